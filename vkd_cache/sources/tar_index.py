"""The samples of one tar, as columns: found in its headers and label members, or read back from where they were kept.

The grouping into samples is webdataset's own: adjacent members with the same path up to the first dot of the file
name. A newcomer's trap: an index that is kept is of one tar's bytes; whoever keeps it has to know that they are the
same bytes still.

Shape legend: n samples.
"""

import struct
from array import array
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from vkd_cache.errors import SourceError
from vkd_cache.sources.findings import Findings, Problem
from vkd_cache.sources.folder import IMAGE_EXTENSIONS
from vkd_cache.sources.keys import key_problem, shown
from vkd_cache.sources.labels import parse_label
from vkd_cache.sources.tar_members import TarMember, TarReader

INDEX_KIND = "tar-index-1"  # another number as soon as the same tar could give another index
_LABEL_LIMIT_BYTES = 1 << 22
_HEAD = struct.Struct("<16sQQQ")  # digest of all that follows it; samples; bytes of the tar; bytes of the keys

_NO_LABEL = Problem(
    "samples with an image and no label", "Each image needs a .cls, or a .json with a label, right beside it."
)
_NO_IMAGE = Problem(
    "samples with a label and no image (jpg, jpeg, png, webp)", "Pack the members of a sample next to each other."
)
_MANY_IMAGES = Problem("samples with more than one member of a kind", "Keep one image and one label a sample.")
_BAD_LABEL = Problem("labels that are not a class index", "Write .cls as an ASCII integer, or .json {'label': 3}.")
_BAD_KEY = Problem("samples whose name cannot be a key", "Rename the members.")
_NO_SAMPLES = Problem("tars without a sample", "Remove them, or check how they were packed.")
_PASSED_OVER = Problem(
    "image files that belong to no sample and are passed over",
    "A sample's name ends at the first dot: name its image KEY.jpg, jpeg, png or webp if these were meant.",
    is_error=False,
)


class TarIndex(NamedTuple):
    """The n samples of one tar, in its order.

    Attributes:
        keys: n keys in UTF-8.
        labels: (n,) uint32.
        offsets: (n,) uint64, where the image's bytes begin in the tar.
        num_bytes: (n,) uint64, of the image.
        tar_bytes: size of the tar.
    """

    keys: list[bytes]
    labels: npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.uint64]
    num_bytes: npt.NDArray[np.uint64]
    tar_bytes: int

    def to_bytes(self) -> bytes:
        """As a small file: 20 bytes a sample, and its key."""
        keys = b"\0".join(self.keys)  # no key holds a NUL
        arrays = (self.labels.astype("<u4"), self.offsets.astype("<u8"), self.num_bytes.astype("<u8"))
        body = b"".join([*(values.tobytes() for values in arrays), keys])
        head = _HEAD.pack(bytes(16), len(self.keys), self.tar_bytes, len(keys))[16:]
        return xxhash.xxh3_128_digest(head + body) + head + body

    @classmethod
    def from_bytes(cls, data: bytes, tar_bytes: int) -> "TarIndex | None":
        """The inverse of `to_bytes`; None if `data` is damaged, or not of a tar of `tar_bytes`."""
        if len(data) < _HEAD.size or xxhash.xxh3_128_digest(memoryview(data)[16:]) != data[:16]:
            return None
        _, count, stated_bytes, keys_bytes = _HEAD.unpack_from(data)
        if stated_bytes != tar_bytes or len(data) != _HEAD.size + 20 * count + keys_bytes:
            return None
        at = _HEAD.size
        keys = data[at + 20 * count :].split(b"\0")
        return cls(
            keys=keys,
            labels=np.frombuffer(data, "<u4", count, at).astype(np.uint32),
            offsets=np.frombuffer(data, "<u8", count, at + 4 * count).astype(np.uint64),
            num_bytes=np.frombuffer(data, "<u8", count, at + 12 * count).astype(np.uint64),
            tar_bytes=tar_bytes,
        ) if len(keys) == count else None


