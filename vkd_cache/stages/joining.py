"""Joins what units hold to the samples of a batch, by position: whole arrays at a time, microseconds a sample.

A newcomer's trap: `row` is a row of the source shard, and a unit lacks the rows of broken images, so rows are looked up
in a unit unless it is complete.

Shape legend: b samples of a batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vkd_cache.cache.pixel_codecs import Encoded, EncodedViews
from vkd_cache.cache.reader import Unit
from vkd_cache.stages.unit_views import ShardView
from vkd_cache.stored_rows import StoredRows, join_rows
from vkd_cache.tokens import Tokens, join_tokens
from vkd_cache.views.params import MixPlan

REPLAY_COLUMNS = ("seed", "source_size", "crop", "flip", "op_id", "op_value", "erase", "digest")
DETECTION_COLUMNS = ("view_size",)  # there, too, in a cache of detection views

Nodes = dict[str, StoredRows | Tokens]


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
        for name in (*REPLAY_COLUMNS, *(name for name in DETECTION_COLUMNS if name in unit.columns)):
            column = unit.columns[name]
            if name not in joined:
                joined[name] = np.empty((count, *column.shape[1:]), column.dtype)
            joined[name][part.position] = column[rows]
    return joined


def joined_pixels(parts: Sequence[Part], count: int) -> EncodedViews | None:
    """Stored views in batch order, still encoded; None where images are to be rendered."""
    views: list[Encoded] = [b""] * count
    for part in parts:
        pixels = None if part.content.unit is None else part.content.unit.pixels
        if part.content.unit is None or pixels is None:
            return None
        rows = part.unit_rows(part.content.unit)
        for position, row in zip(part.position.tolist(), rows.tolist(), strict=True):
            views[position] = pixels[row]
    return EncodedViews.joined(views)


def joined_nodes(parts: Sequence[Part], count: int, names: Sequence[str]) -> Nodes:
    """Node values, or tokens, in batch order, as they are stored."""
    units = [(part, part.content.unit) for part in parts]
    read = [(part.position, unit, part.unit_rows(unit)) for part, unit in units if unit is not None]
    if len(read) < len(parts):
        return {}
    joined: Nodes = {}
    for name in names:
        if read and read[0][1].layout(name) == "tokens":
            joined[name] = _in_order([(position, unit.tokens(name, rows)) for position, unit, rows in read], count)
            continue
        if read:
            joined[name] = join_rows([(unit.stored(name, rows), position) for position, unit, rows in read], count)
    return joined


def _in_order(parts: Sequence[tuple[npt.NDArray[np.int64], Tokens]], count: int) -> Tokens:
    """The tokens of the samples at each part's positions, as those of all `count` samples in order."""
    order = np.empty(count, np.int64)
    order[np.concatenate([position for position, _ in parts])] = np.arange(count)
    return join_tokens([tokens for _, tokens in parts]).select(order)


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
