"""The index of tars that lie here, kept from one start to the next: a million headers take minutes to read from a disk.

A newcomer's trap: a tar that was changed has to be noticed without reading it. Size and time of modification do not
tell, because both can be set; the time of the last change of the inode cannot, but by the system's clock. Images of
file systems (squashfs) have no such time: two of them, mounted in turn at one place, may differ in nothing but
content. They are mounted read-only, and of tars on such mounts nothing is kept.
"""

import contextlib
import os
import struct
import time
from collections.abc import Sequence
from typing import NamedTuple

import xxhash

from vkd_cache.errors import StorageError
from vkd_cache.local_copies import LocalCopies, Original
from vkd_cache.sources.findings import Findings
from vkd_cache.sources.tar_index import INDEX_KIND, TarIndex, index_tar
from vkd_cache.sources.tar_members import TarReader

KEPT_KIND = f"{INDEX_KIND}-local-1"  # another number with another format
AT_MOST = 16  # data sets of which it is kept: jobs that unpack theirs to a new place each time would fill the folder
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
    before = _state(paths) if copies is not None else None
    if copies is None or before is None:
        return _indexed(given, names, findings)
    place = _place(paths)
    with contextlib.suppress(StorageError):  # then it is made again
        kept = _parsed(copies.kept(place, KEPT_KIND), before)
        if kept is not None:
            return kept
    indexes = _indexed(given, names, findings)
    after = _state(paths)
    unchanged = after is not None and before.is_settled and after.digest == before.digest
    if unchanged and findings.is_empty and sum(len(index.keys) for index in indexes) >= WORTH_KEEPING:
        with contextlib.suppress(StorageError):
            data = before.digest + b"".join(map(_framed, indexes))
            copies.keep_if_room(place, KEPT_KIND, data, at_most=AT_MOST)
    return indexes


def _indexed(given: Sequence[str], names: Sequence[str], findings: Findings) -> list[TarIndex]:
    return [index_tar(TarReader(path), name, findings) for path, name in zip(given, names, strict=True)]


class _State(NamedTuple):
    """Tars as the file system describes them.

    Attributes:
        sizes: of each, bytes.
        digest: of that, and of all that changes when one of them does.
        is_settled: a change from now on has another time.
    """

    sizes: list[int]
    digest: bytes
    is_settled: bool


def _state(paths: Sequence[str]) -> _State | None:
    """None where a change might not show, or there is something else with them: whoever opens them will say so."""
    now, digest, writable = time.time_ns(), xxhash.xxh3_128(), set()
    sizes, latest = [], 0
    try:
        for path in paths:
            stat = os.stat(path)  # noqa: PTH116 - a million paths are dear as objects
            if stat.st_dev not in writable:
                if os.statvfs(path).f_flag & os.ST_RDONLY:
                    return None
                writable.add(stat.st_dev)
            sizes.append(stat.st_size)
            latest = max(latest, stat.st_ctime_ns)
            digest.update(f"{stat.st_size} {stat.st_ino} {stat.st_mtime_ns} {stat.st_ctime_ns}\0".encode())
    except OSError:
        return None
    return _State(sizes, digest.digest(), latest < now - _SETTLED_NS)


def _place(paths: Sequence[str]) -> Original:
    """What the index of these tars is kept under, whatever is in them."""
    names = xxhash.xxh3_128()
    for path in paths:
        names.update(os.fsencode(path) + b"\0")
    return Original("tars", 0, names.hexdigest())


def _framed(index: TarIndex) -> bytes:
    data = index.to_bytes()
    return _LENGTH.pack(len(data)) + data


def _parsed(data: bytes | None, state: _State) -> list[TarIndex] | None:
    """The indexes of tars in that state; None if `data` has none of them, or is damaged."""
    found, view = [], memoryview(data or b"")
    at = len(state.digest)
    if view[:at] != state.digest:
        return None
    for num_bytes in state.sizes:
        if len(view) - at < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(view, at)
        at += _LENGTH.size + length
        index = TarIndex.from_bytes(bytes(view[at - length : at]), num_bytes)
        if index is None:
            return None
        found.append(index)
    return found if at == len(view) else None
