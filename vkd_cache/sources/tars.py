"""WebDataset tar shards as a source: one shard a tar, samples in the order they lie there, read by offset.

The grouping into samples is webdataset's own: adjacent members with the same path up to the first dot of the file
name. A shard is what was packed together: tars packed class by class work, but badly, and give a warning.
"""

import os
import warnings
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from vkd_cache.config import MAX_CLASSES
from vkd_cache.errors import SourceError
from vkd_cache.sources.findings import Findings, Problem, first_few
from vkd_cache.sources.folder import IMAGE_EXTENSIONS, check_image_bytes
from vkd_cache.sources.keys import PackedShards, hash_order, key_problem, shown
from vkd_cache.sources.labels import parse_label
from vkd_cache.sources.shard import Shard
from vkd_cache.sources.tar_members import TarMember, TarReader

_OPEN_TARS = 32
_LABEL_LIMIT_BYTES = 1 << 22

_NO_LABEL = Problem(
    "samples with an image and no label", "Each image needs a .cls, or a .json with a label, right beside it."
)
_NO_IMAGE = Problem(
    "samples with a label and no image (jpg, jpeg, png, webp)", "Pack the members of a sample next to each other."
)
_MANY_IMAGES = Problem("samples with more than one member of a kind", "Keep one image and one label a sample.")
_BAD_LABEL = Problem("labels that are not a class index", "Write .cls as an ASCII integer, or .json {'label': 3}.")
_BAD_KEY = Problem("samples whose name cannot be a key", "Rename the members.")
_TWICE = Problem("keys that appear twice", "Rename or remove one of each pair: a key names one sample.")
_NO_SAMPLES = Problem("tars without a sample", "Remove them, or check how they were packed.")


class SingleClassShardWarning(UserWarning):
    """Tar shards that hold one class only: mixing and shuffling, which stay inside shards, lose their point."""


class TarSource:
    """Tar shards, indexed once from their headers and label members. Labels are the numbers in the tars.

    Attributes:
        kind, location, num_classes, class_names, shards: see `Source`.
    """

    kind: str = "tar"

    def __init__(self, paths: Sequence[str], *, location: str | None = None) -> None:
        """Index the tars at `paths`, one shard each, in this order.

        Warns:
            SingleClassShardWarning: some of them hold one class only.

        Raises:
            SourceError: a tar that cannot be read, or anything that `docs/sources.md` lists.
        """
        self.location = first_few(list(paths)) if location is None else location
        self.class_names: tuple[str, ...] | None = None
        self._paths = tuple(os.path.abspath(path) for path in paths)  # noqa: PTH100 - resolve() would follow links
        self._open: dict[int, TarReader] = {}
        findings = Findings(self.location)
        index = _Index()
        for path in paths:
            index.add_tar(path, findings)
        if index.keys:
            _find_twins(index, paths, findings)
        findings.raise_any()
        self._tar_bytes = tuple(index.tar_bytes)
        self._offsets: npt.NDArray[np.uint64] = np.asarray(index.offsets, dtype=np.uint64)
        self._num_bytes: npt.NDArray[np.uint64] = np.asarray(index.num_bytes, dtype=np.uint64)
        labels = np.asarray(index.labels, dtype=np.uint32)
        self.num_classes = int(labels.max()) + 1
        if self.num_classes > MAX_CLASSES:
            raise SourceError(
                f"{shown(self.location)}: the largest label is {self.num_classes - 1}, at most {MAX_CLASSES - 1} is "
                "expected: a network has one output for each from 0 on. Number the classes from 0."
            )
        self._packed = PackedShards(
            [os.path.basename(path) for path in paths],  # noqa: PTH119 - a string is all we have
            (index.keys[first:last] for first, last in index.bounds()),
            labels,
        )
        self.shards: Sequence[Shard] = self._packed
        _warn_single_class(index, labels, paths, self.location)

    def read(self, shard: int, row: int) -> bytes:
        """The encoded image of sample `row` of shard `shard`; see `Source`."""
        sample = self._packed.sample(shard, row)
        reader = self._open.get(shard) or self._reader(shard)
        found, expected = reader.current_bytes(), self._tar_bytes[shard]
        num_bytes = int(self._num_bytes[sample])
        check_image_bytes(num_bytes)
        data = reader.read(int(self._offsets[sample]), num_bytes) if found == expected else b""
        if found != expected or len(data) != num_bytes:
            raise SourceError(
                f"{reader.path}: has {found} bytes, and had {expected} when {self.location} was indexed: the tar was "
                "changed in between. Start again when nothing writes to it any more."
            )
        return data

    def _reader(self, shard: int) -> TarReader:
        if len(self._open) >= _OPEN_TARS:
            self._open.clear()  # one atomic step; a thread that is reading keeps its reader
        reader = self._open[shard] = TarReader(self._paths[shard])
        return reader

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": {}}


