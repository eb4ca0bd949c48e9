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
from vkd_cache.runtime import num_cores
from vkd_cache.sources import Source, source_identity
from vkd_cache.stages.batch_size import batch_size_of_cache, try_sizes
from vkd_cache.stages.extract_checks import nodes_to_store
from vkd_cache.stages.extract_job import ExtractJob
from vkd_cache.stages.extract_plan import ExtractPlan
from vkd_cache.stages.extract_size import view_bytes
from vkd_cache.stages.planning_process import Memory, wait_for
from vkd_cache.stages.planning_sample import Place, part_of, sampled_places
from vkd_cache.stages.planning_sizes import UnitSize, unit_sizes
from vkd_cache.stages.ranks import take_device
from vkd_cache.stages.rendering import Renderer
from vkd_cache.stages.stored_pixels import StoredPixels
from vkd_cache.stages.teaching import TeacherRun, start_teacher
from vkd_cache.stages.transfer import ahead_on_device, model_input
from vkd_cache.stages.units import unit_tasks
from vkd_cache.teachers import load_teacher
from vkd_cache.views.recipe import Recipe, make_recipe

FIRST_BATCH = 8  # samples of the batch by which it is decided what can be measured in the time
MIN_BATCHES = 6  # that are measured, if a batch can be made as small as that takes
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Speed:
    """Of one batch by itself: seconds of a view in the teacher and in one process that renders, and of its start."""

    teacher_s: float
    render_s: float
    warmup_s: float

    def view_s(self, config: Config, on_gpu: bool) -> float:
        """About how long a view takes when both are at work."""
        workers = config.extract.workers
        if not workers:
            return self.teacher_s + self.render_s
        if on_gpu:
            return max(self.teacher_s, self.render_s / min(workers, num_cores()))
        return self.teacher_s + self.render_s / num_cores()


def measure_extraction(request: ExtractRequest, started: float) -> ExtractFound:
    """Extract a sample; in a process of its own, `started` at that moment.

    Raises:
        VkdCacheError: as an extraction would.
    """
    config, source = request.config, request.source
    recipe = make_recipe(config.views)
    device = take_device(config.extract.device)
    nodes = nodes_to_store(config.cache, source)
    teacher = load_teacher(config.teacher, nodes=nodes, num_classes=source.num_classes, view_px=recipe.size_px)
    run = start_teacher(teacher, config.extract, device)
    existing = find_cache(config.cache.url) if config.cache.url else None
    run = _with_batch_size(run, existing, source, recipe)
    full, base = run.batch_size, Memory(device)
    begun = time.monotonic()
    run, speed = _fitting(run, config, source, request.seconds)
    aside_s = time.monotonic() - begun

    where = dataclasses.replace(config.cache, url=config.cache.url or request.folder)
    plan = ExtractPlan(config=dataclasses.replace(config, cache=where), source=source, recipe=recipe, run=run)
    manifest = plan.manifest(existing)
    if existing is not None and request.known:
        check_same(existing.url, existing.manifest, Manifest.from_json(manifest.to_json()))

    view_s = speed.view_s(config, device.type == "cuda")
    per_shard, units_wanted = _layout(request.seconds, view_s, run.batch_size)
    places = sampled_places(
        source, recipe, config.views.seed, batch_size=run.batch_size, batches=per_shard, shards=units_wanted
    )
    part = part_of(source, places)
    manifest = dataclasses.replace(manifest, dataset=source_identity(part).to_json())
    create_cache(request.folder, manifest, teacher.head_tensors())
    writer = _ClockedWriter(open_storage(request.folder), open_cache(request.folder).manifest)
    views = range(math.ceil(units_wanted / (len(places) - 1)))
    began = time.monotonic()
    job = ExtractJob(config, part, recipe, run, writer)
    job.do([UnitId(shard, view) for view in views for shard in range(len(places))])
    failed = job.summary().units_failed
    if failed or not writer.clock:
        raise SourceError(f"plan: a unit of the sample failed, as extraction's would: {failed[0] if failed else ''}")
    tail = -(-2 * config.extract.workers // per_shard)
    view_s, spread, count = _rate([(began, 0), *writer.clock], tail)
    first_at, first_views = writer.clock[0]
    memory = Memory(device)
    return ExtractFound(
        view_s=view_s,
        spread=spread,
        views=count,
        teacher_s=speed.teacher_s,
        render_s=speed.render_s,
        start_s=began - started - aside_s + speed.warmup_s + max(0.0, first_at - began - first_views * view_s),
        batch_size=full,
        measured_batch_size=run.batch_size,
        device=str(device),
        host_bytes=round(memory.host_bytes + (memory.host_bytes - base.host_bytes) * (full / run.batch_size - 1)),
        gpu_bytes=memory.gpu_bytes,
        places=tuple(places),
        units=unit_sizes(writer.cache, len(places), len(source.shards[0].keys)),
        nodes={spec.name: spec.codec for spec in manifest.nodes},
        tokens_per_view=view_bytes(
            [spec for spec in manifest.nodes if spec.layout == "tokens"], source, recipe, config.views.seed, teacher
        ),
    )


def _with_batch_size(run: TeacherRun, existing: Cache | None, source: Source, recipe: Recipe) -> TeacherRun:
    """With the batch size that extraction will use, where nobody says it: that of the cache, or the fastest."""
    if run.batch_size:
        return run
    stored = batch_size_of_cache(existing.manifest) if existing is not None else None
    return dataclasses.replace(run, batch_size=stored or try_sizes(run, source, recipe)[0])


def _fitting(run: TeacherRun, config: Config, source: Source, seconds: float) -> tuple[TeacherRun, _Speed]:
    """The teacher with batches of which some can be measured in `seconds`: those configured, or smaller ones."""
    wanted = run.batch_size
    if run.compiled or run.device.type == "cuda" or wanted <= FIRST_BATCH:
        return run, _speed(run, config, source)
    small = dataclasses.replace(run, batch_size=FIRST_BATCH)
    affordable = seconds / MIN_BATCHES / _speed(small, config, source).view_s(config, on_gpu=False)
    if affordable < wanted:
        run = dataclasses.replace(run, batch_size=max(FIRST_BATCH, 1 << int(affordable).bit_length() - 1))
    return run, _speed(run, config, source)


def _speed(run: TeacherRun, config: Config, source: Source) -> _Speed:
    """The speed of one batch of the first unit, by itself; the teacher has run once before, which is `warmup_s`."""
    recipe = make_recipe(config.views)
    renderer = Renderer(source, recipe, config.views.seed, stored=StoredPixels.wanted(config.cache))
    tasks = unit_tasks(source, recipe, config.views.seed, UnitId(0, 0), run.batch_size)
    task = max(tasks, key=lambda task: len(task.row))
    begun = time.perf_counter()
    rendered = renderer[task]
    render_s = time.perf_counter() - begun
    if rendered.error is not None:
        raise rendered.error
    (batch, pixels), = ahead_on_device([rendered], run.device)
    images = model_input(batch, pixels)
    times = [wait_for(run.device)]
    for _ in range(2):
        run(images)
        times.append(wait_for(run.device))
    first, second = times[1] - times[0], times[2] - times[1]
    return _Speed(
        teacher_s=second / len(task.row), render_s=render_s / len(task.row), warmup_s=max(0.0, first - second)
    )


def _layout(seconds: float, view_s: float, batch_size: int) -> tuple[int, int]:
    """Batches of a unit of the sample, and how many such units."""
    batches = max(MIN_BATCHES, int(seconds / view_s / batch_size))
    per_unit = max(1, batches // _UNITS)
    return per_unit, -(-batches // per_unit)


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
