"""Stage one: run the teacher once over planned views, and publish its features as units of a cache.

    source shards -> render tasks (worker processes) -> mixed images (device) -> teacher -> writer thread -> units

Only whole units are published, so the same command continues an interrupted job, and any number of processes may work
on one cache: each takes every N-th unit.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import torch

from vkd_cache import console
from vkd_cache.cache.codecs import resolve_codec
from vkd_cache.cache.reader import Cache, find_cache
from vkd_cache.cache.schema import Manifest, NodeSpec, UnitRecord
from vkd_cache.cache.writer import CacheWriter, create_cache
from vkd_cache.config import Config, config_to_json, parse_view_range
from vkd_cache.errors import ConfigError, SourceError, TeacherError
from vkd_cache.runtime import JobSplit, hardware, library_versions, resolve_device
from vkd_cache.sources import Source, open_source, source_identity
from vkd_cache.stages.rendering import RenderedBatch, Renderer, RenderTask, render_loader
from vkd_cache.stages.teaching import TeacherRun, start_teacher
from vkd_cache.stages.transfer import ahead_on_device, mixed_images
from vkd_cache.stages.units import UnitAssembly, UnitId, unit_tasks, units_of_worker
from vkd_cache.teachers import load_teacher
from vkd_cache.views.recipe import Recipe, make_recipe

PROBE_SAMPLES = 256  # of the first unit: enough for a stable loss effect, and seconds on a CPU
MAX_UNITS_WAITING = 2  # finished units that may wait for the writer before the teacher does


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractSummary:
    """What one run did.

    Attributes:
        units_published: units this run wrote.
        units_skipped: units of this worker that were published before.
        units_failed: one message per unit that could not be made.
        samples: views rendered and stored by this run.
        broken: (key, reason) of broken images, once per key.
        bytes: bytes of the units and records written.
        seconds: wall-clock time.
    """

    units_published: int
    units_skipped: int
    units_failed: tuple[str, ...]
    samples: int
    broken: tuple[tuple[str, str], ...]
    bytes: int
    seconds: float

    @property
    def exit_code(self) -> int:
        """0, or 3 when some units failed."""
        return 3 if self.units_failed else 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def extract(config: Config, split: JobSplit, *, dry_run: bool = False) -> ExtractSummary:
    """Make this worker's missing units of the cache that `config` describes.

    Raises:
        VkdCacheError: a configuration, source, teacher or cache that cannot be used; a broken image when strict.
    """
    started = time.monotonic()
    _check_config(config)
    source = open_source(config.source.train, split="train", shard_size=config.source.shard_size)
    recipe = make_recipe(config.views)
    views = parse_view_range(config.views.count)
    device = torch.device(resolve_device(config.extract.device, split.local_index))
    teacher = load_teacher(
        config.teacher, nodes=config.cache.nodes, num_classes=source.num_classes, view_px=recipe.size_px
    )
    run = start_teacher(teacher, config.extract, device)
    existing = find_cache(config.cache.url)
    manifest = plan_manifest(config, source, recipe, run, existing)
    units = units_of_worker(len(source.shards), views, split.index, split.count)
    if dry_run:
        return _dry_run(config, source, manifest, existing, units)

    writer = create_cache(config.cache.url, manifest, teacher.head_tensors())
    todo = _unpublished(writer, units)
    _warn_of_batch_size(writer.manifest, run)
    log_name = _write_run_log(writer, config, split, None)
    job = _Job(config, source, recipe, run, writer)
    job.do(todo)
    summary = dataclasses.replace(
        job.summary(), units_skipped=len(units) - len(todo), seconds=time.monotonic() - started
    )
    _write_run_log(writer, config, split, summary, log_name)
    _say_summary(config, summary)
    return summary


def _check_config(config: Config) -> None:
    problems = []
    for where, value, flag in (
        ("[source] train", config.source.train, "--source"),
        ("[cache] url", config.cache.url, "--cache"),
        ("[teacher] name", config.teacher.name, "--teacher"),
    ):
        if not value:
            problems.append(f"{where} is empty: give {flag} or set it in the pipeline file.")
    if config.extract.batch_size % 2:
        problems.append(
            f"[extract] batch_size: found {config.extract.batch_size}, expected an even number, so that the two images "
            "of a mixed pair are in one batch."
        )
    try:
        parse_view_range(config.views.count)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def plan_manifest(
    config: Config, source: Source, recipe: Recipe, run: TeacherRun, existing: Cache | None
) -> Manifest:
    """The manifest this run would write; codecs that were measured before are taken from `existing`."""
    nodes = _reusable_nodes(config, existing)
    if nodes is None:
        nodes = _measured_nodes(config, source, recipe, run)
    identity = source_identity(source)
    return Manifest(
        dataset=identity.to_json(),
        recipe=recipe.to_json(),
        seed=config.views.seed,
        nodes=nodes,
        teacher=run.teacher.identity,
        head=run.teacher.head_identity(),
        numerics=run.numerics(),
        versions=library_versions(),
        backend=config.cache.backend,
        block_samples=config.cache.block_samples if config.cache.backend == "webdataset" else 0,
    )


def _reusable_nodes(config: Config, existing: Cache | None) -> tuple[NodeSpec, ...] | None:
    if existing is None:
        return None
    requested = {node.dtype for node in existing.manifest.nodes}
    return existing.manifest.nodes if requested == {config.cache.dtype} else None


def _measured_nodes(config: Config, source: Source, recipe: Recipe, run: TeacherRun) -> tuple[NodeSpec, ...]:
    """Run the teacher on the first samples of the first unit: shapes, and the codecs that `dtype` leaves open.

    Always shard 0, view 0, whatever this worker's share is, so that all workers decide alike.
    """
    tasks = unit_tasks(source, recipe, config.views.seed, (0, 0), run.batch_size)
    tasks = tasks[: max(1, PROBE_SAMPLES // run.batch_size)]
    outputs: list[dict[str, torch.Tensor]] = []
    for batch, pixels in _batches(Renderer(source, recipe, config.views.seed), tasks, 0, run):
        if batch.error is not None:
            raise batch.error
        values = run(mixed_images(pixels, batch.mix))
        keep = torch.from_numpy(batch.ok)
        outputs.append({name: tensor.cpu()[keep] for name, tensor in values.items()})
    nodes = {name: torch.cat([values[name] for values in outputs]) for name in outputs[0]}
    head = run.teacher.head_tensors()
    return tuple(resolve_codec(name, config.cache.dtype, values, head) for name, values in nodes.items())


def _batches(
    renderer: Renderer, tasks: Any, workers: int, run: TeacherRun
) -> Iterator[tuple[RenderedBatch, torch.Tensor]]:
    loader = render_loader(renderer, tasks, workers=workers, pin_memory=run.device.type == "cuda")
    return ahead_on_device(loader, run.device)


class _Job:
    """The loop over this worker's units, with its writer thread and its bookkeeping."""

    def __init__(
        self, config: Config, source: Source, recipe: Recipe, run: TeacherRun, writer: CacheWriter
    ) -> None:
        self._config = config
        self._source = source
        self._renderer = Renderer(source, recipe, config.views.seed)
        self._run = run
        self._writer = writer
        self._records: list[UnitRecord] = []
        self._failed: dict[UnitId, str] = {}
        self._broken: dict[str, str] = {}
        self._seconds = {"data": 0.0, "teacher": 0.0, "write": 0.0}

    def do(self, units: list[UnitId]) -> None:
        """Make and publish `units`."""
        total = sum(len(self._source.shards[shard].keys) for shard, _ in units)
        if not units:
            return
        with (
            console.track("extract", total) as progress,
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer") as thread,
        ):
            waiting: list[Future[None]] = []
            for assembly in self._taught(units, progress):
                waiting.append(thread.submit(self._publish, assembly))
                while len(waiting) > MAX_UNITS_WAITING or (waiting and waiting[0].done()):
                    waiting.pop(0).result()
                progress.detail(self._where_time_goes())
            for future in waiting:
                future.result()
            progress.detail(self._where_time_goes())

    def _tasks(self, units: list[UnitId]) -> Iterator[RenderTask]:
        for unit in units:
            yield from unit_tasks(
                self._source, self._renderer.recipe, self._config.views.seed, unit, self._run.batch_size
            )

    def _taught(self, units: list[UnitId], progress: console.Progress) -> Iterator[UnitAssembly]:
        """Assemblies of the units that came through the teacher whole."""
        assembly: UnitAssembly | None = None
        busy: torch.cuda.Event | None = None  # the batch before: one is always queued on the GPU while we wait
        mark = time.monotonic()
        for batch, pixels in _batches(self._renderer, self._tasks(units), self._config.extract.workers, self._run):
            mark = self._spent("data", mark)
            unit, last = batch.tag
            if assembly is None:
                assembly = UnitAssembly(self._source, unit)
            if self._usable(batch):
                assembly.add(batch, self._run(mixed_images(pixels, batch.mix)))
                if busy is not None:
                    busy.synchronize()
                busy = torch.cuda.current_stream().record_event() if self._run.device.type == "cuda" else None
            progress.advance(len(batch.row))
            mark = self._spent("teacher", mark)
            if last:
                if unit not in self._failed:
                    yield assembly
                assembly = None
                mark = time.monotonic()

    def _usable(self, batch: RenderedBatch) -> bool:
        unit, _ = batch.tag
        if batch.error is not None:
            self._failed.setdefault(unit, f"shard {unit[0]}, view {unit[1]}: {batch.error}")
        for position, reason in batch.broken:
            key = self._source.shards[unit[0]].keys[int(batch.row[position])]
            if self._config.extract.strict:
                raise SourceError(
                    f"{self._source.location}: image of key '{key}' is broken: {reason}. Repair or remove it, or run "
                    "without --strict to record and skip it."
                )
            self._broken[key] = reason
        return unit not in self._failed

    def _publish(self, assembly: UnitAssembly) -> None:
        """In the writer thread."""
        started = time.monotonic()
        columns, nodes, broken = assembly.finish()
        shard, view = assembly.unit
        try:
            _check_finite(nodes, self._source, shard, view, columns["row"])
            self._records.append(self._writer.publish(shard, view, columns, nodes, broken))
        except TeacherError as error:
            self._failed[assembly.unit] = f"shard {shard}, view {view}: {error}"
        self._seconds["write"] += time.monotonic() - started

    def _spent(self, what: str, since: float) -> float:
        now = time.monotonic()
        self._seconds[what] += now - since
        return now

    def _where_time_goes(self) -> str:
        waited = max(self._seconds["data"] + self._seconds["teacher"], 1e-9)
        shares = ", ".join(f"{what} {100 * spent / waited:.0f}%" for what, spent in self._seconds.items())
        return f"{shares} | {self._bytes() / 1e6:.1f} MB"

    def _bytes(self) -> int:
        return sum(record.num_bytes for record in self._records)

    def summary(self) -> ExtractSummary:
        """The finished part of the job's summary."""
        return ExtractSummary(
            units_published=len(self._records),
            units_skipped=0,
            units_failed=tuple(self._failed.values()),
            samples=sum(record.num_samples for record in self._records),
            broken=tuple(sorted(self._broken.items())),
            bytes=self._bytes(),
            seconds=0.0,
        )


