"""The loop of an extraction: units through the teacher, a writer thread behind it, and the bookkeeping of both.

A newcomer's trap: what is wrong with a unit (a file that vanished, features that are not finite) fails that unit, and
the job goes on; what is wrong with the cache (a full disk) stops the job at once. That another job has published a unit
meanwhile is neither.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch

from vkd_cache import console
from vkd_cache.cache.units import UnitId, by_view, record_path
from vkd_cache.cache.writer import CacheWriter
from vkd_cache.config import Config
from vkd_cache.errors import SourceError, TeacherError
from vkd_cache.sources import Source, read_ahead
from vkd_cache.stages.rendering import RenderedBatch, Renderer, RenderTask
from vkd_cache.stages.teaching import TeacherRun, taught_batches
from vkd_cache.stages.transfer import model_input
from vkd_cache.stages.unit_order import UnitOrder
from vkd_cache.stages.units import UnitAssembly, check_storable, unit_tasks
from vkd_cache.views.recipe import Recipe

MAX_UNITS_WAITING = 2  # finished units that may wait for the writer before the teacher does
_READ_AHEAD_UNITS = 4  # units whose tars may be copied meanwhile, where they lie behind a URL


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractSummary:
    """What one run did.

    Attributes:
        units_published: units this run wrote.
        units_skipped: units of this worker that were published before.
        units_overtaken: units of this worker that another job published meanwhile.
        units_wasted: those of them that this run computed all the same.
        units_failed: one message per unit that could not be made.
        samples: views rendered and stored by this run.
        broken: (key, reason) of broken images, once per key.
        bytes: bytes of the units written.
        leftovers: files that killed writers had left, which this run removed.
        seconds: wall-clock time.
    """

    units_published: int = 0
    units_skipped: int = 0
    units_overtaken: int = 0
    units_wasted: int = 0
    units_failed: tuple[str, ...] = ()
    samples: int = 0
    broken: tuple[tuple[str, str], ...] = ()
    bytes: int = 0
    leftovers: int = 0
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0, or 3 when some units failed."""
        return 3 if self.units_failed else 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


