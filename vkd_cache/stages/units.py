"""A unit's way through extraction: cut into render tasks, and put together again from the teacher's batches.

Rows are visited pair by pair, so that both members of a pair are in one batch; they are stored in the shard's order.

Shape legend: n rows of the shard, b samples of a batch.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.cache.units import UnitId, keys_to_columns
from vkd_cache.sources import Source
from vkd_cache.stages.rendering import RenderedBatch, RenderTask
from vkd_cache.views.mixing import pair_slots, plan_mixing
from vkd_cache.views.params import MixPlan
from vkd_cache.views.recipe import Recipe


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
    """Collects the batches of one unit and gives its columns and node values, without the broken rows."""

    def __init__(self, source: Source, unit: UnitId) -> None:
        self.unit = unit
        self._shard = source.shards[unit[0]]
        self._batches: list[RenderedBatch] = []
        self._outputs: list[dict[str, torch.Tensor]] = []
        self._copied: list[torch.cuda.Event] = []

    def add(self, batch: RenderedBatch, outputs: dict[str, torch.Tensor]) -> None:
        """Take one batch; `outputs` (b, ...) per node may still be on their way from a GPU.

        The pixels are dropped here: a unit of them would be gigabytes.
        """
        batch.pixels = torch.empty(0)
        self._batches.append(batch)
        self._outputs.append({name: values.to("cpu", non_blocking=True) for name, values in outputs.items()})
        on_gpu = [values.device for values in outputs.values() if values.device.type == "cuda"]
        if on_gpu:
            self._copied.append(torch.cuda.current_stream(on_gpu[0]).record_event())

    def finish(
        self,
    ) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, torch.Tensor], list[tuple[str, int, str]]]:
        """Columns and node values (row order, broken rows left out), and the broken rows as (key, row, reason)."""
        for event in self._copied:
            event.synchronize()
        rows = np.concatenate([batch.row for batch in self._batches])
        ok = np.concatenate([batch.ok for batch in self._batches])
        order = np.argsort(rows, kind="stable")
        order = order[ok[order]]
        columns: dict[str, npt.NDArray[np.generic]] = {
            name: np.concatenate([batch.columns[name] for batch in self._batches])[order]
            for name in self._batches[0].columns
        }
        rows = rows[order]
        columns |= keys_to_columns([self._shard.keys[row] for row in rows])
        columns |= {
            "row": rows.astype(np.uint32),
            "label": self._shard.labels[rows].astype(np.uint32),
        }
        columns |= {name: values[order] for name, values in self._mix_columns().items()}
        # the same memory layout whatever the number of batches, and the smallest copy there is
        index = torch.from_numpy(order)
        nodes = {
            name: torch.cat([outputs[name] for outputs in self._outputs])[index] for name in self._outputs[0]
        }
        return columns, nodes, self._broken()

    def _mix_columns(self) -> dict[str, npt.NDArray[np.generic]]:
        mixes = [(batch.row, batch.mix) for batch in self._batches if batch.mix is not None]
        return {
            "partner": np.concatenate([row[mix.partner] for row, mix in mixes]).astype(np.uint32),
            "mix_kind": np.concatenate([mix.kind for _, mix in mixes]),
            "mix_lambda": np.concatenate([mix.lam for _, mix in mixes]),
            "mix_box": np.concatenate([mix.box for _, mix in mixes]),
        }

    def _broken(self) -> list[tuple[str, int, str]]:
        found: list[tuple[int, str]] = []
        for batch in self._batches:
            found += [(int(batch.row[position]), reason) for position, reason in batch.broken]
        return [(self._shard.keys[row], row, reason) for row, reason in sorted(found)]


def units_of_worker(num_shards: int, views: Sequence[int], index: int, count: int) -> list[UnitId]:
    """The units that worker `index` of `count` does: every `count`-th of all, view by view.

    Published or not makes no difference, so workers that start at different times agree on who does what.
    """
    units = [UnitId(shard, view) for view in views for shard in range(num_shards)]
    return units[index::count]
