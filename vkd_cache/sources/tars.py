"""WebDataset tar shards as a source: one shard a tar, samples in the order they lie there, read by offset.

A shard is what was packed together: tars packed class by class work, but badly, and give a warning. Where the tars lie,
here or behind a URL, is no part of what the data set is.
"""

import os
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from vkd_cache.config import MAX_CLASSES
from vkd_cache.errors import SourceError
from vkd_cache.local_copies import LocalCopies
from vkd_cache.sources.findings import Findings, Problem, first_few
from vkd_cache.sources.folder import check_image_bytes
from vkd_cache.sources.keys import PackedShards, hash_order, shown
from vkd_cache.sources.local_index import local_indexes
from vkd_cache.sources.shard import Shard, Source
from vkd_cache.sources.tar_index import TarIndex
from vkd_cache.sources.tar_members import TarReader

_OPEN_TARS = 32

_TWICE = Problem("keys that appear twice", "Rename or remove one of each pair: a key names one sample.")


class SingleClassShardWarning(UserWarning):
    """Tar shards that hold one class only: mixing and shuffling, which stay inside shards, lose their point."""


class Tars(Protocol):
    """Where tars lie. Picklable.

    Attributes:
        names: the file name of each.
    """

    names: Sequence[str]

    def indexes(self, findings: Findings) -> Iterator[TarIndex]:
        """What is in each of them, in order; what is wrong goes to `findings`.

        Raises:
            SourceError: a tar that cannot be read at all.
        """
        ...

    def open(self, shard: int) -> TarReader:
        """One of them, to read from.

        Raises:
            SourceError: it cannot be had any more.
        """
        ...

    def fits(self, shard: int, row: int, data: bytes) -> bool:
        """Whether `data` is the image that was indexed there, as far as that is known."""
        ...

    def replace(self, shard: int, reader: TarReader) -> TarReader | None:
        """Another one to read from, in place of `reader`, whose bytes are damaged; None if there is nothing but these.

        Raises:
            SourceError: it cannot be had any more, or is damaged again.
        """
        ...

    def read_ahead(self, now: Sequence[int], soon: Sequence[int]) -> None:
        """Be told which will be read; see the function `read_ahead`."""
        ...


class LocalTars:
    """Tars in the file system."""

    def __init__(self, paths: Sequence[str], copies: LocalCopies | None = None) -> None:
        """`copies`: where their index is kept; None: it is not."""
        self.names: Sequence[str] = tuple(os.path.basename(path) for path in paths)  # noqa: PTH119
        self._given = tuple(paths)
        self._paths = tuple(str(Path(path).absolute()) for path in paths)  # abspath() would take "link/.." for nothing
        self._copies = copies

    def indexes(self, findings: Findings) -> Iterator[TarIndex]:
        """See `Tars`: from what was kept, or else from the tars."""
        return iter(local_indexes(self._given, self._paths, self.names, findings, self._copies))

    def open(self, shard: int) -> TarReader:
        """See `Tars`."""
        return TarReader(self._paths[shard])

    def fits(self, shard: int, row: int, data: bytes) -> bool:
        """Always: of tars that lie here nothing but headers and labels is read to index them."""
        return True

    def replace(self, shard: int, reader: TarReader) -> TarReader | None:
        """See `Tars`: nothing."""
        return None

    def read_ahead(self, now: Sequence[int], soon: Sequence[int]) -> None:
        """Nothing: the system reads ahead by itself."""


