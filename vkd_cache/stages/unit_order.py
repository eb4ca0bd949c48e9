"""Which unit next: the order in which a job takes its units, beside other jobs that may be taking the same ones.

Nothing is locked or claimed, so that a job that dies blocks nobody. A job looks whether a unit is published just before
it begins it. When it finds that another job was there first, it goes elsewhere, into the largest stretch that is still
missing: two jobs that have met do not go on side by side, each making what the other makes.

A newcomer's trap: the order never changes what is stored. It is the one place where chance is welcome, because two
jobs that meet the same third one must not go to the same place.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from vkd_cache.cache.units import UnitId


class PublishedUnits(Protocol):
    """What has to be known of a cache; `Cache` is one."""

    def published(self) -> Mapping[int, frozenset[int]]:
        """Published shards by view; lists the cache."""
        ...

    def is_published(self, unit: UnitId) -> bool:
        """Whether one unit is published now; one look at its record's name."""
        ...


def unpublished(cache: PublishedUnits | None, units: Sequence[UnitId]) -> list[UnitId]:
    """Those of `units` that are missing now; lists the cache once. Without a cache all of them are."""
    published = cache.published() if cache is not None else {}
    return [unit for unit in units if unit.shard not in published.get(unit.view, frozenset())]


class UnitOrder:
    """Iterates over the units that are still missing when their turn comes: in the order given, until jobs meet."""

    def __init__(
        self,
        units: Sequence[UnitId],
        cache: PublishedUnits,
        rng: np.random.Generator,
        skipped: Callable[[UnitId], None],
    ) -> None:
        """`units`: what was missing when the job began; `skipped` is told of each that another job has published."""
        self._cache = cache
        self._rng = rng
        self._skipped = skipped
        self._ahead = deque(enumerate(units))
        self._behind: list[tuple[int, UnitId]] = []  # missing too, but before the place where the job went on
        self._stretch: set[UnitId] = set()  # begun since then
        self._met = False

    def __iter__(self) -> Iterator[UnitId]:
        while self._ahead or self._behind:
            if self._met or not self._ahead:
                self._go_elsewhere()
                continue
            _, unit = self._ahead.popleft()
            if self._cache.is_published(unit):
                self._met = True
                self._skipped(unit)
            else:
                self._stretch.add(unit)
                yield unit

    def upcoming(self, count: int) -> list[UnitId]:
        """The units, at most `count`, that come next unless jobs meet."""
        return [unit for _, unit in itertools.islice(self._ahead, count)]

    def lost(self, unit: UnitId) -> None:
        """Take note that another job published `unit` while this one made it; from any thread."""
        # what was begun before the job went elsewhere says nothing about where it is now
        if unit in self._stretch:
            self._met = True

    def _go_elsewhere(self) -> None:
        published = self._cache.published()
        missing = []
        for number, unit in [*self._behind, *self._ahead]:
            if unit.shard in published.get(unit.view, frozenset()):
                self._skipped(unit)
            else:
                missing.append((number, unit))
        start = self._place_in_largest_stretch([number for number, _ in missing])
        self._behind, self._ahead = missing[:start], deque(missing[start:])
        self._stretch = set()
        self._met = False

    def _place_in_largest_stretch(self, numbers: Sequence[int]) -> int:
        """Index into ascending `numbers`, by chance in the middle half of a longest part that follow one another.

        The middle, because a job is at work at the start; a longest, because where shares interleave many are one long.
        """
        if not numbers:
            return 0
        starts = np.concatenate([[0], np.flatnonzero(np.diff(numbers) > 1) + 1])
        lengths = np.diff(starts, append=len(numbers))
        chosen = int(self._rng.choice(np.flatnonzero(lengths == lengths.max())))
        length = int(lengths[chosen])
        return int(starts[chosen]) + int(self._rng.integers(length // 4, max(length // 4 + 1, 3 * length // 4)))
