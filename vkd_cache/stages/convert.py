"""Converting a cache: another backend, dtype or cut of its shards, without the teacher and without the images.

    source's units --(checked, decoded)--> values --(encoded, cut)--> units of the target, each with its origin

Only whole units are published, so the same command continues an interrupted job, converts what the source has got
since, and may be shared out over processes like an extraction. The source is only read.
"""

import dataclasses
import itertools
import time

from vkd_cache import console
from vkd_cache.cache.reader import Cache, open_cache
from vkd_cache.cache.schema import Manifest
from vkd_cache.cache.units import UnitId
from vkd_cache.cache.writer import check_same, start_cache
from vkd_cache.config import parse_view_range
from vkd_cache.errors import ConfigError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.convert_cut import Cut, new_cut, same_cut
from vkd_cache.stages.convert_job import ConvertJob, ConvertSummary
from vkd_cache.stages.convert_plan import ConvertPlan, Wish
from vkd_cache.stages.run_log import RunLog
from vkd_cache.stages.target import find_target, refuse_overlap
from vkd_cache.stages.unit_order import unpublished
from vkd_cache.stages.units import units_of_worker
from vkd_cache.urls import check_place


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """What to convert.

    Attributes:
        source: URL of the cache to convert.
        target: URL of the cache to make.
        wish: backend, dtype and blocks of the target.
        shard_size: samples per shard of the target; None: the source's shards.
        images: the data set that the source was extracted from, for `shard_size`.
        views: which views, as `[views] count` has it; empty: all that are there.
    """

    source: str
    target: str
    wish: Wish = dataclasses.field(default_factory=Wish)
    shard_size: int | None = None
    images: str = ""
    views: str = ""


def convert(request: ConvertRequest, split: JobSplit, *, dry_run: bool = False) -> ConvertSummary:
    """Make this worker's missing units of the target.

    Raises:
        ConfigError: the target is the source, or in it, a step that pretends precision, or a cut that cannot be made.
        SourceError: the data set for another cut cannot be opened.
        CacheError: the source cannot be read, the target is another cache, or cannot be written.
    """
    started = time.monotonic()
    _check_request(request)
    source = open_cache(request.source)
    refuse_overlap(source.url, request.target)
    cut = same_cut(source.manifest)
    if request.shard_size is not None:
        cut = new_cut(source, request.images, request.shard_size)
    existing = find_target(request.target, "TARGET")
    asked, ready = _units(source, cut, request.views, split)
    plan = ConvertPlan(source=source, url=request.target, cut=cut, units=ready, wish=request.wish)
    manifest = Manifest.from_json(plan.manifest().to_json())
    whole = set(ready)
    todo = [unit for unit in asked if unit in whole]
    summary = ConvertSummary(
        source=source.url,
        target=request.target,
        fingerprint=manifest.fingerprint(),
        dry_run=dry_run,
        target_exists=existing is not None,
        backend=manifest.backend,
        shards=manifest.num_shards,
        units_waiting=len(asked) - len(todo),
        codecs=_codecs(source.manifest, manifest),
    )
    if dry_run:
        if existing is not None:
            check_same(existing.url, existing.manifest, manifest)
        num_missing = len(unpublished(existing, todo))
        summary = dataclasses.replace(summary, units_to_convert=num_missing, units_skipped=len(todo) - num_missing)
        _show(summary)
        return dataclasses.replace(summary, seconds=time.monotonic() - started)

    writer = start_cache(request.target, manifest, source.head_file())
    missing = unpublished(writer.cache, todo)
    log = RunLog(writer, "convert", split, {"request": dataclasses.asdict(request)})
    job = ConvertJob(source, cut, writer)
    job.do(missing)
    summary = dataclasses.replace(
        summary,
        **job.counts(),
        units_to_convert=len(missing),
        units_skipped=len(todo) - len(missing),
        leftovers=len(writer.leftovers),
        seconds=time.monotonic() - started,
    )
    log.finish(summary.to_json())
    _say_summary(summary)
    return summary


def _check_request(request: ConvertRequest) -> None:
    """What can be said against a request before anything is opened.

    Raises:
        ConfigError: no target, one that is no place for a cache, or a data set that nothing needs.
    """
    if not request.target:
        raise ConfigError("convert: TARGET is empty, expected a directory or a URL.")
    check_place(request.target, "TARGET")
    if request.images and request.shard_size is None:
        raise ConfigError(
            f"--source: found {request.images}, which only a new --shard-size needs. Give both, or neither."
        )


def _units(source: Cache, cut: Cut, views: str, split: JobSplit) -> tuple[list[UnitId], tuple[UnitId, ...]]:
    """The units of this worker, and all units of the target that the source has all parts of."""
    published = source.published()
    wanted = list(parse_view_range(views)) if views else sorted(published)
    ready = tuple(
        UnitId(shard, view)
        for view, shard in itertools.product(wanted, range(len(cut.pieces)))
        if {piece.shard for piece in cut.pieces[shard]} <= published.get(view, frozenset())
    )
    return units_of_worker(len(cut.pieces), wanted, split.index, split.count), ready


def _codecs(source: Manifest, target: Manifest) -> dict[str, str]:
    return {
        old.name: old.codec if (old.codec, old.passed) == (new.codec, new.passed) else f"{old.codec} -> {new.codec}"
        for old, new in zip(source.nodes, target.nodes, strict=True)
    }


def _show(summary: ConvertSummary) -> None:
    rows = [
        ("source", summary.source),
        ("target", f"{summary.target} ({summary.backend}), " + ("exists" if summary.target_exists else "new")),
        ("nodes", ", ".join(f"{name} {codec}" for name, codec in summary.codecs.items())),
        ("shards", str(summary.shards)),
        ("units to convert", str(summary.units_to_convert)),
        ("units that the source lacks", str(summary.units_waiting)),
    ]
    console.show_table("convert, dry run: nothing is written", ("what", "value"), rows)


def _say_summary(summary: ConvertSummary) -> None:
    codecs = ", ".join(f"{name} {codec}" for name, codec in summary.codecs.items())
    console.say(
        f"convert: {summary.units_converted} units converted, {summary.units_skipped} were there, "
        f"{len(summary.units_failed)} failed; {summary.samples} views, {summary.bytes_before / 1e6:.1f} MB -> "
        f"{summary.bytes_after / 1e6:.1f} MB, {codecs}, {summary.seconds:.1f} s -> {summary.target}"
    )
    if summary.units_overtaken:
        console.say(
            f"convert: another job published {summary.units_overtaken} units of this share meanwhile "
            f"({summary.units_wasted} of them converted twice)"
        )
    if summary.units_waiting:
        console.warn(
            f"{summary.units_waiting} units are not whole in {summary.source} yet. Once they are, the same command "
            "converts them."
        )
    for message in summary.units_failed[:20]:
        console.warn(f"unit failed: {message}")
    if summary.units_failed:
        console.warn(
            f"{len(summary.units_failed)} units failed. Mend the source (vkd-cache verify says more), and run the same "
            "command again."
        )
