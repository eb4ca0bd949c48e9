"""A unit's tokens on their way from the teacher into the cache: sampled on the device, put in order on the host.

A newcomer's trap: which tokens of an image are kept is drawn from (cache seed, key, view, node), so it depends neither
on the batch nor on the other images; and what stays behind is still counted, in the sums over *all* valid tokens.

Shape legend: b images of a batch, n images of the unit, T tokens, C channels.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.cache.rounding import token_int8
from vkd_cache.cache.schema import NodeSpec
from vkd_cache.detection.sampling import sample_places
from vkd_cache.tokens import Tokens

HALF_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def sampled_tokens(tokens: Tokens, spec: NodeSpec, *, seed: int, keys: Sequence[str], view: int) -> Tokens:
    """The tokens of `spec` that are stored, of tokens that are all here.

    Args:
        tokens: of b images, on any device; stays there.
        spec: says which fraction.
        seed: cache seed.
        keys: of the b images.
        view: number of the view.
    """
    if spec.tokens == 1.0:
        return tokens
    places = [
        sample_places(seed, key, view, spec.name, int(count), spec.tokens)
        for key, count in zip(keys, tokens.counts, strict=True)
    ]
    none = np.empty(0, np.int64)  # for a batch all of whose images are broken
    return tokens.sampled(np.concatenate([none, *places]), np.array([len(kept) for kept in places], np.int64))


def stored_dtype(values: torch.Tensor, spec: NodeSpec | None) -> torch.dtype:
    """What `values` are kept in until they are written, without a bit more than their codec stores.

    So whatever does not fit the codec is infinite from here on, and told with its key.
    """
    widest = torch.float32 if values.dtype == torch.float64 else values.dtype
    return widest if spec is None else HALF_DTYPES.get(spec.codec, widest)


def as_stored(tokens: Tokens, codec: str) -> Tokens:
    """The tokens with their values as `codec` stores them, on the device they are on: fewer bytes to copy and keep."""
    if codec == "token_int8":
        values, scale = token_int8(tokens.values)
        return dataclasses.replace(tokens, values=values, scale=scale)
    dtype = HALF_DTYPES.get(codec)
    return tokens if dtype is None else dataclasses.replace(tokens, values=tokens.values.to(dtype))


def in_order(parts: list[Tokens], order: npt.NDArray[np.int64]) -> Tokens:
    """The images of `parts`, laid end to end and then taken in `order`, as one; `parts` is emptied on the way.

    Unlike join and select, it holds the tokens once, and beside them one part at a time.
    """
    first = parts[0]
    kept = np.concatenate([part.kept for part in parts])
    grid = np.concatenate([part.grid for part in parts])
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept[order])])
    num_tokens = int(offsets[-1])
    joined = Tokens(
        values=first.values.new_empty((num_tokens, *first.values.shape[1:])),
        scale=None if first.scale is None else first.scale.new_empty((num_tokens, 1)),
        grid=grid[order],
        offsets=offsets,
        index=None if first.index is None else np.empty(num_tokens, np.int64),
        total=first.total.new_empty((len(order), *first.total.shape[1:])),
        squares=first.squares.new_empty((len(order), *first.squares.shape[1:])),
    )
    start = 0
    while parts:
        part = parts.pop(0)
        where = place[start : start + len(part)]
        _put(part, joined, where)
        start += len(part)
    return joined


def _put(part: Tokens, joined: Tokens, where: npt.NDArray[np.int64]) -> None:
    """Copy the images of `part` to the places `where` of `joined`."""
    rows = np.repeat(joined.offsets[where] - part.offsets[:-1], part.kept) + np.arange(len(part.values))
    to = torch.from_numpy(rows)
    joined.values[to] = part.values
    if joined.scale is not None and part.scale is not None:
        joined.scale[to] = part.scale
    if joined.index is not None and part.index is not None:
        joined.index[rows] = part.index
    images = torch.from_numpy(where)
    joined.total[images] = part.total
    joined.squares[images] = part.squares


def on_host(tokens: Tokens) -> Tokens:
    """The tokens on the host, and arrived: `Tokens.to` only begins to copy them."""
    scale = None if tokens.scale is None else tokens.scale.cpu()
    values, total, squares = tokens.values.cpu(), tokens.total.cpu(), tokens.squares.cpu()
    return dataclasses.replace(tokens, values=values, scale=scale, total=total, squares=squares)


def extremes(tokens: Tokens) -> tuple[float, float]:
    """Smallest and largest of everything that is stored; nan if any of it is."""
    parts = [tokens.values if tokens.scale is None else tokens.scale, tokens.total, tokens.squares]
    found = [torch.stack(part.aminmax()).double() for part in parts]
    low, high = torch.stack(found).unbind(1)
    return float(low.min()), float(high.max())


def finite_images(tokens: Tokens) -> npt.NDArray[np.bool_]:
    """(b,) which images have nothing but finite tokens and sums."""
    values = tokens.values if tokens.scale is None else tokens.scale
    image = np.repeat(np.arange(len(tokens)), tokens.kept)
    finite = np.ones(len(tokens), np.bool_)
    finite[image[~torch.isfinite(values).all(1).cpu().numpy()]] = False
    sums = torch.isfinite(tokens.total).all(1) & torch.isfinite(tokens.squares).all(1)
    finite &= sums.cpu().numpy()
    return finite
