"""Predictions as detections in pixels, and as the list of results that COCO's evaluation reads.

A newcomer would take the best class of each query. A query may give several detections, one for each class that is
among the image's best scores: that is the reference's rule, and what its AP was measured with.

Shape legend: b images, Q queries, K classes, k detections of an image.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vkd_cache.detection.boxes import xyxy_from_cxcywh

MAX_DETECTIONS = 100


class Detections(NamedTuple):
    """Detections of one image, best first.

    Attributes:
        scores: (k,) float32 in [0, 1].
        labels: (k,) int64 classes.
        boxes: (k, 4) float32 left, top, right, bottom in pixels; may reach over the image's edge.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor


@torch.no_grad()
def detections(
    logits: Tensor, boxes: Tensor, sizes: Sequence[tuple[int, int]] | npt.NDArray[np.integer]
) -> list[Detections]:
    """The min(100, Q * K) highest class probabilities of each image, each with its query's box.

    Args:
        logits: (b, Q, K) of the last layer.
        boxes: (b, Q, 4) cxcywh, relative to the image.
        sizes: (b, 2) (width, height) in pixels of what the boxes shall be in: the source image's.

    Returns:
        Per image, on the device of `logits`.
    """
    num_classes = logits.shape[-1]
    scores, places = logits.float().sigmoid().flatten(1).topk(min(MAX_DETECTIONS, logits[0].numel()), dim=1)
    chosen = (places // num_classes).unsqueeze(-1).expand(-1, -1, 4)
    scale = torch.as_tensor(np.tile(np.asarray(sizes, np.float32), 2), device=boxes.device)
    pixels = xyxy_from_cxcywh(boxes.float()).gather(1, chosen) * scale[:, None]
    return [Detections(*image) for image in zip(scores, places % num_classes, pixels, strict=True)]


def to_coco(found: Sequence[Detections], image_ids: Sequence[int]) -> list[dict[str, Any]]:
    """COCO's result format: one dict for each detection, with `image_id`, `category_id`, `bbox` (x, y, width, height in
    pixels) and `score`; category ids are the classes' numbers.
    """
    results = []
    for image, image_id in zip(found, image_ids, strict=True):
        corners = image.boxes.cpu()
        bboxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
        rows = zip(image.labels.tolist(), bboxes, image.scores.tolist(), strict=True)
        results += [
            {"image_id": int(image_id), "category_id": label, "bbox": bbox, "score": score}
            for label, bbox, score in rows
        ]
    return results
