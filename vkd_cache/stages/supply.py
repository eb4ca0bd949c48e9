"""What the student learns from, besides labels: teacher features and logits, from a cache or from a live teacher.

Both supplies answer the same question for the same batch, which is what makes `compare` possible. Only the live one
ever builds a teacher; the module that does is imported when a live supply is made, not before.

Shape legend: b samples, C teacher width, K classes.
"""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from vkd_cache.cache.reader import Cache
from vkd_cache.config import Config, LossConfig
from vkd_cache.errors import CacheMismatchError, ConfigError, CorruptCacheError
from vkd_cache.normalisation import Whitening, whitening_statistics
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stored_rows import StoredRows
from vkd_cache.tokens import Tokens


class TeacherOutput(NamedTuple):
    """What a teacher says of a batch, on the student's device.

    Attributes:
        features: (b, C) float32 pooled, where they are used.
        logits: (b, K) float32, where they are used.
        nodes: tokens by node, of a detector.
    """

    features: Tensor | None = None
    logits: Tensor | None = None
    nodes: Mapping[str, Tokens] = types.MappingProxyType({})


class Supply(Protocol):
    """Where teacher outputs come from.

    Attributes:
        nodes: stored nodes that a feed has to join.
        width: C, None where features are not used.
        num_classes: K, None where logits are not used.
        distilled: nodes whose tokens a detector's student is compared with.
        identity: which teacher it is, JSON values, where it is live; None otherwise.
        numerics: how a live one is run.
    """

    nodes: tuple[str, ...]
    width: int | None
    num_classes: int | None
    distilled: tuple[str, ...]
    identity: dict[str, Any] | None
    numerics: dict[str, Any]

    def __call__(self, batch: FedBatch, images: Any) -> TeacherOutput:
        """The teacher's outputs for the task's images in [0, 1], mixed, on the device."""
        ...


def nodes_on_device(batch: FedBatch, device: torch.device) -> tuple[FedBatch, list[Tensor]]:
    """The batch with what its cache holds on its way to `device`, and the tensors that are on it."""
    nodes = {name: values.to(device) for name, values in batch.nodes.items()}
    return dataclasses.replace(batch, nodes=nodes), [part for values in nodes.values() for part in values.tensors()]


class NoTeacher:
    """Training without distillation."""

    nodes: tuple[str, ...] = ()
    width: int | None = None
    num_classes: int | None = None
    distilled: tuple[str, ...] = ()
    identity: dict[str, Any] | None = None

    def __init__(self) -> None:
        self.numerics: dict[str, Any] = {}

    def __call__(self, batch: FedBatch, images: Any) -> TeacherOutput:
        """Nothing."""
        return TeacherOutput()


class CachedTeacher:
    """Stored features; logits as they are stored, or from the stored head."""

    distilled: tuple[str, ...] = ()
    identity: dict[str, Any] | None = None

    def __init__(self, cache: Cache, loss: LossConfig, device: torch.device) -> None:
        self.numerics: dict[str, Any] = {}
        specs = {node.name: node for node in cache.manifest.nodes if node.layout == node.name}  # vectors of their kind
        self._device = device
        self._features_used = loss.feature_weight > 0
        logits_used, logits_stored = loss.logit_weight > 0, "logits" in specs
        head = cache.head() if logits_used and not logits_stored else None
        wanted = ["pooled"] if self._features_used or head is not None else []
        if logits_used and head is None:
            wanted.append("logits")
        missing = [name for name in wanted if name not in specs]
        if missing:
            raise CacheMismatchError(
                f"{cache.url}: holds the nodes {', '.join(specs)}{'' if cache.manifest.head else ' and no head'}; the "
                f"losses that are on need {' and '.join(missing)}. Extract a cache with [cache] nodes = "
                '["pooled", "logits"], or set [loss] feature_weight or logit_weight to 0.'
            )
        self._head = (head[0].to(device), head[1].to(device)) if head is not None else None
        self.nodes = tuple(wanted)
        self.width = specs["pooled"].shape[0] if self._features_used else None
        self.num_classes = None
        if logits_used:
            self.num_classes = len(head[1]) if head is not None else specs["logits"].shape[0]

    def __call__(self, batch: FedBatch, images: Tensor) -> TeacherOutput:
        """What the cache holds for the batch's views."""
        values = {
            name: stored.to(self._device).dense().float()
            for name, stored in batch.nodes.items()
            if isinstance(stored, StoredRows)
        }
        features, logits = values.get("pooled"), values.get("logits")
        if features is not None and self._head is not None:
            logits = functional.linear(features, *self._head)
        return TeacherOutput(features if self._features_used else None, logits)


