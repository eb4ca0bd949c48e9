"""Stage two on a sample: how long a step takes here, fed by real data workers, with one kind of teacher or with none.

Feed, student, losses and optimizer are those of a real run. A newcomer's trap: epochs over a sample are short, so the
loop of a real run would do little else than save checkpoints; what that takes is measured by itself, once.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from vkd_cache.cache.reader import open_cache
from vkd_cache.config import MAX_VIEWS, Config
from vkd_cache.errors import ConfigError
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import Source
from vkd_cache.stages.batch_size import beside_a_student
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.learner import Learner, step_seed
from vkd_cache.stages.planning_between import checkpoint_seconds, evaluation_line, finish_seconds
from vkd_cache.stages.planning_process import Memory, wait_for
from vkd_cache.stages.planning_sample import Place, part_of
from vkd_cache.stages.planning_sizes import Line
from vkd_cache.stages.ranks import take_device
from vkd_cache.stages.run import Run, complete_views
from vkd_cache.stages.supply import Supply, nodes_on_device
from vkd_cache.stages.transfer import ahead_on_device
from vkd_cache.stages.unit_views import CachedViews, PlannedViews, Views
from vkd_cache.views.recipe import make_recipe

FIRST_BATCH = 8  # samples of the steps by which it is decided what can be measured in the time
MIN_STEPS = 6  # that are measured, if a batch can be made as small as that takes
_SETTLED = 0.01  # relative standard error of the rate at which measuring ends
_STRETCH_S = 0.5  # between two looks at the clock, which wait for a GPU
_EVAL_SHARE = 0.4  # of the time to measure for

Group = list[tuple[FedBatch, torch.Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What to measure.

    Attributes:
        config: of the training.
        source: all of it.
        places: its samples that are in the cache of the sample.
        cache: that cache; "": none is read, views are planned.
        live: with the teacher in memory.
        sample_s: seconds that a sample takes, about; 0: it has to be found out.
        val: to measure an evaluation on; None: none is.
        folder: for a checkpoint.
        seconds: to measure for.
    """

    config: Config
    source: Source
    places: tuple[Place, ...]
    cache: str
    live: bool
    sample_s: float
    val: Source | None
    folder: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFound:
    """What was measured.

    Attributes:
        step_s: seconds of an optimizer step of the configured size, data included.
        spread: standard error of that, relative.
        start_s: seconds from the start of the process to the first step.
        batch_size: of the batches that were measured, at most the configured one.
        device: the student's.
        finish_s: seconds of what is done at the end of a run: its curves are drawn.
        host_bytes, gpu_bytes: peak memory, see `Memory`; for the configured batch.
        more_host_bytes: that evaluation, checkpoint and curves take on top of `host_bytes`.
        checkpoint_s: seconds of writing one.
        evaluation: seconds of one by its number of images; None: not measured.
    """

    step_s: float
    spread: float
    start_s: float
    finish_s: float
    batch_size: int
    device: str
    host_bytes: int
    more_host_bytes: int
    gpu_bytes: int
    checkpoint_s: float
    evaluation: Line | None


def measure_training(request: TrainRequest, started: float) -> TrainFound:
    """Train on a sample; in a process of its own, `started` at that moment.

    Raises:
        VkdCacheError: as a training run would.
    """
    device = take_device(request.config.train.device)
    sample_s = request.sample_s
    batch_size = _batch_size(request, sample_s, device) if sample_s else 0
    run = _prepared(request, device, batch_size or request.config.train.batch_size)
    supply = run.supply(live=request.live)
    learner = run.learner(supply)
    trainer = _Trainer(run, supply, learner)
    before = [(0, Memory(device).host_bytes)]
    begun = time.monotonic()
    if not batch_size:
        sample_s = trainer.sample_seconds()
        before.append((FIRST_BATCH, Memory(device).host_bytes))
        batch_size = _batch_size(request, sample_s, device)
        trainer = _Trainer(_prepared(request, device, batch_size), supply, learner)
    aside_s = time.monotonic() - begun
    began = time.monotonic()
    fed_s, spread, filling_s = trainer.steady(request.seconds)
    peak, full = Memory(device), request.config.train.batch_size
    smaller, base = next(point for point in reversed(before) if point[0] < batch_size)
    per_sample = (peak.host_bytes - base) / (batch_size - smaller)
    checkpoint_s = checkpoint_seconds(learner, Path(request.folder))
    evaluation, eval_s = None, _EVAL_SHARE * request.seconds
    if request.val is not None:
        evaluation = evaluation_line(learner, request.val, request.config.eval, sample_s=sample_s, seconds=eval_s)
    finish_s = finish_seconds(Path(request.folder))
    end = Memory(device)
    return TrainFound(
        step_s=fed_s * full * request.config.train.accumulate,
        spread=spread,
        start_s=began - started - aside_s + filling_s,
        finish_s=finish_s,
        batch_size=batch_size,
        device=str(device),
        host_bytes=round(peak.host_bytes + (full - batch_size) * per_sample),
        more_host_bytes=end.host_bytes - peak.host_bytes,
        gpu_bytes=round(max(peak.gpu_bytes * full / batch_size, end.gpu_bytes)),
        checkpoint_s=checkpoint_s,
        evaluation=evaluation,
    )


