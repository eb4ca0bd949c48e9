"""Stage one on a sample: how long the extraction of a view takes here, and what its units look like.

The stage's own loop runs, into a cache in a temporary folder. A newcomer's trap: the rate is taken between two units
that were published. Before the first lies the start, and at the end the data workers have nothing left to do, which on
a CPU makes the teacher faster than it ever is in a long job.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vkd_cache.cache.arrays import Array
from vkd_cache.cache.reader import Cache, find_cache, open_cache
from vkd_cache.cache.schema import Manifest, UnitRecord
from vkd_cache.cache.storage import Storage, open_storage
from vkd_cache.cache.units import UnitId
from vkd_cache.cache.writer import CacheWriter, check_same, create_cache
from vkd_cache.config import Config
from vkd_cache.errors import SourceError
from vkd_cache.sources import Source, is_detection, source_identity
from vkd_cache.stages.extract_checks import nodes_to_store
from vkd_cache.stages.extract_job import ExtractJob
from vkd_cache.stages.extract_plan import ExtractPlan
from vkd_cache.stages.extract_size import view_bytes
from vkd_cache.stages.planning_process import Memory
from vkd_cache.stages.planning_sample import Place, first_places, part_of, sampled_places
from vkd_cache.stages.planning_sizes import UnitSize, unit_sizes
from vkd_cache.stages.planning_speed import FIRST_BATCH, MIN_BATCHES, Speed, fitting, with_batch_size
from vkd_cache.stages.ranks import take_device
from vkd_cache.stages.teaching import TeacherRun, memory_told, start_teacher
from vkd_cache.teachers import load_teacher
from vkd_cache.views.recipe import make_recipe

PROBED = 256  # images that an extraction measures stored types on
_PROBE_SHARE = 0.5  # of the time to measure for, that may go into it here
_UNITS = 12  # of the sample, about: the rate is taken between two of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractRequest:
    """What to measure.

    Attributes:
        config: of the extraction; its cache is only looked at.
        source: all of it.
        known: whether the weights are those that an extraction would use.
        folder: of the sample's cache, which is made here.
        seconds: to measure for.
    """

    config: Config
    source: Source
    known: bool
    folder: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractFound:
    """What was measured.

    Attributes:
        view_s: seconds of a view in a job that is under way.
        spread: standard error of that, relative.
        views: that it was measured on.
        teacher_s: seconds of the teacher's forward alone, of a view.
        render_s: CPU seconds of rendering a view.
        start_s: seconds from the start of the process to the first unit, less what that unit's views take.
        batch_size: of the teacher's batches.
        measured_batch_size: of those that were measured, smaller where the others would have taken too long.
        device: the teacher's.
        host_bytes, gpu_bytes: peak memory, see `Memory`; for batches of `batch_size`.
        places: where the samples of the sample's cache lie.
        units: sizes of units that were published there, and of several of them in one.
        nodes: codec by node.
        tokens_per_view: bytes of the tokens of a view before compression, mean over the data set.
    """

    view_s: float
    spread: float
    views: int
    teacher_s: float
    render_s: float
    start_s: float
    batch_size: int
    measured_batch_size: int
    device: str
    host_bytes: int
    gpu_bytes: int
    places: tuple[Place, ...]
    units: tuple[UnitSize, ...]
    nodes: dict[str, str]
    tokens_per_view: float


class _ClockedWriter(CacheWriter):
    """A cache's writer that remembers when it published how many samples."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        super().__init__(storage, manifest)
        self.clock: list[tuple[float, int]] = []

    def publish(
        self,
        shard: int,
        view: int,
        columns: Mapping[str, Array],
        nodes: Mapping[str, Any],
        broken: Sequence[tuple[str, int, str]] = (),
        *,
        exclusive: bool = False,
    ) -> UnitRecord:
        """As that of any writer."""
        record = super().publish(shard, view, columns, nodes, broken, exclusive=exclusive)
        self.clock.append((time.monotonic(), record.num_samples + len(record.broken)))
        return record


