"""The columns that describe the rows of a unit, packed into one array of bytes: half their size, and one array for 16.

A list of the columns in JSON, a line feed, and a zstd frame for each. A newcomer's trap: a frame holds the column's
bytes by significance, first the lowest byte of every number, then the next: so the high bytes of small numbers, all
zero, lie together and vanish.
"""

import json
import math
from collections.abc import Iterator, Mapping, Set
from typing import Any, NamedTuple

import numpy as np

from vkd_cache.cache.arrays import Array
from vkd_cache.cache.frames import compressed, expanded
from vkd_cache.errors import CacheFormatError

PACKED = "columns"  # the name of the array
_LEVEL = 3  # 0.4 us a row; level 9 gains half a byte in 53 for four times that
_DTYPES = ("|u1", "|i1", "<u2", "<u4", "<u8", "<f2", "<f4")
_MAX_LIST_BYTES = 2**16
_MAX_AXES = 8


class _Entry(NamedTuple):
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    frame: memoryview

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def with_packed(columns: Mapping[str, Array], names: Set[str]) -> dict[str, Array]:
    """The columns with those called `names` packed into one; as they are where there are no names."""
    own = {name: column for name, column in columns.items() if name not in names}
    return {**own, PACKED: pack_columns({name: columns[name] for name in names & columns.keys()})} if names else own


def without_packed(arrays: Mapping[str, Array], most_bytes: int) -> dict[str, Array]:
    """The inverse of `with_packed`; arguments and errors as for `unpack_columns`."""
    if PACKED not in arrays:
        raise CacheFormatError(f"unit: column '{PACKED}' is missing: found {', '.join(sorted(arrays))}.")
    columns = unpack_columns(arrays[PACKED], most_bytes)
    own = {name: array for name, array in arrays.items() if name != PACKED}
    if twice := own.keys() & columns.keys():
        raise CacheFormatError(f"unit: {PACKED}: found {', '.join(sorted(twice))} inside and outside of it.")
    return own | columns


def pack_columns(columns: Mapping[str, Array]) -> Array:
    """(bytes,) uint8: the same columns in any order give the same."""
    entries, frames = [], []
    for name, column in sorted(columns.items()):
        array = np.ascontiguousarray(column)
        frames.append(compressed(_planes(array), _LEVEL) if array.size else b"")
        entries.append([name, array.dtype.str, list(column.shape), len(frames[-1])])  # array: one axis at least
    head = json.dumps(entries, separators=(",", ":")).encode("ascii")
    return np.frombuffer(b"".join([head, b"\n", *frames]), np.uint8)


def unpack_columns(packed: Array, most_bytes: int) -> dict[str, Array]:
    """The inverse of `pack_columns`.

    Args:
        packed: what was stored.
        most_bytes: of all the columns together.

    Raises:
        CacheFormatError: not such an array, or one of larger columns.
    """
    try:
        if packed.ndim != 1 or packed.dtype != np.uint8:
            raise ValueError(f"{packed.dtype} {packed.shape}, expected bytes")
        entries = list(_entries(memoryview(np.ascontiguousarray(packed).data)))
        num_bytes = sum(entry.num_bytes for entry in entries)
        if num_bytes > most_bytes:
            raise ValueError(f"columns of {num_bytes} bytes, expected at most {most_bytes} in a file of that size")
        return {entry.name: _column(entry) for entry in entries}
    except (ValueError, TypeError, RecursionError) as error:
        raise CacheFormatError(f"unit: {PACKED}: found {error}.") from error


def _entries(content: memoryview) -> Iterator[_Entry]:
    head, mark, _ = bytes(content[:_MAX_LIST_BYTES]).partition(b"\n")
    listed = json.loads(head) if mark else None
    if not isinstance(listed, list):
        raise ValueError("no list of columns")
    names, start = set(), len(head) + 1
    for entry in listed:
        name, code, shape, size = entry
        if not isinstance(name, str) or name in names or code not in _DTYPES:
            raise ValueError(f"column {name!r} of {code!r}, expected each once, of {', '.join(_DTYPES)}")
        numbers = [*shape, size]
        if len(numbers) > _MAX_AXES or not all(type(number) is int and 0 <= number < 2**40 for number in numbers):
            raise ValueError(f"column {name!r} of sizes {numbers}")
        names.add(name)
        yield _Entry(name, np.dtype(code), tuple(shape), content[start : start + size])
        start += size
    if start != len(content):
        raise ValueError(f"{len(content)} bytes, the list of columns says {start}")


def _planes(array: Array) -> memoryview:
    """The bytes of an array, all of one significance together."""
    table = array.reshape(-1).view(np.uint8).reshape(array.size, array.itemsize)
    return np.ascontiguousarray(table.T).reshape(-1).data


def _column(entry: _Entry) -> Array:
    """One column, not writable: like the arrays that lie in the file's bytes."""
    if not entry.num_bytes:
        return np.empty(entry.shape, entry.dtype)
    planes = np.frombuffer(expanded(entry.frame, entry.num_bytes), np.uint8)
    table = planes.reshape(entry.dtype.itemsize, -1).T
    column: Array = np.ascontiguousarray(table).reshape(-1).view(entry.dtype).reshape(entry.shape)
    column.flags.writeable = False
    return column
