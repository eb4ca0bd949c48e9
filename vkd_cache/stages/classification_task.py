"""Classification: views that may be mixed, soft labels, pooled features and logits of the teacher.

Shape legend: b samples of a batch, K classes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vkd_cache.config import Config
from vkd_cache.losses import VkdLoss, mix_targets
from vkd_cache.normalisation import Whitening
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import Source
from vkd_cache.stages.accuracy import accuracy_of
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.supply import TeacherOutput
from vkd_cache.stages.transfer import mixed_images
from vkd_cache.students import Student, StudentOutput, create_student
from vkd_cache.tokens import to_device
from vkd_cache.views.blend import normalise


class ClassificationTask:
    """VkD's classification student and its three losses; `create_student` comes before everything else."""

    terms: tuple[str, ...] = ("total", "task", "feature", "logit")
    metric = "top1"
    joint = False
    _mean: Tensor  # of the student, on the device
    _std: Tensor

    def __init__(
        self,
        config: Config,
        *,
        num_classes: int,
        teacher_width: int | None,
        device: torch.device,
        whitening: Whitening | None = None,
    ) -> None:
        """`teacher_width`: of the features, None without a feature loss; `whitening`: for `whiten`, else None."""
        self._config = config
        self._num_classes = num_classes
        self._teacher_width = teacher_width
        self._device = device
        loss = config.loss
        self.loss = VkdLoss(
            task_weight=loss.task_weight,
            feature_weight=loss.feature_weight,
            logit_weight=loss.logit_weight,
            temperature=loss.temperature,
            feature_loss=loss.feature_loss,
            normalisation=loss.normalisation,
            whitening=whitening,
        )

    def create_student(self) -> Student:
        """Network and projector by the configured name."""
        config = self._config
        student = create_student(
            config.student.name,
            self._num_classes,
            self._teacher_width,
            input_px=config.views.size_px,
            drop_path=config.student.drop_path,
            projector=config.loss.projector,
        )
        # made once: a tensor from numbers is a copy that waits for the GPU
        self._mean, self._std = (torch.tensor(values, device=self._device) for values in (student.mean, student.std))
        return student

    def compiled(self, student: nn.Module) -> nn.Module:
        """All of it: views have one size."""
        return torch.compile(student)  # type: ignore[return-value]

    def images(self, batch: FedBatch, pixels: Tensor) -> Tensor:
        """(b, 3, H, W) in [0, 1], coloured and mixed as the batch's plan says."""
        return mixed_images(pixels, batch.rendered.mix, batch.rendered.colour)

    def idle_images(self, pixels: Tensor) -> Tensor:
        """Two, because batch norm needs them."""
        return pixels.new_zeros(2, 3, *pixels.shape[1:3]).float()

    def outputs(self, model: nn.Module, images: Tensor) -> StudentOutput:
        """Logits and projected features of normalised images."""
        output: StudentOutput = model(normalise(images, self._mean, self._std))
        return output

    def losses(self, outputs: StudentOutput, batch: FedBatch, teacher: TeacherOutput) -> dict[str, Tensor]:
        """`task`, `feature` and `logit`, those with a weight, and `total`; means over the batch."""
        return self.loss(outputs, self.targets(batch), teacher.features, teacher.logits)

    def idle_loss(self, outputs: StudentOutput) -> Tensor:
        """Zero times everything."""
        zeros: Any = sum(part.float().sum() for part in outputs if part is not None)
        zero: Tensor = zeros * 0.0
        return zero

    def targets(self, batch: FedBatch) -> Tensor:
        """(b, K) task targets: lambda-weighted, smoothed one-hot labels."""
        label = to_device(batch.rendered.label, self._device)
        mix = batch.rendered.mix
        partner, lam = label, torch.ones(len(label), device=self._device)
        if mix is not None:
            partner = label[to_device(torch.from_numpy(mix.partner.astype("int64")), self._device)]
            lam = to_device(torch.from_numpy(mix.lam), self._device)
        return mix_targets(label, partner, lam, self._num_classes, self._config.loss.smoothing)

    def evaluate(
        self, model: nn.Module, source: Source, split: JobSplit, between: Callable[[], None]
    ) -> dict[str, float]:
        """Top-1 and top-5."""
        result = accuracy_of(model, source, self._config, self._device, split, between=between)
        return {"top1": result.top1, "top5": result.top5}