def _check_finite(
    nodes: dict[str, torch.Tensor], source: Source, shard: int, view: int, rows: Any
) -> None:
    for name, values in nodes.items():
        bad = (~torch.isfinite(values.flatten(1)).all(1)).nonzero().flatten() if len(values) else values
        if len(bad):
            key = source.shards[shard].keys[int(rows[int(bad[0])])]
            raise TeacherError(
                f"node '{name}' is not finite for {len(bad)} samples, first key '{key}' in view {view}. Under float16 "
                "autocast values overflow at 65504: use [extract] autocast = 'bfloat16' or 'off'."
            )


def _unpublished(writer: CacheWriter, units: list[UnitId]) -> list[UnitId]:
    published = {view: writer.published(view) for view in {view for _, view in units}}
    return [(shard, view) for shard, view in units if shard not in published[view]]


def _warn_of_batch_size(manifest: Manifest, run: TeacherRun) -> None:
    stored = manifest.numerics.get("batch_size")
    if stored != run.batch_size:
        console.warn(
            f"the cache was begun with batches of {stored}, this run uses {run.batch_size}: features may differ from "
            "those of an unbroken run in the last bits of a float32."
        )


def _write_run_log(
    writer: CacheWriter, config: Config, split: JobSplit, summary: ExtractSummary | None, name: str | None = None
) -> str:
    """Write what this run was asked for, and at its end what it did, beside the cache."""
    now = datetime.now(UTC)
    name = name or f"extract-{now:%Y%m%dT%H%M%S%f}-{split.index}of{split.count}.json"
    document = {
        "command": "extract",
        "written": now.isoformat(timespec="seconds"),
        "config": config_to_json(config),
        "worker": dataclasses.asdict(split),
        "fingerprint": writer.manifest.fingerprint(),
        "versions": library_versions(),
        "hardware": hardware(),
        "summary": summary.to_json() if summary else None,
    }
    writer.write_run_log(name, json.dumps(document, indent=2).encode())
    return name


