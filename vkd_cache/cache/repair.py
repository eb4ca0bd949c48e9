"""Dropping what is damaged, so that the extraction that made a cache makes it again: `vkd-cache verify --repair`.

A unit's record goes first and its file second. Killed in between, a repair leaves a unit that is not published beside
a file that nobody reads, which the next extraction writes again; the other way round it would leave a record without
its file, a unit that is published and cannot be read.

A newcomer's trap: an extraction may publish the same unit meanwhile, under the same name where its bits are the same.
So what is damaged is looked at again before anything goes, and afterwards; and a writer looks, after its record, that
its file is still there, and puts it back (`CacheWriter.publish`). Whoever is last, no record is left without its file:
at worst a unit that was published in these milliseconds is dropped too, and extracted once more.
"""

import dataclasses
from typing import Any

from vkd_cache.cache.check import Fault, Finding, check_head, check_unit
from vkd_cache.cache.reader import Cache
from vkd_cache.cache.units import UnitId, files_of_unit, kind_of, record_path
from vkd_cache.errors import CacheError

_ROUNDS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropped:
    """Something that was taken out of a cache.

    Attributes:
        kind: `unit`, `head`, `leftover` of a writer that died, or `obstacle`: an empty folder for a file, or the
            other way round.
        where: path from the cache's root, a unit's of its record.
        reason: what was wrong with it.
    """

    kind: str
    where: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def drop_unit(cache: Cache, unit: UnitId, faults: frozenset[Fault]) -> Dropped | None:
    """Take a unit out, record first, where it still has one of `faults`; None: it is sound by now.

    Raises:
        CacheError: it is published again and again, and never sound.
        OSError: the cache cannot be written to.
    """
    record = record_path(unit)
    first: Finding | None = None
    for _ in range(_ROUNDS):
        files = files_of_unit(unit, cache.storage.paths(f"units/view-{unit.view:04d}"))
        found = next((finding for finding in check_unit(cache, unit) if finding.fault in faults), None)
        if found is None:
            return None if first is None or cache.storage.exists(record) else _dropped(record, first)
        first = first or found
        cache.storage.delete(record)
        for path in files:
            if not cache.storage.exists(record):  # else somebody has published it again, in this very file perhaps
                cache.storage.delete(path)
    raise CacheError(
        f"{cache.url}/{record}: was dropped {_ROUNDS} times, and each time published again and damaged. Stop the "
        "extraction that is running, and look at the disk or at the machine that it runs on."
    )


def _dropped(record: str, finding: Finding) -> Dropped:
    return Dropped(kind="unit", where=record, reason=finding.message)


def drop_head(cache: Cache) -> Dropped | None:
    """Take out a damaged head, which the next extraction writes again; None: it is sound, or dropping mends nothing."""
    for finding in check_head(cache):
        if finding.fault is Fault.DAMAGE:
            cache.storage.delete(finding.where)
            return Dropped(kind="head", where=finding.where, reason=finding.message)
    return None


def drop_leftovers(cache: Cache) -> list[Dropped]:
    """Take out temporary files whose writers are dead."""
    dropped = []
    for path in cache.storage.abandoned():
        cache.storage.delete(path)
        dropped.append(Dropped(kind="leftover", where=path, reason="left by a writer that died."))
    return dropped


def drop_obstacles(cache: Cache) -> tuple[list[Dropped], list[str]]:
    """Take out empty folders in the place of files, and empty files in that of folders.

    Returns:
        What went, and the paths of those that stay because something is in them.
    """
    dropped, kept = [], []
    for path in cache.storage.obstacles(kind_of):
        if cache.storage.delete_empty(path):
            reason = f"stood where {'a file' if kind_of(path) == 'file' else 'a folder'} belongs."
            dropped.append(Dropped(kind="obstacle", where=path, reason=reason))
        else:
            kept.append(path)
    return dropped, kept