def measure_extraction(request: ExtractRequest, started: float) -> ExtractFound:
    """Extract a sample; in a process of its own, `started` at that moment.

    Raises:
        VkdCacheError: as an extraction would.
    """
    begin = _begin(request)
    run, source, device = begin.run, request.source, begin.run.device
    began = time.monotonic()
    places, clock, cache = _extract_sample(request, begin)
    view_s, spread, count = _rate([(began, 0), *clock], begin.tail)
    first_at, first_views = clock[0]
    filling_s = max(0.0, first_at - began - first_views * view_s)
    memory, specs = Memory(device), cache.manifest.nodes
    more = begin.batch_size / run.batch_size - 1
    return ExtractFound(
        view_s=view_s,
        spread=spread,
        views=count,
        teacher_s=begin.speed.teacher_s,
        render_s=begin.speed.render_s,
        start_s=began - started - begin.aside_s + begin.speed.warmup_s + filling_s,
        batch_size=begin.batch_size,
        measured_batch_size=run.batch_size,
        device=str(device),
        host_bytes=round(memory.host_bytes + more * (memory.host_bytes - begin.host_bytes)),
        gpu_bytes=memory.gpu_bytes,
        places=tuple(places),
        units=unit_sizes(cache, len(places), len(source.shards[0].keys)),
        nodes={spec.name: spec.codec for spec in specs},
        tokens_per_view=view_bytes(
            [spec for spec in specs if spec.layout == "tokens"],
            source,
            make_recipe(request.config.views),
            request.config.views.seed,
            run.teacher,
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Begin:
    """An extraction before its first unit.

    Attributes:
        run: the teacher, with batches that can be measured.
        batch_size: of the batches that an extraction would have.
        speed: of one batch.
        manifest: of the cache that would be written.
        aside_s: seconds that an extraction does not take up to here: they went into finding out the speed. Less those
            that it takes for measuring stored types on more images than here.
        host_bytes: peak memory before any batch.
        per_unit: batches of a unit of the sample.
        num_units: of the sample, about.
        tail: units at the end of the sample that do not count: nothing is rendered any more meanwhile.
    """

    run: TeacherRun
    batch_size: int
    speed: Speed
    manifest: Manifest
    aside_s: float
    host_bytes: int
    per_unit: int
    num_units: int
    tail: int


def _begin(request: ExtractRequest) -> _Begin:
    """Do what an extraction does before its first unit, and find out what can be measured in the time."""
    config, source = request.config, request.source
    recipe = make_recipe(config.views)
    device = take_device(config.extract.device)
    nodes = nodes_to_store(config.cache, source)
    teacher = load_teacher(config.teacher, nodes=nodes, num_classes=source.num_classes, view_px=recipe.size_px)
    existing = find_cache(config.cache.url) if config.cache.url else None
    run = with_batch_size(start_teacher(teacher, config.extract, device), existing, source, recipe)
    batch_size, memory = run.batch_size, Memory(device)
    begun = time.monotonic()
    with memory_told(run):
        run, speed = fitting(run, config, source, request.seconds)
    aside_s = time.monotonic() - begun

    where = dataclasses.replace(config.cache, url=config.cache.url or request.folder)
    probed, unprobed = _probed(source, int(_PROBE_SHARE * request.seconds / speed.teacher_s))
    plan = ExtractPlan(config=dataclasses.replace(config, cache=where), source=probed, recipe=recipe, run=run)
    manifest = dataclasses.replace(plan.manifest(existing), dataset=source_identity(source).to_json())
    measures = any(spec.measured for spec in manifest.nodes) and existing is None
    if existing is not None:
        _check_existing(existing, manifest, known=request.known)
    view_s = speed.view_s(config, device.type == "cuda")
    batches = max(MIN_BATCHES, int(request.seconds / view_s / run.batch_size))
    per_unit = max(1, batches // _UNITS)
    return _Begin(
        run=run,
        batch_size=batch_size,
        speed=speed,
        manifest=manifest,
        aside_s=aside_s - (unprobed * speed.teacher_s if measures else 0.0),
        host_bytes=memory.host_bytes,
        per_unit=per_unit,
        num_units=-(-batches // per_unit),
        tail=-(-2 * config.extract.workers // per_unit),
    )


def _check_existing(existing: Cache, manifest: Manifest, *, known: bool) -> None:
    """Refuse a cache that an extraction would; of a teacher whose weights are not at hand, only the name is known."""
    there = existing.manifest
    if not known:
        teacher = dict(there.teacher) | {"name": manifest.teacher["name"]}
        manifest = dataclasses.replace(manifest, teacher=teacher, head=there.head)
    check_same(existing.url, there, Manifest.from_json(manifest.to_json()))


def _probed(source: Source, count: int) -> tuple[Source, int]:
    """What stored types are measured on: all of `source`, of whose first unit that takes PROBED images, or `count` of
    them if those are fewer; and how many fewer. A detector's images have so many tokens that a few are enough."""
    probed = min(PROBED, len(source.shards[0].keys))
    count = max(FIRST_BATCH, count)
    if is_detection(source) or count >= probed:
        return source, 0
    return part_of(source, first_places(source, count)), probed - count


def _extract_sample(request: ExtractRequest, begin: _Begin) -> tuple[list[Place], list[tuple[float, int]], Cache]:
    """Where the samples lie, when how many were published, and the cache that they are in.

    Raises:
        SourceError: a unit that cannot be made.
    """
    config, run = request.config, begin.run
    recipe = make_recipe(config.views)
    places = sampled_places(
        request.source,
        recipe,
        config.views.seed,
        batch_size=run.batch_size,
        batches=begin.per_unit,
        shards=begin.num_units,
    )
    part = part_of(request.source, places)
    manifest = dataclasses.replace(begin.manifest, dataset=source_identity(part).to_json())
    create_cache(request.folder, manifest, run.teacher.head_tensors())
    writer = _ClockedWriter(open_storage(request.folder), open_cache(request.folder).manifest)
    job = ExtractJob(config, part, recipe, run, writer)
    views = math.ceil(begin.num_units / (len(places) - 1))
    job.do([UnitId(shard, view) for view in range(views) for shard in range(len(places))])
    failed = job.summary().units_failed
    if failed:
        raise SourceError(f"plan: a unit of the sample failed, as it would in an extraction: {failed[0]}")
    return places, writer.clock, writer.cache


def _rate(clock: Sequence[tuple[float, int]], tail: int) -> tuple[float, float, int]:
    """Seconds of a view, its relative standard error, and the number of views that it was measured on.

    Args:
        clock: moments, and the views that were done in the time before each of them.
        tail: units at the end that do not count, as long as half of all do.
    """
    units = len(clock) - 1
    head = min(max(1, units // 6), units - 1)
    last = max(head + 1, units - min(tail, units // 3))
    parts = [(clock[at][0] - clock[at - 1][0], clock[at][1]) for at in range(head + 1, last + 1)]
    count = sum(views for _, views in parts)
    view_s = sum(took for took, _ in parts) / max(1, count)
    rates = torch.tensor([took / max(1, views) for took, views in parts], dtype=torch.float64)
    error = float(rates.std()) / math.sqrt(len(parts)) if len(parts) > 1 else math.nan
    return view_s, error / view_s if view_s > 0 else math.nan, count
