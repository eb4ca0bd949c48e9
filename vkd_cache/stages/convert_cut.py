"""How the shards of a conversion's target are cut from those of its source.

A newcomer's trap: mixing partners lie within a shard, so that a shard of mixed samples can be joined with its
neighbours but never be divided; and a shard's identity needs the labels of all its samples, those of broken images
too, which only the data set itself knows.
"""

import dataclasses
from typing import Any, NamedTuple

from vkd_cache.cache.reader import Cache
from vkd_cache.cache.schema import Manifest
from vkd_cache.errors import CacheMismatchError, ConfigError
from vkd_cache.sources import open_source, source_identity


class Piece(NamedTuple):
    """Rows `first` to `stop` of shard `shard` of the source, which begin at row `start` of a shard of the target."""

    shard: int
    first: int
    stop: int
    start: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """The target's shards.

    Attributes:
        dataset: the target's identity of the data set.
        pieces: of each shard of the target, in row order.
        is_new: whether it is another cut than the source's.
    """

    dataset: dict[str, Any]
    pieces: tuple[tuple[Piece, ...], ...]
    is_new: bool = False


def same_cut(manifest: Manifest) -> Cut:
    """The source's own shards."""
    counts = manifest.dataset["shard_counts"]
    whole = tuple((Piece(shard, 0, count, 0),) for shard, count in enumerate(counts))
    return Cut(dataset=manifest.dataset, pieces=whole)


def new_cut(cache: Cache, images: str, shard_size: int) -> Cut:
    """Shards of `shard_size` samples, as an extraction with that size would have them.

    Args:
        cache: the source of the conversion.
        images: the data set that it was extracted from.
        shard_size: samples per shard; the last may hold fewer.

    Raises:
        ConfigError: this cache cannot be cut so, or there is no data set given.
        SourceError: the data set cannot be opened.
        CacheMismatchError: the cache was made from another one.
    """
    manifest, own = cache.manifest, same_cut(cache.manifest)
    counts: list[int] = manifest.dataset["shard_counts"]
    if manifest.dataset["kind"] == "tar":
        raise ConfigError(
            f"--shard-size: {cache.url} was extracted from tars, whose shards are as they were packed. Repack the tars "
            "and extract again, or convert without --shard-size."
        )
    pieces = _pieces(counts, shard_size)
    if pieces == own.pieces:
        return own
    _refuse_parted_pairs(cache, pieces, shard_size)
    if not images:
        raise ConfigError(
            "--shard-size: found no data set, but new shards need the keys and labels of all samples, in order. Give "
            f"--source, the data set that {cache.url} was extracted from."
        )
    old = source_identity(open_source(images, split="train", shard_size=max(counts, default=1))).to_json()
    if old != manifest.dataset:
        differing = ", ".join(name for name in sorted(old) if old[name] != manifest.dataset.get(name))
        raise CacheMismatchError(
            f"{cache.url}: was made from another data set than {images}: {differing} differ. Give the data set that it "
            "was extracted from."
        )
    new = source_identity(open_source(images, split="train", shard_size=shard_size)).to_json()
    return Cut(dataset=new, pieces=pieces, is_new=True)


def _pieces(counts: list[int], shard_size: int) -> tuple[tuple[Piece, ...], ...]:
    """The shards laid end to end, and cut every `shard_size` samples."""
    shards: list[list[Piece]] = []
    place = 0  # of the next sample among all
    for shard, count in enumerate(counts):
        first = 0
        while first < count:
            start = place % shard_size
            if start == 0:
                shards.append([])
            stop = min(count, first + shard_size - start)
            shards[-1].append(Piece(shard, first, stop, start))
            place += stop - first
            first = stop
    return tuple(map(tuple, shards))


def _refuse_parted_pairs(cache: Cache, pieces: tuple[tuple[Piece, ...], ...], shard_size: int) -> None:
    counts = cache.manifest.dataset["shard_counts"]
    parted = any(piece.stop - piece.first < counts[piece.shard] for shard in pieces for piece in shard)
    if parted and cache.recipe.mixes:
        raise ConfigError(
            f"--shard-size: found {shard_size}, but the recipe of {cache.url} mixes samples within shards of "
            f"{max(counts)}: shards can only be joined, or partners would be parted. Give a multiple of {max(counts)}."
        )
