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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vkd_cache import console
from vkd_cache.config import Config
from vkd_cache.errors import VkdCacheError
from vkd_cache.runtime import JobSplit, peak_memory_bytes

# what jobs import, so that it is imported once; torch imports _dynamo at the first optimizer step
_PRELOADED = ["torch._dynamo", "matplotlib.figure"]
_PRELOADED += [f"vkd_cache.stages.{name}" for name in ("train", "extract", "evaluate", "verify")]

_Result = TypeVar("_Result")


class Processes(Protocol):
    """Calls `job(config)` in a process of its own and waits for what it returns."""

    def __call__(self, job: Callable[[Config], _Result], config: Config) -> _Result:
        """The job's result; its errors are raised here."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """One training run.

    Attributes:
        top1: accuracy of the last weights on the validation split, percent.
        steps: optimizer steps.
        seconds: wall-clock time, evaluations on the way included.
        cpu_seconds: processor time of its process, which a busy machine does not stretch as much.
        peak_bytes: largest resident size of its process.
    """

    top1: float
    steps: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


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

    def call(job: Callable[[Config], _Result], config: Config) -> _Result:
        # a pool for each job: one that replaces its process after every job can deadlock in Python 3.11
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            try:
                return pool.submit(job, config).result()
            except BrokenProcessPool as error:
                raise VkdCacheError(
                    f"demo: the process of {job.__name__} died. The usual cause is memory: one needs about 1 GB."
                ) from error

    yield call
    warm_up.join()


def _settle() -> None:
    """What every job does first."""
    import torch

    # Images of 32 px give a second thread nothing to do, and threads that wait for each other on a busy machine cost
    # ten times what they bring.
    torch.set_num_threads(1)


def fit_teacher(config: Config) -> TrainResult:
    """Train without distillation, and talk about it: this is the longest single job."""
    from vkd_cache.stages.train import train

    _settle()
    summary = train(config, JobSplit())
    if summary.interrupted:
        raise KeyboardInterrupt
    return TrainResult(
        top1=summary.score or 0.0,
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
    return dataclasses.replace(result, top1=evaluate(config, request, JobSplit())[0].score)


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


def check_cache(config: Config) -> CheckResult:
    """Verify all levels, and evaluate the teacher and its cache."""
    from vkd_cache.stages.evaluate import EvalRequest, evaluate
    from vkd_cache.stages.verify import VerifyRequest, verify

    _settle()
    console.set_quiet(True)
    request = VerifyRequest(url=config.cache.url, source=config.source.train, pixels=True, teacher=True, sample=64)
    report = verify(config, request)
    teacher, *cached = evaluate(config, EvalRequest(teacher=True, cache=True), JobSplit())
    return CheckResult(report=report.to_json(), teacher_top1=teacher.score, cached_top1=cached[-1].score)
