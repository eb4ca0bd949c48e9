"""A unit as a tar of NumPy arrays that plain webdataset reads: block b of column c is the member `<b>.<c>.npy`.

A newcomer's trap: each block stands on its own, so offsets start at 0 in each, and what a unit has once (the
scales of channels) is repeated in each.
"""

import io
import math
import re
import tarfile
from collections.abc import Iterator, Mapping, Set

import numpy as np

from vkd_cache.cache.arrays import Array
from vkd_cache.cache.frames import most_expanded
from vkd_cache.cache.packed_columns import with_packed, without_packed
from vkd_cache.cache.pixel_codecs import OFFSETS, PIXELS
from vkd_cache.cache.schema import UNIT_SCALED, Manifest
from vkd_cache.errors import CacheFormatError

_MEMBER = re.compile(rb"([0-9]{6,12})\.([a-z0-9_.]+)\.npy")
_OFFSETS = re.compile(r"key_offsets|pixels_offsets|node\.[a-z0-9_]+\.offsets")
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
# a header as NumPy writes it, and nothing else: dtypes without objects, plain numbers, no Python to evaluate
_NPY_HEADER = re.compile(
    rb"\{'descr': '(\|u1|\|i1|<u2|<u4|<u8|<f2|<f4)', 'fortran_order': False, "
    rb"'shape': \(((?:[0-9]{1,18}(?:, |,(?=\))|(?=\)))){0,8})\), \} *\n"
)
_BLOCK = 512


def pack(columns: Mapping[str, Array], manifest: Manifest, packed: Set[str] = frozenset()) -> bytes:
    """The columns as one tar file: blocks in row order, columns in name order, dates fixed; in each block, those that
    are `packed` in one array."""
    num_rows = len(columns["row"])
    shared, ragged = _shared_columns(manifest), _ragged_columns(manifest)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        # a unit without rows still has one, empty, block: it says what its columns are
        for block, start in enumerate(range(0, max(1, num_rows), manifest.block_samples)):
            end = min(num_rows, start + manifest.block_samples)
            arrays = {
                name: columns[name] if name in shared else _rows_of(columns, name, ragged, start, end)
                for name in columns
            }
            for name, array in sorted(with_packed(arrays, packed).items()):
                content = _npy(array)
                entry = tarfile.TarInfo(f"{block:06d}.{name}.npy")
                entry.size = len(content)
                entry.mode = 0o644
                archive.addfile(entry, io.BytesIO(content))
        num_bytes = archive.offset + 2 * _BLOCK
    return stream.getvalue()[: num_bytes if manifest.packs_columns else None]  # version 1 pads to a tape's record


def _shared_columns(manifest: Manifest) -> set[str]:
    return {f"node.{node.name}.scale" for node in manifest.nodes if node.codec in UNIT_SCALED}


def _ragged_columns(manifest: Manifest) -> dict[str, str]:
    """Column -> the one that says where each row of it starts."""
    tokens = [f"node.{node.name}" for node in manifest.nodes if node.layout == "tokens"]
    ragged = {f"{name}{suffix}": f"{name}.offsets" for name in tokens for suffix in ("", ".scale", ".index")}
    stored = {PIXELS: OFFSETS} if manifest.pixels is not None else {}
    return {"key_bytes": "key_offsets", **stored, **ragged}


def _rows_of(columns: Mapping[str, Array], name: str, ragged: Mapping[str, str], start: int, end: int) -> Array:
    if name in ragged:
        offsets = columns[ragged[name]]
        return columns[name][int(offsets[start]) : int(offsets[end])]
    if name in ragged.values():
        rebased: Array = columns[name][start : end + 1].astype(np.uint32) - np.uint32(columns[name][start])
        return rebased
    return columns[name][start:end]


def _npy(array: Array) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def unpack(data: bytes, *, packs: bool = False) -> dict[str, Array]:
    """The inverse of `pack`. The caller has checked the checksum.

    Args:
        data: the file.
        packs: some of the columns are packed in one array.

    Raises:
        CacheFormatError: not a tar file, or not of blocks as `pack` writes them.
    """
    blocks: dict[int, dict[str, Array]] = {}
    for name, content in _members(memoryview(data)):
        match = _MEMBER.fullmatch(name)
        if match is None:
            raise CacheFormatError(f"unit: found member {name!r}, expected <block>.<column>.npy.")
        blocks.setdefault(int(match[1]), {})[match[2].decode("ascii")] = _array(content, name.decode("ascii"))
    return _join(_without_packed(blocks, most_expanded(len(data))) if packs else blocks)


