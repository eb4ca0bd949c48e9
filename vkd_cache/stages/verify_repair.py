"""What `vkd-cache verify --repair` drops of what the level `files` found, and what it says of the rest.

A newcomer's trap: findings of `--pixels` and `--teacher` are never repaired. The unit is what was published; it is the
source, the decoder or the teacher at hand that differ, and a unit made with them would be another one.
"""

import dataclasses
from collections.abc import Mapping

from vkd_cache import console
from vkd_cache.cache.check import Fault
from vkd_cache.cache.reader import MANIFEST_PATH, Cache
from vkd_cache.cache.repair import Dropped, drop_head, drop_leftovers, drop_obstacles, drop_unit
from vkd_cache.cache.units import UnitId
from vkd_cache.console import counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repair:
    """What a repair did.

    Attributes:
        dropped: what it took out.
        kept: what it left, and why, as sentences.
        converted: the cache holds units that were converted from another cache.
    """

    dropped: tuple[Dropped, ...] = ()
    kept: tuple[str, ...] = ()
    converted: bool = False

    def advice(self, url: str, again: str) -> str:
        """What was dropped, what not, and which command is next.

        Args:
            url: of the cache.
            again: the command that makes its units, where it is known.
        """
        kinds = [entry.kind for entry in self.dropped]
        parts = [counted(kinds.count("unit"), "unit")] if "unit" in kinds else []
        parts += ["the teacher's head"] if "head" in kinds else []
        sentences = list(self.kept)
        if parts:
            if self.converted:
                again = f"the same `vkd-cache convert` into {url} again"
            again = again or f"the same `vkd-cache extract` with --cache {url} again (runs/ there has its settings)"
            sentences.insert(0, f"Dropped {' and '.join(parts)}. Next: {again}; it makes these and nothing else.")
        if "obstacle" in kinds:
            sentences.append(
                f"Removed {counted(kinds.count('obstacle'), 'empty thing')} in the way of the cache's own: the same "
                "extraction makes what belongs there."
            )
        if "leftover" in kinds:
            sentences.append(f"Removed {counted(kinds.count('leftover'), 'file')} of writers that died.")
        return " ".join(sentences)


def repair_cache(cache: Cache, bad: Mapping[UnitId, frozenset[Fault]], *, num_own: int, converted: bool) -> Repair:
    """Drop what is damaged, and what writers that died have left.

    Args:
        cache: the cache, whose manifest is whole.
        bad: the faults of each unit that has any.
        num_own: units that name the manifest's fingerprint.
        converted: whether there are units that were converted from another cache.

    Raises:
        CacheError: a unit is published again and again, and never sound.
        OSError: the cache cannot be written to.
    """
    faults = {Fault.DAMAGE}
    kept = []
    num_foreign = sum(Fault.FOREIGN in found for found in bad.values())
    if num_own:
        faults.add(Fault.FOREIGN)
    elif num_foreign:
        kept.append(
            f"Kept {counted(num_foreign, 'unit')} of another cache, for not one belongs to {MANIFEST_PATH}: it is the "
            f"one that was replaced. Restore {MANIFEST_PATH} from a copy, or move it away and run the extraction that "
            "made the units again: it writes their manifest anew and keeps them."
        )
    dropped = drop_leftovers(cache)
    head = drop_head(cache)
    for unit, found in bad.items():
        gone = drop_unit(cache, unit, frozenset(faults)) if found & faults else None
        if gone is not None:
            console.warn(f"{cache.url}: dropped {gone.where}: {gone.reason}")
            dropped.append(gone)
    removed, in_the_way = drop_obstacles(cache)
    dropped += removed
    kept += [f"Kept {cache.url}/{path}, in which there is something: move it away." for path in in_the_way]
    if head is not None:
        console.warn(f"{cache.url}: dropped {head.where}: {head.reason}")
        dropped.append(head)
    if any(Fault.ELSEWHERE in found for found in bad.values()):
        kept.append("Kept what cannot be read here, or is of a newer format version: see the findings.")
    return Repair(dropped=tuple(dropped), kept=tuple(kept), converted=converted)
