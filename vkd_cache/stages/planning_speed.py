"""The speed of one batch of the teacher and of its data, by themselves: it decides how much can be measured in a time.

A newcomer's trap: these are no rates of a job. There, teacher and data workers share the cores, or run side by side.
"""

import dataclasses
import time

from vkd_cache.cache.reader import Cache
from vkd_cache.cache.units import UnitId
from vkd_cache.config import Config
from vkd_cache.runtime import num_cores
from vkd_cache.sources import Source, is_detection
from vkd_cache.stages.batch_size import batch_size_of_cache, try_sizes
from vkd_cache.stages.planning_process import wait_for
from vkd_cache.stages.rendering import Renderer
from vkd_cache.stages.stored_pixels import StoredPixels
from vkd_cache.stages.teaching import TeacherRun
from vkd_cache.stages.transfer import ahead_on_device, model_input
from vkd_cache.stages.units import unit_tasks
from vkd_cache.views.recipe import Recipe, make_recipe

FIRST_BATCH, FIRST_OF_A_DETECTOR = 8, 2  # samples of the batch by which it is decided what can be measured in the time
MIN_BATCHES = 6  # that are measured, if a batch can be made as small as that takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
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


def with_batch_size(run: TeacherRun, existing: Cache | None, source: Source, recipe: Recipe) -> TeacherRun:
    """With the batch size that extraction will use, where nobody says it: that of the cache, or the fastest."""
    if run.batch_size:
        return run
    stored = batch_size_of_cache(existing.manifest) if existing is not None else None
    return dataclasses.replace(run, batch_size=stored or try_sizes(run, source, recipe)[0])


def fitting(run: TeacherRun, config: Config, source: Source, seconds: float) -> tuple[TeacherRun, Speed]:
    """The teacher with batches of which some can be measured in `seconds`: those configured, or smaller ones."""
    first = FIRST_OF_A_DETECTOR if is_detection(source) else FIRST_BATCH
    if run.compiled or run.device.type == "cuda" or run.batch_size <= first:
        return run, speed_of(run, config, source)
    small = dataclasses.replace(run, batch_size=first)
    affordable = int(seconds / MIN_BATCHES / speed_of(small, config, source).view_s(config, on_gpu=False))
    if affordable < run.batch_size:
        run = dataclasses.replace(run, batch_size=max(first, 1 << (max(1, affordable).bit_length() - 1)))
    return run, speed_of(run, config, source)


def speed_of(run: TeacherRun, config: Config, source: Source) -> Speed:
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
    return Speed(
        teacher_s=second / len(task.row), render_s=render_s / len(task.row), warmup_s=max(0.0, first - second)
    )
