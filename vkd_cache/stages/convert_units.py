"""One unit of a conversion: what is read of the source, and the arrays that the target stores.

A newcomer's trap: values whose codec stays are never decoded: their bytes are copied, because a scale that is taken
anew from decoded values may come out in another last bit.

Shape legend: n rows of the target's unit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.cache.arrays import Array
from vkd_cache.cache.codecs import decode_node, encode_node, stored_arrays
from vkd_cache.cache.pixel_codecs import OFFSETS, PIXELS, EncodedViews
from vkd_cache.cache.reader import Cache
from vkd_cache.cache.schema import Manifest, NodeSpec, UnitRecord
from vkd_cache.cache.token_codecs import decode_tokens, encode_tokens
from vkd_cache.cache.units import UnitId, columns_of, keys_from_columns, keys_to_columns
from vkd_cache.errors import CacheError, CorruptCacheError
from vkd_cache.stages.convert_cut import Piece
from vkd_cache.tokens import Tokens, join_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The rows of a piece, in the source's unit.

    Attributes:
        piece: which rows of the source's shard, and where they begin in the target's.
        record: of the source's unit.
        arrays: all of the source's unit.
        rows: those of the piece, as positions in the unit.
        is_whole: the piece is the whole shard.
    """

    piece: Piece
    record: UnitRecord
    arrays: Mapping[str, Array]
    rows: slice
    is_whole: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the source's file that the rows take up, about."""
        num_rows: int = self.rows.stop - self.rows.start
        return self.record.num_bytes * num_rows // max(1, self.record.num_samples)


class SourceUnits:
    """Units of the source as parts of those of the target; a unit is read once while neighbours need it."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._held: dict[UnitId, tuple[UnitRecord, Mapping[str, Array]]] = {}

    def parts(self, pieces: Sequence[Piece], view: int) -> list[Part]:
        """The parts of one unit of the target.

        Raises:
            CacheError: a unit of the source is damaged or gone; the message names it.
            OSError: it cannot be read.
        """
        units = [UnitId(piece.shard, view) for piece in pieces]
        self._held = {unit: held for unit, held in self._held.items() if unit in units}
        for unit in units:
            if unit not in self._held:
                record = self._cache.record(*unit)
                self._held[unit] = record, self._cache.read_arrays(record)
        return [self._part(piece, *self._held[unit]) for piece, unit in zip(pieces, units, strict=True)]

    def _part(self, piece: Piece, record: UnitRecord, arrays: Mapping[str, Array]) -> Part:
        count = self._cache.manifest.dataset["shard_counts"][piece.shard]
        rows = arrays["row"].astype(np.int64)
        everyone = np.sort(np.concatenate([rows, np.array([row for _, row, _ in record.broken], np.int64)]))
        if (np.diff(rows) <= 0).any() or not np.array_equal(everyone, np.arange(count)):
            raise CorruptCacheError(
                f"{self._cache.url}/{record.files[0][0]}: rows and broken rows together are not 0 to {count - 1}, each "
                "once. Run vkd-cache verify on the cache."
            )
        start, stop = np.searchsorted(rows, [piece.first, piece.stop]).tolist()
        is_whole = (piece.first, piece.stop, piece.start) == (0, count, 0)
        return Part(piece=piece, record=record, arrays=arrays, rows=slice(start, stop), is_whole=is_whole)


def unit_arrays(parts: Sequence[Part], source: Manifest, target: Manifest) -> dict[str, Array]:
    """Every array of the target's unit: columns, keys and nodes.

    Raises:
        CacheError: values that the target's codec cannot hold; names node and unit.
    """
    arrays = unit_columns(parts, source)
    for spec, wanted in zip(source.nodes, target.nodes, strict=True):
        try:
            encoded = _encoded(parts, spec, wanted)
        except CacheError as error:
            unit = UnitId(parts[0].record.shard, parts[0].record.view)
            raise CacheError(f"shard {unit.shard} of view {unit.view}: node '{spec.name}': {error}") from error
        arrays |= {f"node.{spec.name}{suffix}": array for suffix, array in encoded.items()}
    return arrays


def unit_columns(parts: Sequence[Part], manifest: Manifest) -> dict[str, Array]:
    """The columns of the target's unit; those that the format does not know stay behind."""
    first = parts[0]
    names = columns_of(manifest)
    if len(parts) == 1 and first.is_whole:
        ragged = ("key_bytes", "key_offsets", *((PIXELS, OFFSETS) if manifest.pixels is not None else ()))
        return {name: first.arrays[name] for name in (*names, *ragged)}
    columns: dict[str, Array] = {
        name: np.concatenate([part.arrays[name][part.rows] for part in parts]) for name in names
    }
    for name in ("row", "partner"):
        columns[name] = np.concatenate([_moved(part, name) for part in parts])
    if manifest.pixels is not None:
        stored = [(EncodedViews.of_columns(part.arrays), part.rows) for part in parts]
        columns |= EncodedViews.joined([views[row] for views, rows in stored for row in _places(rows)]).to_columns()
    return columns | keys_to_columns([key for part in parts for key in keys_from_columns(part.arrays)[part.rows]])


