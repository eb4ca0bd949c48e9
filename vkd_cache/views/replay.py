"""Whether stored view params can be rendered at all: they come from a file that anyone may have written.

A newcomer's trap: this says nothing about whether the plan draws them (`verify --pixels` does). It keeps a few bytes
from asking for a crop, a view or an erased box as large as the memory, or for an operation that there is not.

Shape legend: n rows of a unit, K operations of the recipe.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vkd_cache.views.colour import LINEAR
from vkd_cache.views.decode import MAX_IMAGE_PIXELS
from vkd_cache.views.ops import GAUSSIAN_BLUR, OP_NAMES, POSTERISE, SOLARISE, SOLARISE_ADD
from vkd_cache.views.params import NO_OP, Columns
from vkd_cache.views.recipe import LARGEST_BLUR, Recipe

_Rows = Any  # (n,) bool; NumPy's types lose what comparisons give
_Wide = npt.NDArray[np.int64]

_LARGEST_VALUE = 1024.0  # of any operation: degrees, pixels, factors
_RANGES = {
    SOLARISE: (0.0, 256.0),
    SOLARISE_ADD: (0.0, 256.0),
    POSTERISE: (0.0, 8.0),
    GAUSSIAN_BLUR: (0.0, _LARGEST_VALUE),
}


def replay_problem(columns: Columns, recipe: Recipe) -> str | None:
    """What keeps stored view params from being rendered, in a few words with the first such row; None for nothing.

    Args:
        columns: at least those of `params_to_columns`, n rows, checked for dtype and shape.
        recipe: of the cache.
    """
    for name, check in _CHECKS.items():
        if name in columns:
            good = np.asarray(check(columns, recipe), np.bool_)
            if not good.all():
                row = int(good.argmin())
                return f"{name} of row {row}: found {columns[name][row].tolist()}, which no view of this recipe has"
    return None


def _wide(columns: Columns, name: str) -> _Wide:
    return columns[name].astype(np.int64)


def _good_sizes(columns: Columns, _: Recipe) -> _Rows:
    width, height = _wide(columns, "source_size").T
    # 32 bits each: their product fits into 64
    return (width >= 1) & (height >= 1) & (width.astype(np.float64) * height <= MAX_IMAGE_PIXELS)


def _good_crops(columns: Columns, _: Recipe) -> _Rows:
    top, left, height, width = _wide(columns, "crop").T
    source_width, source_height = _wide(columns, "source_size").T
    return (height >= 1) & (width >= 1) & (top + height <= source_height) & (left + width <= source_width)


def _good_views(columns: Columns, recipe: Recipe) -> _Rows:
    largest = 0
    if recipe.detection is not None:  # the long side of a very long image goes a little beyond its bound
        largest = 2 * max(*recipe.detection.scales, recipe.detection.max_size_px)
    view_size = _wide(columns, "view_size")
    return ((view_size >= 1) & (view_size <= largest)).all(axis=1)


def _good_erasing(columns: Columns, recipe: Recipe) -> _Rows:
    top, left, height, width = _wide(columns, "erase").T
    sides = _wide(columns, "view_size") if "view_size" in columns else np.full((len(top), 2), recipe.size_px, np.int64)
    return (top + height <= sides[:, 0]) & (left + width <= sides[:, 1])


def _good_operations(columns: Columns, recipe: Recipe) -> _Rows:
    op_id, value = columns["op_id"], columns["op_value"].astype(np.float64)
    low, high = np.full(value.shape, -_LARGEST_VALUE), np.full(value.shape, _LARGEST_VALUE)
    for number, (least, most) in _RANGES.items():
        low[op_id == number], high[op_id == number] = least, most
    known = np.isin(op_id, [*OP_NAMES])
    if recipe.colour_kernel == "affine":
        high[op_id == GAUSSIAN_BLUR] = LARGEST_BLUR
        linear = np.isin(op_id, [*LINEAR])
        # one map, at the end, and before it what works on whole numbers
        known = linear | (np.isin(op_id, (SOLARISE, GAUSSIAN_BLUR)) & ~np.logical_or.accumulate(linear, axis=1))
    good = known & (value >= low) & (value <= high)  # nan is neither
    return (good | (op_id == NO_OP)).all(axis=1)


_CHECKS: Mapping[str, Callable[[Columns, Recipe], _Rows]] = {
    "source_size": _good_sizes,
    "crop": _good_crops,
    "view_size": _good_views,
    "erase": _good_erasing,
    "op_id": _good_operations,
}
