"""Detection: views on canvases, boxes, a ViDT student, and tokens of a teacher.

A newcomer's trap: the losses are sums over this rank's images, divided by counts over all ranks (boxes, valid tokens).
So they call collectives, every rank calls them equally often, and no rank's batch is weighted by its own size.

Shape legend: b images of a batch, m boxes of an image, T valid tokens of all images.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vkd_cache.config import Config
from vkd_cache.detection.canvas import CanvasBatch, DetectorOutput, compile_by_canvas
from vkd_cache.detection.criterion import BoxTargets, DetectionCriterion
from vkd_cache.detection.distillation import detection_feature_loss
from vkd_cache.errors import ConfigError
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import Source, is_detection
from vkd_cache.stages.coco_accuracy import ap_of
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.supply import TeacherOutput
from vkd_cache.stages.transfer import canvas_batch
from vkd_cache.students.detector import DetectionStudent, create_detector
from vkd_cache.tokens import Tokens

Outputs = tuple[DetectorOutput, dict[str, Tensor]]
_METRICS = ("ap", "ap50", "ap75")  # of the twelve, those that a run writes down


class DetectionTask:
    """VkD's detection student: the losses of a detector, and that of its tokens."""

    terms: tuple[str, ...] = ("total", "class", "box", "giou", "iou", "token_label", "feature")
    metric = "ap"
    joint = True

    def __init__(
        self,
        config: Config,
        *,
        num_classes: int,
        distilled: Sequence[str],
        teacher_width: int | None,
        device: torch.device,
    ) -> None:
        """`distilled`: the teacher's nodes; none, and no width, without a feature loss."""
        self._config = config
        self._num_classes = num_classes
        self._distilled = tuple(distilled)
        self._teacher_width = teacher_width
        self._device = device
        self._criterion = DetectionCriterion()

    def create_student(self) -> DetectionStudent:
        """Detector and projectors by the configured name."""
        student = self._config.student
        return create_detector(
            student.name,
            self._num_classes,
            nodes=self._distilled,
            teacher_width=self._teacher_width,
            projector=self._config.loss.projector,
            drop_path=student.drop_path,
            cross_scale_fusion=student.cross_scale_fusion,
            iou_aware=student.iou_aware,
            token_label=student.token_label,
        )

    def compiled(self, student: nn.Module) -> nn.Module:
        """The detector alone: how many canvases a batch has differs from batch to batch."""
        compile_by_canvas(student.get_submodule("net"))
        return student

    def images(self, batch: FedBatch, pixels: Tensor) -> CanvasBatch:
        """The views on their canvases."""
        return canvas_batch(batch.rendered, pixels)

    def idle_images(self, pixels: Tensor) -> CanvasBatch:
        """Two black images of the smallest canvas."""
        side = self._config.views.canvas_multiple_px
        sizes = np.full((2, 2), side, np.int64)
        return CanvasBatch(images=pixels.new_zeros(2, 3, side, side).float(), view_size=sizes, canvas=sizes)

    def outputs(self, model: nn.Module, images: CanvasBatch) -> Outputs:
        """Predictions and projected tokens."""
        outputs: Outputs = model(images)
        return outputs

    def losses(self, outputs: Outputs, batch: FedBatch, teacher: TeacherOutput) -> dict[str, Tensor]:
        """The detector's weighted losses and `feature`, those that are on, and `total`."""
        return self._terms(outputs, self.targets(batch), teacher.nodes)

    def idle_loss(self, outputs: Outputs) -> Tensor:
        """The same collectives, forward and backward, as the other ranks' losses, with nothing of its own."""
        output, projected = outputs
        nothing = {name: _no_tokens(values) for name, values in projected.items()}
        found = self._terms((output, {name: values[:0] for name, values in projected.items()}), _no_boxes(2), nothing)
        return found["total"] * 0.0

    def _terms(
        self, outputs: Outputs, targets: Sequence[BoxTargets], teacher: Mapping[str, Tokens]
    ) -> dict[str, Tensor]:
        output, projected = outputs
        loss = self._config.loss
        terms: dict[str, Tensor] = {}
        total = _attached_zero(output, projected)
        if loss.task_weight > 0:
            terms |= self._criterion(output, targets)
            total = total + loss.task_weight * torch.stack(list(terms.values())).sum()
        if loss.feature_weight > 0:
            terms["feature"] = detection_feature_loss(projected, teacher, kind=loss.feature_loss)
            total = total + loss.feature_weight * terms["feature"]
        return terms | {"total": total}

    def targets(self, batch: FedBatch) -> list[BoxTargets]:
        """What there is to find in each view, on the host."""
        views = batch.rendered.boxes or ()
        return [BoxTargets(torch.from_numpy(view.labels), torch.from_numpy(view.boxes)) for view in views]

    def evaluate(
        self, model: nn.Module, source: Source, split: JobSplit, between: Callable[[], None]
    ) -> dict[str, float]:
        """COCO's AP, at all IoU and at 0.50 and 0.75."""
        if not is_detection(source):
            raise ConfigError(f"{source.location}: has no boxes to evaluate a detector on. Give COCO's layout.")
        result, _ = ap_of(model, source, self._config, self._device, split, between=between)
        return {name: getattr(result, name) for name in _METRICS}


def _attached_zero(output: DetectorOutput, projected: dict[str, Tensor]) -> Tensor:
    """0 as a function of everything the student gives, so that no parameter is without a gradient."""
    parts = [output.logits, output.boxes, *projected.values(), *(output.token_logits or {}).values()]
    if output.ious is not None:
        parts.append(output.ious)
    return torch.stack([part[:0].float().sum() for part in parts]).sum()


def _no_boxes(count: int) -> list[BoxTargets]:
    return [BoxTargets(torch.empty(0, dtype=torch.int64), torch.empty(0, 4)) for _ in range(count)]


def _no_tokens(like: Tensor) -> Tokens:
    """The teacher's tokens (0, C) of no image."""
    nothing = like.detach()[:0].float()
    return Tokens(
        values=nothing, grid=np.zeros((0, 2), np.int64), offsets=np.zeros(1, np.int64), total=nothing, squares=nothing
    )