def _places(rows: slice) -> range:
    return range(rows.start, rows.stop)


def _moved(part: Part, name: str) -> npt.NDArray[np.uint32]:
    """Rows of the source's shard as rows of the target's."""
    rows = part.arrays[name][part.rows].astype(np.int64)
    if ((rows < part.piece.first) | (rows >= part.piece.stop)).any():
        raise CorruptCacheError(
            f"{part.record.files[0][0]}: column '{name}' names rows outside of its shard. Run vkd-cache verify on the "
            "cache."
        )
    return (rows - part.piece.first + part.piece.start).astype(np.uint32)


def _encoded(parts: Sequence[Part], spec: NodeSpec, wanted: NodeSpec) -> dict[str, Array]:
    """The arrays of one node; copied where the codec stays."""
    stays = (spec.codec, spec.passed) == (wanted.codec, wanted.passed)
    if stays and len(parts) == 1 and parts[0].is_whole:
        return _stored(parts[0], spec)
    if stays and spec.layout != "tokens":
        stored = [_stored(part, spec) for part in parts]
        rows = [part.rows for part in parts]
        return {
            suffix: np.concatenate([arrays[suffix][row] for arrays, row in zip(stored, rows, strict=True)])
            for suffix in stored[0]
        }
    values = node_values(parts, spec)
    return encode_tokens(values, wanted) if isinstance(values, Tokens) else encode_node(values, wanted.codec)


def node_values(parts: Sequence[Part], spec: NodeSpec) -> torch.Tensor | Tokens:
    """The n values (n, ...) or the tokens of the n images of a node, in the precision that the source stores."""
    if spec.layout == "tokens":
        tokens = [decode_tokens(spec, _stored(part, spec), part.rows) for part in parts]
        return tokens[0] if len(tokens) == 1 else join_tokens(tokens)
    values = [decode_node(spec, _stored(part, spec), part.rows) for part in parts]
    return values[0] if len(values) == 1 else torch.cat(values)


def _stored(part: Part, spec: NodeSpec) -> dict[str, Array]:
    return {suffix: part.arrays[f"node.{spec.name}{suffix}"] for suffix in stored_arrays(spec)}


def broken_rows(parts: Sequence[Part]) -> list[tuple[str, int, str]]:
    """(key, row in the target's shard, reason) of the broken images."""
    return [
        (key, row - part.piece.first + part.piece.start, reason)
        for part in parts
        for key, row, reason in part.record.broken
        if part.piece.first <= row < part.piece.stop
    ]


def unit_origin(parts: Sequence[Part], source: Cache, *, mixes: bool) -> dict[str, Any]:
    """What the record says of where a unit came from, see docs/format.md; `mixes`: partners may be among its rows."""
    units = []
    for part in parts:
        piece, record = part.piece, part.record
        entry: dict[str, Any] = {"shard": record.shard, "view": record.view, "xxh3_128": record.files[0][2]}
        if piece.stop - piece.first < record.num_samples + len(record.broken):
            entry["rows"] = [piece.first, piece.stop]
        units.append(entry)
    origin: dict[str, Any] = {"fingerprint": source.fingerprint, "units": units}
    groups = [
        count
        for part in parts
        for count in part.record.planned_in or (part.record.num_samples + len(part.record.broken),)
    ]
    return {**origin, "planned_in": groups} if mixes and len(groups) > 1 else origin
