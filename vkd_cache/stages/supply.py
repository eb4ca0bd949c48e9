"""What the student learns from, besides labels: teacher features and logits, from a cache or from a live teacher.

Both supplies answer the same question for the same batch, which is what makes `compare` possible. Only the live one
ever builds a teacher; the module that does is imported when a live supply is made, not before.

Shape legend: b samples, C teacher width, K classes.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from vkd_cache.cache.reader import Cache
from vkd_cache.config import Config, LossConfig
from vkd_cache.errors import CacheMismatchError, ConfigError
from vkd_cache.stages.feed import FedBatch


class TeacherOutput(NamedTuple):
    """features (b, C) or None; logits (b, K) or None; float32 on the student's device."""

    features: Tensor | None
    logits: Tensor | None


class Supply(Protocol):
    """Where teacher outputs come from. `nodes` is what a feed has to join; `width` is C."""

    nodes: tuple[str, ...]
    width: int | None

    def __call__(self, batch: FedBatch, images: Tensor) -> TeacherOutput:
        """The teacher's outputs for `images` (b, 3, H, W) in [0, 1], mixed, on the device."""
        ...


class NoTeacher:
    """Training without distillation."""

    nodes: tuple[str, ...] = ()
    width: int | None = None

    def __call__(self, batch: FedBatch, images: Tensor) -> TeacherOutput:
        """Nothing."""
        return TeacherOutput(None, None)


class CachedTeacher:
    """Stored features; logits from the stored head, or stored themselves."""

    def __init__(self, cache: Cache, loss: LossConfig, device: torch.device) -> None:
        specs = {node.name: node for node in cache.manifest.nodes}
        self._device = device
        self._head = cache.head()
        self._stored_logits = loss.logit_weight > 0 and "logits" in specs
        wanted = []
        if loss.feature_weight > 0 or (loss.logit_weight > 0 and not self._stored_logits):
            wanted.append("pooled")
        if self._stored_logits:
            wanted.append("logits")
        missing = [name for name in wanted if name not in specs]
        if missing or (loss.logit_weight > 0 and not self._stored_logits and self._head is None):
            raise CacheMismatchError(
                f"{cache.url}: holds the nodes {', '.join(specs)}{'' if self._head else ' and no teacher head'}; the "
                f"losses that are on need {' and '.join(missing or ['logits'])}. Extract with [cache] nodes = "
                '["pooled", "logits"], or set [loss] feature_weight or logit_weight to 0.'
            )
        if self._head is not None:
            self._head = (self._head[0].to(device), self._head[1].to(device))
        self.nodes = tuple(wanted)
        self._features_used = loss.feature_weight > 0
        self.width = specs["pooled"].shape[0] if self._features_used else None

    def __call__(self, batch: FedBatch, images: Tensor) -> TeacherOutput:
        """What the cache holds for the batch's views."""
        values = {name: tensor.to(self._device, non_blocking=True).float() for name, tensor in batch.nodes.items()}
        features, logits = values.get("pooled"), values.get("logits")
        if logits is None and features is not None and self._head is not None:
            logits = functional.linear(features, *self._head)
        return TeacherOutput(features if self._features_used else None, logits)


class LiveTeacher:
    """The teacher in memory, run on the very images the student sees."""

    nodes: tuple[str, ...] = ()

    def __init__(self, config: Config, num_classes: int, view_px: int, device: torch.device) -> None:
        if not config.teacher.name:
            raise ConfigError("[teacher] name is empty: --live-teacher needs --teacher, or a pipeline file with one.")
        from vkd_cache.stages.teaching import start_teacher
        from vkd_cache.teachers import load_teacher

        teacher = load_teacher(
            config.teacher, nodes=("pooled", "logits"), num_classes=num_classes, view_px=view_px
        )
        self._run = start_teacher(teacher, config.extract, device)
        self._batch_size = config.extract.batch_size
        self._features_used = config.loss.feature_weight > 0
        self.identity = teacher.identity
        self.width: int | None = teacher.identity["width"] if self._features_used else None

    def __call__(self, batch: FedBatch, images: Tensor) -> TeacherOutput:
        """Run the teacher in batches of the size that extraction uses, so that its kernels are the same."""
        parts = [self._run(part) for part in torch.split(images, self._batch_size)]
        # clone: tensors made in inference mode cannot take part in autograd
        features = torch.cat([part["pooled"] for part in parts]).float().clone()
        logits = torch.cat([part["logits"] for part in parts]).float().clone()
        return TeacherOutput(features if self._features_used else None, logits)
