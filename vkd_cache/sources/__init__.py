"""Data sets as shards of keyed, labelled, encoded images: folders of classes, and tar shards."""

from vkd_cache.sources.identity import source_identity
from vkd_cache.sources.opening import open_source, validation_beside
from vkd_cache.sources.shard import Shard, Source, SourceIdentity
from vkd_cache.sources.tars import SingleClassShardWarning

__all__ = [
    "Shard",
    "SingleClassShardWarning",
    "Source",
    "SourceIdentity",
    "open_source",
    "source_identity",
    "validation_beside",
]