class WriterThread:
    """Publishes finished units behind the teacher's back, in order; a context manager.

    Left by an error or Ctrl-C, it finishes the unit it is writing and drops those that wait.
    """

    def __init__(self, publish: Callable[[UnitAssembly], None]) -> None:
        self._publish = publish
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def put(self, unit: UnitAssembly) -> None:
        """Hand over a unit; waits while too many are waiting already."""
        self._waiting.append(self._thread.submit(self._publish, unit))
        while len(self._waiting) > MAX_UNITS_WAITING:
            self._waiting.popleft().result()

    def check(self) -> None:
        """Raise what stopped the writer, if anything did."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    def finish(self) -> None:
        """Wait for all units."""
        while self._waiting:
            self._waiting.popleft().result()


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
        self._failed: dict[UnitId, str] = {}
        self._broken: dict[str, str] = {}
        self._seconds = {"data": 0.0, "teacher": 0.0, "write": 0.0}
        self._units_published = self._units_wasted = self._samples = self._bytes = 0  # by the writer thread alone
        self._units_left_out = 0
        self._queued: torch.cuda.Event | None = None

    def do(self, units: list[UnitId]) -> None:
        """Make and publish `units`.

        Raises:
            SourceError: a broken image when strict, or a worker process that died.
            CacheError: the cache cannot be written.
        """
        if not units:
            return
        total = sum(len(self._source.shards[unit.shard].keys) for unit in units)
        with console.track("extract", total) as progress:

            def leave_out(unit: UnitId) -> None:
                self._units_left_out += 1
                progress.leave_out(len(self._source.shards[unit.shard].keys))

            # chance has no say in what is stored, see unit_order
            order = UnitOrder(units, self._writer.cache, np.random.default_rng(), leave_out)
            self._make(order, progress)

    def _make(self, order: UnitOrder, progress: console.Progress) -> None:
        with WriterThread(lambda assembly: self._publish(assembly, order)) as writer:
            assembly: UnitAssembly | None = None
            for batch, pixels in self._timed_batches(order):
                unit, is_last = batch.tag
                assembly = assembly or self._new_assembly(unit)
                started = time.monotonic()
                if self._usable(batch):
                    assembly.add(batch, self._run(model_input(batch, pixels)))
                    self._keep_one_batch_queued()
                self._seconds["teacher"] += time.monotonic() - started
                writer.check()
                if is_last:
                    if unit not in self._failed:
                        writer.put(assembly)
                    assembly = None
                progress.advance(len(batch.row))
                progress.detail(self._where_time_goes())
            writer.finish()
            progress.detail(self._where_time_goes())

    def _new_assembly(self, unit: UnitId) -> UnitAssembly:
        return UnitAssembly(self._source, unit, self._writer.manifest.nodes, seed=self._config.views.seed)

    def _keep_one_batch_queued(self) -> None:
        """Wait for the batch before this one: the GPU has one to go on with, and memory for no more is needed."""
        if self._run.device.type == "cuda":
            if self._queued is not None:
                self._queued.synchronize()
            self._queued = torch.cuda.current_stream(self._run.device).record_event()

    def _timed_batches(self, order: UnitOrder) -> Iterator[tuple[RenderedBatch, torch.Tensor]]:
        started = time.monotonic()
        for item in taught_batches(self._renderer, self._tasks(order), self._config.extract.workers, self._run):
            self._seconds["data"] += time.monotonic() - started
            yield item
            started = time.monotonic()

    def _tasks(self, order: UnitOrder) -> Iterator[RenderTask]:
        for unit in order:
            read_ahead(self._source, [unit.shard], [later.shard for later in order.upcoming(_READ_AHEAD_UNITS)])
            yield from unit_tasks(
                self._source, self._renderer.recipe, self._config.views.seed, unit, self._run.batch_size
            )

    def _usable(self, batch: RenderedBatch) -> bool:
        """Whether the teacher should see a batch: not if its unit has failed."""
        unit, _ = batch.tag
        if batch.error is not None:
            self._fail(unit, batch.error)
        for position, reason in batch.broken:
            key = self._source.shards[unit.shard].keys[int(batch.row[position])]
            if self._config.extract.strict:
                raise SourceError(
                    f"{self._source.location}: image of key '{key}' is broken: {reason}. Repair or remove it, or run "
                    "without --strict to record and skip it."
                )
            self._broken[key] = reason
        return unit not in self._failed

    def _fail(self, unit: UnitId, error: Exception) -> None:
        self._failed.setdefault(unit, f"shard {unit.shard}, view {unit.view}: {error}")

    def _publish(self, assembly: UnitAssembly, order: UnitOrder) -> None:
        """In the writer thread."""
        started = time.monotonic()
        unit = assembly.unit
        try:
            if self._writer.cache.is_published(unit):
                raise FileExistsError(record_path(unit))
            columns, nodes, broken = assembly.finish()
            keys = self._source.shards[unit.shard].keys
            check_storable(self._writer.manifest.nodes, nodes, [keys[row] for row in columns["row"].tolist()])
            record = self._writer.publish(unit.shard, unit.view, columns, nodes, broken, exclusive=True)
        except TeacherError as error:
            self._fail(unit, error)
        except FileExistsError:  # another job was faster, or something else has a name that the cache needs
            if not self._writer.cache.is_published(unit):
                raise
            self._units_wasted += 1
            order.lost(unit)
        else:
            self._units_published += 1
            self._samples += record.num_samples
            self._bytes += record.num_bytes
        self._seconds["write"] += time.monotonic() - started

    def _where_time_goes(self) -> str:
        """Shares of the main loop's time; the writer works beside it, and waits for nobody until it reaches 100 %."""
        total = max(self._seconds["data"] + self._seconds["teacher"], 1e-9)
        shares = ", ".join(f"{what} {100 * spent / total:.0f}%" for what, spent in self._seconds.items())
        return f"{shares} | {self._bytes / 1e6:.1f} MB"

    def summary(self) -> ExtractSummary:
        """What was done so far; skipped units and seconds are the caller's to know."""
        return ExtractSummary(
            units_published=self._units_published,
            units_overtaken=self._units_left_out + self._units_wasted,
            units_wasted=self._units_wasted,
            units_failed=tuple(self._failed[unit] for unit in sorted(self._failed, key=by_view)),
            samples=self._samples,
            broken=tuple(sorted(self._broken.items())),
            bytes=self._bytes,
        )
