"""How a batch of detection views lies in memory: sizes, canvases, and the boxes of every view.

A newcomer would pad a batch to its largest image. Here every view has its own canvas, known from the plan before any
image is read; the array is as large as the batch's largest canvas only because an array must have one size.

Shape legend: b samples of a batch.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vkd_cache.errors import ConfigError
from vkd_cache.sources import CocoSource, Source, is_detection
from vkd_cache.views.boxes import ViewBoxes, boxes_in_view
from vkd_cache.views.params import ViewParams
from vkd_cache.views.recipe import RECIPES, Recipe
from vkd_cache.views.sizes import canvas_of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ViewLayout:
    """Where the views of one batch lie.

    Attributes:
        view_size: (b, 2) int64 (height, width) of each view, pixels.
        canvas: (b, 2) int64 (height, width) of its canvas, pixels.
        boxes: b views' boxes.
    """

    view_size: npt.NDArray[np.int64]
    canvas: npt.NDArray[np.int64]
    boxes: list[ViewBoxes]

    @property
    def frame(self) -> tuple[int, int]:
        """(height, width) that has room for every canvas."""
        height, width = self.canvas.max(axis=0, initial=0).tolist()
        return height, width


def detection_source(source: Source, recipe: Recipe) -> CocoSource | None:
    """`source` if it has boxes, else None.

    Raises:
        ConfigError: the recipe is for the other kind of data.
    """
    names = [name for name, preset in RECIPES.items() if (preset.detection is not None) == is_detection(source)]
    if is_detection(source) != (recipe.detection is not None):
        data = "boxes" if is_detection(source) else "classes, not boxes"
        raise ConfigError(
            f"{source.location}: its samples are annotated with {data}; found the view recipe '{recipe.name}', "
            f"expected one for such data. Set [views] recipe to one of {', '.join(names)}."
        )
    return source if is_detection(source) else None


def layout_of(
    source: CocoSource,
    recipe: Recipe,
    shard: npt.NDArray[np.int64],
    row: npt.NDArray[np.int64],
    params: Sequence[ViewParams],
) -> ViewLayout:
    """The layout of the samples (`shard`, `row`), b each, in the views `params`."""
    multiple_px = recipe.detection.canvas_multiple_px if recipe.detection is not None else 1
    boxes = []
    for number, position, view in zip(shard.tolist(), row.tolist(), params, strict=True):
        annotation = source.boxes(number, position)
        boxes.append(ViewBoxes(*boxes_in_view(annotation.boxes, annotation.labels, view), annotation.image_id))
    return ViewLayout(
        view_size=np.array([view.view_size for view in params], np.int64).reshape(-1, 2),
        canvas=np.array([canvas_of(view.view_size, multiple_px) for view in params], np.int64).reshape(-1, 2),
        boxes=boxes,
    )