def _batch_size(request: TrainRequest, sample_s: float, device: torch.device) -> int:
    """The configured batch, or a smaller one: so that some are measured in the time, and the sample fills one.

    Raises:
        ConfigError: the sample does not fill any.
    """
    train = request.config.train
    there = sum(len(place.rows) // 2 * 2 for place in request.places)
    wanted = min(train.batch_size, there)
    if wanted < 2:
        raise ConfigError(f"{request.source.location}: has too few images for one step of training.")
    affordable = request.seconds / MIN_STEPS / sample_s
    if device.type == "cuda" or train.compile or affordable >= wanted or wanted <= FIRST_BATCH:
        return wanted
    return min(wanted, max(FIRST_BATCH, 1 << (max(1, int(affordable)).bit_length() - 1)))


def _prepared(request: TrainRequest, device: torch.device, batch_size: int) -> Run:
    """A run over the sample whose batches have `batch_size` samples, and a live teacher's their share of that."""
    config, train = request.config, request.config.train
    taught = beside_a_student(config).batch_size
    if batch_size < train.batch_size:
        taught = max(2, taught * batch_size // train.batch_size // 2 * 2)
    shards = len(request.places)
    config = dataclasses.replace(
        config,
        # few shards are open, or no unit would be read twice however many epochs there are
        train=dataclasses.replace(
            train,
            batch_size=batch_size,
            epochs=MAX_VIEWS,
            open_shards=max(1, min(train.open_shards, shards // 4)),
            live_teacher=request.live,
        ),
        extract=dataclasses.replace(config.extract, batch_size=taught),
    )
    source = part_of(request.source, request.places)
    cache = open_cache(request.cache) if request.cache else None
    recipe = make_recipe(config.views)
    views: Views
    if cache is None:
        views = PlannedViews(source, recipe, config.views.seed, range(MAX_VIEWS))
    else:
        views = CachedViews(cache, source, complete_views(cache, shards, warn=False))
    return Run(
        config=config,
        split=JobSplit(),
        device=device,
        source=source,
        val_source=None,
        cache=cache,
        recipe=recipe,
        views=views,
        num_classes=source.num_classes,
    )


class _Trainer:
    """Steps of one learner, one after the other, as fast as they come."""

    def __init__(self, run: Run, supply: Supply, learner: Learner) -> None:
        self._run = run
        self._supply = supply
        self._learner = learner
        self._steps = 0

    def sample_seconds(self) -> float:
        """Seconds of a sample, from a few small batches that are rendered in this process."""
        size = min(FIRST_BATCH, self._run.config.train.batch_size)
        run = dataclasses.replace(
            self._run,
            config=dataclasses.replace(
                self._run.config, train=dataclasses.replace(self._run.config.train, batch_size=size, workers=0)
            ),
        )
        small = _Trainer(run, self._supply, self._learner)
        times = []
        with run.feed(self._supply) as feed:
            for group in itertools.islice(small._groups(feed.batches(epoch=0, step=0, workers=0)), 3):
                small._step(group)
                times.append(wait_for(run.device))
        return (times[-1] - times[0]) / (len(times) - 1) / size / run.config.train.accumulate

    def steady(self, seconds: float) -> tuple[float, float, float]:
        """Seconds of a sample, their relative standard error, and the seconds until the first step, without its own.

        A newcomer's trap: batches are not all full. A detector's shards may have an image with a canvas of its own.
        """
        train, device = self._run.config.train, self._run.device
        ahead = 2 * train.workers + 2  # steps that find more batches waiting than there will be
        stretches: list[tuple[float, int]] = []
        begun = last = time.monotonic()
        first_s, first, done = 0.0, 0, 0
        with self._run.feed(self._supply) as feed:
            fed = feed.batches(epoch=0, step=0, workers=train.workers, pin_memory=device.type == "cuda")
            for number, group in enumerate(self._groups(fed), start=1):
                self._step(group)
                done += sum(len(batch) for batch, _ in group)
                if number == 1:
                    last = wait_for(device)
                    first_s, first, done, begun = last - begun, done, 0, last
                elif time.monotonic() - last > _STRETCH_S or number == ahead:
                    now = wait_for(device)
                    if number > ahead or now - begun > seconds / 2:
                        stretches.append((now - last, done))
                    last, done = now, 0
                if (last - begun > seconds and len(stretches) > 1) or _has_settled(stretches):
                    break
        mean = sum(took for took, _ in stretches) / sum(samples for _, samples in stretches)
        return mean, _standard_error(_each(stretches)) / mean, max(0.0, first_s - first * mean)

    def _groups(self, batches: Iterator[FedBatch]) -> Iterator[Group]:
        ahead = ahead_on_device(batches, self._run.device, nodes_on_device)
        while group := list(itertools.islice(ahead, self._run.config.train.accumulate)):
            yield group

    def _step(self, group: Group) -> None:
        train = self._run.config.train
        self._steps += 1
        # small, so that no student of these data goes astray
        terms = self._learner.step(group, self._supply, train.lr / 100, step_seed(train.seed, self._steps, 0))
        if self._steps % train.log_every == 0:
            float(terms["total"])  # as the loop does for a line of the log: here the host waits for the device


def _has_settled(stretches: list[tuple[float, int]]) -> bool:
    times = _each(stretches)
    return len(times) >= 10 and _standard_error(times) <= _SETTLED * sum(times) / len(times)


def _each(stretches: list[tuple[float, int]]) -> list[float]:
    """Seconds of a sample in each stretch of (seconds, samples)."""
    return [took / samples for took, samples in stretches]


def _standard_error(values: list[float]) -> float:
    if len(values) < 2:
        return math.nan
    return float(torch.tensor(values, dtype=torch.float64).std()) / math.sqrt(len(values))
