"""A unit as a zarr v3 group inside one uncompressed zip file, the default container.

Written and read here without the zarr library, which opens the result like any other group (docs/format.md): its own
price per array, 1-2 ms, would be twice that of the data, and the bytes would change with its releases. A newcomer's
trap: every array is a single zarr chunk, and reading one row costs as much as reading all.
"""

import io
import json
import math
import struct
import zipfile
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from vkd_cache.cache.arrays import Array
from vkd_cache.cache.frames import compressed, expanded, most_expanded
from vkd_cache.cache.packed_columns import PACKED, with_packed, without_packed
from vkd_cache.cache.pixel_codecs import PIXELS
from vkd_cache.cache.schema import Manifest
from vkd_cache.errors import CacheFormatError

# zarr's names of the dtypes that a unit uses
_DTYPES = {"uint8": "|u1", "int8": "|i1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8"} | {
    "float16": "<f2",
    "float32": "<f4",
}
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}
_ZSTD_LEVEL = 1
_BYTES_CODEC = {"name": "bytes", "configuration": {"endian": "little"}}
_ZSTD_CODEC = {"name": "zstd", "configuration": {"level": _ZSTD_LEVEL, "checksum": False}}

# what decides how the bytes of an array are read
_LAYOUT_FIELDS = ("zarr_format", "node_type", "data_type", "chunk_grid", "chunk_key_encoding", "codecs")
_MAX_METADATA_BYTES = 2**20
# what lists the entries: 1024 nodes take a megabyte, and Python some twenty times that
_MAX_DIRECTORY_BYTES = 2**22
_LOCAL_HEADER = struct.Struct("<26xHH")
# what Python's reader of zip files raises on bytes that are none
_DAMAGE = (zipfile.BadZipFile, NotImplementedError, struct.error, EOFError, OverflowError, ValueError, OSError)


_Layout = tuple[tuple[int, ...], np.dtype[Any], bool]  # shape, dtype, whether compressed


def pack(columns: Mapping[str, Array], manifest: Manifest, packed: Set[str] = frozenset()) -> bytes:
    """The columns as one zip file, those that are `packed` in one array; entries in name order, dates fixed."""
    raw = {PACKED, *_uncompressed(manifest)}
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"vkd_cache_format": 1}}
    entries: dict[str, bytes | memoryview] = {"zarr.json": _json(group)}
    for name, column in with_packed(columns, packed).items():
        array = np.ascontiguousarray(column)
        shrinks = name not in raw
        entries[f"{name}/zarr.json"] = _json(_array_metadata(array.shape, array.dtype, shrinks))
        if array.size:
            chunk = "/".join(["c"] + ["0"] * array.ndim)
            content = array.reshape(-1).view(np.uint8).data
            entries[f"{name}/{chunk}"] = compressed(content, _ZSTD_LEVEL) if shrinks else content
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(entries):
            entry = zipfile.ZipInfo(path, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, entries[path])
    return stream.getvalue()


def _uncompressed(manifest: Manifest) -> set[str]:
    # dense maps and tokens shrink by a tenth for twice the time, and encoded pixels not at all
    suffixes = {"feature_map": ("",), "tokens": ("", ".scale", ".sum", ".sumsq")}
    nodes = {f"node.{node.name}{suffix}" for node in manifest.nodes for suffix in suffixes.get(node.layout, ())}
    return {PIXELS, *nodes}


def _array_metadata(shape: tuple[int, ...], dtype: np.dtype[Any], shrinks: bool) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": _NAMES[dtype],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, size) for size in shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if dtype.kind == "f" else 0,
        "codecs": [_BYTES_CODEC, _ZSTD_CODEC] if shrinks else [_BYTES_CODEC],
        "attributes": {},
        "storage_transformers": [],
    }


def _json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True).encode("ascii")


