"""The cache: arrays and JSON in a directory or behind an fsspec URL; knows neither models nor images."""

from vkd_cache.cache.reader import Cache, Unit, find_cache, open_cache
from vkd_cache.cache.schema import Manifest, NodeSpec, UnitRecord
from vkd_cache.cache.units import UnitId
from vkd_cache.cache.writer import CacheWriter, create_cache

__all__ = [
    "Cache",
    "CacheWriter",
    "Manifest",
    "NodeSpec",
    "Unit",
    "UnitId",
    "UnitRecord",
    "create_cache",
    "find_cache",
    "open_cache",
]
