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
    crop = image[top : top + height, left : left + width]
    line = crop.strides[0]
    # the strides say that channels come last: torch takes another, slower kernel where it cannot see that
    planes = torch.from_numpy(crop).as_strided((1, 3, height, width), (height * line, 1, line, 3))
    resized = interpolate(planes, size, mode=recipe.interpolation, antialias=True)
    if params.flip:
        resized = resized.flip(3)
    view = np.ascontiguousarray(resized.numpy()[0].transpose(1, 2, 0))
    return apply_to_pixels(view, params.ops)
