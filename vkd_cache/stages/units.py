"""A unit's way through extraction: cut into render tasks, and put together again from the teacher's batches.

Rows are visited pair by pair, so that both members of a pair are in one batch; rows of detection, which are never
mixed, canvas by canvas. They are stored in the shard's order.

Shape legend: n rows of the shard, b samples of a batch.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.cache.pixel_codecs import EncodedViews
from vkd_cache.cache.schema import UNIT_SCALED, NodeSpec
from vkd_cache.cache.units import UnitId, keys_to_columns
from vkd_cache.errors import TeacherError
from vkd_cache.sources import CocoSource, Source, is_detection
from vkd_cache.stages.device_queue import blocking_event
from vkd_cache.stages.rendering import RenderedBatch, RenderTask
from vkd_cache.stages.unit_tokens import (
    HALF_DTYPES,
    as_stored,
    extremes,
    finite_images,
    in_order,
    sampled_tokens,
    stored_dtype,
)
from vkd_cache.tokens import Tokens
from vkd_cache.views.mixing import pair_slots, plan_mixing
from vkd_cache.views.params import MixPlan
from vkd_cache.views.plan import plan_canvas
from vkd_cache.views.recipe import Recipe

Output = torch.Tensor | Tokens


def unit_tasks(
    source: Source, recipe: Recipe, seed: int, unit: UnitId, batch_size: int
) -> list[RenderTask]:
    """The batches of one unit; `tag` is (unit, is it the last one). `batch_size` is even.

    A batch of detection holds views of one canvas, as the plan says it: what else is in a unit has no say in that.
    """
    shard, view = unit
    plan = plan_mixing(recipe, seed, source.shards[shard].keys, view)
    rows = pair_slots(plan).reshape(-1)
    groups = [rows[rows >= 0]]
    if is_detection(source):
        groups = rows_by_canvas(source, recipe, seed, unit)
    batches = [rows[start : start + batch_size] for rows in groups for start in range(0, len(rows), batch_size)]
    return [
        RenderTask(
            tag=(unit, number == len(batches)),
            shard=np.full(len(batch_rows), shard, np.int64),
            row=batch_rows,
            view=view,
            mix=mix_of_batch(plan, batch_rows),
        )
        for number, batch_rows in enumerate(batches, start=1)
    ]


def rows_by_canvas(source: CocoSource, recipe: Recipe, seed: int, unit: UnitId) -> list[npt.NDArray[np.int64]]:
    """Rows of a unit's shard that share a canvas, ascending; the canvases by height and width."""
    shard, view = unit
    rows: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(source.shards[shard].keys):
        width, height = source.image_size(shard, row)
        canvas = plan_canvas(recipe, seed, key, view, width_px=width, height_px=height)
        rows.setdefault(canvas, []).append(row)
    return [np.array(rows[canvas], np.int64) for canvas in sorted(rows)]


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

    Only what is stored is kept. Decoded pixels, and anything else that a worker process has sent as a tensor, are not:
    a unit of them would be gigabytes, and each holds a file descriptor.
    """

    def __init__(self, source: Source, unit: UnitId, nodes: Sequence[NodeSpec] = (), *, seed: int = 0) -> None:
        """`nodes`: those that are stored as half floats are converted before they leave the device, as are all tokens,
        of which only the sample that `seed`, the cache's, draws leaves it."""
        self.unit = unit
        self._shard = source.shards[unit.shard]
        self._specs = {spec.name: spec for spec in nodes}
        self._seed = seed
        self._rows: list[npt.NDArray[np.int64]] = []
        self._ok: list[npt.NDArray[np.bool_]] = []
        self._columns: list[dict[str, npt.NDArray[np.generic]]] = []
        self._pixels: list[EncodedViews] = []
        self._broken: list[tuple[str, int, str]] = []
        self._outputs: list[dict[str, Output]] = []
        self._copied: list[torch.cuda.Event] = []

    def add(self, batch: RenderedBatch, outputs: Mapping[str, Output]) -> None:
        """Take one batch; `outputs` (b, ...) or tokens of b images may still be on their way from a GPU."""
        self._rows.append(batch.row)
        self._ok.append(batch.ok)
        # copies: an array of a large batch lies in a block as large as its pixels, which would have to stay for it
        self._columns.append({name: values.copy() for name, values in (batch.columns | _mix_columns(batch)).items()})
        self._pixels += [batch.stored.copy()] if batch.stored is not None else []
        self._broken += [
            (self._shard.keys[row], row, reason)
            for row, reason in ((int(batch.row[position]), reason) for position, reason in batch.broken)
        ]
        # copies from a GPU go to pinned memory, which torch allocates for them, and are complete at the event
        self._outputs.append({name: self._kept(name, values, batch) for name, values in outputs.items()})
        tensors = [values.values if isinstance(values, Tokens) else values for values in outputs.values()]
        device = next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)
        if device is not None:
            copied = blocking_event()
            copied.record(torch.cuda.current_stream(device))
            self._copied.append(copied)

    def _kept(self, name: str, values: Output, batch: RenderedBatch) -> Output:
        """What is stored of a node, on its way to the host."""
        spec = self._specs.get(name)
        if not isinstance(values, Tokens):
            return values.to(stored_dtype(values, spec)).to("cpu", non_blocking=True)
        if not batch.ok.all():
            values = values.select(np.flatnonzero(batch.ok))
        if spec is not None:
            keys = [self._shard.keys[row] for row in batch.row[batch.ok].tolist()]
            values = sampled_tokens(values, spec, seed=self._seed, keys=keys, view=self.unit.view)
        if spec is not None:
            values = as_stored(values, spec.codec)
        return values.to(torch.device("cpu"))

    def finish(
        self,
    ) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, Output], list[tuple[str, int, str]]]:
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
        if self._pixels:
            views = [part[place] for part in self._pixels for place in range(len(part))]
            columns |= EncodedViews.joined([views[place] for place in order.tolist()]).to_columns()
        return columns, self._joined(order, ok), sorted(self._broken, key=_row)

    def _joined(self, order: npt.NDArray[np.int64], ok: npt.NDArray[np.bool_]) -> dict[str, Output]:
        """Node values, the rows of all batches taken in `order`; those that are not `ok` are not in it."""
        place = np.full(len(ok), -1, np.int64)
        place[order] = np.arange(len(order))
        kept = (np.cumsum(ok) - 1)[order]  # tokens of broken images have been left out already
        nodes: dict[str, Output] = {}
        for name in list(self._outputs[0]):
            parts = [outputs.pop(name) for outputs in self._outputs]
            tensors = [part for part in parts if isinstance(part, torch.Tensor)]
            tokens = [part for part in parts if isinstance(part, Tokens)]
            del parts
            nodes[name] = in_order(tokens, kept) if tokens else _placed(tensors, torch.from_numpy(place), len(order))
        return nodes


