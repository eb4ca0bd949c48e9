"""Mixing: which samples of a shard are blended for a view, how, and how strongly.

A newcomer's trap: every row of a shard belongs to a pair of the matching, mixed or not; `MixPlan` only shows the pairs
that are mixed. The matching and the draws depend on the keys alone, never on the order they are given in.

Shape legend: n samples of a shard, m slots.
"""

import hashlib
import math
import struct
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from vkd_cache.views.draws import Draws
from vkd_cache.views.params import MIX_CUTMIX, MIX_MIXUP, MIX_NONE, MixPlan
from vkd_cache.views.recipe import Recipe

_KEY = struct.Struct("<Q")
_VIEW = struct.Struct("<Q")
_PERSON = b"vkd-cache mixing"  # 16 bytes: keeps these hashes apart from those of the views


def plan_mixing(recipe: Recipe, seed: int, keys: Sequence[str], view: int) -> MixPlan:
    """Match the samples of a shard into pairs, and draw for each pair whether and how it is mixed.

    Source: Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) with timm's 'batch' distribution. Deviation: one
    draw per pair instead of one per batch; the marginal distribution of an image is the same.

    Args:
        recipe: its probabilities, Beta parameters and view size.
        seed: cache seed, in [0, 2**64).
        keys: (n,) keys of the shard's samples, all different.
        view: number of the view, from 0.

    Returns:
        The plan, rows as in `keys`. With odd n the last of the matching stays unmixed.
    """
    plan = _unmixed(len(keys))
    if not recipe.mixes:
        return plan
    ranked = sorted((digest, row) for row, digest in enumerate(_ranks(seed, keys, view)))
    for (first_hash, first), (second_hash, second) in zip(ranked[::2], ranked[1::2], strict=False):
        pair = hashlib.blake2b(first_hash + second_hash, digest_size=8, person=_PERSON).digest()
        kind, lam, box = _draw_pair(Draws(int.from_bytes(pair, "little")), recipe)
        if kind == MIX_NONE:
            continue
        plan.partner[first], plan.partner[second] = second, first
        for row in (first, second):
            plan.kind[row], plan.lam[row], plan.box[row] = kind, lam, box
    return plan


def plan_mixing_in(groups: Sequence[int], recipe: Recipe, seed: int, keys: Sequence[str], view: int) -> MixPlan:
    """`plan_mixing` within each group of rows by itself: of a shard that was joined from others after it was planned.

    Args:
        groups: samples of each group, in row order; their sum is the number of keys.
        recipe, seed, keys, view: as for `plan_mixing`.
    """
    ends = np.cumsum(groups).tolist()
    plans = [plan_mixing(recipe, seed, keys[end - count : end], view) for count, end in zip(groups, ends, strict=True)]
    offsets = np.repeat(np.array(ends) - np.array(groups), groups).astype(np.uint32)
    return MixPlan(
        partner=np.concatenate([plan.partner for plan in plans]) + offsets,
        kind=np.concatenate([plan.kind for plan in plans]),
        lam=np.concatenate([plan.lam for plan in plans]),
        box=np.concatenate([plan.box for plan in plans]),
    )


def _ranks(seed: int, keys: Iterable[str], view: int) -> Iterator[bytes]:
    """A keyed hash per sample; neighbours in the order of these hashes are partners."""
    head = _VIEW.pack(view)
    secret = _KEY.pack(seed)
    for key in keys:
        message = head + key.encode("utf-8", "surrogatepass")
        yield hashlib.blake2b(message, digest_size=16, key=secret, person=_PERSON).digest()


def _draw_pair(draws: Draws, recipe: Recipe) -> tuple[int, float, tuple[int, int, int, int]]:
    """(kind, lambda, box) of one pair."""
    if draws.uniform() >= recipe.mix_probability:
        return MIX_NONE, 1.0, (0, 0, 0, 0)
    cutmix = recipe.cutmix_alpha > 0.0
    if cutmix and recipe.mixup_alpha > 0.0:
        cutmix = draws.uniform() < recipe.cutmix_switch
    if not cutmix:
        return MIX_MIXUP, draws.beta(recipe.mixup_alpha, recipe.mixup_alpha), (0, 0, 0, 0)
    box = _cutmix_box(draws, draws.beta(recipe.cutmix_alpha, recipe.cutmix_alpha), recipe.size_px)
    return MIX_CUTMIX, 1.0 - box[2] * box[3] / recipe.size_px**2, box


def _cutmix_box(draws: Draws, lam: float, size_px: int) -> tuple[int, int, int, int]:
    """(top, left, height, width): a square of area share 1 - lam around a uniform centre, clipped to the view.

    Source: timm's `rand_bbox`, with its rounding: for an odd side the longer half lies below and right.
    """
    side = int(size_px * math.sqrt(1.0 - lam))
    spans = []
    for _ in range(2):
        centre = draws.integer(0, size_px)
        start = max(0, centre - side // 2)
        spans.append((start, min(size_px, centre + (side + 1) // 2) - start))
    (top, height), (left, width) = spans
    return top, left, height, width


def drop_partners(plan: MixPlan, broken_rows: Iterable[int]) -> MixPlan:
    """The plan without the broken rows: they and their partners become unmixed; all other rows stay as they are.

    Args:
        plan: of a whole shard.
        broken_rows: rows of the shard without an image.
    """
    rows = np.fromiter(broken_rows, np.int64)
    dropped = np.union1d(rows, plan.partner[rows].astype(np.int64))
    kept = _copy(plan)
    kept.partner[dropped] = dropped
    kept.kind[dropped] = MIX_NONE
    kept.lam[dropped] = 1.0
    kept.box[dropped] = 0
    return kept


def pair_slots(plan: MixPlan) -> npt.NDArray[np.int64]:
    """The rows two by two, so that both members of a mixed pair can always be in the same batch.

    Returns:
        (m, 2) rows: one slot per mixed pair in order of its lower row, then the unmixed rows coupled in row order;
        a last lone row is (row, -1).
    """
    rows = np.arange(len(plan.partner), dtype=np.int64)
    partner = plan.partner.astype(np.int64)
    first = rows[rows < partner]
    pairs = np.stack([first, partner[first]], axis=1)
    single = rows[rows == partner]
    if len(single) % 2:
        single = np.append(single, -1)
    return np.concatenate([pairs, single.reshape(-1, 2)])


def _unmixed(n: int) -> MixPlan:
    return MixPlan(
        partner=np.arange(n, dtype=np.uint32),
        kind=np.zeros(n, np.uint8),
        lam=np.ones(n, np.float32),
        box=np.zeros((n, 4), np.uint16),
    )


def _copy(plan: MixPlan) -> MixPlan:
    return MixPlan(partner=plan.partner.copy(), kind=plan.kind.copy(), lam=plan.lam.copy(), box=plan.box.copy())