class TarSource:
    """Tar shards, indexed once from their headers and label members. Labels are the numbers in the tars.

    Attributes:
        kind, location, num_classes, class_names, shards: see `Source`.
    """

    kind: str = "tar"

    def __init__(self, tars: Tars, *, location: str) -> None:
        """Index `tars`, one shard each, in this order; `location` is what the user gave.

        Warns:
            SingleClassShardWarning: some of them hold one class only.

        Raises:
            SourceError: a tar that cannot be read, or anything that `docs/sources.md` lists.
        """
        self.location = location
        self.class_names: tuple[str, ...] | None = None
        self._tars = tars
        self._open: dict[int, TarReader] = {}
        findings = Findings(location)
        indexes = list(tars.indexes(findings))
        if any(index.keys for index in indexes):
            _find_twins(indexes, tars.names, findings)
        findings.raise_any()
        self._tar_bytes = tuple(index.tar_bytes for index in indexes)
        self._offsets = np.concatenate([index.offsets for index in indexes])
        self._num_bytes = np.concatenate([index.num_bytes for index in indexes])
        labels = np.concatenate([index.labels for index in indexes])
        self.num_classes = int(labels.max()) + 1
        if self.num_classes > MAX_CLASSES:
            raise SourceError(
                f"{shown(self.location)}: the largest label is {self.num_classes - 1}, at most {MAX_CLASSES - 1} is "
                "expected: a network has one output for each from 0 on. Number the classes from 0."
            )
        self._packed = PackedShards(tars.names, (index.keys for index in indexes), labels)
        self.shards: Sequence[Shard] = self._packed
        _warn_single_class(indexes, tars.names, location)

    def read(self, shard: int, row: int) -> bytes:
        """The encoded image of sample `row` of shard `shard`; see `Source`."""
        check_image_bytes(int(self._num_bytes[self._packed.sample(shard, row)]))
        reader = self._open.get(shard) or self._reader(shard)
        try:
            return self._image(reader, shard, row)
        except SourceError:
            other = self._tars.replace(shard, reader)
            if other is None:
                raise
        self._open[shard] = other
        return self._image(other, shard, row)

    def _image(self, reader: TarReader, shard: int, row: int) -> bytes:
        """The bytes of one image from an open tar, compared with what was indexed."""
        sample = self._packed.sample(shard, row)
        found, expected = reader.current_bytes(), self._tar_bytes[shard]
        num_bytes = int(self._num_bytes[sample])
        data = reader.read(int(self._offsets[sample]), num_bytes) if found == expected else b""
        if found != expected or len(data) != num_bytes:
            raise SourceError(
                f"{reader.path}: has {found} bytes, and had {expected} when {self.location} was indexed: the tar was "
                "changed in between. Start again when nothing writes to it any more."
            )
        if not self._tars.fits(shard, row, data):
            raise SourceError(
                f"{reader.path}: the image of {shown(self.shards[shard].keys[row])} is another one than when the tar "
                "was indexed, in a copy that was fetched just now and is whole: the tar itself was changed, though its "
                "size and version are the same, or was damaged in the store. Upload it again."
            )
        return data

    def read_ahead(self, now: Sequence[int], soon: Sequence[int]) -> None:
        """See the function `read_ahead`."""
        self._tars.read_ahead(now, soon)

    def _reader(self, shard: int) -> TarReader:
        # threads may share a source: each change is one atomic step, and one that is reading keeps its reader
        if len(self._open) >= _OPEN_TARS:
            self._open.clear()
        for other, reader in list(self._open.items()):
            if reader.is_removed():  # the space of a local copy is free when nobody has it open
                self._open.pop(other, None)
        reader = self._open[shard] = self._tars.open(shard)
        return reader

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": {}}


def read_ahead(source: Source, now: Sequence[int], soon: Sequence[int] = ()) -> None:
    """Tell a source which shards are going to be read, so that those behind a URL are being copied by then.

    Args:
        source: any; those that are local have nothing to do.
        now: shards that are read from now on, all at once.
        soon: those that come then, in order.

    Raises:
        ConfigError: the local copies of `now` would be larger than the bound for all of them.
    """
    if isinstance(source, TarSource):
        source.read_ahead(now, soon)


def _find_twins(indexes: Sequence[TarIndex], names: Sequence[str], findings: Findings) -> None:
    keys = [key for index in indexes for key in index.keys]
    ends = np.cumsum([len(index.keys) for index in indexes]).tolist()
    _, twins = hash_order(keys)
    for pair in twins:
        tars = [names[bisect_right(ends, at)] for at in pair]
        findings.add(_TWICE, f"{shown(keys[pair[0]].decode())} ({' and '.join(tars)})")


def _warn_single_class(indexes: Sequence[TarIndex], names: Sequence[str], location: str) -> None:
    single = [
        name
        for index, name in zip(indexes, names, strict=True)
        if len(index.labels) > 1 and np.ptp(index.labels) == 0
    ]
    if single:
        warnings.warn(
            f"{location}: {len(single)} of {len(names)} tar shards hold one class only: {first_few(single)}. Mixing "
            "partners and shuffling stay inside a shard, so images are mixed with their own class and batches are "
            "one-sided: the student gets worse. Shuffle the samples over the tars when packing.",
            SingleClassShardWarning,
            stacklevel=4,
        )
