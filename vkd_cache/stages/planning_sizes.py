"""Bytes of a cache, from units that were published on a sample and from what is known of all its units.

A newcomer's trap: bytes before compression follow from the shapes alone, so they are exact for every node whose size
does not depend on the image; what compression leaves of them was measured on the sample. A unit costs something
whatever its size, so two sizes of unit are measured, and no unit is taken for many small ones.

Shape legend: n rows of a unit.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from vkd_cache.cache.arrays import Array
from vkd_cache.cache.reader import Cache
from vkd_cache.cache.schema import UNIT_SCALED, Manifest
from vkd_cache.cache.units import UnitId, pack_unit, record_path, unpack_unit
from vkd_cache.sources import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitSize:
    """What one published unit takes.

    Attributes:
        rows: n.
        fixed_bytes: of its arrays that do not depend on keys or on the number of tokens, before compression.
        key_bytes: of its keys.
        token_bytes: of its nodes of tokens, before compression.
        stored_bytes: of its file and its record.
    """

    rows: int
    fixed_bytes: int
    key_bytes: int
    token_bytes: int
    stored_bytes: int

    @property
    def plain_bytes(self) -> int:
        """All of it before compression."""
        return self.fixed_bytes + self.key_bytes + self.token_bytes


def unit_sizes(cache: Cache, shards: int, rows: int) -> tuple[UnitSize, ...]:
    """The sizes of the units of shards 0 to `shards` - 1 of view 0, and of as many of them in one as have `rows`.

    What a unit of many rows takes after compression is not seen from small ones. Tokens are not compressed, and too
    large to be put together here.

    Errors as for reading units.
    """
    manifest = cache.manifest
    sizes: list[UnitSize] = []
    parts: list[dict[str, Array]] = []
    for shard in range(shards):
        record = cache.record(shard, 0)
        data = cache.storage.get(record.files[0][0])
        arrays = unpack_unit(data, manifest)
        record_bytes = len(cache.storage.get(record_path(UnitId(shard, 0))))
        sizes.append(_size(arrays, manifest, len(data) + record_bytes))
        if sum(len(part["row"]) for part in parts) < rows and shard < max(1, shards - 1):
            parts.append(arrays)
    if len(parts) > 1 and not any(spec.layout == "tokens" for spec in manifest.nodes):
        whole = _joined(parts, manifest)
        sizes.append(_size(whole, manifest, len(pack_unit(whole, manifest)) + record_bytes))
    return tuple(sizes)


def _size(arrays: Mapping[str, Array], manifest: Manifest, stored_bytes: int) -> UnitSize:
    keys, tokens = int(arrays["key_bytes"].nbytes), _token_bytes(arrays, manifest)
    return UnitSize(
        rows=len(arrays["row"]),
        fixed_bytes=sum(array.nbytes for array in arrays.values()) - keys - tokens,
        key_bytes=keys,
        token_bytes=tokens,
        stored_bytes=stored_bytes,
    )


def _joined(parts: Sequence[Mapping[str, Array]], manifest: Manifest) -> dict[str, Array]:
    """The arrays of several units as if they were of one; the scales of the first serve for all."""
    shared = {f"node.{spec.name}.scale" for spec in manifest.nodes if spec.codec in UNIT_SCALED}
    found: dict[str, Array] = {}
    for name, first in parts[0].items():
        arrays = [part[name] for part in parts]
        if name.endswith("offsets"):
            lengths = np.concatenate([np.diff(array.astype(np.int64)) for array in arrays])
            found[name] = np.concatenate([[0], np.cumsum(lengths)]).astype(first.dtype)
        else:
            found[name] = first if name in shared else np.concatenate(arrays)
    return found


def _token_bytes(arrays: Mapping[str, Array], manifest: Manifest) -> int:
    nodes = [f"node.{spec.name}" for spec in manifest.nodes if spec.layout == "tokens"]
    return sum(
        int(array.nbytes) for name, array in arrays.items() if any(name == n or name.startswith(f"{n}.") for n in nodes)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """`constant + slope * x`."""

    constant: float
    slope: float

    def at(self, x: float) -> float:
        """Its value there."""
        return self.constant + self.slope * x


def line_through(points: Sequence[tuple[float, float]]) -> Line:
    """The line through the means of the larger and of the smaller x; through the origin where there is one x only.

    Its constant and its slope are never below zero.
    """
    largest, smallest = max(x for x, _ in points), min(x for x, _ in points)
    split = (largest + smallest) / 2
    (x1, y1), (x0, y0) = (
        tuple(np.mean([p for p in points if (p[0] > split) == above or largest == smallest], axis=0).tolist())
        for above in (True, False)
    )
    if x1 <= x0:
        return Line(constant=0.0, slope=y1 / x1 if x1 > 0 else 0.0)
    slope = max(0.0, (y1 - y0) / (x1 - x0))
    constant = max(0.0, y1 - slope * x1)
    return Line(constant=constant, slope=max(0.0, y1 - constant) / x1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeModel:
    """From a unit's rows, keys and tokens to its bytes.

    Attributes:
        fixed: bytes before compression, but for keys and tokens, by rows.
        stored: bytes of the files by bytes before compression.
        tokens_per_view: bytes of a view's tokens before compression, mean over the data set.
    """

    fixed: Line
    stored: Line
    tokens_per_view: float

    def plain_bytes(self, rows: int, key_bytes: int) -> float:
        """Of a unit, before compression."""
        return self.fixed.at(rows) + key_bytes + self.tokens_per_view * rows

    def stored_bytes(self, rows: int, key_bytes: int) -> float:
        """Of a unit, its record included."""
        return self.stored.at(self.plain_bytes(rows, key_bytes))


def size_model(sizes: Sequence[UnitSize], tokens_per_view: float) -> SizeModel:
    """The model of units that were published; `tokens_per_view` as in SizeModel."""
    return SizeModel(
        fixed=line_through([(size.rows, size.fixed_bytes) for size in sizes]),
        stored=line_through([(size.plain_bytes, size.stored_bytes) for size in sizes]),
        tokens_per_view=tokens_per_view,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSize:
    """Bytes of some units.

    Attributes:
        plain_bytes: before compression.
        stored_bytes: of their files and records.
    """

    plain_bytes: int
    stored_bytes: int


def cache_size(model: SizeModel, source: Source, units: Sequence[UnitId]) -> CacheSize:
    """The bytes of `units` of `source`, none of whose images is broken."""
    times: dict[int, int] = {}
    for unit in units:
        times[unit.shard] = times.get(unit.shard, 0) + 1
    plain = stored = 0.0
    for shard, count in times.items():
        keys = source.shards[shard].keys
        key_bytes = sum(len(key.encode()) for key in keys)
        plain += count * model.plain_bytes(len(keys), key_bytes)
        stored += count * model.stored_bytes(len(keys), key_bytes)
    return CacheSize(plain_bytes=round(plain), stored_bytes=round(stored))