def _without_packed(blocks: Mapping[int, Mapping[str, Array]], most_bytes: int) -> dict[int, dict[str, Array]]:
    found = {}
    for block, arrays in blocks.items():
        found[block] = without_packed(arrays, most_bytes)
        most_bytes -= sum(array.nbytes for name, array in found[block].items() if name not in arrays)
    return found


def _members(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Name and content, not copied, of each member of a tar as `pack` writes it.

    Not Python's reader, which is for all tars there ever were: it follows chains of long names until its stack ends,
    and evaluates sizes below zero.
    """
    start = 0
    while True:
        header = bytes(data[start : start + _BLOCK])
        if len(header) < _BLOCK:
            raise CacheFormatError(f"unit: found a tar that ends at byte {len(data)}, without an end mark.")
        if not any(header):
            return
        size, kind = header[124:136].rstrip(b" \0"), header[156:157]
        if header[257:263] != b"ustar\0" or kind not in (b"0", b"\0") or not size or size.strip(b"01234567"):
            raise CacheFormatError(f"unit: found no header of a plain file at byte {start}, expected a tar of blocks.")
        first, num_bytes = start + _BLOCK, int(size, 8)
        if first + num_bytes > len(data):
            raise CacheFormatError(f"unit: found a member of {num_bytes} bytes at byte {start}, behind the tar's end.")
        yield header[:100].rstrip(b"\0"), data[first : first + num_bytes]
        start = first + -(-num_bytes // _BLOCK) * _BLOCK


def _array(content: memoryview, name: str) -> Array:
    """An .npy member, not copied. NumPy's own reader takes five times as long for small arrays."""
    start = 10 + int.from_bytes(content[8:10], "little")
    match = _NPY_HEADER.fullmatch(bytes(content[10:start]))
    if bytes(content[:8]) != _NPY_MAGIC or match is None:
        raise CacheFormatError(f"unit: {name}: not a plain .npy array, as NumPy writes them.")
    shape = tuple(int(size) for size in match[2].split(b",") if size.strip())
    dtype, body = np.dtype(match[1].decode("ascii")), content[start:]
    if math.prod(shape) * dtype.itemsize != len(body):
        raise CacheFormatError(f"unit: {name}: found {len(body)} bytes for shape {shape} of {dtype}.")
    return np.frombuffer(body, dtype).reshape(shape)


def _join(blocks: Mapping[int, Mapping[str, Array]]) -> dict[str, Array]:
    """The blocks' columns end to end."""
    if sorted(blocks) != list(range(len(blocks))) or not blocks:
        raise CacheFormatError(f"unit: found blocks {sorted(blocks)[:10]}, expected 0, 1, 2 and so on.")
    parts = [blocks[block] for block in range(len(blocks))]
    if any(part.keys() != parts[0].keys() for part in parts) or not {"key_offsets", "row"} <= parts[0].keys():
        raise CacheFormatError("unit: found blocks with different columns, or without row and key_offsets.")
    if len(parts) == 1:
        return dict(parts[0])
    columns = {}
    for name, first in parts[0].items():
        arrays = [part[name] for part in parts]
        if _OFFSETS.fullmatch(name):
            columns[name] = _join_offsets(arrays, name)
        elif _is_shared(name, parts):
            columns[name] = first
        elif not first.ndim or len({(array.shape[1:], array.dtype) for array in arrays}) > 1:
            raise CacheFormatError(f"unit: column '{name}': found blocks of different shapes or dtypes.")
        else:
            columns[name] = np.concatenate(arrays)
    return columns


def _is_shared(name: str, parts: list[Mapping[str, Array]]) -> bool:
    """Whether a column belongs to the unit and not to its rows: (C,) beside values (n, C, ...) of the same node."""
    values = parts[0].get(name.removesuffix(".scale"))
    if not name.endswith(".scale") or values is None or parts[0][name].ndim != 1:
        return False
    if any(not np.array_equal(part[name], parts[0][name]) for part in parts):
        raise CacheFormatError(f"unit: column '{name}': found blocks that disagree, expected one scale for the unit.")
    return True


def _join_offsets(arrays: list[Array], name: str) -> Array:
    if any(array.dtype != np.uint32 or array.ndim != 1 or not len(array) or array[0] != 0 for array in arrays):
        raise CacheFormatError(f"unit: column '{name}': found blocks that do not start at 0.")
    bases = np.cumsum([0, *(int(array[-1]) for array in arrays)])
    shifted = [array[1:].astype(np.int64) + base for array, base in zip(arrays, bases[:-1], strict=True)]
    joined: Array = np.concatenate([np.zeros(1, np.int64), *shifted]).astype(np.uint32)
    return joined
