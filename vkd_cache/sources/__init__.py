"""Data sets as shards of keyed, annotated, encoded images: folders of classes, tar shards, and COCO's layout."""

from vkd_cache.sources.boxes import BoxAnnotation
from vkd_cache.sources.coco import CocoSource, is_detection
from vkd_cache.sources.identity import source_identity
from vkd_cache.sources.opening import open_source, validation_beside
from vkd_cache.sources.shard import Shard, Source, SourceIdentity
from vkd_cache.sources.tars import SingleClassShardWarning, read_ahead

__all__ = [
    "BoxAnnotation",
    "CocoSource",
    "Shard",
    "SingleClassShardWarning",
    "Source",
    "SourceIdentity",
    "is_detection",
    "open_source",
    "read_ahead",
    "source_identity",
    "validation_beside",
]
