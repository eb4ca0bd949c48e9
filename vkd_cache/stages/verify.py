"""Checking a cache: its files, on request the pixels that the teacher saw, and the teacher itself.

    files     every record, file, checksum, array          always, all of them; needs nothing else
    pixels    views rendered and planned again             `--pixels`: a sample of views; needs the source
    teacher   the teacher's values on replayed views       `--teacher`: a sample of views; needs source and teacher

With `--repair`, what the level `files` finds damaged is dropped, so that the same extraction makes it again.

A newcomer's trap: a unit that is not published is no error, for a cache may grow; it is noted.
"""

import contextlib
import dataclasses
import itertools
import time
from typing import Any

from vkd_cache import console
from vkd_cache.cache.check import Fault, check_layout, check_unit
from vkd_cache.cache.reader import MANIFEST_PATH, Cache, open_cache
from vkd_cache.cache.repair import Dropped
from vkd_cache.cache.schema import UnitRecord
from vkd_cache.cache.storage import open_storage
from vkd_cache.cache.units import UnitId
from vkd_cache.config import Config
from vkd_cache.errors import CacheError, CacheFormatError, CacheVersionError, ConfigError, CorruptCacheError
from vkd_cache.sources import Source, open_source, source_identity
from vkd_cache.stages.copying import copies_of
from vkd_cache.stages.verify_pixels import PixelCheck
from vkd_cache.stages.verify_repair import Repair, repair_cache
from vkd_cache.stages.verify_sample import Level, choose_rows
from vkd_cache.stages.verify_teacher import check_teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyRequest:
    """What to verify.

    Attributes:
        url: of the cache.
        source: the source that it was made from; empty: only the files are checked.
        pixels: render views again.
        teacher: run the teacher again.
        sample: views that `pixels` and `teacher` look at, drawn from all units; 0: all.
        repair: drop what is damaged.
        again: the command that makes what was dropped, where it is known.
    """

    url: str
    source: str = ""
    pixels: bool = False
    teacher: bool = False
    sample: int = 64
    repair: bool = False
    again: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        url: of the cache.
        fingerprint: of its manifest.
        units: published units.
        samples: views stored in them.
        broken: entries for broken images in them.
        bytes: of the units' files.
        levels: those that ran.
        seconds: wall-clock time.
        repaired: what was dropped.
        next_step: what to do about it.
    """

    url: str
    fingerprint: str
    units: int
    samples: int
    broken: int
    bytes: int
    levels: tuple[Level, ...]
    seconds: float
    repaired: tuple[Dropped, ...] = ()
    next_step: str = ""

    @property
    def errors(self) -> int:
        """Errors of all levels."""
        return sum(level.errors for level in self.levels)

    @property
    def exit_code(self) -> int:
        """0 if the cache is what it says, 3 if it was not, also where what was wrong has been dropped."""
        return 3 if self.errors else 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the findings of all levels in one list."""
        return {
            "url": self.url,
            "fingerprint": self.fingerprint,
            "verdict": f"{self.errors} errors" if self.errors else "sound",
            "units": self.units,
            "samples": self.samples,
            "broken": self.broken,
            "bytes": self.bytes,
            "levels": {level.name: level.to_json() for level in self.levels},
            "findings": [
                {
                    "level": level.name,
                    "kind": "error" if finding.is_error else "note",
                    "where": finding.where,
                    "message": finding.message,
                }
                for level in self.levels
                for finding in level.findings
            ],
            "repaired": [entry.to_json() for entry in self.repaired],
            "next": self.next_step,
            "seconds": round(self.seconds, 3),
        }


def verify(config: Config, request: VerifyRequest) -> VerifyReport:
    """Check the cache at `request.url`.

    Raises:
        ConfigError: pixels or teacher without a source.
        CacheFormatError, CorruptCacheError: there is no cache, or its manifest is damaged: nothing can be checked.
        SourceError, TeacherError: the source or the teacher cannot be had.
        OSError: something is to be dropped, and the cache cannot be written to.
    """
    started = time.monotonic()
    if (request.pixels or request.teacher) and not request.source:
        raise ConfigError("[source] train is empty, and --pixels and --teacher need the images: give --source.")
    cache = _open(request)
    source = _open_source(cache, request.source, config) if request.source else None
    files = Level(name="files")
    same_source = _check_layout(cache, source, files)
    units = _check_units(cache, files)
    repair = Repair()
    if request.repair:
        repair = repair_cache(cache, units.bad, num_own=units.num_own, converted=units.converted)
    levels = [files]
    if source is not None and same_source:
        chosen = choose_rows(units.sound, request.sample, seed=int(cache.fingerprint[:15], 16))
        if request.pixels:
            levels.append(Level(name="pixels"))
            PixelCheck(cache, source, levels[-1]).run(chosen, config.extract.workers)
        if request.teacher:
            levels.append(Level(name="teacher"))
            check_teacher(cache, source, config, chosen, levels[-1])
    return VerifyReport(
        url=cache.url,
        fingerprint=cache.fingerprint,
        units=units.checked,
        samples=units.samples,
        broken=units.broken,
        bytes=units.bytes,
        levels=tuple(levels),
        seconds=time.monotonic() - started,
        repaired=repair.dropped,
        next_step=_next_step(request, repair, levels, same_source=source is None or same_source),
    )