class _Sample:
    """What the members of one sample have given so far."""

    __slots__ = ("cls", "document", "doubled", "image", "key")

    def __init__(self, key: str) -> None:
        self.key = key
        self.image: TarMember | None = None
        self.cls: bytes | None = None
        self.document: bytes | None = None
        self.doubled = False


class _Index:
    """Flat columns over all samples of all tars, filled tar by tar."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.labels, self.offsets, self.num_bytes = array("I"), array("Q"), array("Q")
        self.ends: list[int] = []
        self.tar_bytes: list[int] = []

    def bounds(self) -> Iterator[tuple[int, int]]:
        """(first, last) sample of each tar, last excluded."""
        return zip([0, *self.ends[:-1]], self.ends, strict=True)

    def add_tar(self, path: str, findings: Findings) -> None:
        reader = TarReader(path)
        name = os.path.basename(path)  # noqa: PTH119
        any_sample = False
        for sample in _samples(reader):
            any_sample = True
            self._add_sample(sample, name, findings)
        if not any_sample:
            findings.add(_NO_SAMPLES, name)
        self.ends.append(len(self.keys))
        self.tar_bytes.append(reader.num_bytes)

    def _add_sample(self, sample: _Sample, tar: str, findings: Findings) -> None:
        where = f"{shown(sample.key)} in {tar}"
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
                label = parse_label(sample.cls, sample.document)
            except ValueError as error:
                findings.add(_BAD_LABEL, f"{where} ({error})")
                return
            self.keys.append(sample.key.encode("utf-8"))
            self.labels.append(label)
            self.offsets.append(sample.image.offset)
            self.num_bytes.append(sample.image.num_bytes)


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


def _samples(reader: TarReader) -> Iterator[_Sample]:
    """Samples of one tar that have an image or a label; members with other extensions are ignored."""
    current: _Sample | None = None
    for member in reader.members():
        parts = split_member_name(member.name)
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


def _label_bytes(reader: TarReader, member: TarMember) -> bytes:
    if member.num_bytes > _LABEL_LIMIT_BYTES:
        raise SourceError(
            f"{shown(reader.path)}: {shown(member.name)} has {member.num_bytes} bytes, at most {_LABEL_LIMIT_BYTES} "
            "are expected of a label. Write labels as .cls."
        )
    return reader.read_near(member.offset, member.num_bytes)


def _find_twins(index: _Index, paths: Sequence[str], findings: Findings) -> None:
    _, twins = hash_order(index.keys)
    for pair in twins:
        tars = [os.path.basename(paths[bisect_right(index.ends, at)]) for at in pair]  # noqa: PTH119
        findings.add(_TWICE, f"{shown(index.keys[pair[0]].decode())} ({' and '.join(tars)})")


def _warn_single_class(index: _Index, labels: npt.NDArray[np.uint32], paths: Sequence[str], location: str) -> None:
    single = [
        os.path.basename(path)  # noqa: PTH119
        for path, (first, last) in zip(paths, index.bounds(), strict=True)
        if last - first > 1 and np.ptp(labels[first:last]) == 0
    ]
    if single:
        warnings.warn(
            f"{location}: {len(single)} of {len(paths)} tar shards hold one class only: {first_few(single)}. Mixing "
            "partners and shuffling stay inside a shard, so images are mixed with their own class and batches are "
            "one-sided: the student gets worse. Shuffle the samples over the tars when packing.",
            SingleClassShardWarning,
            stacklevel=4,
        )
