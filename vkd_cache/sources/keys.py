"""Keys of samples: which are allowed, how they are hashed into an order, and how millions of them are kept small.

A key is data from outside. It ends up in file names' places, JSON and reports, so it is checked once, here, and a
source that has been opened holds valid, unique keys only.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt
import xxhash

from vkd_cache.sources.shard import Shard

KEY_LIMIT_BYTES = 1024

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_RECENT_SHARDS = 16


def key_problem(key: str) -> str | None:
    """Why `key` may not name a sample, in a few words; None when it may."""
    try:
        num_bytes = len(key.encode("utf-8"))
    except UnicodeEncodeError:
        return "not valid UTF-8"
    if not key:
        return "empty"
    if num_bytes > KEY_LIMIT_BYTES:
        return f"{num_bytes} bytes long, at most {KEY_LIMIT_BYTES} are allowed"
    if _CONTROL.search(key):
        return "holds a control character"
    if key.startswith("/"):
        return "an absolute path"
    if ".." in key and ".." in key.split("/"):
        return "holds a '..' component"
    return None


def shown(text: str) -> str:
    """`text` as an error message may print it: short, and with everything unprintable escaped."""
    plain = text if text.isprintable() else ascii(text)[1:-1]
    return plain if len(plain) <= 120 else f"{plain[:100]}...{plain[-17:]}"


def hash_keys(keys: Iterable[bytes]) -> npt.NDArray[np.uint64]:
    """(n,) xxh3_64 of each UTF-8 key, seed 0: the order of folder sources, and the quick way to find equal keys."""
    return np.fromiter((xxhash.xxh3_64_intdigest(key) for key in keys), dtype=np.uint64)


def hash_order(keys: Sequence[bytes]) -> tuple[npt.NDArray[np.int64], list[tuple[int, int]]]:
    """Positions of `keys` in the order of their hashes (ties by key), and every pair of positions with equal keys."""
    hashes = hash_keys(keys)
    order = np.argsort(hashes, kind="stable")
    in_order = hashes[order]
    twins: list[tuple[int, int]] = []
    ties = np.flatnonzero(in_order[1:] == in_order[:-1])
    last = -1
    for tie in ties.tolist():
        if tie < last:  # inside a run that is already sorted
            continue
        last = int(np.searchsorted(in_order, in_order[tie], side="right"))
        run = sorted(order[tie:last].tolist(), key=lambda position: (keys[position], position))
        order[tie:last] = run
        twins += [(a, b) for a, b in itertools.pairwise(run) if keys[a] == keys[b]]
    return order, twins


class PackedShards(Sequence[Shard]):
    """The shards of a source, kept as one string of keys per shard and built when asked for.

    A million samples cost their keys' bytes and four bytes of label each, here and in the copy that every worker
    process is sent, instead of a million Python strings. The last few shards that were asked for are kept built.

    Attributes:
        starts: (num_shards + 1,) int64 index of each shard's first sample, counted over the whole source.
    """

    def __init__(
        self, names: Sequence[str], keys: Iterable[Sequence[bytes]], labels: npt.NDArray[np.uint32]
    ) -> None:
        """`names` and `keys` hold one entry a shard; `labels` runs over all samples in the same order."""
        self._names = tuple(names)
        blobs, counts = [], [0]
        for shard_keys in keys:
            blobs.append(b"\0".join(shard_keys))  # no key holds a NUL
            counts.append(len(shard_keys))
        self._blobs = tuple(blobs)
        self.starts: npt.NDArray[np.int64] = np.cumsum(np.array(counts, dtype=np.int64))
        self._labels = labels
        self._recent: dict[int, Shard] = {}

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Shard]: ...
    def __getitem__(self, index: int | slice) -> Shard | Sequence[Shard]:
        """The shard `index`, or those of a slice."""
        if isinstance(index, slice):
            return tuple(self[position] for position in range(len(self))[index])
        position = range(len(self))[index]
        shard = self._recent.get(position)
        if shard is None:
            shard = self._build(position)
            if len(self._recent) >= _RECENT_SHARDS:
                self._recent.clear()  # one atomic step, so that threads may share a source
            self._recent[position] = shard
        return shard

    def __iter__(self) -> Iterator[Shard]:
        """All shards in turn, none of them kept."""
        return (self._build(position) for position in range(len(self)))

    def sample(self, shard: int, row: int) -> int:
        """Index of a sample, counted over the whole source.

        Raises:
            IndexError: no such shard, or no such row in it.
        """
        if not (0 <= shard < len(self) and 0 <= row < self.starts[shard + 1] - self.starts[shard]):
            raise IndexError(f"no row {row} in a shard {shard}")
        return int(self.starts[shard]) + row

    def _build(self, position: int) -> Shard:
        first, last = self.starts[position : position + 2]
        labels = self._labels[first:last]
        labels.flags.writeable = False
        return Shard(
            name=self._names[position],
            keys=tuple(self._blobs[position].decode("utf-8").split("\0")),
            labels=labels,
        )

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_recent": {}}
