"""What a unit holds: its columns, their checks, its paths, and the choice of container.

A newcomer's trap: rows of a unit are those of the source shard *without* broken images; column `row` says which row of
the shard each one is, and `partner` speaks of rows of the shard too.

Shape legend: n rows of the unit, K operations of the recipe.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vkd_cache.cache import tar_backend, zarr_backend
from vkd_cache.cache.arrays import Array, check_array, column_of, summary
from vkd_cache.cache.codecs import array_shapes, stored_arrays
from vkd_cache.cache.pixel_codecs import check_pixels
from vkd_cache.cache.schema import Manifest
from vkd_cache.cache.token_codecs import check_tokens
from vkd_cache.errors import CacheFormatError


class UnitId(NamedTuple):
    """Which unit: `cache.read(unit)`."""

    shard: int
    view: int


class ColumnSpec(NamedTuple):
    """A column of n rows: NumPy dtype, and shape per row (None: the recipe's number of operations)."""

    dtype: str
    shape: tuple[int | None, ...] = ()


# Columns with one entry per row, besides the keys (`key_bytes`, `key_offsets`) and the nodes.
COLUMNS: dict[str, ColumnSpec] = {
    "row": ColumnSpec("<u4"),
    "label": ColumnSpec("<u4"),
    "digest": ColumnSpec("<u8"),
    "seed": ColumnSpec("<u8"),
    "source_size": ColumnSpec("<u4", (2,)),
    "crop": ColumnSpec("<u4", (4,)),
    "flip": ColumnSpec("|u1"),
    "op_id": ColumnSpec("|u1", (None,)),
    "op_value": ColumnSpec("<f4", (None,)),
    "erase": ColumnSpec("<u2", (4,)),
    "partner": ColumnSpec("<u4"),
    "mix_kind": ColumnSpec("|u1"),
    "mix_lambda": ColumnSpec("<f4"),
    "mix_box": ColumnSpec("<u2", (4,)),
}

# and, where the recipe's geometry is `detection`, one that says how large the view is within its canvas
DETECTION_COLUMNS: dict[str, ColumnSpec] = {"view_size": ColumnSpec("<u2", (2,))}

_RECORD_PATH = re.compile(r"records/view-(\d{4,10})/shard-(\d{6,10})\.json")
_SUFFIXES = {"zarr": ".zip", "webdataset": ".tar"}
_UNIT_DIGITS = 16


def by_view(unit: UnitId) -> tuple[int, int]:
    """The key that sorts units as jobs take them: view by view."""
    return unit.view, unit.shard


def unit_path(unit: UnitId, backend: str, digest: str) -> str:
    """Path of a unit's file from the cache's root.

    Its content is in its name: two writers whose teachers differ in a bit never overwrite each other's file, and what
    the name once meant it means for ever.

    Args:
        unit: which unit.
        backend: `zarr` or `webdataset`.
        digest: xxh3_128 of the file's bytes, hexadecimal.
    """
    return f"units/view-{unit.view:04d}/shard-{unit.shard:06d}-{digest[:_UNIT_DIGITS]}{_SUFFIXES[backend]}"


def files_of_unit(unit: UnitId, paths: Iterable[str]) -> list[str]:
    """Those of `paths` that are files of this unit, named by a record or not."""
    start = f"units/view-{unit.view:04d}/shard-{unit.shard:06d}-"
    return [path for path in paths if path.startswith(start) and "/" not in path.removeprefix(start)]


_FOLDER = re.compile(r"records|units|runs|\.incomplete|(records|units)/view-\d{4,10}")
_FILE = re.compile(r"manifest\.json|head-\w+\.safetensors|(records|units)/view-\d{4,10}/shard-[\w-]+\.(json|zip|tar)")


def kind_of(path: str) -> str:
    """What a path from the cache's root stands for: `folder`, `file`, or nothing that a cache knows: ''."""
    if _FOLDER.fullmatch(path):
        return "folder"
    return "file" if _FILE.fullmatch(path) else ""


def record_path(unit: UnitId) -> str:
    """Path of the unit's record from the cache's root."""
    return f"records/view-{unit.view:04d}/shard-{unit.shard:06d}.json"


def unit_of_record(path: str) -> UnitId | None:
    """The inverse of `record_path`; None if `path` is not a record's."""
    match = _RECORD_PATH.fullmatch(path)
    if match is None:
        return None
    unit = UnitId(view=int(match[1]), shard=int(match[2]))
    return unit if record_path(unit) == path else None


def keys_to_columns(keys: Sequence[str]) -> dict[str, Array]:
    """Columns `key_bytes` (total bytes,) uint8, the keys in UTF-8 end to end, and `key_offsets` (n + 1,) uint32."""
    encoded = [key.encode("utf-8") for key in keys]
    offsets = np.zeros(len(encoded) + 1, np.uint32)
    np.cumsum([len(key) for key in encoded], out=offsets[1:])
    return {"key_bytes": np.frombuffer(b"".join(encoded), np.uint8), "key_offsets": offsets}


def keys_from_columns(columns: Mapping[str, Array]) -> list[str]:
    """The inverse of `keys_to_columns`.

    Raises:
        CacheFormatError: keys that are not UTF-8.
    """
    data = columns["key_bytes"].tobytes()
    offsets: list[int] = columns["key_offsets"].tolist()
    try:
        return [data[start:end].decode("utf-8") for start, end in itertools.pairwise(offsets)]
    except UnicodeDecodeError as error:
        raise CacheFormatError(f"key_bytes: found bytes that are not UTF-8 ({error}), expected UTF-8 keys.") from error


def columns_of(manifest: Manifest) -> dict[str, ColumnSpec]:
    """The columns with one entry per row of this cache's units, besides the keys and the nodes."""
    return {**COLUMNS, **DETECTION_COLUMNS} if is_detection(manifest) else dict(COLUMNS)


def is_detection(manifest: Manifest) -> bool:
    """Whether the cache is one of a detection data set: views of many sizes, annotations instead of classes."""
    return manifest.recipe.get("geometry") == "detection"


def pack_unit(columns: Mapping[str, Array], manifest: Manifest) -> bytes:
    """All columns of a unit, node arrays included, as one file. The same columns give the same bytes."""
    packed = {"key_bytes", "key_offsets", *columns_of(manifest)} if manifest.packs_columns else frozenset[str]()
    if manifest.backend == "webdataset":
        return tar_backend.pack(columns, manifest, packed)
    return zarr_backend.pack(columns, manifest, packed)


def unpack_unit(data: bytes, manifest: Manifest) -> dict[str, Array]:
    """The inverse of `pack_unit`.

    Raises:
        CacheFormatError: not a unit file of the manifest's backend.
    """
    if manifest.backend == "webdataset":
        return tar_backend.unpack(data, packs=manifest.packs_columns)
    return zarr_backend.unpack(data, packs=manifest.packs_columns)


def check_columns(columns: Mapping[str, Array], manifest: Manifest, where: str) -> int:
    """Check names, dtypes and shapes of all columns of a unit against the format; columns unknown to it are tolerated.

    Returns:
        Number of rows.

    Raises:
        CacheFormatError: a column is missing or not as the format says; names the column, found and expected.
    """
    offsets = column_of(columns, "key_offsets", where)
    check_array(offsets, "<u4", (None,), f"{where}: column 'key_offsets'")
    num_rows = len(offsets) - 1
    key_bytes = column_of(columns, "key_bytes", where)
    ends = offsets.astype(np.int64)
    check_array(key_bytes, "|u1", (None,), f"{where}: column 'key_bytes'")
    if num_rows < 0 or ends[0] != 0 or ends[-1] != len(key_bytes) or (np.diff(ends) < 0).any():
        raise CacheFormatError(
            f"{where}: column 'key_offsets': found {summary(offsets)}, expected n + 1 rising offsets from 0 to "
            f"{len(key_bytes)}, the length of key_bytes."
        )
    for name, spec in columns_of(manifest).items():
        check_array(column_of(columns, name, where), spec.dtype, (num_rows, *spec.shape), f"{where}: column '{name}'")
    if columns["op_id"].shape != columns["op_value"].shape:
        raise CacheFormatError(
            f"{where}: column 'op_value': found shape {columns['op_value'].shape}, expected op_id's "
            f"{columns['op_id'].shape}."
        )
    if manifest.pixels is not None:
        check_pixels(columns, num_rows, where)
    for node in manifest.nodes:
        if node.layout == "tokens":
            check_tokens(columns, node, num_rows, where)
            continue
        shapes = array_shapes(node, num_rows)
        for suffix, dtype in stored_arrays(node).items():
            name = f"node.{node.name}{suffix}"
            check_array(column_of(columns, name, where), dtype, shapes[suffix], f"{where}: column '{name}'")
    return num_rows
