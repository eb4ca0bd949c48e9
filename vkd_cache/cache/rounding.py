"""Floating point in fewer bits: what the codecs of all layouts have in common.

A newcomer's trap: half floats are converted by torch, which is an order of magnitude faster at it than NumPy; and NumPy
has no bfloat16, so its 16 bits travel as uint16.

Shape legend: n rows (samples or tokens), C channels.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.cache.arrays import Array
from vkd_cache.errors import CacheError

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Suffix -> dtype of the arrays of each codec. "" is the array with one row per sample or token.
CODEC_ARRAYS: dict[str, dict[str, str]] = {
    "float32": {"": "<f4"},
    "float16": {"": "<f2"},
    "bfloat16": {"": "<u2"},
    "sqrt_uint8": {"": "|u1", ".scale": "<f4"},
    "sqrt_uint4": {"": "|u1", ".scale": "<f4"},
    "token_int8": {"": "|i1", ".scale": "<f4"},
}

# Largest q of the codecs whose values are q² · scale, with a scale for each channel of the unit.
SQRT_STEPS = {"sqrt_uint8": 255, "sqrt_uint4": 15}

# relative and smallest absolute half step
_HALF_STEPS = {"float32": (0.0, 0.0), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134)}


def as_array(values: torch.Tensor) -> Array:
    """A CPU tensor as an array, not copied if contiguous; bfloat16 as its 16 bits."""
    values = values.contiguous()
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    array: Array = values.numpy()
    return array


def as_tensor(array: Array, codec: str = "") -> torch.Tensor:
    """A stored array as a tensor that may be written to; with codec `bfloat16`, its 16 bits as what they are."""
    owned = array if array.flags.writeable else array.copy()  # torch warns of arrays that it may not write to
    if codec == "bfloat16":
        return torch.from_numpy(owned.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(owned)


def half_step(values: torch.Tensor, codec: str) -> torch.Tensor:
    """How far each float32 value may be from the one that a float codec rounded to it."""
    relative, smallest = _HALF_STEPS[codec]
    return values.abs().mul_(relative).add_(smallest)


def with_passed(
    bound: torch.Tensor, values: torch.Tensor, passed: Sequence[str], largest: torch.Tensor | None = None
) -> torch.Tensor:
    """How far values may be from the teacher's, where a conversion led them through other codecs before.

    Args:
        bound: (n, C, ...) how far the last codec may have moved them.
        values: (n, C, ...) float32, as they are now.
        passed: the codecs before the last one, in order.
        largest: (1, C, ...) of each channel of the unit; needed for SQRT_STEPS. A unit that was cut anew may have had
            larger ones, so that this is what can be told from here, no more.
    """
    for codec in reversed(passed):
        reach = values.abs() + bound
        if codec == "token_int8":
            step = reach.amax(1, keepdim=True) / 254.0
        elif codec in SQRT_STEPS and largest is not None:  # (q + 1/2)^2 - q^2 steps
            scale = largest / float(SQRT_STEPS[codec] ** 2)
            step = (reach * scale).sqrt_() + 0.25 * scale
        else:
            step = half_step(reach, codec)
        bound = bound + step
    return bound


def token_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row (and position): value = q * scale with q in -127..127 and scale = largest magnitude / 127.

    Args:
        values: (n, C, ...) floating point, finite, on any device.

    Returns:
        (n, C, ...) int8 and (n, 1, ...) float32 scale.
    """
    steps = torch.full((), 127.0, device=values.device)  # by a number, a GPU multiplies with its rounded inverse
    stored = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    scale = torch.empty((len(values), 1, *values.shape[2:]), dtype=torch.float32, device=values.device)
    for rows in blocks(values):
        block = values[rows].to(torch.float32)
        scale[rows], inverse = with_inverse(block.abs().amax(1, keepdim=True) / steps)
        stored[rows] = (block * inverse).round_().clamp_(-127, 127)
    return stored, scale


def with_inverse(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A scale and its inverse, both 0 where the scale is 0 or so small that its inverse would be infinite."""
    usable = scale >= torch.finfo(torch.float32).tiny
    zero = torch.zeros((), device=scale.device)
    return torch.where(usable, scale, zero), torch.where(usable, 1.0 / scale, zero)


def blocks(values: torch.Tensor) -> list[slice]:
    """Slices of rows whose float32 intermediates stay in a processor's cache: three times as fast as all at once."""
    if values.device.type != "cpu":
        return [slice(None)]
    num_rows = max(1, 200_000 // max(1, values[:1].numel()))
    return [slice(start, start + num_rows) for start in range(0, len(values), num_rows)]


def finite(
    stored: torch.Tensor, values: torch.Tensor, codec: str, offsets: npt.NDArray[np.int64] | None = None
) -> torch.Tensor:
    """`stored`, if every number in it is finite.

    Args:
        stored: (n, ...) what is to be stored.
        values: (n, ...) what it was made from.
        codec: for the message.
        offsets: where each image's rows begin, and the end, where rows are tokens: the message then names the image.

    Raises:
        CacheError: inf or nan; names the first such row, and tells an overflow of `codec` from one of the teacher.
    """
    # the extremes are inf or nan if any value is, and cost a twentieth of isfinite over all
    if not stored.numel() or bool(torch.isfinite(torch.stack(stored.aminmax())).all()):
        return stored
    first = int((~torch.isfinite(stored)).flatten(1).any(1).nonzero()[0, 0])
    row = first if offsets is None else int(np.searchsorted(offsets, first, "right")) - 1
    if bool(torch.isfinite(values[first]).all()):
        raise CacheError(
            f"{codec}: found {float(values[first].abs().max()):g} in row {row}, more than {codec} can hold. "
            "Extract with --dtype bfloat16 or float32."
        )
    raise CacheError(
        f"found inf or nan in row {row}, expected finite numbers. The teacher overflows: extract with autocast off or "
        "bfloat16."
    )