def unpack(data: bytes, *, packs: bool = False) -> dict[str, Array]:
    """The inverse of `pack`: every array of the group, by name. The caller has checked the checksum.

    Args:
        data: the file.
        packs: some of the columns are packed in one array.

    Raises:
        CacheFormatError: not a zip file, or not a group as `pack` writes it.
    """
    try:
        entries = _zip_entries(data)
        names = [path.removesuffix("/zarr.json") for path in entries if path.endswith("/zarr.json")]
        layouts = {name: _array_layout(name, entries[f"{name}/zarr.json"]) for name in names}
        num_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in layouts.values())
        most_bytes = most_expanded(len(data))
        if num_bytes > most_bytes:
            raise CacheFormatError(f"unit: found arrays of {num_bytes} bytes in a file of {len(data)}.")
        arrays = {name: _read_array(name, layout, entries) for name, layout in layouts.items()}
        return without_packed(arrays, most_bytes - num_bytes) if packs else arrays
    except _DAMAGE as error:
        raise CacheFormatError(f"unit: found bytes that are not a zip file of zarr arrays ({error}).") from error


def _zip_entries(data: bytes) -> dict[str, memoryview]:
    """Content of each entry, not copied; no CRC is checked here, the record has a better checksum."""
    content = memoryview(data)
    entries = {}
    _check_directory(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CacheFormatError(f"unit: {entry.filename}: found a compressed zip entry, expected a stored one.")
            name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(data, entry.header_offset)
            start = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
            if start + entry.file_size > len(data):
                raise CacheFormatError(f"unit: {entry.filename}: ends behind the end of the file.")
            entries[entry.filename] = content[start : start + entry.file_size]
    return entries


def _check_directory(data: bytes) -> None:
    """Look at the size of the list of entries before Python makes objects of it.

    Raises:
        zipfile.BadZipFile: it is absurd, or not where `pack` leaves it.
    """
    end = data[-22:]
    if end[:4] != b"PK\x05\x06":
        raise zipfile.BadZipFile("no end of a zip file")
    num_bytes = int.from_bytes(end[12:16], "little")
    if data[-42:-38] == b"PK\x06\x07":  # the record of large files goes before the one for all
        num_bytes = int.from_bytes(data[-58:-50], "little")
    if num_bytes > _MAX_DIRECTORY_BYTES:
        raise zipfile.BadZipFile(f"a list of entries of {num_bytes} bytes")


def _read_array(name: str, layout: _Layout, entries: Mapping[str, memoryview]) -> Array:
    """One array, not writable: it lies in the file's bytes or in those that zstd made."""
    shape, dtype, shrinks = layout
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return np.empty(shape, dtype)
    path = "/".join([name, "c"] + ["0"] * len(shape))
    if path not in entries:
        raise CacheFormatError(f"unit: {path}: missing, expected the only zarr chunk of the array.")
    content: bytes | memoryview = entries[path]
    if shrinks:
        try:
            content = expanded(entries[path], num_bytes)
        except ValueError as error:
            raise CacheFormatError(f"unit: {path}: found {error}.") from error
    if len(content) != num_bytes:
        raise CacheFormatError(f"unit: {path}: found {len(content)} bytes, expected {num_bytes}.")
    return np.frombuffer(content, dtype).reshape(shape)


def _array_layout(name: str, metadata: memoryview) -> _Layout:
    """Shape, dtype and whether compressed, of an array laid out as `pack` does; other metadata is tolerated."""
    try:
        found = json.loads(bytes(metadata[:_MAX_METADATA_BYTES]))
        shape = tuple(found["shape"])
        dtype = np.dtype(_DTYPES[found["data_type"]])
        shrinks = len(found["codecs"]) == 2
        fits = len(shape) <= 8 and all(type(size) is int and 0 <= size < 2**40 for size in shape)
        if not fits:
            raise ValueError(f"shape {found['shape']}")
        for field, expected in _array_metadata(shape, dtype, shrinks).items():
            if field in _LAYOUT_FIELDS and found[field] != expected:
                raise ValueError(f"{field} {found[field]}, expected {expected}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheFormatError(f"unit: {name}/zarr.json: found metadata of another layout ({error}).") from error
    return shape, dtype, shrinks
