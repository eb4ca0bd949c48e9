"""What of a run is not what its cache was made with: refused where it would give wrong numbers, said where it only may.

A newcomer's trap: a training run asks its cache how views are planned and which teacher it had, and not its pipeline
file. That is right, but somebody who has changed the file, or points it at another cache, should hear of it.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from vkd_cache import console
from vkd_cache.cache.reader import Cache
from vkd_cache.config import Config, ViewsConfig
from vkd_cache.errors import CacheMismatchError
from vkd_cache.sources import Source, is_detection, source_identity
from vkd_cache.stages.supply import Supply
from vkd_cache.views.recipe import make_recipe

_SAME_TEACHER = ("weights_sha256", "input_px", "mean", "std", "interpolation")  # what makes it one function


def check_same_source(cache: Cache, source: Source) -> None:
    """Refuse a source that is not the one the cache was made from.

    Raises:
        CacheMismatchError: what differs, with both values.
    """
    ours, theirs = source_identity(source).to_json(), cache.manifest.dataset
    for name, value in ours.items():
        stored = theirs.get(name)
        if stored == value:
            continue
        if isinstance(value, list):
            pairs = list(itertools.zip_longest(value, stored or []))
            differing = [shard for shard, (here, there) in enumerate(pairs) if here != there]
            found = f"{len(differing)} of {len(pairs)} shards differ, the first is shard {differing[0]}"
        else:
            found = f"{value!r} here, {stored!r} there"
        raise CacheMismatchError(
            f"{cache.url}: was made from another data set than {source.location}: {name}: {found}. "
            f"{'Keys, image sizes, boxes and categories count. ' if is_detection(source) else ''}Use the "
            f"{'images and annotation file' if is_detection(source) else 'source'} that the cache was extracted from, "
            "or extract a new cache."
        )


def check_same_teacher(cache: Cache, live: Supply) -> None:
    """Refuse a live teacher that is not the cached one.

    Raises:
        CacheMismatchError: what differs, with both values.
    """
    here, there = live.identity or {}, cache.manifest.teacher
    differing = [name for name in _SAME_TEACHER if here.get(name) != there.get(name)]
    if differing:
        shown = "; ".join(f"{name} {there.get(name)!r} there, {here[name]!r} here" for name in differing)
        raise CacheMismatchError(
            f"{cache.url}: was made with teacher '{there.get('name')}', this run asks for '{here['name']}': {shown}. "
            "Use the cached one, its --teacher-weights and its [teacher] input_px."
        )


def say_other_numerics(cache: Cache, live: Supply) -> None:
    """Say where a live teacher is run otherwise than the cached one was."""
    stored = cache.manifest.numerics
    numerics = _differing({**stored, "batch_size": live.numerics.get("batch_size")}, live.numerics)
    if numerics:
        console.warn(
            f"{cache.url}: its teacher was run otherwise than the live one ({numerics}): a part of every gap is "
            "theirs, not the cache's. Set [extract] as it was to measure the cache alone."
        )


def say_other_settings(cache: Cache, config: Config) -> None:
    """Say where a configuration asks for other views, or another teacher, than the cache that is used has."""
    if config.views != ViewsConfig(count=config.views.count):  # else nobody asked for anything
        wanted = {**make_recipe(config.views).to_json(), "seed": config.views.seed}
        stored = {**cache.recipe.to_json(), "seed": cache.manifest.seed}
        if views := _differing(stored, wanted):
            console.warn(
                f"{cache.url}: holds other views than [views] asks for ({views}). Those of the cache are used: "
                "extract another cache if the others were meant."
            )
    name, stored_name = config.teacher.name, cache.manifest.teacher.get("name")
    if name and name != stored_name and not config.train.live_teacher:
        console.warn(
            f"{cache.url}: holds what teacher '{stored_name}' says, [teacher] name is '{name}'. The cache is used: "
            "give another --cache if the other teacher was meant."
        )


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Fields of `here` that differ from those of `there`, with both values; empty if none does."""
    return "; ".join(
        f"{name} {there.get(name)!r} there, {value!r} here" for name, value in here.items() if there.get(name) != value
    )
