"""timm's own online feature distillation, stepping on our batches: a further kind of `step.py`.

A newcomer's trap: its student has to speak timm's protocol whole, `forward_head(features, pre_logits=True)` included,
and has one head. Ours does through `OneHead`: the same parameters, the mean of both heads as logits, the mean over
patch tokens as features.
"""

from collections.abc import Sequence
from typing import Any

import safetensors.torch
import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.task.distillation import DistillationTeacher, FeatureDistillationTask
from torch import Tensor, nn

from vkd_cache.config import Config
from vkd_cache.optim import parameter_groups
from vkd_cache.stages.classification_task import ClassificationTask
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.learner import AMP_DTYPES, Learner
from vkd_cache.stages.supply import Supply
from vkd_cache.students.deit import DistilledVisionTransformer
from vkd_cache.views.blend import normalise


class OneHead(nn.Module):
    """One of VkD's students as timm's tasks want it."""

    def __init__(self, net: DistilledVisionTransformer, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        self.num_features, self.num_classes, self.in_chans = net.num_features, net.num_classes, 3
        self.pretrained_cfg = {"mean": tuple(mean), "std": tuple(std)}

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Tokens (B, T, C)."""
        return self.net.forward_features(pixels)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K), or features (B, C)."""
        if pre_logits:
            return tokens[:, self.net.num_prefix_tokens :].mean(1)
        first, second = self.net.head(tokens[:, 0]), self.net.head_dist(tokens[:, 1])
        return 0.5 * (first + second)


class TimmLearner:
    """Steps as `Learner.step` does, with timm's task in place of our losses, supply and projector.

    Mixing, targets, optimizer, autocast and scaler are ours, the same as of every other kind.
    """

    def __init__(self, config: Config, learner: Learner, device: torch.device) -> None:
        """`learner`: of the same configuration without distillation; its network becomes timm's student."""
        if not isinstance(learner.task, ClassificationTask):
            raise TypeError("timm distils classifiers")
        self._task, self._learner = learner.task, learner
        net: Any = learner.student.net
        if isinstance(net, DistilledVisionTransformer):
            net = OneHead(net, learner.student.mean, learner.student.std)
        teacher = timm.create_model(config.teacher.name, num_classes=net.num_classes)
        teacher.load_state_dict(safetensors.torch.load_file(config.teacher.weights))
        if config.extract.channels_last:
            teacher = teacher.to(memory_format=torch.channels_last)
        made = FeatureDistillationTask(
            net, DistillationTeacher(teacher.to(device).requires_grad_(False), device=device),
            criterion=SoftTargetCrossEntropy(), distill_loss_weight=1.0, device=device, verbose=False,
        )  # fmt: skip
        self._timm = made.to(device).train()
        numbers = (learner.student.mean, learner.student.std)
        self._mean, self._std = (torch.tensor(values, device=device) for values in numbers)
        self._dtype = AMP_DTYPES[config.train.amp]
        self._device = device
        train = config.train
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self._timm.trainable_module, train.weight_decay), lr=train.lr, fused=True
        )

    def step(
        self, batches: Sequence[tuple[FedBatch, Tensor]], supply: Supply, lr: float, seed: int
    ) -> dict[str, Tensor]:
        """One optimizer step over one batch; `supply` has nothing to give."""
        torch.manual_seed(seed)
        ((batch, pixels),) = batches
        images = normalise(self._task.images(batch, pixels), self._mean, self._std)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            found = self._timm(images, self._task.targets(batch))
        scaler = self._learner.scaler
        scaler.scale(found["loss"]).backward()
        scaler.step(self._optimizer)
        scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return {"total": found["loss"].detach()}
