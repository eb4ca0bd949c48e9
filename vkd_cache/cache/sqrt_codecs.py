"""Values that are never negative in 8 or in 4 bits: value = q² · scale, with one scale for each channel of the unit.

Activations after a ReLU are dense near zero, where a square root has its fine steps. A newcomer's trap: two values of
4 bits lie in a byte, channel i beside channel i + ⌈C/2⌉, so that both halves of a row are written and read at once.

Shape legend: n samples, C channels.
"""

import numpy as np
import torch

from vkd_cache.cache.arrays import Array
from vkd_cache.cache.rounding import SQRT_STEPS, blocks, with_inverse
from vkd_cache.errors import CacheError


def stored_channels(codec: str, num_channels: int) -> int:
    """Bytes of one position of a sample."""
    return -(-num_channels // 2) if codec == "sqrt_uint4" else num_channels


def encode_sqrt(values: torch.Tensor, codec: str) -> dict[str, Array]:
    """The stored arrays of values (n, C, ...): scale = maximum / steps², q in 0..steps.

    Raises:
        CacheError: a value is negative; names the first such row.
    """
    num_channels, steps = values.shape[1], SQRT_STEPS[codec]
    stored = torch.empty((len(values), stored_channels(codec, num_channels), *values.shape[2:]), dtype=torch.uint8)
    if not values.numel():
        return {"": stored.numpy(), ".scale": np.zeros(num_channels, np.float32)}
    if values.min() < 0:
        row = int((values < 0).flatten(1).any(1).nonzero()[0, 0])
        raise CacheError(
            f"{codec}: found a negative value in row {row}, expected none. Extract with --dtype float16, or with a "
            "teacher whose features are never negative."
        )
    others = [axis for axis in range(values.ndim) if axis != 1]
    scale = values.amax(others).to(torch.float32) / float(steps**2)
    scale, inverse = with_inverse(scale)
    inverse = inverse.reshape([1, num_channels] + [1] * (values.ndim - 2))
    for rows in blocks(values):
        levels = (values[rows].to(torch.float32) * inverse).sqrt_().round_().clamp_max_(steps)
        stored[rows] = packed_levels(levels.to(torch.uint8)) if codec == "sqrt_uint4" else levels
    return {"": stored.numpy(), ".scale": scale.numpy()}


def packed_levels(levels: torch.Tensor) -> torch.Tensor:
    """Two channels in a byte: (n, C, ...) uint8 of 0..15 as (n, ⌈C/2⌉, ...), the first half in the low bits."""
    half = stored_channels("sqrt_uint4", levels.shape[1])
    packed = levels[:, :half].clone()
    packed[:, : levels.shape[1] - half] |= levels[:, half:] << 4
    return packed


def unpacked_levels(packed: torch.Tensor, num_channels: int) -> torch.Tensor:
    """The inverse of `packed_levels`, on any device; what an odd last byte has in its high bits is ignored."""
    levels = packed.new_empty((len(packed), num_channels, *packed.shape[2:]))
    half = packed.shape[1]
    levels[:, :half] = packed & 15
    levels[:, half:] = packed[:, : num_channels - half] >> 4
    return levels


def sqrt_bound(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """How far values (n, C, ...) may be from those that were encoded: (q + 1/2)² - q² steps of `scale` (C,)."""
    shaped = scale.reshape([1, -1] + [1] * (values.ndim - 2))
    return (values * shaped).sqrt_().add_(0.25 * shaped)
