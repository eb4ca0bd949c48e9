"""What every source of images looks like: shards of keyed, labelled samples whose bytes can be read one by one.

A shard is fixed and ordered; the order of the rows in a unit of the cache is the order of its shard's keys.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A fixed, ordered group of samples.

    Attributes:
        name: what a user calls it: the tar's file name, or `block-000012` of a folder or COCO source.
        keys: n keys, unique over the whole source.
        labels: (n,) uint32 class indices; digests of what is annotated about each image in a COCO source.
    """

    name: str
    keys: tuple[str, ...]
    labels: npt.NDArray[np.uint32]


class Source(Protocol):
    """A data set, opened and indexed. Picklable: worker processes get a copy.

    Attributes:
        kind: `folder`, `tar` or `coco`.
        location: what the user gave, for messages; never part of the identity.
        num_classes: one more than the largest label or category id, or the number of class folders.
        class_names: one name a class, where the layout has them.
        shards: all shards, in order.
    """

    kind: str
    location: str
    num_classes: int
    class_names: tuple[str, ...] | None
    shards: Sequence[Shard]

    def read(self, shard: int, row: int) -> bytes:
        """The encoded image of sample `row` of shard `shard`.

        Raises:
            SourceError: the file vanished, cannot be read, or is not what was indexed.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceIdentity:
    """What makes two sources the same data set, wherever their roots lie.

    Attributes:
        kind: `folder`, `tar` or `coco`.
        num_classes: number of classes.
        shard_counts: samples per shard.
        shard_hashes: per shard, xxh3_128 hex of its keys and labels in order.
    """

    kind: str
    num_classes: int
    shard_counts: tuple[int, ...]
    shard_hashes: tuple[str, ...]

    @property
    def num_samples(self) -> int:
        """Samples over all shards."""
        return sum(self.shard_counts)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, for the manifest of a cache."""
        return {
            "kind": self.kind,
            "num_classes": self.num_classes,
            "shard_counts": list(self.shard_counts),
            "shard_hashes": list(self.shard_hashes),
        }
