"""What is kept of a tar behind a URL, so that a local copy of it can be trusted: its index, and what its bytes must be.

A newcomer's trap: there are two kinds of digests, for two moments. The checksum of the whole tar is taken as it comes
from the store, so that no index is made from a copy that has rotted since; the digests of single images come with the
index, so that an image is compared each time it is read, and the rest of the tar is left alone.

Shape legend: n samples.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from vkd_cache.sources.tar_index import INDEX_KIND, TarIndex
from vkd_cache.sources.tar_members import TarReader

KEPT_KIND = f"{INDEX_KIND}-images-1"  # another number with another format, or other digests
CHECKSUM_KIND = "tar-xxh3-128"
_BLOCK_BYTES = 1 << 23
_HEAD = struct.Struct("<16sQ")  # digest of all that follows it; samples


class KeptIndex(NamedTuple):
    """An index with the digests of its images.

    Attributes:
        samples: of the tar.
        digests: (n,) uint64, the xxh3_64 of each image's bytes.
    """

    samples: TarIndex
    digests: npt.NDArray[np.uint64]

    def to_bytes(self) -> bytes:
        """As a small file: 28 bytes a sample, and its key."""
        body = self.digests.astype("<u8").tobytes() + self.samples.to_bytes()
        head = _HEAD.pack(bytes(16), len(self.digests))[16:]
        return xxhash.xxh3_128_digest(head + body) + head + body

    @classmethod
    def from_bytes(cls, data: bytes, tar_bytes: int) -> "KeptIndex | None":
        """The inverse of `to_bytes`; None if `data` is damaged, or not of a tar of `tar_bytes`."""
        if len(data) < _HEAD.size or xxhash.xxh3_128_digest(memoryview(data)[16:]) != data[:16]:
            return None
        _, count = _HEAD.unpack_from(data)
        index = TarIndex.from_bytes(data[_HEAD.size + 8 * count :], tar_bytes)
        if index is None or len(index.labels) != count:
            return None
        return cls(index, np.frombuffer(data, "<u8", count, _HEAD.size).astype(np.uint64))


def image_digests(reader: TarReader, index: TarIndex) -> npt.NDArray[np.uint64]:
    """The (n,) digests of the images of an open tar.

    Raises:
        SourceError: it cannot be read.
    """
    digests = np.empty(len(index.keys), dtype=np.uint64)
    for sample, (offset, num_bytes) in enumerate(zip(index.offsets.tolist(), index.num_bytes.tolist(), strict=True)):
        digest = xxhash.xxh3_64()
        for block in _blocks(reader, offset, num_bytes):
            digest.update(block)
        digests[sample] = digest.intdigest()
    return digests


def tar_checksum(reader: TarReader) -> bytes:
    """The xxh3_128 of an open tar.

    Raises:
        SourceError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    for block in _blocks(reader, 0, reader.num_bytes):
        digest.update(block)
    return digest.digest()


def file_checksum(path: Path) -> bytes:
    """The xxh3_128 of a file."""
    return tar_checksum(TarReader(str(path)))


def _blocks(reader: TarReader, offset: int, num_bytes: int) -> Iterator[bytes]:
    """What lies there, piece by piece: a tar, or what somebody calls an image, may be larger than the memory."""
    end = offset + num_bytes
    while offset < end and (block := reader.read(offset, min(_BLOCK_BYTES, end - offset))):
        yield block
        offset += len(block)
