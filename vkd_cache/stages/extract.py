"""Stage one: run the teacher once over planned views, and publish its features as units of a cache.

    source shards -> render tasks (worker processes) -> mixed images (device) -> teacher -> writer thread -> units

Only whole units are published, so the same command continues an interrupted job, and any number of processes may work
on one cache: each takes every N-th unit. Jobs that take the same units are safe too, and get out of each other's way.
"""

import dataclasses
import time

from vkd_cache import console
from vkd_cache.cache.schema import Manifest
from vkd_cache.cache.writer import create_cache
from vkd_cache.config import Config, config_to_json, parse_view_range
from vkd_cache.console import counted
from vkd_cache.errors import ConfigError
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import Source, open_source
from vkd_cache.stages.batch_size import Trial, batch_size_of_cache, try_sizes
from vkd_cache.stages.copying import copies_of
from vkd_cache.stages.extract_checks import check_fit, nodes_to_store
from vkd_cache.stages.extract_job import ExtractJob, ExtractSummary
from vkd_cache.stages.extract_plan import ExtractPlan
from vkd_cache.stages.ranks import take_device
from vkd_cache.stages.run_log import RunLog
from vkd_cache.stages.target import find_target
from vkd_cache.stages.teaching import TeacherRun, start_teacher
from vkd_cache.stages.time_spent import sharing
from vkd_cache.stages.unit_order import unpublished
from vkd_cache.stages.units import units_of_worker
from vkd_cache.teachers import DetectionTeacher, Teacher, load_teacher
from vkd_cache.views.recipe import make_recipe


def extract(config: Config, split: JobSplit, *, dry_run: bool = False) -> ExtractSummary:
    """Make this worker's missing units of the cache that `config` describes.

    Raises:
        VkdCacheError: a configuration, source, teacher or cache that cannot be used; a cache that cannot be written;
            a broken image when strict.
    """
    started = time.monotonic()
    _check_config(config)
    source = open_source(
        config.source.train, split="train", shard_size=config.source.shard_size, copies=copies_of(config.source)
    )
    recipe = make_recipe(config.views)
    check_fit(config, source, recipe)
    existing = find_target(config.cache.url, "--cache")
    device = take_device(config.extract.device, split.local_index)
    nodes = nodes_to_store(config.cache, source)
    teacher = load_teacher(config.teacher, nodes=nodes, num_classes=source.num_classes, view_px=recipe.size_px)
    _warn_of_classes(teacher, source)
    run = start_teacher(teacher, config.extract, device)
    if not run.batch_size and existing is not None:
        run = _as_in_cache(run, existing.manifest)
    tried: list[Trial] = []
    if not (run.batch_size or dry_run):
        size, tried = try_sizes(run, source, recipe)
        run = dataclasses.replace(run, batch_size=size)
    plan = ExtractPlan(config=config, source=source, recipe=recipe, run=run)
    units = units_of_worker(len(source.shards), parse_view_range(config.views.count), split.index, split.count)
    if dry_run:
        todo = unpublished(existing, units)
        plan.show(existing, units, todo)
        return dataclasses.replace(
            ExtractSummary(), units_skipped=len(units) - len(todo), seconds=time.monotonic() - started
        )

    writer = create_cache(config.cache.url, plan.manifest(existing), teacher.head_tensors())
    if not config.extract.batch_size:  # of workers that begin a cache together, one decides
        run = _as_in_cache(run, writer.manifest)
    todo = unpublished(writer.cache, units)
    _warn_of_batch_size(writer.manifest, run)
    if writer.leftovers:
        console.say(f"extract: removed {counted(len(writer.leftovers), 'leftover')} of killed writers")
    asked = {"config": config_to_json(config), "batch_size": run.batch_size}
    log = RunLog(writer, "extract", split, asked | {"batch_sizes_tried": [trial.to_json() for trial in tried]})
    job = ExtractJob(config, source, recipe, run, writer)
    job.do(todo)
    summary = dataclasses.replace(
        job.summary(),
        units_skipped=len(units) - len(todo),
        leftovers=len(writer.leftovers),
        seconds=time.monotonic() - started,
    )
    log.finish(summary.to_json())
    _say_summary(config, summary, sharing(device.type))
    return summary


def _warn_of_classes(teacher: Teacher | DetectionTeacher, source: Source) -> None:
    """Features serve all the same, so this is no error; but it is seldom meant."""
    classes = teacher.identity["num_classes"]
    if classes in (0, source.num_classes):
        return
    found = f"the teacher {teacher.identity['name']} has {classes} classes, {source.location} has {source.num_classes}"
    cure = "its logits cannot teach these labels. Train with [loss] logit_weight = 0, or give"
    if isinstance(teacher, DetectionTeacher):
        cure = "its tokens teach all the same, but were they meant for this data? Else give"
    console.warn(f"{found}: {cure} the weights that were trained for this data.")


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


def _as_in_cache(run: TeacherRun, manifest: Manifest) -> TeacherRun:
    """`run` with batches of the size that the cache was begun with, where it says one."""
    stored = batch_size_of_cache(manifest)
    if stored is None or stored == run.batch_size:
        return run
    console.say(f"extract: batches of {stored}, as the cache was begun with")
    return dataclasses.replace(run, batch_size=stored)


def _warn_of_batch_size(manifest: Manifest, run: TeacherRun) -> None:
    stored = manifest.numerics.get("batch_size")
    if stored != run.batch_size:
        console.warn(
            f"the cache was begun with batches of {stored}, this run uses {run.batch_size}: features may differ from "
            "those of an unbroken run in the last bits of a float32."
        )


def _say_summary(config: Config, summary: ExtractSummary, remark: str) -> None:
    """`remark`: is to be said beside the limit."""
    rate = summary.samples / max(summary.seconds, 1e-9)
    console.say(
        f"extract: {summary.units_published} units published, {summary.units_skipped} were there, "
        f"{len(summary.units_failed)} failed; {summary.samples} views, {summary.bytes / 1e6:.1f} MB, "
        f"{summary.seconds:.1f} s ({rate:.1f} images/s) -> {config.cache.url}"
    )
    if summary.limit:
        busy, data, writer = (f"{100 * summary.shares[name]:.0f}%" for name in ("teacher", "data", "writer"))
        console.say(
            f"extract: limited by the {summary.limit}: the teacher was at work for {busy} of the time, waited for data "
            f"for {data}, for the writer for {writer}{remark}"
        )
    if summary.units_overtaken:
        console.say(
            f"extract: another job published {counted(summary.units_overtaken, 'unit')} of this share meanwhile "
            f"({summary.units_wasted} of them computed twice)"
        )
    if summary.broken:
        shown = ", ".join(f"'{key}' ({reason})" for key, reason in summary.broken[:5])
        more = ", ..." if len(summary.broken) > 5 else ""
        console.warn(f"{len(summary.broken)} broken images were recorded and skipped: {shown}{more}")
    for message in summary.units_failed[:20]:
        console.warn(f"unit failed: {message}")
    if summary.units_failed:
        console.warn(f"{len(summary.units_failed)} units failed. The same command again makes what is missing.")
