"""Stage two: train a student from cached teacher features, with no teacher in the process.

    source shards + units -> feed (worker processes render, this one joins) -> student + projector -> losses -> step

What a run is made of lies in `run` (what it reads), `feed` (data), `supply` (teacher outputs), `learner` (model and
one step), `loop` (the steps), `checkpoints` and `journal`.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from vkd_cache import console
from vkd_cache.config import Config
from vkd_cache.errors import ConfigError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.checkpoints import find_checkpoint
from vkd_cache.stages.loop import Loop, TrainSummary
from vkd_cache.stages.run import Run, prepare_run


def train(config: Config, split: JobSplit, *, dry_run: bool = False) -> TrainSummary:
    """Train a student as `config` says; under torchrun, this process' share of it.

    Raises:
        VkdCacheError: a configuration, source, cache or checkpoint that cannot be used; pixels that differ from those
            the teacher saw.
    """
    started = time.monotonic()
    _check_config(config)
    run = prepare_run(config, split)
    checkpoint = find_checkpoint(config)
    if dry_run:
        return _dry_run(run, checkpoint)
    with process_group(run):
        supply = run.supply(live=config.train.live_teacher)
        loop = Loop(run, supply)
        if checkpoint is not None:
            loop.resume(checkpoint)
        interrupted = loop.go()
    summary = loop.summary(interrupted, time.monotonic() - started)
    _say_summary(summary)
    return summary


def _check_config(config: Config) -> None:
    problems = [
        f"{where} is empty: give {flag} or set it in the pipeline file."
        for where, value, flag in (
            ("[source] train", config.source.train, "--source"),
            ("[student] name", config.student.name, "--student"),
            ("[train] output", config.train.output, "--output"),
        )
        if not value
    ]
    if config.train.batch_size % 2:
        problems.append(
            f"[train] batch_size: found {config.train.batch_size}, expected an even number, so that the two images of "
            "a mixed pair are in one batch."
        )
    if config.loss.task_weight == config.loss.feature_weight == config.loss.logit_weight == 0:
        problems.append("[loss] all three weights are 0: there is nothing to learn.")
    if problems:
        raise ConfigError("\n".join(problems))


@contextlib.contextmanager
def process_group(run: Run) -> Iterator[None]:
    """Join the other ranks, where there are any; ranks above 0 say nothing."""
    if run.split.count == 1:
        yield
        return
    on_gpu = run.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(run.device)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=run.split.index, world_size=run.split.count)
    console.set_quiet(run.split.index > 0)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _dry_run(run: Run, checkpoint: Path | None) -> TrainSummary:
    config = run.config
    count = sum(len(shard.keys) for shard in run.source.shards)
    teacher = "live" if config.train.live_teacher else f"cache {config.cache.url}" if run.cache else "none"
    batches = count // (config.train.batch_size * run.split.count)
    console.show_table(
        "train, dry run: nothing is written",
        ["what", "value"],
        [
            ["source", f"{run.source.location} ({run.source.kind}, {count} images, {run.num_classes} classes)"],
            ["validation", run.val_source.location if run.val_source else "none: give [source] val"],
            ["views", f"{len(run.views.views)} of recipe {run.recipe.name} at {run.recipe.size_px} px"],
            ["teacher", teacher],
            ["student", f"{config.student.name} on {run.device}, {run.split.count} processes"],
            ["steps", f"{config.train.epochs} epochs of about {math.ceil(batches / config.train.accumulate)}"],
            ["start", f"continue from {checkpoint}" if checkpoint else "new run"],
            ["output", config.train.output],
        ],
    )
    return TrainSummary(
        steps=0, interrupted=False, top1=None, best_top1=None, seconds=0.0, peak_memory_bytes=0, output=""
    )


def _say_summary(summary: TrainSummary) -> None:
    if summary.interrupted:
        console.say(f"train: stopped and saved at step {summary.steps}; the same command with --resume auto continues")
        return
    accuracy = "" if summary.top1 is None else f"top-1 {summary.top1:.2f} (best {summary.best_top1:.2f}), "
    console.say(
        f"train: {summary.steps} steps, {accuracy}{summary.seconds:.1f} s, "
        f"peak {summary.peak_memory_bytes / 2**20:.0f} MiB -> {summary.output}"
    )
