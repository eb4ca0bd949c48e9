"""Checking a cache: its files, on request the pixels that the teacher saw, and the teacher itself.

    files     every record, file, checksum, array          always, all of them; needs nothing else
    pixels    views rendered and planned again             `--pixels`: a sample of views; needs the source
    teacher   the teacher's values on replayed views       `--teacher`: a sample of views; needs source and teacher

A newcomer's trap: a unit that is not published is no error, for a cache may grow; it is noted.
"""

import dataclasses
import time
from typing import Any

from vkd_cache import console
from vkd_cache.cache.check import check_layout, check_unit
from vkd_cache.cache.reader import MANIFEST_PATH, Cache, open_cache
from vkd_cache.cache.units import UnitId
from vkd_cache.config import Config
from vkd_cache.errors import ConfigError
from vkd_cache.sources import Source, open_source, source_identity
from vkd_cache.stages.verify_pixels import PixelCheck
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
    """

    url: str
    source: str = ""
    pixels: bool = False
    teacher: bool = False
    sample: int = 64


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
    """

    url: str
    fingerprint: str
    units: int
    samples: int
    broken: int
    bytes: int
    levels: tuple[Level, ...]
    seconds: float

    @property
    def errors(self) -> int:
        """Errors of all levels."""
        return sum(level.errors for level in self.levels)

    @property
    def exit_code(self) -> int:
        """0 if the cache is what it says, 3 if not."""
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
            "seconds": round(self.seconds, 3),
        }


def verify(config: Config, request: VerifyRequest) -> VerifyReport:
    """Check the cache at `request.url`.

    Raises:
        ConfigError: pixels or teacher without a source.
        CacheFormatError, CorruptCacheError: there is no cache, or its manifest is damaged: nothing can be checked.
        SourceError, TeacherError: the source or the teacher cannot be had.
    """
    started = time.monotonic()
    if (request.pixels or request.teacher) and not request.source:
        raise ConfigError("[source] train is empty, and --pixels and --teacher need the images: give --source.")
    cache = open_cache(request.url)
    source = _open_source(cache, request.source) if request.source else None
    files = Level(name="files")
    same_source = _check_layout(cache, source, files)
    sound, totals = _check_units(cache, files)
    levels = [files]
    if source is not None and same_source:
        chosen = choose_rows(sound, request.sample, seed=int(cache.fingerprint[:15], 16))
        if request.pixels:
            levels.append(Level(name="pixels"))
            PixelCheck(cache, source, levels[-1]).run(chosen, config.extract.workers)
        if request.teacher:
            levels.append(Level(name="teacher"))
            check_teacher(cache, source, config, chosen, levels[-1])
    return VerifyReport(
        url=cache.url,
        fingerprint=cache.fingerprint,
        levels=tuple(levels),
        seconds=time.monotonic() - started,
        **totals,
    )


def _open_source(cache: Cache, spec: str) -> Source:
    # a folder has to be cut as it was; the last shard may be smaller, the largest tells
    shard_size = max(cache.manifest.dataset["shard_counts"], default=0)
    return open_source(spec, split="train", shard_size=max(shard_size, 1))


def _check_layout(cache: Cache, source: Source | None, level: Level) -> bool:
    """Everything outside the units; whether the source is the cache's."""
    identity = source_identity(source).to_json() if source is not None else None
    for finding in check_layout(cache, identity):
        level.add(finding)
    return identity == cache.manifest.dataset


def _check_units(cache: Cache, level: Level) -> tuple[dict[UnitId, int], dict[str, int]]:
    """Rows of the source shard of every sound unit, and totals over all units."""
    sound: dict[UnitId, int] = {}
    units = cache.units
    totals = {"units": len(units), "samples": 0, "broken": 0, "bytes": 0}
    with console.track("verify files", len(units), "units") as progress:
        for unit in units:
            before = level.errors
            for finding in check_unit(cache, unit):
                level.add(finding)
            level.checked += 1
            progress.advance()
            if level.errors > before:
                continue
            record = cache.record(*unit)
            sound[unit] = record.num_samples + len(record.broken)
            totals["samples"] += record.num_samples
            totals["broken"] += len(record.broken)
            totals["bytes"] += record.num_bytes
    for view, shards in cache.published().items():
        if len(shards) < cache.manifest.num_shards:
            level.note(MANIFEST_PATH, f"view {view}: {len(shards)} of {cache.manifest.num_shards} units are published.")
    return sound, totals
