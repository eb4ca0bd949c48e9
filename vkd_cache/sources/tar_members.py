"""The members of a tar archive and where their bytes lie, from its headers alone.

Python's `tarfile` takes 18 us a member or more and keeps every one in memory, millions for ImageNet's shards; this
reads a window at each header and yields. Formats: v7, ustar, GNU long names and base-256 sizes, pax paths and sizes.
"""

import os
import weakref
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from vkd_cache.errors import SourceError
from vkd_cache.sources.keys import shown

_BLOCK = 512
_WINDOW = 4096  # a header, a small label member and the next header in one read
_METADATA_LIMIT_BYTES = 1 << 20
_REGULAR = b"07\0"
_PAX_LOCAL, _PAX_GLOBAL = b"xX", b"g"
_GNU_LONG_NAME, _GNU_LONG_LINK, _GNU_SPARSE = b"L", b"K", b"S"
_LINKS_AND_DEVICES = b"123456"  # whatever size they state, nothing follows their header
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarMember(NamedTuple):
    """One regular file of an archive: `num_bytes` bytes at `offset` from the archive's start."""

    name: str
    offset: int
    num_bytes: int


class TarReader:
    """An open archive: its members, and bytes at an offset. Reads never move a file position, so it survives a fork.

    Attributes:
        path: the archive, or the URL that it is a copy of, for messages.
        num_bytes: its size when it was opened.
    """

    def __init__(self, path: str, handle: int | None = None) -> None:
        """Open `path`, or take over the file descriptor `handle`.

        Raises:
            SourceError: it cannot be opened.
        """
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY) if handle is None else handle
        except OSError as error:
            raise SourceError(
                f"{shown(path)}: the tar cannot be opened ({error.strerror}). Check that it is there and readable."
            ) from error
        # closed with the last reference: a thread that is still reading keeps a reader open that another one evicted
        weakref.finalize(self, os.close, self._handle)
        self.num_bytes = os.fstat(self._handle).st_size
        self._window, self._window_start = b"", 0

    def current_bytes(self) -> int:
        """The archive's size now."""
        return os.fstat(self._handle).st_size

    def is_removed(self) -> bool:
        """Whether the open file has no name any more: its space is free when it is closed."""
        return os.fstat(self._handle).st_nlink == 0

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Up to `num_bytes` bytes from `offset`; fewer only where the file ends.

        Raises:
            SourceError: the system cannot read them.
        """
        try:
            return os.pread(self._handle, num_bytes, offset)
        except OSError as error:
            raise SourceError(f"{shown(self.path)}: cannot be read at byte {offset} ({error.strerror}).") from error

    def read_near(self, offset: int, num_bytes: int) -> bytes:
        """As `read`, for the bytes of the member that `members` has just given: small ones have been read already."""
        at = offset - self._window_start
        if at >= 0 and at + num_bytes <= len(self._window):
            return self._window[at : at + num_bytes]
        return self.read(offset, num_bytes)

    def members(self) -> Iterator[TarMember]:
        """Every regular file, in order; links, folders and devices are passed over.

        Raises:
            SourceError: not a tar, compressed, damaged, sparse, or cut off.
        """
        offset, long_name, pax = 0, "", dict[str, str]()
        while (header := self._header(offset)) is not None:
            kind, start = header[156:157], offset + _BLOCK
            size = pax.get("size", "")
            num_bytes = int(size) if size.isdecimal() and len(size) < 20 else self._size(header, offset)
            if kind in _LINKS_AND_DEVICES:
                num_bytes = 0
            if start + num_bytes > self.num_bytes:
                raise self._cut_off(offset)
            if kind == _GNU_LONG_NAME:
                long_name = _text(self._metadata(start, num_bytes))
            elif kind in _PAX_LOCAL:
                pax = _pax_records(self._metadata(start, num_bytes))
            elif kind not in (_GNU_LONG_LINK, _PAX_GLOBAL):
                name = pax.get("path") or long_name or _name(header)
                if kind == _GNU_SPARSE or any(field.startswith("GNU.sparse") for field in pax):
                    raise self._sparse(name)
                if kind in _REGULAR and not name.endswith("/"):
                    yield TarMember(name, start, num_bytes)
                long_name, pax = "", {}
            offset = start + -(-num_bytes // _BLOCK) * _BLOCK

    def _header(self, offset: int) -> bytes | None:
        """The header at `offset`, checked; None at the end of the archive."""
        at = offset - self._window_start
        if not 0 <= at <= len(self._window) - _BLOCK:
            self._window, self._window_start, at = self.read(offset, _WINDOW), offset, 0
        header = self._window[at : at + _BLOCK]
        if len(header) < _BLOCK:
            raise self._not_a_tar() if offset == 0 else self._cut_off(offset)
        if header[0] == 0 and not any(header):
            return None
        if not _checksum_holds(header):
            if offset == 0:
                raise self._not_a_tar()
            raise SourceError(
                f"{shown(self.path)}: damaged: no member header at byte {offset}, where one must be. "
                "Copy or make the archive again."
            )
        return header

    def _size(self, header: bytes, offset: int) -> int:
        field = header[124:136]
        if field[0] == 0x80:  # GNU and star: beyond 8 GiB as a big-endian number
            return int.from_bytes(field[1:], "big")
        digits = field.strip(b" \0")
        if digits.strip(b"01234567"):  # int() would take a sign, too
            raise SourceError(
                f"{shown(self.path)}: damaged: the header at byte {offset} states no valid size. "
                "Copy or make the archive again."
            )
        return int(digits or b"0", 8)

    def _metadata(self, start: int, num_bytes: int) -> bytes:
        if num_bytes > _METADATA_LIMIT_BYTES:
            raise SourceError(
                f"{shown(self.path)}: damaged: a member name of {num_bytes} bytes at byte {start}, at most "
                f"{_METADATA_LIMIT_BYTES} are read. Copy or make the archive again."
            )
        return self.read(start, num_bytes)

    def _not_a_tar(self) -> SourceError:
        first = self.read(0, 8)
        packed = next((name for magic, name in _COMPRESSED.items() if first.startswith(magic)), None)
        if packed:
            return SourceError(
                f"{shown(self.path)}: compressed with {packed}, but images are read from the middle of the file. "
                "Unpack it to a plain .tar; JPEGs do not get smaller anyway."
            )
        return SourceError(
            f"{shown(self.path)}: not a tar archive ({self.num_bytes} bytes without a valid first header). "
            "Check the path, or copy the file again."
        )

    def _sparse(self, name: str) -> SourceError:
        return SourceError(
            f"{shown(self.path)}: member {shown(name)} is sparse; only plain files are read. "
            "Pack the archive again without --sparse."
        )

    def _cut_off(self, offset: int) -> SourceError:
        return SourceError(
            f"{shown(self.path)}: truncated: {self.num_bytes} bytes, but the archive goes on behind byte {offset} "
            "(no end mark). Copy or make it again."
        )


def _checksum_holds(header: bytes) -> bool:
    try:
        stated = int(header[148:156].strip(b" \0") or b"-1", 8)
    except ValueError:
        return False
    # The low half of Adler-32 is 1 + the sum of the bytes modulo 65521, twenty times faster than sum(header). The
    # checksum counts its own eight bytes as blanks.
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
    if stated >= 0 and (total - stated) % 65521 == 0:
        return True
    plain = header[:148] + b" " * 8 + header[156:]
    return stated in (sum(plain), sum(byte - 256 if byte > 127 else byte for byte in plain))


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_records(data: bytes) -> dict[str, str]:
    """`17 path=name\\n` records, each led by its own length; a record that does not hold together ends the list."""
    records: dict[str, str] = {}
    start = 0
    while start < len(data):
        blank = data.find(b" ", start, start + 8)
        length = data[start:blank] if blank > start else b""
        if not length.isdigit() or not len(length) < int(length) <= len(data) - start:
            break
        field, equals, value = data[blank + 1 : start + int(length) - 1].partition(b"=")
        if equals:
            records[_text(field)] = value.decode("utf-8", "surrogateescape")
        start += int(length)
    return records