def _dry_run(
    config: Config, source: Source, manifest: Manifest, existing: Cache | None, units: list[UnitId]
) -> ExtractSummary:
    published = existing.published() if existing is not None else {}
    todo = [(shard, view) for shard, view in units if shard not in published.get(view, frozenset())]
    samples = sum(len(source.shards[shard].keys) for shard, _ in todo)
    sample_bytes = sum(node.sample_bytes for node in manifest.nodes)
    console.show_table(
        "extract, dry run: nothing is written",
        ["what", "value"],
        [
            ["source", f"{source.location} ({source.kind}, {sum(map(len, (s.keys for s in source.shards)))} images, "
                       f"{len(source.shards)} shards, {source.num_classes} classes)"],
            ["views", f"{config.views.count} of recipe {config.views.recipe} at {config.views.size_px} px"],
            ["teacher", f"{manifest.teacher['name']} on {manifest.numerics['device']}"],
            ["nodes", ", ".join(f"{n.name} {'x'.join(map(str, n.shape))} as {n.codec}" for n in manifest.nodes)],
            ["cache", f"{config.cache.url} ({manifest.backend})" + (", exists" if existing else ", new")],
            ["units to make", f"{len(todo)} of this worker's {len(units)}"],
            ["images to render", str(samples)],
            ["node bytes", f"{samples * sample_bytes / 1e6:.1f} MB before compression"],
        ],
    )
    return ExtractSummary(
        units_published=0,
        units_skipped=len(units) - len(todo),
        units_failed=(),
        samples=0,
        broken=(),
        bytes=0,
        seconds=0.0,
    )


def _say_summary(config: Config, summary: ExtractSummary) -> None:
    rate = summary.samples / max(summary.seconds, 1e-9)
    console.say(
        f"extract: {summary.units_published} units published, {summary.units_skipped} were there, "
        f"{len(summary.units_failed)} failed; {summary.samples} views, {summary.bytes / 1e6:.1f} MB, "
        f"{summary.seconds:.1f} s ({rate:.1f} images/s) -> {config.cache.url}"
    )
    if summary.broken:
        shown = ", ".join(f"'{key}' ({reason})" for key, reason in summary.broken[:5])
        console.warn(f"{len(summary.broken)} broken images were recorded and skipped: {shown}")
    for message in summary.units_failed:
        console.warn(f"unit failed: {message}")


