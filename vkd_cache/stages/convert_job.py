"""The loop of a conversion: units read, converted and published, and the bookkeeping of that.

A newcomer's trap: what is wrong with a unit of the source (a damaged file, a value that the codec cannot hold) fails
the target's unit, and the job goes on; what is wrong with the target (a full disk) stops the job at once. That another
job has published a unit meanwhile is neither.
"""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from vkd_cache import console
from vkd_cache.cache.reader import Cache
from vkd_cache.cache.units import UnitId, by_view
from vkd_cache.cache.writer import CacheWriter
from vkd_cache.errors import CacheError
from vkd_cache.stages.convert_cut import Cut
from vkd_cache.stages.convert_units import SourceUnits, broken_rows, unit_arrays, unit_origin
from vkd_cache.stages.unit_order import UnitOrder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertSummary:
    """What one run did.

    Attributes:
        source, target: URLs.
        fingerprint: of the target.
        dry_run: nothing was done, only planned.
        target_exists: it was begun before.
        backend: of the target.
        shards: of the target's data set.
        units_to_convert: units of this worker that were neither there nor lacking in the source when it began.
        units_converted: units this run wrote.
        units_skipped: units of this worker that were published before.
        units_overtaken: units of this worker that another job published meanwhile.
        units_wasted: those of them that this run converted all the same.
        units_waiting: units of this worker that the source does not have whole yet.
        units_failed: one message per unit that could not be converted.
        samples: views in the units written.
        bytes_before, bytes_after: of these units' files, in the source and in the target.
        codecs: how each node is stored, before and after.
        leftovers: files that killed writers had left in the target, which this run removed.
        seconds: wall-clock time.
    """

    source: str
    target: str
    fingerprint: str = ""
    dry_run: bool = False
    target_exists: bool = False
    backend: str = ""
    shards: int = 0
    units_to_convert: int = 0
    units_converted: int = 0
    units_skipped: int = 0
    units_overtaken: int = 0
    units_wasted: int = 0
    units_waiting: int = 0
    units_failed: tuple[str, ...] = ()
    samples: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    codecs: dict[str, str] = dataclasses.field(default_factory=dict)
    leftovers: int = 0
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0, or 3 when some units failed."""
        return 3 if self.units_failed else 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


class ConvertJob:
    """The loop over this worker's units, with its bookkeeping."""

    def __init__(self, source: Cache, cut: Cut, writer: CacheWriter) -> None:
        self._source = source
        self._cut = cut
        self._writer = writer
        # only shards that are joined have something new to say of their mixing
        self._mixes = not cut.is_new or source.recipe.mixes
        self._failed: dict[UnitId, str] = {}
        self._units_left_out = 0
        self._units = self._units_wasted = self._samples = self._before = self._after = 0  # by the writer thread alone

    def do(self, units: list[UnitId]) -> None:
        """Convert and publish `units`; what is damaged in the source fails its unit, and the job goes on.

        Raises:
            CacheError: the target cannot be written.
        """
        with console.track("convert", len(units), "units") as progress:

            def leave_out(_unit: UnitId) -> None:
                self._units_left_out += 1
                progress.leave_out(1)

            # chance has no say in what is stored, see unit_order
            order = UnitOrder(units, self._writer.cache, np.random.default_rng(), leave_out)
            self._make(order, progress)

    def _make(self, order: UnitOrder, progress: console.Progress) -> None:
        """One unit is written while the next one is read and encoded."""
        reader = SourceUnits(self._source)
        with ThreadPoolExecutor(1, "writer") as thread:
            written: Future[None] | None = None
            for unit in order:
                publish = self._prepared(reader, unit, order)
                if written is not None:
                    written.result()
                written = thread.submit(publish) if publish is not None else None
                progress.advance()
                progress.detail(f"{self._before / 1e6:.1f} MB -> {self._after / 1e6:.1f} MB")
            if written is not None:
                written.result()
            progress.detail(f"{self._before / 1e6:.1f} MB -> {self._after / 1e6:.1f} MB")

    def _prepared(self, reader: SourceUnits, unit: UnitId, order: UnitOrder) -> Callable[[], None] | None:
        """What publishes one unit; None if there is something wrong with it."""
        try:
            parts = reader.parts(self._cut.pieces[unit.shard], unit.view)
            arrays = unit_arrays(parts, self._source.manifest, self._writer.manifest)
        except (CacheError, OSError) as error:
            self._failed[unit] = f"shard {unit.shard}, view {unit.view}: {error}"
            return None
        origin = unit_origin(parts, self._source, mixes=self._mixes)
        broken, num_bytes = broken_rows(parts), sum(part.num_bytes for part in parts)

        def publish() -> None:
            """In the writer thread."""
            try:
                record = self._writer.publish_arrays(unit, arrays, broken, origin, exclusive=True)
            except FileExistsError:  # another job was faster
                self._units_wasted += 1
                order.lost(unit)
            else:
                self._units += 1
                self._samples += record.num_samples
                self._before += num_bytes
                self._after += record.num_bytes

        return publish

    def counts(self) -> dict[str, Any]:
        """The fields of the summary that the job knows."""
        return {
            "units_converted": self._units,
            "units_overtaken": self._units_left_out + self._units_wasted,
            "units_wasted": self._units_wasted,
            "units_failed": tuple(self._failed[unit] for unit in sorted(self._failed, key=by_view)),
            "samples": self._samples,
            "bytes_before": self._before,
            "bytes_after": self._after,
        }
