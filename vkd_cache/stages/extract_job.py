"""The loop of an extraction: units through the teacher, a writer thread behind it, and the bookkeeping of both.

A newcomer's trap: what is wrong with a unit (a file that vanished, features that are not finite) fails that unit, and
the job goes on; what is wrong with the cache (a full disk) stops the job at once. That another job has published a unit
meanwhile is neither.
"""

import contextlib
import dataclasses
import functools
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
from vkd_cache.errors import CacheError, SourceError, TeacherError
from vkd_cache.memory import is_out_of_memory
from vkd_cache.sources import Source, read_ahead
from vkd_cache.stages.device_queue import DeviceQueue
from vkd_cache.stages.rendering import RenderedBatch, Renderer, RenderTask
from vkd_cache.stages.stored_pixels import StoredPixels
from vkd_cache.stages.teaching import TeacherRun, memory_told, taught_batches
from vkd_cache.stages.time_spent import TimeSpent, limit_of, shares, sharing
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
        limit: `teacher`, `data` or `writer`: what would have to be faster for the job to be; empty without a batch.
        shares: of the time from the first batch to the last, see `vkd_cache.stages.time_spent.shares`.
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
    limit: str = ""
    shares: dict[str, float] = dataclasses.field(default_factory=dict)

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
        self._renderer = Renderer(source, recipe, config.views.seed, stored=StoredPixels.of_cache(writer.cache))
        self._run = run
        self._writer = writer
        self._failed: dict[UnitId, str] = {}
        self._broken: dict[str, str] = {}
        self._known_broken: dict[int, frozenset[str]] = {}  # keys by shard; by the writer thread alone
        self._spent = TimeSpent()
        self._queue = DeviceQueue(run.device, self._spent)
        self._units_published = self._units_wasted = self._samples = self._bytes = 0  # by the writer thread alone
        self._units_left_out = 0

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
        with WriterThread(lambda assembly: self._publish(assembly, order)) as writer, memory_told(self._run):
            assembly: UnitAssembly | None = None
            for batch, pixels in self._timed_batches(order):
                unit, is_last = batch.tag
                assembly = assembly or self._new_assembly(unit)
                if self._usable(batch):
                    with self._queue.batch():
                        assembly.add(batch, self._run(model_input(batch, pixels)))
                writer.check()
                if is_last:
                    if unit not in self._failed:
                        with self._spent.during("writer"):
                            writer.put(assembly)
                    assembly = None
                progress.advance(len(batch.row))
                progress.detail(self._where_time_goes())
            self._queue.finish()
            self._spent.end()
            writer.finish()
            progress.detail(self._where_time_goes())

    def _new_assembly(self, unit: UnitId) -> UnitAssembly:
        return UnitAssembly(self._source, unit, self._writer.manifest.nodes, seed=self._config.views.seed)

    def _timed_batches(self, order: UnitOrder) -> Iterator[tuple[RenderedBatch, torch.Tensor]]:
        batches = taught_batches(self._renderer, self._tasks(order), self._config.extract.workers, self._run)
        while True:
            with self._spent.during("data"):
                item = next(batches, None)
            if item is None:
                return
            self._spent.begin()  # once: how long workers take to start limits nothing
            yield item

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
        if self._config.extract.strict and batch.broken:
            position, reason = batch.broken[0]
            key = self._source.shards[unit.shard].keys[int(batch.row[position])]
            raise SourceError(
                f"{self._source.location}: image of key '{key}' is broken: {reason}. Repair or remove it, or run "
                "without --strict to record and skip it."
            )
        return unit not in self._failed

    def _fail(self, unit: UnitId, error: Exception) -> None:
        self._failed.setdefault(unit, f"shard {unit.shard}, view {unit.view}: {error}")

    def _publish(self, assembly: UnitAssembly, order: UnitOrder) -> None:
        """In the writer thread."""
        with self._spent.during("writing"):
            self._publish_unit(assembly, order)

    def _publish_unit(self, assembly: UnitAssembly, order: UnitOrder) -> None:
        unit = assembly.unit
        try:
            if self._writer.cache.is_published(unit):
                raise FileExistsError(record_path(unit))
            columns, nodes, broken = assembly.finish()
            reasons = {key: reason for key, _, reason in broken}
            self._check_broken(unit, reasons)
            keys = self._source.shards[unit.shard].keys
            check_storable(self._writer.manifest.nodes, nodes, [keys[row] for row in columns["row"].tolist()])
            record = self._writer.publish(unit.shard, unit.view, columns, nodes, broken, exclusive=True)
        except (SourceError, TeacherError) as error:
            self._fail(unit, error)
        except FileExistsError:  # another job was faster, or something else has a name that the cache needs
            if not self._writer.cache.is_published(unit):
                raise
            self._units_wasted += 1
            order.lost(unit)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise CacheError(
                f"out of memory while shard {unit.shard} of view {unit.view} was put together: "
                f"{len(self._source.shards[unit.shard].keys)} samples are written at once. Give a smaller [source] "
                "shard_size, or store fewer nodes or tokens, in another cache."
            ) from error
        else:
            self._known_broken.setdefault(unit.shard, frozenset(reasons))
            self._broken |= reasons
            self._units_published += 1
            self._samples += record.num_samples
            self._bytes += record.num_bytes

    def _check_broken(self, unit: UnitId, broken: dict[str, str]) -> None:
        """Refuse images that cannot be decoded now, and could when another view of their shard was made.

        Raises:
            SourceError: there are some.
        """
        if not broken:
            return
        known = self._known_broken.get(unit.shard)
        if known is None:
            known = self._broken_in_cache(unit.shard)
            if known is None:
                return
            self._known_broken[unit.shard] = known
        lost = [key for key in broken if key not in known]
        if lost:
            raise SourceError(
                f"{len(lost)} images cannot be decoded any more, that another view in the cache has; first key "
                f"'{lost[0]}': {broken[lost[0]]}. Restore them; the same command then makes what is missing. If they "
                "are lost, extract into another cache."
            )

    def _broken_in_cache(self, shard: int) -> frozenset[str] | None:
        """Keys that a unit of `shard` records as broken; None where none was published."""
        if shard in self._published_views:
            with contextlib.suppress(CacheError):  # a record that cannot be read says nothing
                record = self._writer.cache.record(shard, self._published_views[shard])
                return frozenset(key for key, _, _ in record.broken)
        return None

    @functools.cached_property
    def _published_views(self) -> dict[int, int]:
        """A view of each shard that has one, when the first image was found broken; lists the cache."""
        return {shard: view for view, shards in self._writer.cache.published().items() for shard in shards}

    def _where_time_goes(self) -> str:
        """What limits the job now, and shares of the last half minute; the writer works beside the others."""
        spent = self._spent.recent()
        found = shares(spent)
        return (
            f"limited by the {limit_of(spent)}{sharing(self._run.device.type)} | data {100 * found['data']:.0f}%, "
            f"teacher {100 * found['teacher']:.0f}%, write {100 * found['writing']:.0f}% | {self._bytes / 1e6:.1f} MB"
        )

    def summary(self) -> ExtractSummary:
        """What was done so far; skipped units and seconds are the caller's to know."""
        spent = self._spent.whole()
        return ExtractSummary(
            units_published=self._units_published,
            units_overtaken=self._units_left_out + self._units_wasted,
            units_wasted=self._units_wasted,
            units_failed=tuple(self._failed[unit] for unit in sorted(self._failed, key=by_view)),
            samples=self._samples,
            broken=tuple(sorted(self._broken.items())),
            bytes=self._bytes,
            limit=limit_of(spent) if spent.wall else "",
            shares={name: round(share, 4) for name, share in shares(spent).items()} if spent.wall else {},
        )
