"""How many samples a batch of the teacher has, where nobody says it: the cache's number, else the fastest that fits.

A newcomer's trap: kernels are chosen by shape, so all units of a cache should be made in batches of one size. Whoever
begins the cache decides it, by trial; every later run, and every worker that lost the race for the manifest, takes it.

Shape legend: b samples of a batch, H/W pixels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache import console
from vkd_cache.cache.reader import find_cache
from vkd_cache.cache.schema import Manifest
from vkd_cache.config import Config, ExtractConfig
from vkd_cache.errors import TeacherMemoryError
from vkd_cache.memory import is_out_of_memory
from vkd_cache.sources import Source, is_detection
from vkd_cache.stages.teaching import TeacherRun
from vkd_cache.stages.trial import Measured, TrialBatch, measure
from vkd_cache.views.recipe import Recipe

FIRST, FIRST_OF_A_DETECTOR = 16, 2
LARGEST, LARGEST_ON_CPU = 2048, 64
LEAST_GAIN = 1.03  # a batch of twice the size has to be faster by this factor
BESIDE_A_STUDENT = 64  # the size for a live teacher, where neither the configuration nor a cache says one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One size that was tried.

    Attributes:
        batch_size: even.
        measured: None: it does not fit into memory.
        filled: share of the rows of all batches that are samples; the rest pads the last batch of each shard.
    """

    batch_size: int
    measured: Measured | None
    filled: float = 1.0

    @property
    def rate(self) -> float:
        """Samples of the data set a second; 0 where it does not fit."""
        return self.measured.images_per_s * self.filled if self.measured is not None else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, for the log of the run."""
        found = dataclasses.asdict(self.measured) if self.measured is not None else None
        return {"batch_size": self.batch_size, "filled": round(self.filled, 4), "measured": found}


def search(attempt: Callable[[int], Trial], first: int, largest: int) -> tuple[int, list[Trial]]:
    """The smallest size that doubling does not make faster by LEAST_GAIN, and all that were tried.

    Args:
        attempt: tries a size.
        first: size to begin at, a power of two; where it does not fit, halves of it are tried.
        largest: no larger size is tried.

    Raises:
        TeacherMemoryError: not even 2 fit.
    """
    trials = [attempt(first)]
    while trials[-1].measured is None and trials[-1].batch_size >= 4:
        trials.append(attempt(trials[-1].batch_size // 2))
    best = trials[-1]
    if best.measured is None:
        raise TeacherMemoryError(
            "out of memory even with batches of 2. Use a smaller teacher or smaller views ([views] size_px, of a "
            "detector [views] scales and max_size_px), fewer other jobs, or another --device."
        )
    while first <= best.batch_size <= largest // 2:  # what did not fit once is not tried again
        trials.append(attempt(2 * best.batch_size))
        if trials[-1].rate < LEAST_GAIN * best.rate:
            break
        best = trials[-1]
    return best.batch_size, trials


def try_sizes(run: TeacherRun, source: Source, recipe: Recipe) -> tuple[int, list[Trial]]:
    """Time the teacher on made images in batches of several sizes, and say what came out.

    Args:
        run: on its device; its batch size does not matter.
        source: says how full the last batches of its shards would be.
        recipe: says how large views are; of detection views, the largest canvas is tried.

    Returns:
        The size to use, and everything that was tried.

    Raises:
        TeacherMemoryError: no size fits.
    """
    batch_of = TrialBatch(recipe)
    seen: list[Measured] = []

    def attempt(size: int) -> Trial:
        try:
            found = measure(dataclasses.replace(run, batch_size=size), batch_of, seen)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            found = None
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        if found is not None:
            seen.append(found)
        trial = Trial(batch_size=size, measured=found, filled=_filled(source, size))
        console.say(_row(trial))  # now: with compile, the next one may take a minute
        return trial

    console.say("extract: batch size  images/s  memory")
    first = FIRST_OF_A_DETECTOR if is_detection(source) else FIRST
    size, trials = search(attempt, first, LARGEST_ON_CPU if run.device.type == "cpu" else LARGEST)
    if run.compiled:
        torch.compiler.reset()  # of the graphs one is wanted, and torch runs what comes after a number of them as it is
    console.say(f"extract: batches of {size}: the fastest, or nearly, that fit")
    return size, trials


def _filled(source: Source, size: int) -> float:
    if is_detection(source):  # its batches are of one canvas each, and filled up to a power of two only
        return 1.0
    counts: npt.NDArray[np.int64] = np.array([len(shard.keys) for shard in source.shards], np.int64)
    return float(counts.sum() / max(1, (-(-counts // size) * size).sum()))


def _row(trial: Trial) -> str:
    if trial.measured is None:
        return f"extract: {trial.batch_size:10d}         -  too little"
    padded = "" if trial.filled > 0.995 else f"  ({100 * (1 - trial.filled):.0f}% of its rows are padding)"
    memory = f"{trial.measured.memory_bytes / 2**30:.2f} GiB"
    return f"extract: {trial.batch_size:10d}  {trial.rate:8.4g}  {memory}{padded}"


def batch_size_of_cache(manifest: Manifest) -> int | None:
    """The size that a cache was begun with; None where it does not say one that can be used."""
    stored = manifest.numerics.get("batch_size")
    return stored if type(stored) is int and stored >= 2 and stored % 2 == 0 else None


def beside_a_student(config: Config) -> ExtractConfig:
    """How a live teacher is run: where its batch size is `auto`, that of the cache it is compared with, if any."""
    if config.extract.batch_size:
        return config.extract
    cache = find_cache(config.cache.url) if config.cache.url else None
    size = batch_size_of_cache(cache.manifest) if cache is not None else None
    return dataclasses.replace(config.extract, batch_size=size or BESIDE_A_STUDENT)
