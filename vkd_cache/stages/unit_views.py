"""Where a feed's views come from: the plan alone, or the units of a cache that are replayed."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vkd_cache.cache.reader import Cache, Unit
from vkd_cache.errors import CorruptCacheError
from vkd_cache.sources import Source
from vkd_cache.views.mixing import drop_partners, pair_slots, plan_mixing
from vkd_cache.views.params import MixPlan
from vkd_cache.views.recipe import Recipe


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardView:
    """What a feed knows of one unit before rendering it.

    Attributes:
        slots: (m, 2) rows of the shard that belong together, -1 for none.
        mix: the unit's mixing, over the rows of the shard.
        unit: the published unit, when the views come from a cache.
    """

    slots: npt.NDArray[np.int64]
    mix: MixPlan
    unit: Unit | None = None


class Views(Protocol):
    """Where views come from: a cache, or the plan alone."""

    views: Sequence[int]

    def slot_counts(self, view: int) -> Sequence[int]:
        """Slots per shard."""
        ...

    def open(self, shard: int, view: int) -> ShardView:
        """One unit; called in a background thread ahead of its use."""
        ...


class PlannedViews:
    """Views planned on the spot: training without a cache, with or without a live teacher."""

    def __init__(self, source: Source, recipe: Recipe, seed: int, views: Sequence[int]) -> None:
        self._source = source
        self._recipe = recipe
        self._seed = seed
        self.views = views

    def slot_counts(self, view: int) -> Sequence[int]:
        """Two samples a slot, an odd one alone."""
        return [(len(shard.keys) + 1) // 2 for shard in self._source.shards]

    def open(self, shard: int, view: int) -> ShardView:
        """Plan the pairs of one unit."""
        mix = plan_mixing(self._recipe, self._seed, self._source.shards[shard].keys, view)
        return ShardView(slots=pair_slots(mix), mix=mix)


class CachedViews:
    """Views replayed from the published units of a cache, without the samples that were broken."""

    def __init__(self, cache: Cache, source: Source, recipe: Recipe, views: Sequence[int]) -> None:
        self._cache = cache
        self._source = source
        self._recipe = recipe
        self._seed = cache.manifest.seed
        self.views = views

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that rendered the cache's views."""
        return self._cache.manifest.versions

    def slot_counts(self, view: int) -> Sequence[int]:
        """As the records say: only shards with broken images need their matching worked out."""
        counts = []
        for shard, content in enumerate(self._source.shards):
            broken = [row for _, row, _ in self._cache.record(shard, view).broken]
            total = len(content.keys)
            counts.append(len(self._slots(shard, view, broken)) if broken else (total + 1) // 2)
        return counts

    def open(self, shard: int, view: int) -> ShardView:
        """Read one unit and check that it belongs to the source's shard."""
        unit = self._cache.read(shard, view)
        keys = self._source.shards[shard].keys
        if len(unit.rows) and (int(unit.rows.max()) >= len(keys) or unit.keys != [keys[row] for row in unit.rows]):
            raise CorruptCacheError(
                f"{self._cache.url}: unit of shard {shard}, view {view} holds other keys than shard {shard} of "
                f"{self._source.location}. Run vkd-cache verify on the cache."
            )
        mix = _stored_mix(unit, len(keys))
        broken = np.setdiff1d(np.arange(len(keys)), unit.rows)
        return ShardView(slots=self._slots(shard, view, broken.tolist()), mix=mix, unit=unit)

    def _slots(self, shard: int, view: int, broken: Sequence[int]) -> npt.NDArray[np.int64]:
        plan = plan_mixing(self._recipe, self._seed, self._source.shards[shard].keys, view)
        return slots_without(plan, broken)


def slots_without(plan: MixPlan, broken: Sequence[int]) -> npt.NDArray[np.int64]:
    """The slots of a unit whose `broken` rows are left out; their partners become lone rows."""
    slots = pair_slots(drop_partners(plan, np.asarray(broken, np.int64)) if len(broken) else plan)
    if not len(broken):
        return slots
    rows = slots.reshape(-1)
    kept = rows[(rows >= 0) & ~np.isin(rows, broken)]
    # mixed pairs stay side by side: rows that lost their neighbour come after all the others
    partner = plan.partner[kept]
    paired = (partner != kept) & ~np.isin(partner, broken)
    kept = np.concatenate([kept[paired], kept[~paired]])
    padded = np.append(kept, -1) if len(kept) % 2 else kept
    return padded.reshape(-1, 2)


def _stored_mix(unit: Unit, num_rows: int) -> MixPlan:
    partner = np.arange(num_rows, dtype=np.uint32)
    kind = np.zeros(num_rows, np.uint8)
    lam = np.ones(num_rows, np.float32)
    box = np.zeros((num_rows, 4), np.uint16)
    partner[unit.rows] = unit.columns["partner"]
    kind[unit.rows] = unit.columns["mix_kind"]
    lam[unit.rows] = unit.columns["mix_lambda"]
    box[unit.rows] = unit.columns["mix_box"]
    return MixPlan(partner=partner, kind=kind, lam=lam, box=box)
