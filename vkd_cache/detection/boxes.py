"""Boxes as torch tensors: two formats and how much two boxes overlap.

A newcomer's trap: the functions broadcast and do not pair up. Give (n, 1, 4) and (1, m, 4) for every pair, (n, 4) and
(n, 4) for the n pairs. Boxes without area are legal everywhere and never give a NaN, neither forward nor backward.
"""

import torch
from torch import Tensor

_TINY_AREA = 1e-12  # of normalised boxes; below it two boxes have no overlap to speak of


def xyxy_from_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height -> left, top, right, bottom, in the same unit."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def cxcywh_from_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) left, top, right, bottom -> centre x, centre y, width, height, in the same unit."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes that broadcast against each other.

    Args:
        first, second: (..., 4) xyxy, right >= left and bottom >= top; computed in float32.

    Returns:
        (...) in [0, 1]; 0 where both boxes have no area.
    """
    intersection, union = _areas(first.float(), second.float())
    return intersection / union.clamp_min(_TINY_AREA)


def generalised_box_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU minus the share of the smallest enclosing box that neither box covers.

    Args:
        first, second: (..., 4) xyxy, right >= left and bottom >= top; computed in float32.

    Returns:
        (...) in [-1, 1]; 0 where even the enclosing box has no area (the reference's is not a number there).

    Source: Rezatofighi et al., Generalized Intersection over Union, 2019, algorithm 1.
    """
    first, second = first.float(), second.float()
    intersection, union = _areas(first, second)
    low = torch.minimum(first[..., :2], second[..., :2])
    high = torch.maximum(first[..., 2:], second[..., 2:])
    enclosing = (high - low).prod(-1)
    uncovered = (enclosing - union) / enclosing.clamp_min(_TINY_AREA)
    return intersection / union.clamp_min(_TINY_AREA) - uncovered


def _areas(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    intersection = (high - low).clamp_min(0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (first, second)]
    return intersection, areas[0] + areas[1] - intersection
