"""The index of tars that lie here, kept from one start to the next: a million headers take minutes to read from a disk.

A newcomer's trap: a tar that was changed has to be noticed without reading it. Size and time of modification do not
tell, because both can be set; the time of the last change of the inode cannot, but by the system's clock.
"""

import contextlib
import os
import struct
import time
from collections.abc import Sequence

import xxhash

from vkd_cache.errors import StorageError
from vkd_cache.local_copies import LocalCopies, Original
from vkd_cache.sources.findings import Findings
from vkd_cache.sources.tar_index import INDEX_KIND, TarIndex, index_tar
from vkd_cache.sources.tar_members import TarReader

KEPT_KIND = f"{INDEX_KIND}-local-1"  # another number with another format
WORTH_KEEPING = 4096  # samples: a smaller data set is indexed in the twinkling of an eye
_SETTLED_NS = 2 * 10**9  # coarser than the clock of any file system: a later change has another time
_LENGTH = struct.Struct("<Q")  # before each tar's index


def local_indexes(
    given: Sequence[str], paths: Sequence[str], names: Sequence[str], findings: Findings, copies: LocalCopies | None
) -> list[TarIndex]:
    """What is in each of the tars at `paths`, in order: as it was kept, if not one has changed, or else from the tars.

    Args:
        given, names: of the tars in messages.
        paths: of the same, absolute.
        findings: gets what is wrong with them; empty. Nothing is kept of tars with which something is.
        copies: where an index is kept, if it can be; None: it is not.

    Raises:
        SourceError: a tar that cannot be read at all.
    """
    before = _state(paths)
    if copies is not None and before is not None:
        with contextlib.suppress(StorageError):  # then it is made again
            kept = _parsed(copies.kept(before.original, KEPT_KIND), before.sizes)
            if kept is not None:
                return kept
    indexes = [index_tar(TarReader(path), name, findings) for path, name in zip(given, names, strict=True)]
    worth = sum(len(index.keys) for index in indexes) >= WORTH_KEEPING and findings.is_empty
    if copies is not None and before is not None and worth and before.is_settled and before == _state(paths):
        with contextlib.suppress(StorageError):
            copies.keep(before.original, KEPT_KIND, b"".join(map(_framed, indexes)))
    return indexes


class _State:
    """Tars as the file system describes them."""

    def __init__(self, paths: Sequence[str], found: Sequence[os.stat_result]) -> None:
        self.sizes = [stat.st_size for stat in found]
        digest = xxhash.xxh3_128()
        for path, stat in zip(paths, found, strict=True):
            times = f"{stat.st_size} {stat.st_ino} {stat.st_mtime_ns} {stat.st_ctime_ns}\0"
            digest.update(os.fsencode(path) + b"\0" + times.encode())
        self.original = Original("tars", sum(self.sizes), digest.hexdigest())
        self.is_settled = max(stat.st_ctime_ns for stat in found) < time.time_ns() - _SETTLED_NS

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _State) and other.original == self.original

    __hash__ = None  # type: ignore[assignment]


def _state(paths: Sequence[str]) -> _State | None:
    try:
        return _State(paths, [os.stat(path) for path in paths])  # noqa: PTH116 - a million paths are dear as objects
    except OSError:
        return None  # whoever opens it will say so


def _framed(index: TarIndex) -> bytes:
    data = index.to_bytes()
    return _LENGTH.pack(len(data)) + data


def _parsed(data: bytes | None, sizes: Sequence[int]) -> list[TarIndex] | None:
    """The indexes of tars of these sizes; None if there are none, or `data` is damaged."""
    found, at, view = [], 0, memoryview(data or b"")
    for num_bytes in sizes:
        if len(view) - at < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(view, at)
        at += _LENGTH.size + length
        index = TarIndex.from_bytes(bytes(view[at - length : at]), num_bytes)
        if index is None:
            return None
        found.append(index)
    return found if at == len(view) else None
