"""Boxes of a detection view: from source pixels to the view, exactly as the params say.

A newcomer's trap: boxes go in as corners (x0, y0, x1, y1) in source pixels and come out as (centre x, centre y, width,
height) in shares of the view's *content*, not of its canvas.

Shape legend: m boxes of an image, k of them in the view.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vkd_cache.views.params import ViewParams

Boxes = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


class ViewBoxes(NamedTuple):
    """What a detector should find in one view.

    Attributes:
        boxes: (k, 4) float32 (centre x, centre y, width, height) in shares of the view's width and height.
        labels: (k,) int64 category ids.
        image_id: of the data set's image.
    """

    boxes: Boxes
    labels: Labels
    image_id: int


def boxes_in_view(boxes: Boxes, labels: Labels, params: ViewParams) -> tuple[Boxes, Labels]:
    """The boxes of a view, as a detector predicts them.

    Args:
        boxes: (m, 4) float32 corners (x0, y0, x1, y1) in source pixels.
        labels: (m,) of the boxes.
        params: of a detection view.

    Returns:
        (k, 4) float32 (centre x, centre y, width, height) in [0, 1] up to rounding, and their labels; boxes without
        area in the crop are gone.
    """
    corners, kept = corners_in_view(boxes, params)
    first, last = corners[:, :2], corners[:, 2:]
    height, width = params.view_size
    shares = np.concatenate([(first + last) / 2, last - first], axis=1) / np.array([width, height] * 2, np.float32)
    return shares.astype(np.float32), labels[kept]


def corners_in_view(boxes: Boxes, params: ViewParams) -> tuple[Boxes, npt.NDArray[np.bool_]]:
    """The boxes of a view in its own pixels.

    Source: the reference's crop (clip, drop what has no area left), flip and resize of boxes, in its order of rounding
    (float32, one ratio per axis). It asks no least area of what is left of a box, and nor does this.

    Args:
        boxes: (m, 4) float32 corners (x0, y0, x1, y1) in source pixels.
        params: of a detection view.

    Returns:
        (k, 4) float32 corners in pixels of the view, and (m,) which boxes these are.
    """
    top, left, height, width = params.crop
    moved = boxes.reshape(-1, 4) - np.array([left, top] * 2, np.float32)
    moved = np.clip(moved, np.float32(0.0), np.array([width, height] * 2, np.float32))
    kept = np.all(moved[:, 2:] > moved[:, :2], axis=1)
    moved = moved[kept]
    if params.flip:
        moved = moved[:, [2, 1, 0, 3]] * np.array([-1, 1, -1, 1], np.float32)
        moved += np.array([width, 0, width, 0], np.float32)
    ratios = np.array([params.view_size[1] / width, params.view_size[0] / height] * 2, np.float32)
    return moved * ratios, kept
