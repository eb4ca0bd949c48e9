"""How far stored tokens are from those that the teacher gives again, image by image.

A newcomer's trap: a cache may hold a sample of the tokens, but the sums beside them are over all of them. Both are
compared: the tokens that are there one by one, and the sums with what the teacher's tokens add up to.

Shape legend: b images, T tokens, C channels.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.cache.reader import Unit
from vkd_cache.tokens import Tokens


class Gap(NamedTuple):
    """What a comparison found, by image.

    Attributes:
        explained: (b,) bool, whether codec and arithmetic explain every difference.
        error: (b,) norm of the difference over the norm of the teacher's values.
    """

    explained: npt.NDArray[np.bool_]
    error: npt.NDArray[np.floating]


def tokens_gap(found: Tokens, unit: Unit, name: str, place: npt.NDArray[np.int64], noise: float) -> Gap:
    """Compare all tokens of b images, as the teacher gives them again, with those stored at `place` of a unit.

    Args:
        found: on the host.
        unit: the unit.
        name: the node.
        place: (b,) positions in the unit.
        noise: of the arithmetic, as a share of the largest value of an image.
    """
    stored = unit.tokens(name, place)
    if not np.array_equal(found.grid, stored.grid):
        return Gap(np.zeros(len(place), np.bool_), np.ones(len(place)))
    image = np.repeat(np.arange(len(place)), stored.kept)
    values = found.dense().float()
    largest = _by_image(values.abs().amax(1), found, "amax")
    kept = values[torch.from_numpy(stored.places())]
    difference = (kept - stored.dense().float()).abs()
    allowed = unit.rounding(name, place) + noise * largest[torch.from_numpy(image), None]
    within = np.ones(len(place), np.bool_)
    within[image[(~(difference <= allowed)).any(1).numpy()]] = False  # nan is no pass
    norms = [_by_image(part.square().sum(1), stored, "sum").sqrt() for part in (difference, kept)]
    within &= _sums_agree(found, stored, noise * largest, largest)
    return Gap(within, (norms[0] / norms[1].clamp_min(1e-12)).numpy())


def _by_image(values: torch.Tensor, tokens: Tokens, reduce: str) -> torch.Tensor:
    """(b,) sums or largest values of (T,) numbers from 0."""
    image = torch.from_numpy(np.repeat(np.arange(len(tokens)), tokens.kept))
    return torch.zeros(len(tokens)).scatter_reduce(0, image, values, reduce)


def _sums_agree(found: Tokens, stored: Tokens, step: torch.Tensor, largest: torch.Tensor) -> npt.NDArray[np.bool_]:
    """(b,) whether the sums over all n tokens differ by no more than n steps of the arithmetic, (b,)."""
    counts = torch.from_numpy(found.counts).float()
    total = (found.total - stored.total).abs() <= (counts * step)[:, None]
    squares = (found.squares - stored.squares).abs() <= (2 * counts * step * largest)[:, None]
    agree: npt.NDArray[np.bool_] = (total & squares).all(1).numpy()
    return agree
