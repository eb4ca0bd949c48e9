"""Rendering without Pillow, for the recipes with simplejpeg: arrays, and torch's antialiased 8-bit resize.

A newcomer's trap: these are other pixels than the reference recipe's. The kernel has the same shape, but its weights
are rounded otherwise, and colour is computed otherwise (`vkd_cache.views.colour`). The fingerprint says which it was.

Shape legend: H/W height and width of a view, h/w of the source image.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

from vkd_cache.views.colour import apply_to_pixels
from vkd_cache.views.params import ViewParams
from vkd_cache.views.recipe import Recipe

Pixels = npt.NDArray[np.uint8]


def render_fast(image: Pixels, params: ViewParams, recipe: Recipe) -> Pixels:
    """The 8-bit pixels of one view; grey and jitter are not among them: see `colour_map`.

    Args:
        image: (h, w, 3), C order, decoded; only the crop is read.
        params: of the view.
        recipe: a fast one.

    Returns:
        (H, W, 3), C order, writable.
    """
    top, left, height, width = params.crop
    size = params.view_size if recipe.detection is not None else (recipe.size_px, recipe.size_px)
    crop = torch.from_numpy(image[top : top + height, left : left + width])
    resized = interpolate(crop[None].permute(0, 3, 1, 2), size, mode=recipe.interpolation, antialias=True)
    view = resized[0].permute(1, 2, 0)
    if params.flip:
        view = view.flip(1)
    return apply_to_pixels(view.contiguous().numpy(), params.ops)
