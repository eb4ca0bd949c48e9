"""What the demo does in processes of their own: each job calls the real stages and returns plain numbers.

Every job is a fresh process, so that its peak memory is its own and a student trained from the cache shares nothing
with a teacher. The processes fork from a server that has imported torch once; neither it nor the process that asks
ever builds a model.

A newcomer's trap: the process that asks imports this module too, and must stay small: the peak that the kernel reports
for a child starts at what its parent held. Hence the imports inside the jobs.
"""

import contextlib
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vkd_cache import console
from vkd_cache.config import Config
from vkd_cache.errors import VkdCacheError
from vkd_cache.runtime import JobSplit, num_cores, peak_memory_bytes

if TYPE_CHECKING:
    from vkd_cache.stages.accuracy import EvalResult
    from vkd_cache.stages.coco_scores import DetectionResult

# what jobs import, so that it is imported once; torch imports _dynamo at the first optimizer step
_PRELOADED = ["torch._dynamo", "matplotlib.figure"]
_PRELOADED += [f"vkd_cache.stages.{name}" for name in ("train", "extract", "evaluate", "verify")]

_MAX_SIDE_BY_SIDE = 8  # a process needs about 1 GB

_Result = TypeVar("_Result")


class Processes:
    """Calls jobs in processes of their own; made by `fresh_processes`."""

    def __init__(self, context: ForkServerContext) -> None:
        self._context = context

    def __call__(self, job: Callable[[Config], _Result], config: Config) -> _Result:
        """Wait for what `job(config)` returns; its errors are raised here."""
        # a pool for each job: one that replaces its process after every job can deadlock in Python 3.11
        with ProcessPoolExecutor(max_workers=1, mp_context=self._context) as pool:
            try:
                return pool.submit(job, config).result()
            except BrokenProcessPool as error:
                raise VkdCacheError(
                    f"demo: the process of {job.__name__} died. The usual cause is memory: one needs about 1 GB."
                ) from error

    def side_by_side(self, jobs: Sequence[tuple[Callable[[Config], _Result], Config]]) -> Iterator[tuple[int, _Result]]:
        """Number and result of each job as it ends, with a process for each core; they begin in the order given.

        The first error ends it: jobs that have not begun never do.
        """
        with ThreadPoolExecutor(max_workers=min(num_cores(), _MAX_SIDE_BY_SIDE)) as threads:
            numbers = {threads.submit(self, job, config): number for number, (job, config) in enumerate(jobs)}
            try:
                for future in as_completed(numbers):
                    yield numbers[future], future.result()
            finally:
                threads.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """One training run.

    Attributes:
        scores: of the last weights on the validation split, percent, by metric; what it is judged by comes first.
        steps: optimizer steps.
        seconds: wall-clock time, evaluations on the way included.
        cpu_seconds: processor time of its process, which a busy machine does not stretch as much.
        peak_bytes: largest resident size of its process.
    """

    scores: dict[str, float]
    steps: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int

    @property
    def score(self) -> float:
        """What it is judged by."""
        return next(iter(self.scores.values()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """The extraction.

    Attributes:
        views: views stored, over all images.
        bytes: of their units.
        codecs: how each node is stored, by name.
        fingerprint: of the cache.
        seconds, cpu_seconds, peak_bytes: as in TrainResult.
    """

    views: int
    bytes: int
    codecs: dict[str, str]
    fingerprint: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int

    @property
    def bytes_per_view(self) -> float:
        """Of one view of one image."""
        return self.bytes / max(self.views, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What the cache is worth.

    Attributes:
        report: of `verify`, all three levels, as plain JSON.
        teacher_top1: of the teacher on the validation split, percent.
        cached_top1: of its stored features through the stored head on the cached (mixed) views, percent.
    """

    report: dict[str, Any]
    teacher_top1: float
    cached_top1: float


@contextlib.contextmanager
def fresh_processes() -> Iterator[Processes]:
    """Start the server that jobs fork from; it imports torch while the caller goes on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    warm_up = context.Process(target=_settle, daemon=True)
    warm_up.start()
    yield Processes(context)
    warm_up.join()


def _settle() -> None:
    """What every job does first."""
    import torch

    # Images of 32 px give a second thread nothing to do, those of a detector have a job for every core, and threads
    # that wait for each other on a busy machine cost ten times what they bring.
    torch.set_num_threads(1)


def fit_teacher(config: Config) -> TrainResult:
    """Train without distillation, and talk about it: this is the longest single job."""
    from vkd_cache.stages.train import train

    _settle()
    summary = train(config, JobSplit())
    if summary.interrupted:
        raise KeyboardInterrupt
    return TrainResult(
        scores={summary.metric: summary.score or 0.0},
        steps=summary.steps,
        seconds=summary.seconds,
        cpu_seconds=time.process_time(),
        peak_bytes=summary.peak_memory_bytes,
    )


def train_student(config: Config) -> TrainResult:
    """Train a student in silence, and evaluate its last checkpoint."""
    from vkd_cache.stages.checkpoints import LAST
    from vkd_cache.stages.evaluate import EvalRequest, evaluate

    console.set_quiet(True)
    result = fit_teacher(config)
    request = EvalRequest(checkpoint=str(Path(config.train.output) / LAST))
    return dataclasses.replace(result, scores=_scores(evaluate(config, request, JobSplit())[0]))


def fill_cache(config: Config) -> ExtractResult:
    """Run the teacher over all views of the student's images."""
    from vkd_cache.cache.reader import open_cache
    from vkd_cache.stages.extract import extract

    _settle()
    summary = extract(config, JobSplit())
    if summary.units_failed:
        raise VkdCacheError(f"demo: {len(summary.units_failed)} units failed: {summary.units_failed[0]}")
    cache = open_cache(config.cache.url)
    return ExtractResult(
        views=summary.samples,
        bytes=summary.bytes,
        codecs={node.name: node.codec for node in cache.manifest.nodes},
        fingerprint=cache.fingerprint,
        seconds=summary.seconds,
        cpu_seconds=time.process_time(),
        peak_bytes=peak_memory_bytes(),
    )


def fill_one_of_many(config: Config) -> ExtractResult:
    """As `fill_cache`, in silence: others run beside it."""
    console.set_quiet(True)
    return fill_cache(config)


def check_cache(config: Config) -> CheckResult:
    """Verify all levels, and evaluate the teacher and its cache."""
    from vkd_cache.stages.evaluate import EvalRequest, evaluate

    report = verify_cache(config)
    teacher, *cached = evaluate(config, EvalRequest(teacher=True, cache=True), JobSplit())
    return CheckResult(report=report, teacher_top1=teacher.score, cached_top1=cached[-1].score)


def verify_cache(config: Config) -> dict[str, Any]:
    """What `verify` says of the cache on all levels, in silence, as plain JSON."""
    from vkd_cache.stages.verify import VerifyRequest, verify

    _settle()
    console.set_quiet(True)
    request = VerifyRequest(url=config.cache.url, source=config.source.train, pixels=True, teacher=True, sample=64)
    return verify(config, request).to_json()


def evaluate_teacher(config: Config) -> dict[str, Any]:
    """The teacher's scores on the validation split, in silence."""
    from vkd_cache.stages.evaluate import EvalRequest, evaluate

    _settle()
    console.set_quiet(True)
    return _scores(evaluate(config, EvalRequest(teacher=True), JobSplit())[0])


def _scores(result: "EvalResult | DetectionResult") -> dict[str, float]:
    """Percent by metric."""
    found = result.to_json()
    return {name: found[name] for name in ("top1", "top5", "ap", "ap50", "ap75") if name in found}
