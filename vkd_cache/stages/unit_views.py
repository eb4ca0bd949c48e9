"""Where a feed's views come from: the plan alone, or the units of a cache that are replayed."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vkd_cache.cache.reader import Cache, Unit
from vkd_cache.cache.schema import UnitRecord
from vkd_cache.errors import CorruptCacheError
from vkd_cache.sources import Source
from vkd_cache.views.mixing import pair_slots, plan_mixing
from vkd_cache.views.params import MIX_CUTMIX, MixPlan
from vkd_cache.views.recipe import Recipe
from vkd_cache.views.replay import replay_problem

RECORD_READERS = 16


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
    """Where views come from: a cache, or the plan alone.

    Attributes:
        views: the views that epochs take turns with.
        num_broken: broken images that are known to be left out of every view.
        reads_images: whether rendering them reads the images of the source.
    """

    views: Sequence[int]
    num_broken: int
    reads_images: bool

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
        self.num_broken = 0
        self.reads_images = True

    def slot_counts(self, view: int) -> Sequence[int]:
        """Two samples a slot, an odd one alone."""
        return [(len(shard.keys) + 1) // 2 for shard in self._source.shards]

    def open(self, shard: int, view: int) -> ShardView:
        """Plan the pairs of one unit."""
        mix = plan_mixing(self._recipe, self._seed, self._source.shards[shard].keys, view)
        return ShardView(slots=pair_slots(mix), mix=mix)


class CachedViews:
    """Views replayed from the published units of a cache, without the samples that were broken."""

    def __init__(self, cache: Cache, source: Source, views: Sequence[int]) -> None:
        self._cache = cache
        self._source = source
        self._recipe = cache.recipe
        self._slot_counts: dict[int, list[int]] = {}
        self.views = views
        self.num_broken = 0
        self.reads_images = cache.manifest.pixels is None

    def slot_counts(self, view: int) -> Sequence[int]:
        """Two samples a slot, as the view's records say; they are read once."""
        if view not in self._slot_counts:
            shards = range(len(self._source.shards))
            with ThreadPoolExecutor(RECORD_READERS) as pool:  # on an object store each read is a round trip
                records = list(pool.map(lambda shard: self._cache.record(shard, view), shards))
            self._check_counts(records)
            self._slot_counts[view] = [(record.num_samples + 1) // 2 for record in records]
            self.num_broken = max(self.num_broken, sum(len(record.broken) for record in records))
        return self._slot_counts[view]

    def _check_counts(self, records: Sequence[UnitRecord]) -> None:
        """Believe the records' numbers only if they are the source's: an epoch is laid out by them."""
        for record in records:
            found, expected = record.num_samples + len(record.broken), len(self._source.shards[record.shard].keys)
            if found != expected:
                raise CorruptCacheError(
                    f"{self._cache.url}: unit of shard {record.shard}, view {record.view} has {found} samples, shard "
                    f"{record.shard} of {self._source.location} has {expected}. Run vkd-cache verify on the cache."
                )

    def open(self, shard: int, view: int) -> ShardView:
        """Read one unit and check that it belongs to the source's shard."""
        unit = self._cache.read(shard, view)
        keys = self._source.shards[shard].keys
        if len(unit.rows) and (int(unit.rows.max()) >= len(keys) or unit.keys != [keys[row] for row in unit.rows]):
            raise CorruptCacheError(
                f"{self._cache.url}: unit of shard {shard}, view {view} holds other keys than shard {shard} of "
                f"{self._source.location}. Run vkd-cache verify on the cache."
            )
        problem = replay_problem(unit.columns, self._recipe) or _mixing_problem(unit)
        if problem is not None:
            raise CorruptCacheError(
                f"{self._cache.url}: unit of shard {shard}, view {view}: {problem}. Run vkd-cache verify on the cache."
            )
        mix = _stored_mix(unit, len(keys))
        return ShardView(slots=slots_of_rows(mix, unit.rows), mix=mix, unit=unit)


def slots_of_rows(mix: MixPlan, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """The (m, 2) slots of `rows` of a shard: mixed pairs first, then the others two by two, -1 for none.

    Args:
        mix: over all rows of the shard; none of `rows` has a partner outside of them.
        rows: ascending.
    """
    slots = pair_slots(mix)
    if len(rows) == len(mix.partner):
        return slots
    kept = slots.reshape(-1)[np.isin(slots.reshape(-1), rows)]
    lone = mix.partner[kept] == kept
    kept = np.concatenate([kept[~lone], kept[lone]])
    padded = np.append(kept, -1) if len(kept) % 2 else kept
    return padded.reshape(-1, 2)


def _mixing_problem(unit: Unit) -> str | None:
    """What keeps rows and partners of a unit from being paired, in a few words."""
    rows, partner = unit.rows.astype(np.int64), unit.columns["partner"].astype(np.int64)
    weight, kind = unit.columns["mix_lambda"].astype(np.float32), unit.columns["mix_kind"].astype(np.uint8)
    if not len(rows):
        return None
    if (np.diff(rows) <= 0).any():
        return "its rows are not in rising order"
    position = np.minimum(np.searchsorted(rows, partner), len(rows) - 1)
    if (rows[position] != partner).any() or (partner[position] != rows).any():
        return "its mixing partners are not pairs of its rows"
    if not ((weight >= 0) & (weight <= 1)).all() or (kind > MIX_CUTMIX).any():
        return "its rows are mixed in no way that there is"
    return None


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