def check_teacher_named(config: Config) -> None:
    """Refuse to run a live teacher that nothing names.

    Raises:
        ConfigError: [teacher] name is empty.
    """
    if not config.teacher.name:
        raise ConfigError("[teacher] name is empty: --live-teacher needs --teacher, or a pipeline file with one.")


class LiveTeacher:
    """The teacher in memory, run on the very images the student sees."""

    nodes: tuple[str, ...] = ()
    distilled: tuple[str, ...] = ()

    def __init__(self, config: Config, num_classes: int, view_px: int, device: torch.device) -> None:
        check_teacher_named(config)
        from vkd_cache.stages.batch_size import beside_a_student
        from vkd_cache.stages.teaching import start_teacher
        from vkd_cache.teachers import load_classifier

        self._logits_used = config.loss.logit_weight > 0
        nodes = ("pooled", "logits") if self._logits_used else ("pooled",)
        teacher = load_classifier(config.teacher, nodes=nodes, num_classes=num_classes, view_px=view_px)
        self._run = start_teacher(teacher, beside_a_student(config), device)
        self._batch_size = self._run.batch_size
        self._features_used = config.loss.feature_weight > 0
        self.identity: dict[str, Any] | None = teacher.identity
        self.numerics = self._run.numerics()
        self.width: int | None = teacher.identity["width"] if self._features_used else None
        self.num_classes: int | None = teacher.identity["num_classes"]

    def __call__(self, batch: FedBatch, images: Tensor) -> TeacherOutput:
        """Run the teacher in batches of the size that extraction uses, so that its kernels are the same."""
        parts = [self._run(part) for part in torch.split(images, self._batch_size)]
        return TeacherOutput(
            _joined(parts, "pooled") if self._features_used else None,
            _joined(parts, "logits") if self._logits_used else None,
        )


def _joined(parts: Sequence[dict[str, Tensor]], node: str) -> Tensor:
    # clone: tensors made in inference mode cannot take part in autograd
    return torch.cat([part[node] for part in parts]).float().clone()


WHITENING_SAMPLES_PER_CHANNEL = 4  # a covariance of C channels from fewer samples than C has empty directions


def whitening_of_cache(cache: Cache, view: int) -> Whitening:
    """Statistics of the teacher's pooled features, from the first units of a view: enough, not all.

    Raises:
        CacheMismatchError: the cache does not hold pooled features.
        CorruptCacheError: they are not finite.
    """
    spec = next((node for node in cache.manifest.nodes if node.name == "pooled"), None)
    if spec is None:
        raise CacheMismatchError(
            f"{cache.url}: [loss] normalisation = whiten needs the node pooled, found "
            f"{', '.join(node.name for node in cache.manifest.nodes)}. Extract a cache with pooled features."
        )
    parts: list[Tensor] = []
    for shard in sorted(cache.published_shards(view)):
        values = cache.read(shard, view).node("pooled").float()
        if not bool(values.isfinite().all()):
            raise CorruptCacheError(
                f"{cache.url}: node 'pooled' of shard {shard}, view {view} is not finite, and [loss] normalisation = "
                "whiten takes its statistics from it. Run vkd-cache verify, and extract such units again."
            )
        parts.append(values)
        if sum(map(len, parts)) >= WHITENING_SAMPLES_PER_CHANNEL * spec.shape[0]:
            break
    return whitening_statistics(torch.cat(parts))
