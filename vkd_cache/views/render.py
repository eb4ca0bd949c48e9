"""Rendering: from a decoded image and view params to the uint8 pixels that leave the CPU, and their digest.

A newcomer's trap: the crop is cut out *before* it is resized, so that the resize kernel sees no pixel outside it. The
order crop, resize, flip, operations, erase is fixed. Blending with a partner comes later, on the device.

Shape legend: H/W height and width of a view (both `Recipe.size_px`, or a detection view's own `view_size`).
"""

import functools
import hashlib
import math
import statistics

import numpy as np
import numpy.typing as npt
import xxhash
from PIL import Image

from vkd_cache.views.ops import apply_op
from vkd_cache.views.params import ViewParams
from vkd_cache.views.recipe import Recipe

Pixels = npt.NDArray[np.uint8]

_KERNEL = Image.Resampling.BICUBIC  # of square views
_KERNEL_RADIUS = 2
_DETECTION_KERNEL = Image.Resampling.BILINEAR  # the reference's
_LARGE_CROP_PX = 50_000_000
_LONG_ASPECT = 32
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def render_view(image: Image.Image | Pixels, params: ViewParams, recipe: Recipe) -> Pixels:
    """Render one view.

    Args:
        image: RGB, decoded (and oriented, except for detection), of the size that the params were planned for: one of
            Pillow's, or, for fast recipes, better a writable (height, width, 3) array in C order.
        params: planned, or read back from a cache.
        recipe: geometry and size of the view.

    Returns:
        (H, W, 3) uint8, C order, writable.

    Raises:
        ValueError: the image has another size or mode than the params were planned for.
    """
    size, mode = image_size(image), image.mode if isinstance(image, Image.Image) else "RGB"
    if size != params.source_size or mode != "RGB":
        raise ValueError(
            f"render_view: found an image of {size} in mode {mode}, expected {params.source_size} in RGB. "
            "Is it the image that the view was planned for?"
        )
    if recipe.fast:
        from vkd_cache.views.fast import render_fast  # torch

        return render_fast(np.array(image) if isinstance(image, Image.Image) else image, params, recipe)
    view = _crop(image if isinstance(image, Image.Image) else Image.fromarray(image), params.crop)
    side = recipe.size_px
    if recipe.geometry == "detection":
        height, width = params.view_size
        view = view.resize((width, height), _DETECTION_KERNEL)
    elif recipe.geometry == "center_crop":
        view = _centre(view, side, round(side / recipe.crop_fraction))
    else:
        view = view.resize((side, side), _KERNEL)
    if params.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for op_id, value in params.ops:
        view = apply_op(view, op_id, value)
    pixels = np.array(view, dtype=np.uint8)
    _erase(pixels, params)
    return pixels


def image_size(image: Image.Image | Pixels) -> tuple[int, int]:
    """(width, height) of a decoded image, pixels."""
    if isinstance(image, Image.Image):
        return image.size
    return image.shape[1], image.shape[0]


def pixel_digest(pixels: Pixels) -> int:
    """uint64 xxh3 of the pixels' bytes in C order."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(pixels).data)


def _crop(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    top, left, height, width = box
    if (width, height) == image.size:
        return image
    if width * height > _LARGE_CROP_PX:
        # Pillow's own crop warns about "decompression bombs" from 89 million pixels on; the size was checked before
        return Image.fromarray(np.asarray(image)[top : top + height, left : left + width])
    return image.crop((left, top, left + width, top + height))


def _centre(image: Image.Image, side_px: int, short_px: int) -> Image.Image:
    """Resize the short side to `short_px`, keeping the shape, and cut the central square of `side_px`.

    Source: torchvision's Resize followed by CenterCrop, bit for bit up to a shape of 1 : 32. Beyond, only the part of
    the image that can reach the square is resized (the same kernel, positions rounded differently), because the whole
    would take up to gigabytes.
    """
    long_px = short_px * max(image.size) // min(image.size)
    size = (short_px, long_px) if image.width <= image.height else (long_px, short_px)
    if long_px > _LONG_ASPECT * short_px:
        return _centre_of_strip(image, side_px, size)
    resized = image if image.size == size else image.resize(size, _KERNEL)
    left, top = (round((length - side_px) / 2.0) for length in size)
    return resized.crop((left, top, left + side_px, top + side_px))


def _centre_of_strip(image: Image.Image, side_px: int, resized: tuple[int, int]) -> Image.Image:
    """The same for a very long image: cut a window of source pixels, then resize from a fractional box inside it."""
    spans = []
    for source, target in zip(image.size, resized, strict=True):
        step = source / target
        start = round((target - side_px) / 2.0) * step
        stop = min(start + side_px * step, source)
        margin = math.ceil(_KERNEL_RADIUS * max(step, 1.0)) + 1
        spans.append((start, stop, max(0, math.floor(start) - margin), min(source, math.ceil(stop) + margin)))
    (left, right, first_x, last_x), (top, bottom, first_y, last_y) = spans
    window = _crop(image, (first_y, first_x, last_y - first_y, last_x - first_x))
    box = (left - first_x, top - first_y, right - first_x, bottom - first_y)
    return window.resize((side_px, side_px), _KERNEL, box=box)


def _erase(pixels: Pixels, params: ViewParams) -> None:
    """Fill the erase box with Gaussian noise in ImageNet's pixel statistics, from the view's own seed.

    Source: timm's random erasing in 'pixel' mode. Deviation: the noise is one of 256 Gaussian quantiles per value,
    rounded and clipped to uint8, so that it is part of the digested pixels.
    """
    top, left, height, width = params.erase
    if height == 0 or width == 0:
        return
    noise = hashlib.shake_256(params.seed.to_bytes(8, "little")).digest(height * width * 3)
    quantile = np.frombuffer(noise, np.uint8).reshape(height, width, 3)
    pixels[top : top + height, left : left + width] = _noise_table()[quantile, np.arange(3)]


@functools.cache
def _noise_table() -> Pixels:
    """(256, 3): pixel value of every quantile of N(mean, std) per channel."""
    normal = statistics.NormalDist()
    quantiles = np.array([normal.inv_cdf((q + 0.5) / 256) for q in range(256)])
    values = 255.0 * (np.array(_IMAGENET_MEAN) + quantiles[:, None] * np.array(_IMAGENET_STD))
    table: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return table
