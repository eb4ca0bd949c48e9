"""Stage one: run the teacher once over planned views, and publish its features as units of a cache.

    source shards -> render tasks (worker processes) -> mixed images (device) -> teacher -> writer thread -> units

Only whole units are published, so the same command continues an interrupted job, and any number of processes may work
on one cache: each takes every N-th unit.
"""

import dataclasses
import json
import time
from datetime import UTC, datetime

import torch

from vkd_cache import console
from vkd_cache.cache.codecs import resolve_codec
from vkd_cache.cache.reader import Cache, find_cache
from vkd_cache.cache.schema import Manifest, NodeSpec
from vkd_cache.cache.units import UnitId
from vkd_cache.cache.writer import CacheWriter, create_cache
from vkd_cache.config import Config, config_to_json, parse_view_range
from vkd_cache.errors import ConfigError
from vkd_cache.runtime import JobSplit, hardware, library_versions, resolve_device
from vkd_cache.sources import Source, open_source, source_identity
from vkd_cache.stages.extract_job import ExtractJob, ExtractSummary, taught_batches
from vkd_cache.stages.rendering import Renderer
from vkd_cache.stages.teaching import TeacherRun, start_teacher, teacher_head
from vkd_cache.stages.transfer import mixed_images
from vkd_cache.stages.units import unit_tasks, units_of_worker
from vkd_cache.teachers import load_teacher
from vkd_cache.views.recipe import Recipe, make_recipe

PROBE_SAMPLES = 256  # of the first unit: enough for a stable loss effect, and seconds on a CPU


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

    writer = create_cache(config.cache.url, manifest, teacher_head(teacher))
    todo = _unpublished(writer, units)
    _warn_of_batch_size(writer.manifest, run)
    log_name = _write_run_log(writer, config, split, None)
    job = ExtractJob(config, source, recipe, run, writer)
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
        head=None,  # filled in when the head is stored
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
    tasks = unit_tasks(source, recipe, config.views.seed, UnitId(0, 0), run.batch_size)
    tasks = tasks[: max(1, PROBE_SAMPLES // run.batch_size)]
    outputs: list[dict[str, torch.Tensor]] = []
    for batch, pixels in taught_batches(Renderer(source, recipe, config.views.seed), tasks, 0, run):
        if batch.error is not None:
            raise batch.error
        values = run(mixed_images(pixels, batch.mix))
        keep = torch.from_numpy(batch.ok)
        outputs.append({name: tensor.cpu()[keep] for name, tensor in values.items()})
    nodes = {name: torch.cat([values[name] for values in outputs]) for name in outputs[0]}
    head = teacher_head(run.teacher)
    return tuple(resolve_codec(name, config.cache.dtype, values, head) for name, values in nodes.items())


def _unpublished(writer: CacheWriter, units: list[UnitId]) -> list[UnitId]:
    published = {view: writer.published(view) for view in {view for _, view in units}}
    return [UnitId(shard, view) for shard, view in units if shard not in published[view]]


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
    todo = [UnitId(shard, view) for shard, view in units if shard not in published.get(view, frozenset())]
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