def _open(request: VerifyRequest) -> Cache:
    """The cache; where it is to be repaired and has a manifest that cannot be, with what to do instead."""
    try:
        return open_cache(request.url)
    except CacheVersionError:
        raise
    except (CacheFormatError, CorruptCacheError) as error:
        if not request.repair or not open_storage(request.url).exists(MANIFEST_PATH):
            raise
        raise type(error)(
            f"{error} --repair cannot mend a manifest, and drops nothing without one: restore it from a copy. Without "
            "a copy, move it away and run the same `vkd-cache extract` again: with the same settings, data and "
            "library versions it writes the same manifest and keeps every unit."
        ) from error


def _next_step(request: VerifyRequest, repair: Repair, levels: list[Level], *, same_source: bool) -> str:
    if not request.repair:
        return ""
    sentences = [repair.advice(request.url, request.again)]
    if not same_source or any(level.errors for level in levels[1:]):
        sentences.append(
            "What differs from the source, and errors of pixels and teacher, are not repaired: they mean another "
            "source, decoder or teacher than the cache was made with, and units made with these would be other ones."
        )
    return " ".join(filter(None, sentences)) or "Nothing to repair."


def _open_source(cache: Cache, spec: str, config: Config) -> Source:
    # a folder has to be cut as it was; the last shard may be smaller, the largest tells
    shard_size = max(cache.manifest.dataset["shard_counts"], default=0)
    return open_source(spec, split="train", shard_size=max(shard_size, 1), copies=copies_of(config.source))


def _check_layout(cache: Cache, source: Source | None, level: Level) -> bool:
    """Everything outside the units; whether the source is the cache's."""
    identity = source_identity(source).to_json() if source is not None else {}
    for finding in check_layout(cache, identity):
        level.add(finding)
    return all(cache.manifest.dataset.get(name) == value for name, value in identity.items())


@dataclasses.dataclass(kw_only=True)
class _Units:
    """What the level `files` learns of the units.

    Attributes:
        sound: rows of the source shard of every sound unit.
        bad: the faults of the others.
        checked: all of them.
        samples, broken, bytes: totals over the sound ones.
        num_own: units whose record can be read and names the manifest's fingerprint.
        converted: some were converted from another cache.
    """

    sound: dict[UnitId, int] = dataclasses.field(default_factory=dict)
    bad: dict[UnitId, frozenset[Fault]] = dataclasses.field(default_factory=dict)
    checked: int = 0
    samples: int = 0
    broken: int = 0
    bytes: int = 0
    num_own: int = 0
    converted: bool = False


def _check_units(cache: Cache, level: Level) -> _Units:
    units, found = cache.units, _Units()
    with console.track("verify files", len(units), "units") as progress:
        for unit in units:
            findings = list(check_unit(cache, unit))
            for finding in findings:
                level.add(finding)
            level.checked += 1
            progress.advance()
            faults = frozenset(finding.fault for finding in findings if finding.is_error)
            if faults:
                found.bad[unit] = faults
            with contextlib.suppress(CacheError, OSError):  # told already
                record = cache.record(*unit)
                found.num_own += 1
                if not faults:
                    _count(found, unit, record)
    found.checked = len(units)
    _note_missing(cache, level)
    return found


def _note_missing(cache: Cache, level: Level) -> None:
    """Units that are not published: no error, for a cache may grow."""
    published = cache.published()
    for view, shards in published.items():
        if len(shards) < cache.manifest.num_shards:
            level.note(MANIFEST_PATH, f"view {view}: {len(shards)} of {cache.manifest.num_shards} units are published.")
    for before, view in itertools.pairwise([-1, *published]):
        if view - before > 1:
            which = f"view {view - 1}" if view - before == 2 else f"views {before + 1} to {view - 1}"
            level.note(MANIFEST_PATH, f"{which}: no unit is published, though view {view} has some.")
    if not published:
        level.note(MANIFEST_PATH, "no unit is published.")


def _count(found: _Units, unit: UnitId, record: UnitRecord) -> None:
    found.sound[unit] = record.num_samples + len(record.broken)
    found.samples += record.num_samples
    found.broken += len(record.broken)
    found.bytes += record.num_bytes
    found.converted |= record.origin is not None
