"""A unit's way through extraction: cut into render tasks, and put together again from the teacher's batches.

Rows are visited pair by pair, so that both members of a pair are in one batch; they are stored in the shard's order.

Shape legend: n rows of the shard, b samples of a batch.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.cache.schema import NodeSpec
from vkd_cache.cache.units import UnitId, keys_to_columns
from vkd_cache.errors import TeacherError
from vkd_cache.sources import Source
from vkd_cache.stages.rendering import RenderedBatch, RenderTask
from vkd_cache.views.mixing import pair_slots, plan_mixing
from vkd_cache.views.params import MixPlan
from vkd_cache.views.recipe import Recipe

HALF_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def unit_tasks(
    source: Source, recipe: Recipe, seed: int, unit: UnitId, batch_size: int
) -> list[RenderTask]:
    """The batches of one unit; `tag` is (unit, is it the last one). `batch_size` is even."""
    shard, view = unit
    plan = plan_mixing(recipe, seed, source.shards[shard].keys, view)
    rows = pair_slots(plan).reshape(-1)
    rows = rows[rows >= 0]
    tasks = []
    for start in range(0, len(rows), batch_size):
        batch_rows = rows[start : start + batch_size]
        shards = np.full(len(batch_rows), shard, np.int64)
        tasks.append(
            RenderTask(
                tag=(unit, start + batch_size >= len(rows)),
                shard=shards,
                row=batch_rows,
                view=view,
                mix=mix_of_batch(plan, batch_rows),
            )
        )
    return tasks


def mix_of_batch(plan: MixPlan, rows: npt.NDArray[np.int64]) -> MixPlan:
    """The part of a unit's mixing that concerns `rows` (with their partners), as positions within the batch."""
    position = np.full(len(plan.partner), -1, np.int64)
    position[rows] = np.arange(len(rows))
    return MixPlan(
        partner=position[plan.partner[rows]].astype(np.uint32),
        kind=plan.kind[rows],
        lam=plan.lam[rows],
        box=plan.box[rows],
    )


class UnitAssembly:
    """Collects the batches of one unit and gives its columns and node values, without the broken rows.

    Only what is stored is kept. Pixels, and anything else that a worker process has sent as a tensor, are not: a unit
    of them would be gigabytes, and each holds a file descriptor.
    """

    def __init__(self, source: Source, unit: UnitId, nodes: Sequence[NodeSpec] = ()) -> None:
        """`nodes`: those that are stored as half floats are converted before they leave the device."""
        self.unit = unit
        self._shard = source.shards[unit.shard]
        self._dtypes = {spec.name: HALF_DTYPES[spec.codec] for spec in nodes if spec.codec in HALF_DTYPES}
        self._rows: list[npt.NDArray[np.int64]] = []
        self._ok: list[npt.NDArray[np.bool_]] = []
        self._columns: list[dict[str, npt.NDArray[np.generic]]] = []
        self._broken: list[tuple[str, int, str]] = []
        self._outputs: list[dict[str, torch.Tensor]] = []
        self._copied: list[torch.cuda.Event] = []

    def add(self, batch: RenderedBatch, outputs: dict[str, torch.Tensor]) -> None:
        """Take one batch; `outputs` (b, ...) per node may still be on their way from a GPU."""
        self._rows.append(batch.row)
        self._ok.append(batch.ok)
        self._columns.append(batch.columns | _mix_columns(batch))
        self._broken += [
            (self._shard.keys[row], row, reason)
            for row, reason in ((int(batch.row[position]), reason) for position, reason in batch.broken)
        ]
        # copies from a GPU go to pinned memory, which torch allocates for them, and are complete at the event
        self._outputs.append(
            {
                name: values.to(self._dtypes.get(name, values.dtype)).to("cpu", non_blocking=True)
                for name, values in outputs.items()
            }
        )
        device = next((values.device for values in outputs.values() if values.device.type == "cuda"), None)
        if device is not None:
            self._copied.append(torch.cuda.current_stream(device).record_event())

    def finish(
        self,
    ) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, torch.Tensor], list[tuple[str, int, str]]]:
        """Columns and node values (row order, broken rows left out), and the broken rows as (key, row, reason).

        Batches are let go of as they are copied: this can be called once.
        """
        for event in self._copied:
            event.synchronize()
        rows, ok = np.concatenate(self._rows), np.concatenate(self._ok)
        order = np.argsort(rows, kind="stable")
        order = order[ok[order]]
        columns: dict[str, npt.NDArray[np.generic]] = {
            name: np.concatenate([part[name] for part in self._columns])[order] for name in self._columns[0]
        }
        rows = rows[order]
        columns |= keys_to_columns([self._shard.keys[row] for row in rows.tolist()])
        columns |= {"row": rows.astype(np.uint32), "label": self._shard.labels[rows].astype(np.uint32)}
        place = np.full(len(ok), -1, np.int64)
        place[order] = np.arange(len(order))
        return columns, self._joined(torch.from_numpy(place), len(order)), sorted(self._broken, key=_row)

    def _joined(self, place: torch.Tensor, num_rows: int) -> dict[str, torch.Tensor]:
        """Node values (num_rows, ...), each row put at its `place`; -1 for those that are left out."""
        first = self._outputs[0]
        nodes = {name: values.new_empty((num_rows, *values.shape[1:])) for name, values in first.items()}
        start = 0
        while self._outputs:
            outputs = self._outputs.pop(0)
            part = place[start : start + len(next(iter(outputs.values())))]
            for name, values in outputs.items():
                nodes[name][part[part >= 0]] = values[part >= 0]
            start += len(part)
        return nodes


def _row(broken: tuple[str, int, str]) -> int:
    return broken[1]


def _mix_columns(batch: RenderedBatch) -> dict[str, npt.NDArray[np.generic]]:
    mix = batch.mix
    if mix is None:
        return {}
    return {
        "partner": batch.row[mix.partner].astype(np.uint32),
        "mix_kind": mix.kind,
        "mix_lambda": mix.lam,
        "mix_box": mix.box,
    }


def check_storable(specs: Sequence[NodeSpec], nodes: Mapping[str, torch.Tensor], keys: Sequence[str]) -> None:
    """Refuse node values (n, ...) that their codecs cannot hold; `keys` are those of the n rows.

    Raises:
        TeacherError: names the node and the first such key.
    """
    for spec in specs:
        values = nodes[spec.name]
        if not values.numel():
            continue
        low, high = (float(extreme) for extreme in values.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = ~torch.isfinite(values).flatten(1).all(1)
            what = "not finite"
            cure = (
                "Under float16, autocast or dtype, values overflow at 65504: use bfloat16, or autocast 'off' and "
                "--dtype float32."
            )
        elif low < 0 and spec.codec == "sqrt_uint8":
            bad = (values < 0).flatten(1).any(1)
            what = "negative, which codec sqrt_uint8 cannot hold,"
            cure = "The codec was chosen for a first unit without any: extract into another cache with --dtype float16."
        else:
            continue
        first = keys[int(bad.nonzero()[0, 0])]
        raise TeacherError(f"node '{spec.name}' is {what} for {int(bad.sum())} samples, first key '{first}'. {cure}")


def units_of_worker(num_shards: int, views: Sequence[int], index: int, count: int) -> list[UnitId]:
    """The units that worker `index` of `count` does: every `count`-th of all, view by view.

    Published or not makes no difference, so workers that start at different times agree on who does what.
    """
    units = [UnitId(shard, view) for view in views for shard in range(num_shards)]
    return units[index::count]
