"""What a training run does between its steps and after the last: evaluations, checkpoints, curves; how long each takes.

A newcomer's trap: an evaluation has a price of its own, the start of its data workers, so two of different sizes are
measured.
"""

import time
from pathlib import Path

from vkd_cache.config import EvalConfig
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import Source, is_detection
from vkd_cache.stages.checkpoints import LAST, save_checkpoint
from vkd_cache.stages.journal import draw_curves
from vkd_cache.stages.learner import Learner
from vkd_cache.stages.planning_sample import first_places, part_of
from vkd_cache.stages.planning_sizes import Line, line_through

_EVAL_BATCH = {True: 8, False: 128}  # of a detector or not, where the configuration leaves it open


def checkpoint_seconds(learner: Learner, folder: Path) -> float:
    """Seconds of saving where a run stands."""
    begun = time.monotonic()
    learner.is_finite()
    save_checkpoint(folder / LAST, learner.state())
    return time.monotonic() - begun


def evaluation_line(learner: Learner, val: Source, config: EvalConfig, *, sample_s: float, seconds: float) -> Line:
    """Seconds of an evaluation by its number of images, from two parts of the validation split.

    Args:
        learner: its student is evaluated, and its average if it has one.
        val: all of the split.
        config: of evaluations.
        sample_s: seconds of a sample in training, which takes about three times as long.
        seconds: to measure for, about.
    """
    total = sum(len(shard.keys) for shard in val.shards)
    affordable = int(seconds / (sample_s / 3))
    smaller = max(2, min(affordable // 4, 2 * (config.batch_size or _EVAL_BATCH[is_detection(val)])))
    points: list[tuple[float, float]] = []
    for count in (min(total, smaller), min(total, max(2 * smaller, affordable - smaller))):
        if points and count == points[0][0]:
            break
        begun = time.monotonic()
        for model in [learner.student, *([learner.ema.module] if learner.ema is not None else [])]:
            learner.task.evaluate(model, part_of(val, first_places(val, count)), JobSplit(), lambda: None)
        points.append((float(count), time.monotonic() - begun))
    return line_through(points)


def finish_seconds(folder: Path) -> float:
    """Seconds of drawing the curves of a run of a few steps."""
    begun = time.monotonic()
    steps = [{"kind": "step", "step": number, "total": 1.0, "task": 1.0, "feature": 1.0} for number in range(1, 100)]
    draw_curves(folder / "curves.png", {"student": steps}, "student")
    return time.monotonic() - begun