def index_tar(reader: TarReader, name: str, findings: Findings) -> TarIndex:
    """The samples of an open tar; what is wrong with them goes to `findings`, under the tar's `name`.

    Raises:
        SourceError: not a tar, compressed, damaged, sparse or cut off, or a label member beyond all measure.
    """
    keys: list[bytes] = []
    labels, offsets, num_bytes = array("I"), array("Q"), array("Q")
    any_sample = False
    for sample in _samples(reader, name, findings):
        any_sample = True
        label = _label_of(sample, f"{shown(sample.key)} in {name}", findings)
        if label is not None and sample.image is not None:
            keys.append(sample.key.encode("utf-8"))
            labels.append(label)
            offsets.append(sample.image.offset)
            num_bytes.append(sample.image.num_bytes)
    if not any_sample:
        findings.add(_NO_SAMPLES, name)
    return TarIndex(
        keys=keys,
        labels=np.asarray(labels, dtype=np.uint32),
        offsets=np.asarray(offsets, dtype=np.uint64),
        num_bytes=np.asarray(num_bytes, dtype=np.uint64),
        tar_bytes=reader.num_bytes,
    )


class _Sample:
    """What the members of one sample have given so far."""

    __slots__ = ("cls", "document", "doubled", "image", "key")

    def __init__(self, key: str) -> None:
        self.key = key
        self.image: TarMember | None = None
        self.cls: bytes | None = None
        self.document: bytes | None = None
        self.doubled = False


def _label_of(sample: _Sample, where: str, findings: Findings) -> int | None:
    """The label of a sample that has all it needs; None, and a finding, of any other."""
    problem = key_problem(sample.key)
    if problem:
        findings.add(_BAD_KEY, f"{where} ({problem})")
    elif sample.doubled:
        findings.add(_MANY_IMAGES, where)
    elif sample.image is None:
        findings.add(_NO_IMAGE, where)
    elif sample.cls is None and sample.document is None:
        findings.add(_NO_LABEL, where)
    else:
        try:
            return parse_label(sample.cls, sample.document)
        except ValueError as error:
            findings.add(_BAD_LABEL, f"{where} ({error})")
    return None


def split_member_name(name: str) -> tuple[str, str] | None:
    """(key, lower-case extension) as webdataset splits a member's name; None for members that belong to no sample."""
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base:  # no extension, or a hidden file
        return None
    first = name.partition("/")[0]
    # webdataset's own metadata members: __name__ or anything below __name__/
    if first.startswith("__") and first.endswith("__") and len(first) >= 4:
        return None
    return name[:dot], name[dot + 1 :].lower()


def _samples(reader: TarReader, tar: str, findings: Findings) -> Iterator[_Sample]:
    """Samples of one tar that have an image or a label; members with other extensions are ignored."""
    current: _Sample | None = None
    for member in reader.members():
        parts = split_member_name(member.name)
        if _is_lost_image(member.name, parts, current):
            findings.add(_PASSED_OVER, f"{shown(member.name)} in {tar}")
        if parts is None:
            continue
        key, extension = parts
        is_image = extension in IMAGE_EXTENSIONS
        # a sample ends with the next member of another key, even one that is ignored otherwise
        if current is not None and current.key != key:
            yield current
            current = None
        if not is_image and extension not in ("cls", "json"):
            continue
        if current is None:
            current = _Sample(key)
        if is_image:
            current.doubled |= current.image is not None
            current.image = member
        elif extension == "cls":
            current.doubled |= current.cls is not None
            current.cls = _label_bytes(reader, member)
        else:
            current.doubled |= current.document is not None
            current.document = _label_bytes(reader, member)
    if current is not None:
        yield current


def _is_lost_image(name: str, parts: tuple[str, str] | None, current: _Sample | None) -> bool:
    """Whether a member looks like an image, but is neither that of a sample nor a further one (`a.seg.png`) of it."""
    base = name.rpartition("/")[2]
    if base.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS or base.startswith("._"):  # the latter are macOS'
        return False
    if parts is None:
        return True
    return parts[1] not in IMAGE_EXTENSIONS and (current is None or current.key != parts[0])


def _label_bytes(reader: TarReader, member: TarMember) -> bytes:
    if member.num_bytes > _LABEL_LIMIT_BYTES:
        raise SourceError(
            f"{shown(reader.path)}: {shown(member.name)} has {member.num_bytes} bytes, at most {_LABEL_LIMIT_BYTES} "
            "are expected of a label. Write labels as .cls."
        )
    return reader.read_near(member.offset, member.num_bytes)
