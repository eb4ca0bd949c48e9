"""The three things that the extraction benchmark times over the same units: teacher, rendering, and the whole stage.

A newcomer's trap: where teacher and data workers share cores, the stage cannot run at the rate of either. `apart` gives
each its own: the thread that runs the teacher has one core to itself; workers and the writer thread have the others.
"""

import argparse
import dataclasses
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from types import FrameType

import torch
from harness import Stopwatch, interleave, require

from vkd_cache.cache.codecs import resolve_codec
from vkd_cache.cache.schema import Manifest
from vkd_cache.cache.units import UnitId
from vkd_cache.cache.writer import create_cache
from vkd_cache.config import Config, load_config
from vkd_cache.runtime import library_versions, resolve_device
from vkd_cache.sources import Source, open_source, source_identity
from vkd_cache.stages.batch_size import Trial, try_sizes
from vkd_cache.stages.extract_job import ExtractJob
from vkd_cache.stages.rendering import RenderedBatch, Renderer, render_loader
from vkd_cache.stages.teaching import TeacherRun, start_teacher
from vkd_cache.stages.transfer import mixed_images
from vkd_cache.stages.units import unit_tasks
from vkd_cache.stages.worker_pool import PRELOADED
from vkd_cache.teachers import load_teacher
from vkd_cache.views.recipe import make_recipe

NODE = "pooled"


class Stage:
    """One teacher over the units of one data set; each method gives views per second.

    Attributes:
        run: the teacher on its device.
        tried: the batch sizes that were tried, where the size is `auto`.
        limits: what each run of the stage said that it was limited by, with the teacher's share of the time.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        """`folder`: where caches are written."""
        source = open_source(config.source.train, shard_size=config.source.shard_size)
        self._recipe = make_recipe(config.views)
        teacher = load_teacher(config.teacher, nodes=(NODE,), num_classes=1000, view_px=config.views.size_px)
        self.tried: list[Trial] = []
        self.limits: list[str] = []
        self.run = start_teacher(teacher, config.extract, torch.device(resolve_device(config.extract.device)))
        if not self.run.batch_size:
            size, self.tried = try_sizes(self.run, source, self._recipe)
            self.run = dataclasses.replace(self.run, batch_size=size)
        self._config, self._source, self._folder = _with_size(config, self.run.batch_size), source, folder
        self._manifest = _manifest(config, source, self.run)
        views = range(int(config.views.count))
        self._units = [UnitId(shard, view) for view in views for shard in range(len(source.shards))]
        self._count = sum(len(source.shards[unit.shard].keys) for unit in self._units)
        self._caches = 0
        # float images on the device, mixed: the teacher alone has nothing to do but its forward
        device = self.run.device
        self._images = [
            mixed_images(batch.pixels.to(device), batch.mix, batch.colour)
            for batch in self._rendered()
        ]
        self.run(self._images[0])

    @property
    def kinds(self) -> dict[str, Callable[[], float]]:
        """What is timed, by name."""
        return {"teacher alone": self.teacher, "rendering alone": self.rendering, "extract": self.stage}

    def _rendered(self) -> Iterator[RenderedBatch]:
        seed, size = self._config.views.seed, self.run.batch_size
        tasks = [t for unit in self._units for t in unit_tasks(self._source, self._recipe, seed, unit, size)]
        renderer = Renderer(self._source, self._recipe, seed)
        return render_loader(renderer, tasks, workers=self._config.extract.workers)

    def teacher(self) -> float:
        """The teacher's forward, images in device memory."""
        with Stopwatch(self.run.device) as watch:
            for images in self._images:
                self.run(images)
        return self._count / watch.wall_s

    def rendering(self) -> float:
        """Reading, decoding and augmenting in worker processes, nothing done with the result."""
        with Stopwatch() as watch:
            done = sum(len(batch.row) for batch in self._rendered())
        require(done == self._count, f"rendering: {done} views came out of {self._count}")
        return self._count / watch.wall_s

    def stage(self) -> float:
        """The stage's own loop into a new cache, from starting the workers to the last record on disk."""
        self._caches += 1
        url = str(self._folder / f"stage-{self._caches}")
        writer = create_cache(url, self._manifest, self.run.teacher.head_tensors())
        job = ExtractJob(self._config, self._source, self._recipe, self.run, writer)
        with Stopwatch(self.run.device) as watch:
            job.do(self._units)
        summary = job.summary()
        require(summary.samples == self._count, f"extract: {summary.samples} views were published of {self._count}")
        self.limits.append(f"{summary.limit}, the teacher at work for {100 * summary.shares['teacher']:.0f} %")
        return self._count / watch.wall_s


def _with_size(config: Config, size: int) -> Config:
    return dataclasses.replace(config, extract=dataclasses.replace(config.extract, batch_size=size))


def stage_config(options: argparse.Namespace, folder: Path, weights: str) -> Config:
    """The configuration of the stage; photographs are in `folder`/photos."""
    sections: dict[str, dict[str, object]] = {
        "source": {"train": str(folder / "photos"), "shard_size": options.shard_size},
        "views": {"recipe": options.recipe, "count": str(options.views), "size_px": options.size_px},
        "teacher": {"name": options.teacher, "weights": weights},
        "cache": {"url": str(folder / "unused"), "dtype": options.dtype},
        "extract": {
            "batch_size": options.batch_size, "workers": options.workers, "device": options.device,
            "autocast": options.autocast, "channels_last": options.channels_last, "compile": options.compile,
        },
    }  # fmt: skip
    return load_config(None, sections)


def _manifest(config: Config, source: Source, run: TeacherRun) -> Manifest:
    """As the stage plans it, without measuring a codec."""
    side = config.views.size_px
    values = run(torch.rand(2, 3, side, side, device=run.device))
    head = run.teacher.head_tensors()
    return Manifest(
        dataset=source_identity(source).to_json(),
        recipe=make_recipe(config.views).to_json(),
        seed=config.views.seed,
        nodes=tuple(resolve_codec(name, config.cache.dtype, value.cpu(), head) for name, value in values.items()),
        teacher=run.teacher.identity,
        head=None,
        numerics=run.numerics(),
        versions=library_versions(),
        backend=config.cache.backend,
    )


def can_be_apart() -> bool:
    """Whether this process may use two cores, and can say which thread runs where."""
    return hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1


def apart(config: Config, folder: Path, repetitions: int) -> tuple[dict[str, list[float]], list[str]]:
    """Rates of `Stage.kinds` with a core for the teacher alone, all repetitions; and what the stage said limited it.

    In a process of its own, for where a thread runs is handed down to what it starts.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure_apart, config, folder, repetitions).result()


def _measure_apart(config: Config, folder: Path, repetitions: int) -> tuple[dict[str, list[float]], list[str]]:
    vars(sys.modules["__main__"]).pop("__file__", None)  # as in harness.parse
    torch.set_num_threads(1)
    own, *others = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, others)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()  # data workers are its children
    os.sched_setaffinity(0, {own})

    def to_the_others(_frame: FrameType, _event: str, _argument: object) -> None:
        os.sched_setaffinity(0, others)  # of the thread that has just begun: the writer
        sys.setprofile(None)

    threading.setprofile(to_the_others)
    stage = Stage(config, folder)
    return interleave("apart", stage.kinds, repetitions), stage.limits
