"""The assignment of predictions to boxes that costs least (Hungarian method), for every image and layer.

A newcomer would match layer by layer and wait for the GPU each time. Here the costs of all layers are computed
together and cross to the host once.

Shape legend: L layers, b images, Q queries, K classes, m boxes of an image (M: of the image with most).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vkd_cache.detection.boxes import generalised_box_iou, xyxy_from_cxcywh
from vkd_cache.detection.focal import focal_costs
from vkd_cache.tokens import to_device

CLASS_COST, BOX_COST, GIOU_COST = 2.0, 5.0, 2.0
_HOPELESS = 1e6  # what a cost that is not a number counts, so that the loss, not the matcher, shows that a run diverged


class BoxTargets(NamedTuple):
    """Boxes of one image: labels (m,) int64 in [0, K); boxes (m, 4) float32 cxcywh, each relative to the content."""

    labels: Tensor
    boxes: Tensor


Match = tuple[Tensor, Tensor]  # queries (k,) int64 ascending, boxes (k,) int64; k = min(Q, m)


def match(logits: Tensor, boxes: Tensor, targets: Sequence[BoxTargets]) -> list[Match]:
    """The cheapest one-to-one assignment of each image's predictions to its boxes.

    The cost of a pair is 2 * focal class cost + 5 * L1 distance - 2 * generalised IoU; the sum over the assigned pairs
    is the smallest possible.

    Args:
        logits: (b, Q, K).
        boxes: (b, Q, 4) cxcywh in [0, 1].
        targets: b of them; an image without boxes is matched to nothing.

    Returns:
        Per image the queries, ascending, and the boxes they are assigned to, on the CPU.

    Source: DETR (arXiv 2005.12872), equation 1, with the focal cost and weights of Deformable DETR as in the reference.
    """
    return match_layers(logits[None], boxes[None], targets)[0]


def match_layers(logits: Tensor, boxes: Tensor, targets: Sequence[BoxTargets]) -> list[list[Match]]:
    """`match` for every layer: logits (L, b, Q, K), boxes (L, b, Q, 4) -> L lists of b matches."""
    sizes = [len(target.labels) for target in targets]
    costs = pair_costs(logits, boxes, *padded_targets(targets, logits.device)).cpu().numpy()
    return [[_assign(cost[:, :size]) for cost, size in zip(layer, sizes, strict=True)] for layer in costs]


def padded_targets(targets: Sequence[BoxTargets], device: torch.device) -> tuple[Tensor, Tensor]:
    """Labels (b, M) int64 and boxes (b, M, 4) float32 on `device`; what pads them is legal and means nothing."""
    labels = pad_sequence([target.labels.long() for target in targets], batch_first=True)
    boxes = pad_sequence([target.boxes.float().reshape(-1, 4) for target in targets], batch_first=True)
    return to_device(labels, device), to_device(boxes, device)


@torch.no_grad()
def pair_costs(logits: Tensor, boxes: Tensor, target_labels: Tensor, target_boxes: Tensor) -> Tensor:
    """The cost (L, b, Q, M) of every pair of a prediction and a box of the same image, in float32 and finite.

    Args:
        logits: (L, b, Q, K).
        boxes: (L, b, Q, 4) cxcywh.
        target_labels: (b, M); target_boxes: (b, M, 4) cxcywh.
    """
    with torch.autocast(logits.device.type, enabled=False):
        num_layers, _, num_queries, _ = logits.shape
        # class costs of the targets' classes alone: (L, b, Q, M)
        chosen = target_labels[None, :, None, :].expand(num_layers, -1, num_queries, -1)
        class_cost = focal_costs(logits.float().gather(-1, chosen))
        predicted, wanted = boxes.float().unsqueeze(-2), target_boxes[None, :, None]
        distance = (predicted - wanted).abs().sum(-1)
        overlap = generalised_box_iou(xyxy_from_cxcywh(predicted), xyxy_from_cxcywh(wanted))
        cost = BOX_COST * distance + CLASS_COST * class_cost - GIOU_COST * overlap
        return cost.nan_to_num(_HOPELESS, _HOPELESS, _HOPELESS)


def _assign(cost: np.ndarray) -> Match:
    queries, boxes = linear_sum_assignment(cost)
    return torch.from_numpy(queries.astype(np.int64)), torch.from_numpy(boxes.astype(np.int64))
