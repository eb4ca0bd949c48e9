"""Joins what units hold to the samples of a batch, by position: whole arrays at a time, microseconds a sample.

A newcomer's trap: `row` is a row of the source shard, and a unit lacks the rows of broken images, so rows are looked up
in a unit unless it is complete.

Shape legend: b samples of a batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.cache.reader import Unit
from vkd_cache.stages.unit_views import ShardView
from vkd_cache.views.params import MixPlan

REPLAY_COLUMNS = ("seed", "source_size", "crop", "flip", "op_id", "op_value", "erase", "digest")


class Part(NamedTuple):
    """The samples of a batch that come from one unit: their positions in the batch and rows of the shard."""

    content: ShardView
    position: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]

    def unit_rows(self, unit: Unit) -> npt.NDArray[np.int64]:
        """Where the rows are in the unit, which lacks those of broken images."""
        return self.row if len(unit.rows) == len(self.content.mix.partner) else np.searchsorted(unit.rows, self.row)


def joined_columns(parts: Sequence[Part], count: int) -> dict[str, npt.NDArray[np.generic]]:
    """Stored view params and digests in batch order; nothing where the views are planned on the spot."""
    joined: dict[str, npt.NDArray[np.generic]] = {}
    for part in parts:
        unit = part.content.unit
        if unit is None:
            return {}
        rows = part.unit_rows(unit)
        for name in REPLAY_COLUMNS:
            column = unit.columns[name]
            if name not in joined:
                joined[name] = np.empty((count, *column.shape[1:]), column.dtype)
            joined[name][part.position] = column[rows]
    return joined


def joined_nodes(parts: Sequence[Part], count: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Node values in batch order."""
    joined: dict[str, torch.Tensor] = {}
    for part in parts:
        unit = part.content.unit
        if unit is None:
            return {}
        for name in names:
            values = unit.node(name, part.unit_rows(unit))
            if name not in joined:
                joined[name] = values.new_empty((count, *values.shape[1:]))
            joined[name][torch.from_numpy(part.position)] = values
    return joined


def joined_mix(parts: Sequence[Part], count: int) -> MixPlan:
    """The mixing of a batch, partners as positions within it."""
    partner = np.arange(count, dtype=np.uint32)
    kind = np.zeros(count, np.uint8)
    lam = np.ones(count, np.float32)
    box = np.zeros((count, 4), np.uint16)
    for content, position, rows in parts:
        mix = content.mix
        where = np.full(len(mix.partner), -1, np.int64)
        where[rows] = position
        partner[position] = where[mix.partner[rows]]
        kind[position] = mix.kind[rows]
        lam[position] = mix.lam[rows]
        box[position] = mix.box[rows]
    return MixPlan(partner=partner, kind=kind, lam=lam, box=box)