def _placed(parts: list[torch.Tensor], place: torch.Tensor, num_rows: int) -> torch.Tensor:
    """(num_rows, ...), each row of `parts` at its `place`, -1 for those that are left out; `parts` is emptied."""
    joined = parts[0].new_empty((num_rows, *parts[0].shape[1:]))
    start = 0
    while parts:
        values = parts.pop(0)
        to = place[start : start + len(values)]
        joined[to[to >= 0]] = values[to >= 0]
        start += len(values)
    return joined


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


def check_storable(specs: Sequence[NodeSpec], nodes: Mapping[str, Output], keys: Sequence[str]) -> None:
    """Refuse node values (n, ...) or tokens that their codecs cannot hold; `keys` are those of the n rows.

    Raises:
        TeacherError: names the node and the first such key.
    """
    for spec in specs:
        values = nodes[spec.name]
        if not len(values) or (isinstance(values, torch.Tensor) and not values.numel()):
            continue
        low, high = extremes(values) if isinstance(values, Tokens) else map(float, values.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            bad, what, cure = ~finite_rows(values), "not finite", _cure(spec)
        elif isinstance(values, Tokens):
            continue
        elif low < 0 and spec.codec in UNIT_SCALED:
            bad = _any_of_row(values < 0)
            what = f"negative, which codec {spec.codec} cannot hold,"
            cure = "The codec was chosen for a first unit without any: extract into another cache with --dtype float16."
        elif max(-low, high) > _LARGEST and spec.codec.endswith(("int8", "int4")):
            bad = _any_of_row(values.abs() > _LARGEST)
            what = f"larger than {_LARGEST:g}, which codec {spec.codec} turns into inf,"
            cure = "Extract into another cache with --dtype float32, or without the teacher's own masking of logits."
        else:
            continue
        first = keys[int(np.flatnonzero(bad)[0])]
        raise TeacherError(f"node '{spec.name}' is {what} for {int(bad.sum())} samples, first key '{first}'. {cure}")


_LARGEST = 3.4e38  # step times number of steps, rounded, may exceed the largest float32 by a bit


def _cure(spec: NodeSpec) -> str:
    """What to do about values that are not finite."""
    cure = "Check the teacher for these images; under [extract] autocast float16, it overflows at 65504: use bfloat16 "
    cure += "or off, in another cache."
    if spec.codec in HALF_DTYPES:
        largest = torch.finfo(HALF_DTYPES[spec.codec]).max
        cure += f" Codec {spec.codec} holds no more than {largest:.4g}: --dtype float32, in another cache, holds all."
    return cure


def _any_of_row(bad: torch.Tensor) -> npt.NDArray[np.bool_]:
    rows: npt.NDArray[np.bool_] = bad.flatten(1).any(1).numpy()
    return rows


def finite_rows(values: Output) -> npt.NDArray[np.bool_]:
    """(n,) which samples have nothing but finite values."""
    if isinstance(values, Tokens):
        return finite_images(values)
    return ~_any_of_row(~torch.isfinite(values))


def units_of_worker(num_shards: int, views: Sequence[int], index: int, count: int) -> list[UnitId]:
    """The units that worker `index` of `count` does: every `count`-th of all, view by view.

    Published or not makes no difference, so workers that start at different times agree on who does what.
    """
    units = [UnitId(shard, view) for view in views for shard in range(num_shards)]
    return units[index::count]
