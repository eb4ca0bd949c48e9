"""The detector's own losses: class, box and overlap of the matched predictions, for every layer's prediction.

A newcomer would average over the boxes of one process. The divisor is the number of boxes per process of the whole
job: the mean of the gradients over processes, which is what DDP forms, is then that of one process with all images.
So a caller multiplies these losses by no batch share of its own.

Shape legend: L+1 layers, b images, Q queries, K classes, m boxes of an image (M: of the image with most), P matched
pairs of all layers and images, T valid tokens of all images.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from vkd_cache.detection.boxes import box_iou, generalised_box_iou, xyxy_from_cxcywh
from vkd_cache.detection.focal import focal_losses
from vkd_cache.detection.matcher import BoxTargets, match_layers, padded_targets
from vkd_cache.detection.moments import num_processes, sum_over_processes
from vkd_cache.detection.token_labels import token_label_losses
from vkd_cache.errors import ConfigError
from vkd_cache.tokens import to_device

if TYPE_CHECKING:
    from vkd_cache.detection.canvas import DetectorOutput

__all__ = ["BoxTargets", "DetectionCriterion"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionCriterion:
    """The weighted sums over all layers of each of a detector's losses.

    Attributes:
        class_weight, box_weight, giou_weight: of the focal, L1 and generalised-IoU losses.
        iou_weight, token_weight: of the losses of the two optional heads.

    Source: ViDT (arXiv 2110.03921), section 3, and the reference's weights. Deviations: token labels are made from
    boxes, not from instance masks, which a source need not have; only valid tokens count; and the overlap that the
    `iou` head predicts is a constant to it (the reference lets its gradient into the boxes).
    """

    class_weight: float = 2.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    iou_weight: float = 2.0
    token_weight: float = 2.0

    def __call__(self, output: "DetectorOutput", targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        """The weighted losses, in float32 whatever autocast says.

        In a job of several processes every one of them has to call it, each with its own images.

        Args:
            output: of b images.
            targets: b of them, on the CPU or the device of `output`.

        Returns:
            Scalars `class`, `box` and `giou`, `iou` and `token_label` where the model has those heads; finite, and
            with a gradient to every prediction, when there is no box at all.

        Raises:
            ConfigError: another number of targets than images, or a label that is no class of the model.
        """
        weights = {"class": self.class_weight, "box": self.box_weight, "giou": self.giou_weight, "iou": self.iou_weight}
        num_boxes = _boxes_per_process(targets, output.logits.device)
        terms = {name: weights[name] * each.sum() for name, each in self._layers(output, targets, num_boxes).items()}
        if output.token_logits is not None:
            grids = {name: output.grids[name] for name in output.token_logits}
            labelled = token_label_losses(output.token_logits, grids, targets, num_boxes)
            terms["token_label"] = self.token_weight * (labelled["focal"] + labelled["dice"])
        return terms

    def per_layer(self, output: "DetectorOutput", targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        """The unweighted losses (L+1,) of each layer's prediction: `class`, `box`, `giou` and maybe `iou`."""
        return self._layers(output, targets, _boxes_per_process(targets, output.logits.device))

    def _layers(self, output: "DetectorOutput", targets: Sequence[BoxTargets], num_boxes: Tensor) -> dict[str, Tensor]:
        _check(output, targets)
        device = output.logits.device
        with torch.autocast(device.type, enabled=False):
            logits, boxes = output.logits.float(), output.boxes.float()
            labels, wanted = padded_targets(targets, device)
            layer, image, query, target = to_device(_pairs(logits.detach(), boxes.detach(), targets), device)
            present = torch.zeros_like(logits)
            present[layer, image, query, labels[image, target]] = 1.0
            found, true = xyxy_from_cxcywh(boxes[layer, image, query]), xyxy_from_cxcywh(wanted[image, target])
            distance = (boxes[layer, image, query] - wanted[image, target]).abs().sum(-1)
            pairs = {"box": distance, "giou": 1 - generalised_box_iou(found, true)}
            if output.ious is not None:
                overlap = box_iou(found, true).detach()
                confidence = output.ious.float()[layer, image, query, 0]
                pairs["iou"] = F.binary_cross_entropy_with_logits(confidence, overlap, reduction="none")
            sums = {"class": focal_losses(logits, present).sum((1, 2, 3))}
            for name, each in pairs.items():
                sums[name] = each.new_zeros(len(logits)).index_add(0, layer, each)
            return {name: each / num_boxes for name, each in sums.items()}


def _pairs(logits: Tensor, boxes: Tensor, targets: Sequence[BoxTargets]) -> Tensor:
    """Layer, image, query and box of every matched pair: (4, P) int64, on the CPU."""
    columns = [torch.empty((4, 0), dtype=torch.int64)]
    for layer, matches in enumerate(match_layers(logits, boxes, targets)):
        for image, (queries, chosen) in enumerate(matches):
            place = [torch.full_like(queries, layer), torch.full_like(queries, image)]
            columns.append(torch.stack([*place, queries, chosen]))
    return torch.cat(columns, dim=1)


def _boxes_per_process(targets: Sequence[BoxTargets], device: torch.device) -> Tensor:
    """Boxes of all processes of the job divided by their number, at least 1; a scalar on `device`."""
    count = torch.tensor(float(sum(len(target.labels) for target in targets)))
    return (sum_over_processes(to_device(count, device)) / num_processes()).clamp_min(1)


def _check(output: "DetectorOutput", targets: Sequence[BoxTargets]) -> None:
    num_images, num_classes = output.logits.shape[1], output.logits.shape[-1]
    if len(targets) != num_images:
        raise ConfigError(f"detection loss: found boxes of {len(targets)} images, predictions for {num_images}.")
    for labels in (target.labels for target in targets):
        # elsewhere than on the CPU looking at the labels would stall
        if labels.is_cpu and bool(((labels < 0) | (labels >= num_classes)).any()):
            raise ConfigError(
                f"detection loss: found labels {sorted(set(labels.tolist()))}, expected 0..{num_classes - 1}. "
                "Give the student as many classes as the source has."
            )
