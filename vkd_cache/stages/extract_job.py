"""The loop of an extraction: units through the teacher, a writer thread behind it, and the bookkeeping of both."""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache import console
from vkd_cache.cache.schema import UnitRecord
from vkd_cache.cache.units import UnitId
from vkd_cache.cache.writer import CacheWriter
from vkd_cache.config import Config
from vkd_cache.errors import SourceError, TeacherError
from vkd_cache.sources import Source
from vkd_cache.stages.rendering import RenderedBatch, Renderer, RenderTask, render_loader
from vkd_cache.stages.teaching import TeacherRun
from vkd_cache.stages.transfer import ahead_on_device, mixed_images
from vkd_cache.stages.units import UnitAssembly, unit_tasks
from vkd_cache.views.recipe import Recipe

MAX_UNITS_WAITING = 2  # finished units that may wait for the writer before the teacher does


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractSummary:
    """What one run did.

    Attributes:
        units_published: units this run wrote.
        units_skipped: units of this worker that were published before.
        units_failed: one message per unit that could not be made.
        samples: views rendered and stored by this run.
        broken: (key, reason) of broken images, once per key.
        bytes: bytes of the units and records written.
        seconds: wall-clock time.
    """

    units_published: int
    units_skipped: int
    units_failed: tuple[str, ...]
    samples: int
    broken: tuple[tuple[str, str], ...]
    bytes: int
    seconds: float

    @property
    def exit_code(self) -> int:
        """0, or 3 when some units failed."""
        return 3 if self.units_failed else 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def taught_batches(
    renderer: Renderer, tasks: Iterable[RenderTask], workers: int, run: TeacherRun
) -> Iterator[tuple[RenderedBatch, torch.Tensor]]:
    """Rendered batches with their pixels on the teacher's device."""
    loader = render_loader(renderer, tasks, workers=workers, pin_memory=run.device.type == "cuda")
    return ahead_on_device(loader, run.device)


class ExtractJob:
    """The loop over this worker's units, with its writer thread and its bookkeeping."""

    def __init__(
        self, config: Config, source: Source, recipe: Recipe, run: TeacherRun, writer: CacheWriter
    ) -> None:
        self._config = config
        self._source = source
        self._renderer = Renderer(source, recipe, config.views.seed)
        self._run = run
        self._writer = writer
        self._records: list[UnitRecord] = []
        self._failed: dict[UnitId, str] = {}
        self._broken: dict[str, str] = {}
        self._seconds = {"data": 0.0, "teacher": 0.0, "write": 0.0}

    def do(self, units: list[UnitId]) -> None:
        """Make and publish `units`."""
        total = sum(len(self._source.shards[shard].keys) for shard, _ in units)
        if not units:
            return
        with (
            console.track("extract", total) as progress,
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer") as thread,
        ):
            waiting: list[Future[None]] = []
            for assembly in self._taught(units, progress):
                waiting.append(thread.submit(self._publish, assembly))
                while len(waiting) > MAX_UNITS_WAITING or (waiting and waiting[0].done()):
                    waiting.pop(0).result()
                progress.detail(self._where_time_goes())
            for future in waiting:
                future.result()
            progress.detail(self._where_time_goes())

    def _tasks(self, units: list[UnitId]) -> Iterator[RenderTask]:
        for unit in units:
            yield from unit_tasks(
                self._source, self._renderer.recipe, self._config.views.seed, unit, self._run.batch_size
            )

    def _taught(self, units: list[UnitId], progress: console.Progress) -> Iterator[UnitAssembly]:
        """Assemblies of the units that came through the teacher whole."""
        assembly: UnitAssembly | None = None
        busy: torch.cuda.Event | None = None  # the batch before: one is always queued on the GPU while we wait
        mark = time.monotonic()
        workers = self._config.extract.workers
        for batch, pixels in taught_batches(self._renderer, self._tasks(units), workers, self._run):
            mark = self._spent("data", mark)
            unit, last = batch.tag
            if assembly is None:
                assembly = UnitAssembly(self._source, unit)
            if self._usable(batch):
                assembly.add(batch, self._run(mixed_images(pixels, batch.mix)))
                if busy is not None:
                    busy.synchronize()
                busy = torch.cuda.current_stream().record_event() if self._run.device.type == "cuda" else None
            progress.advance(len(batch.row))
            mark = self._spent("teacher", mark)
            if last:
                if unit not in self._failed:
                    yield assembly
                assembly = None
                mark = time.monotonic()

    def _usable(self, batch: RenderedBatch) -> bool:
        unit, _ = batch.tag
        if batch.error is not None:
            self._failed.setdefault(unit, f"shard {unit[0]}, view {unit[1]}: {batch.error}")
        for position, reason in batch.broken:
            key = self._source.shards[unit[0]].keys[int(batch.row[position])]
            if self._config.extract.strict:
                raise SourceError(
                    f"{self._source.location}: image of key '{key}' is broken: {reason}. Repair or remove it, or run "
                    "without --strict to record and skip it."
                )
            self._broken[key] = reason
        return unit not in self._failed

    def _publish(self, assembly: UnitAssembly) -> None:
        """In the writer thread."""
        started = time.monotonic()
        columns, nodes, broken = assembly.finish()
        shard, view = assembly.unit
        try:
            _check_finite(nodes, self._source, shard, view, columns["row"])
            self._records.append(self._writer.publish(shard, view, columns, nodes, broken))
        except TeacherError as error:
            self._failed[assembly.unit] = f"shard {shard}, view {view}: {error}"
        self._seconds["write"] += time.monotonic() - started

    def _spent(self, what: str, since: float) -> float:
        now = time.monotonic()
        self._seconds[what] += now - since
        return now

    def _where_time_goes(self) -> str:
        waited = max(self._seconds["data"] + self._seconds["teacher"], 1e-9)
        shares = ", ".join(f"{what} {100 * spent / waited:.0f}%" for what, spent in self._seconds.items())
        return f"{shares} | {self._bytes() / 1e6:.1f} MB"

    def _bytes(self) -> int:
        return sum(record.num_bytes for record in self._records)

    def summary(self) -> ExtractSummary:
        """The finished part of the job's summary."""
        return ExtractSummary(
            units_published=len(self._records),
            units_skipped=0,
            units_failed=tuple(self._failed.values()),
            samples=sum(record.num_samples for record in self._records),
            broken=tuple(sorted(self._broken.items())),
            bytes=self._bytes(),
            seconds=0.0,
        )


def _check_finite(
    nodes: dict[str, torch.Tensor], source: Source, shard: int, view: int, rows: npt.NDArray[np.generic]
) -> None:
    for name, values in nodes.items():
        bad = (~torch.isfinite(values.flatten(1)).all(1)).nonzero().flatten() if len(values) else values
        if len(bad):
            key = source.shards[shard].keys[int(rows[int(bad[0])])]
            raise TeacherError(
                f"node '{name}' is not finite for {len(bad)} samples, first key '{key}' in view {view}. Under float16 "
                "autocast values overflow at 65504: use [extract] autocast = 'bfloat16' or 'off'."
            )
