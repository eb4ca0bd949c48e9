"""Colour of the fast recipes: whole-number operations on arrays, and the rest as one map per view.

A newcomer's trap: the last operations of a view are usually not in its pixels. Grey, brightness, contrast and
saturation are all of the form scale * x + grey * L(x) + offset, and so is any sequence of them; that sequence is kept
as three numbers, and applied where pixels become floats (`vkd_cache.views.blend.adjust_colour`). What they are depends
on nothing but the stored params and the pixels that the digest covers.

Everything here is exact in whole numbers or a fixed sequence of double additions and multiplications: the same bits
with any number of threads and on any machine.

Shape legend: H/W height and width of a view.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vkd_cache.views import ops

Pixels = npt.NDArray[np.uint8]
Operations = Sequence[tuple[int, float]]

LUMA = (299, 587, 114)  # weights of red, green and blue in a grey value, thousandths
LUMA_SUM = sum(LUMA)
LINEAR = frozenset((ops.GREY, ops.BRIGHTNESS, ops.CONTRAST, ops.SATURATION))
_BOXES = 3  # Pillow's Gaussian blur is this many box blurs, and so is ours
_WEIGHT_SUM = 256  # of a blur kernel: the most that 16 bits hold for 8-bit values


class ColourMap(NamedTuple):
    """x -> (scale * x + grey * L(x) + offset) / 255, clipped to [0, 1], for values x of 0 to 255.

    L(x) is the pixel's grey value: its channels weighted by `LUMA`.
    """

    scale: float
    grey: float
    offset: float


IDENTITY = ColourMap(1.0, 0.0, 0.0)


def split_ops(operations: Operations) -> tuple[Operations, Operations]:
    """What is done to the 8-bit pixels, and the linear operations at the end that become a `ColourMap`."""
    end = len(operations)
    while end and operations[end - 1][0] in LINEAR:
        end -= 1
    return operations[:end], operations[end:]


def colour_map(operations: Operations, mean: float) -> ColourMap:
    """The linear operations at the end of `operations` as one map.

    Nothing is clipped between them, where Pillow clips and rounds after each.

    Args:
        operations: all of the view's.
        mean: `mean_grey` of the view's pixels, as its digest has them; contrast leaves it where it is.
    """
    scale, grey, offset = IDENTITY
    for op, factor in split_ops(operations)[1]:
        if op == ops.BRIGHTNESS:
            scale, grey, offset = factor * scale, factor * grey, factor * offset
        elif op == ops.CONTRAST:
            pivot = (scale + grey) * mean + offset  # the mean grey of what came before
            scale, grey, offset = factor * scale, factor * grey, factor * offset + (1.0 - factor) * pivot
        else:  # saturation; grey is its zero
            factor = 0.0 if op == ops.GREY else factor
            grey = factor * grey + (1.0 - factor) * (scale + grey)
            scale = factor * scale
    return ColourMap(scale, grey, offset)


def mean_grey(pixels: Pixels) -> float:
    """The mean of L over (H, W, 3) pixels, C order, from whole-number sums, rounded once."""
    height, width, channels = pixels.shape
    lines = pixels.reshape(height, width * channels)
    # 16 bits hold the sum of 256 values, and are summed twice as fast as 32
    blocks = [np.add.reduce(lines[top : top + 256], axis=0, dtype=np.uint16) for top in range(0, height, 256)]
    red, green, blue = np.add.reduce(np.reshape(blocks, (-1, channels)), axis=0, dtype=np.int64).tolist()
    weighted: int = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    mean: float = weighted / (LUMA_SUM * height * width)
    return mean


def apply_to_pixels(pixels: Pixels, operations: Operations) -> Pixels:
    """Do what of `operations` is done to 8-bit pixels.

    Args:
        pixels: (H, W, 3); not changed.
        operations: of three-augment.

    Returns:
        (H, W, 3); `pixels` itself where there is nothing to do.

    Raises:
        ValueError: an operation that has no whole-number form.
    """
    for op, value in split_ops(operations)[0]:
        if op == ops.SOLARISE:
            pixels = _solarise(pixels, int(value))
        elif op == ops.GAUSSIAN_BLUR:
            pixels = _blur(pixels, value)
        else:
            raise ValueError(f"operation: found number {op}, expected one of three-augment under a fast recipe.")
    return pixels


def _solarise(pixels: Pixels, threshold: int) -> Pixels:
    """255 - x for values x from `threshold` on: all their bits change."""
    bits = (pixels >= threshold).view(np.uint8)
    np.negative(bits, out=bits)
    return np.bitwise_xor(bits, pixels, out=bits)


def _blur(pixels: Pixels, radius: float) -> Pixels:
    """Gaussian blur, first down the columns, then along the rows, each rounded to 8 bits; edges are continued."""
    kernel = blur_kernel(radius)
    reach = len(kernel) - 1
    if reach == 0:
        return pixels
    height, width, channels = pixels.shape
    framed = np.empty((height + 2 * reach, width + 2 * reach, channels), np.uint16)
    framed[reach:-reach, reach:-reach] = pixels
    framed[reach:-reach, :reach] = framed[reach:-reach, reach, None]
    framed[reach:-reach, -reach:] = framed[reach:-reach, -reach - 1, None]
    framed[:reach], framed[-reach:] = framed[reach], framed[-reach - 1]
    line = framed.shape[1] * channels
    rows, blurred = (np.empty((height, line // channels, channels), np.uint16) for _ in range(2))
    _weigh(framed.reshape(-1), kernel, line, rows.reshape(-1))
    # all rows one after another: what runs from one into the next stays in the margin
    _weigh(rows.reshape(-1), kernel, channels, blurred.reshape(-1)[: -2 * reach * channels])
    return blurred[:, :width].astype(np.uint8, order="C")


def _weigh(
    values: npt.NDArray[np.uint16], kernel: Sequence[int], step: int, total: npt.NDArray[np.uint16]
) -> None:
    """Into `total`: weighted means of all values that have enough neighbours at multiples of `step` on both sides."""
    count = len(total)
    centre = (len(kernel) - 1) * step
    np.multiply(values[centre : centre + count], np.uint16(kernel[0]), out=total)
    pair = np.empty_like(total)
    for distance in range(1, len(kernel)):
        before, after = centre - distance * step, centre + distance * step
        np.add(values[before : before + count], values[after : after + count], out=pair)
        pair *= np.uint16(kernel[distance])
        total += pair
    total += np.uint16(_WEIGHT_SUM // 2)
    total >>= np.uint16(8)


@functools.lru_cache(maxsize=1024)
def blur_kernel(radius: float) -> tuple[int, ...]:
    """Weights, 256ths, of a value and of its neighbours at distance 1, 2, ...

    Source: the three box blurs with fractional ends of Pillow's GaussianBlur, as one kernel ("Theoretical Foundations
    of Gaussian Convolution by Extended Box Filtering", 2011).
    """
    variance = radius * radius / _BOXES
    length = math.sqrt(12.0 * variance + 1.0)
    whole = math.floor((length - 1.0) / 2.0)
    end = (2 * whole + 1) * (whole * (whole + 1) - 3.0 * variance)
    end /= 6.0 * (variance - (whole + 1) * (whole + 1))
    box = [end, *[1.0] * (2 * whole + 1), end]
    kernel = [1.0]
    for _ in range(_BOXES):
        kernel = [
            sum(kernel[at - shift] * box[shift] for shift in range(len(box)) if 0 <= at - shift < len(kernel))
            for at in range(len(kernel) + len(box) - 1)
        ]
    centre, total = len(kernel) // 2, sum(kernel)
    weights = [round(_WEIGHT_SUM * value / total) for value in kernel[centre:]]
    while len(weights) > 1 and weights[-1] == 0:
        weights.pop()
    weights[0] = _WEIGHT_SUM - 2 * sum(weights[1:])
    return tuple(weights)
