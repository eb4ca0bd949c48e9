"""Stage two: train a student from cached teacher features, with no teacher in the process.

    source shards + units -> feed (worker processes render, this one joins) -> student + projector -> losses -> step

What a run is made of lies in `run` (what it reads), `feed` (data), `supply` (teacher outputs), `learner` (model and
one step), `loop` (the steps), `checkpoints` and `journal`.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from vkd_cache import console
from vkd_cache.config import Config
from vkd_cache.runtime import JobSplit, peak_memory_bytes
from vkd_cache.stages.checkpoints import find_checkpoint
from vkd_cache.stages.journal import METRIC_LABELS
from vkd_cache.stages.loop import Loop
from vkd_cache.stages.ranks import process_group
from vkd_cache.stages.run import Run, prepare_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """What one run came to.

    Attributes:
        steps: optimizer steps done in all.
        interrupted: a signal stopped it; the checkpoint continues.
        metric: the metric that was watched, a key of `METRIC_LABELS`.
        score, best_score: that metric at the end and at best, percent; None without a validation split.
        broken: broken images that were left out.
        seconds: wall-clock time of this process' part.
        peak_memory_bytes: largest resident size of the process, plus the GPU's peak.
        output: where checkpoints, logs and curves are.
    """

    steps: int = 0
    interrupted: bool = False
    metric: str = ""
    score: float | None = None
    best_score: float | None = None
    broken: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    output: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def train(config: Config, split: JobSplit, *, dry_run: bool = False) -> TrainSummary:
    """Train a student as `config` says; under torchrun, this process' share of it.

    Raises:
        VkdCacheError: a configuration, source, cache or checkpoint that cannot be used; pixels that differ from those
            the teacher saw.
    """
    started = time.monotonic()
    run = prepare_run(config, split)
    checkpoint = find_checkpoint(config)
    with process_group(split, run.device):
        loop = Loop(run, run.supply(live=config.train.live_teacher), checkpoint)
        if dry_run:
            return _dry_run(run, loop, checkpoint)
        interrupted = loop.go()
    summary = TrainSummary(
        steps=loop.standing.step,
        interrupted=interrupted,
        metric=loop.metric,
        score=loop.standing.score,
        best_score=loop.standing.best_score,
        broken=loop.num_broken,
        seconds=time.monotonic() - started,
        peak_memory_bytes=_peak_memory_bytes(run.device),
        output=config.train.output,
    )
    if split.index == 0:
        _say_summary(summary)
    return summary


def _peak_memory_bytes(device: torch.device) -> int:
    peak = peak_memory_bytes()
    return peak + (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)


def _dry_run(run: Run, loop: Loop, checkpoint: Path | None) -> TrainSummary:
    config = run.config
    count = sum(len(shard.keys) for shard in run.source.shards)
    teacher = "live" if config.train.live_teacher else f"cache {config.cache.url}" if run.cache else "none"
    console.show_table(
        "train, dry run: nothing is written",
        ["what", "value"],
        [
            ["source", f"{run.source.location} ({run.source.kind}, {count} images, {run.num_classes} classes)"],
            ["validation", run.val_source.location if run.val_source else "none: give [source] val"],
            ["views", f"{len(run.views.views)} of recipe {run.recipe.name} at {run.recipe.size_px} px"],
            ["teacher", teacher],
            ["student", f"{config.student.name} on {run.device}, {run.split.count} processes"],
            ["steps", f"{config.train.epochs} epochs of {loop.steps_per_epoch()}"],
            ["start", f"continue from {checkpoint}" if checkpoint else "new run"],
            ["output", config.train.output],
        ],
    )
    return TrainSummary()


def _say_summary(summary: TrainSummary) -> None:
    if summary.interrupted:
        console.say(f"train: stopped and saved at step {summary.steps}; the same command with --resume auto continues")
        return
    if summary.broken:
        console.warn(f"{summary.broken} broken images were left out")
    score = ""
    if summary.score is not None:
        score = f"{METRIC_LABELS[summary.metric]} {summary.score:.2f} (best {summary.best_score:.2f}), "
    console.say(
        f"train: {summary.steps} steps, {score}{summary.seconds:.1f} s, "
        f"peak {summary.peak_memory_bytes / 2**20:.0f} MiB -> {summary.output}"
    )
