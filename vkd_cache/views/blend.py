"""Blending and normalising on the device that runs the network.

A newcomer's trap: `partner` holds positions in the batch, not rows of the shard. Both members of a pair must be in the
batch, and views are mixed in [0, 1], before any network's own normalisation.

Shape legend: B batch, H/W height and width of a view.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vkd_cache.views.colour import LUMA, LUMA_SUM, Operations, Pixels, colour_map, mean_grey
from vkd_cache.views.params import MIX_CUTMIX, MIX_MIXUP


def colour_rows(pixels: Pixels, operations: Sequence[Operations]) -> Tensor:
    """What `adjust_colour` takes for a batch of views; a row depends on nothing but its own view.

    Args:
        pixels: (B, H, W, 3), C order, as their digests have them.
        operations: all those of each view's params.

    Returns:
        (B, 3) float32: the numbers of each `ColourMap`, for values of 0 to 255 and sums of `LUMA` thousandths.
    """
    maps = [colour_map(listed, mean_grey(view)) for view, listed in zip(pixels, operations, strict=True)]
    rows = [(found.scale / 255.0, found.grey / (255.0 * LUMA_SUM), found.offset / 255.0) for found in maps]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 3)


def adjust_colour(values: Tensor, rows: Tensor) -> Tensor:
    """Apply a colour map to each view, and bring it to [0, 1].

    Every operation is one multiplication or addition, rounded by itself: the same bits on every device, for any batch.

    Args:
        values: (B, 3, H, W) float32 whole numbers of 0 to 255; changed in place.
        rows: (B, 3) of `colour_rows`.

    Returns:
        `values`, clipped to [0, 1].
    """
    scale, grey, offset = (column[:, None, None] for column in rows.unbind(1))
    red, green, blue = values.unbind(1)
    # whole numbers below 2**24: exact
    shift = torch.mul(red, LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    shift.mul_(grey).add_(offset)
    return values.mul_(scale[:, None]).add_(shift[:, None]).clamp_(0.0, 1.0)


def mix_pixels(pixels: Tensor, partner: Tensor, kind: Tensor, lam: Tensor, box: Tensor) -> Tensor:
    """Mix every row with its partner.

    Args:
        pixels: (B, 3, H, W) floating point, in [0, 1].
        partner: (B,) int64 position of the partner in the batch; its own for an unmixed row.
        kind: (B,) integers: 0 none, 1 Mixup, 2 CutMix.
        lam: (B,) weight of the row's own pixels in [0, 1]; used by Mixup only.
        box: (B, 4) integers (top, left, height, width) that come from the partner; used by CutMix only.

    Returns:
        (B, 3, H, W), of the type of `pixels`. Unmixed rows come back bit for bit, and a row's result depends on
        nothing but itself and its partner.
    """
    other = pixels[partner]
    own = torch.where(kind == MIX_MIXUP, lam.to(pixels.dtype), 1.0)[:, None, None, None]
    blended = (pixels * own).add_(other * (1 - own))
    top, left, height, width = box.to(torch.int64).unbind(1)
    y = torch.arange(pixels.shape[2], device=pixels.device)
    x = torch.arange(pixels.shape[3], device=pixels.device)
    inside_y = (y >= top[:, None]) & (y < (top + height)[:, None])
    inside_x = (x >= left[:, None]) & (x < (left + width)[:, None])
    inside = inside_y[:, :, None] & inside_x[:, None, :] & (kind == MIX_CUTMIX)[:, None, None]
    return torch.where(inside[:, None], other, blended)


def normalise(pixels: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """(pixels - mean) / std per channel.

    Args:
        pixels: (B, 3, H, W) floating point, in [0, 1].
        mean: three numbers in the same unit.
        std: three positive numbers in the same unit.
    """
    mean = torch.as_tensor(mean, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1)
    std = torch.as_tensor(std, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1)
    return (pixels - mean).div_(std)
