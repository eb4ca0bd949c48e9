"""What makes two sources the same data set: keys and labels of every shard, in order, and nothing of where they lie.

Images are not hashed here (that would read the whole data set at every start): the pixel digests in the cache notice
when an image under the same key has changed.
"""

import xxhash

from vkd_cache.sources.shard import Shard, Source, SourceIdentity


def source_identity(source: Source) -> SourceIdentity:
    """The identity of `source`: equal for equal keys, labels, order and cut, wherever the root lies."""
    counts, hashes = [], []
    for shard in source.shards:
        counts.append(len(shard.keys))
        hashes.append(_shard_hash(shard))
    return SourceIdentity(
        kind=source.kind,
        num_classes=source.num_classes,
        shard_counts=tuple(counts),
        shard_hashes=tuple(hashes),
    )


def _shard_hash(shard: Shard) -> str:
    # a NUL behind every key (none holds one), then four bytes a label: no two shards give the same bytes
    digest = xxhash.xxh3_128("".join(f"{key}\0" for key in shard.keys).encode("utf-8"))
    digest.update(shard.labels.astype("<u4").tobytes())
    return digest.hexdigest()
