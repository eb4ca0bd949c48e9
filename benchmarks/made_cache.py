"""A cache of made features of the size of ImageNet's, and batches joined from it: for steps at its real size.

A newcomer's trap: there are no images behind it. Every unit holds the features of the first one, because neither
reading nor joining looks at them; keys, order, units and bytes are those of a data set of that size.

Shape legend: n samples of a unit, C channels.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import data
import numpy as np

from vkd_cache import console
from vkd_cache.cache.reader import Cache, open_cache
from vkd_cache.cache.units import keys_to_columns
from vkd_cache.config import ViewsConfig
from vkd_cache.sources import Shard
from vkd_cache.stages.feed import Feed, Schedule
from vkd_cache.stages.joining import Nodes
from vkd_cache.stages.unit_views import CachedViews
from vkd_cache.views.recipe import make_recipe

UNIT_SAMPLES = 1000
OPEN_UNITS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeSource:
    """A data set of keys alone."""

    shards: Sequence[Shard]
    kind: str = "made"
    location: str = "made"
    num_classes: int = 1000
    class_names: tuple[str, ...] | None = None

    def read(self, shard: int, row: int) -> bytes:
        """No image is there, and nobody asks for one."""
        return b""


def _keys(unit: int) -> tuple[str, ...]:
    return tuple(f"n{unit:08d}/n{unit:08d}_{row:05d}" for row in range(UNIT_SAMPLES))


def make_cache(url: str, samples: int, *, width: int, dtype: str, seed: int) -> None:
    """Publish the units of at least `samples` samples, all of the same size; about a minute for 1.28 million."""
    recipe = make_recipe(ViewsConfig(recipe="vkd"))
    units = -(-samples // UNIT_SAMPLES)
    form = data.Form(width=width, dtype=dtype, backend="zarr")
    writer = data.unit_store(url, recipe, form, units=units, count=UNIT_SAMPLES)
    features = data.pooled_features(UNIT_SAMPLES, width, seed=seed)
    columns = data.unit_columns(recipe, _keys(0), seed=seed)
    with console.track("made cache", units, "units") as progress:
        for unit in range(units):
            writer.publish(unit, 0, {**columns, **keys_to_columns(_keys(unit))}, {"pooled": features})
            progress.advance()


def joined_batches(url: str, batch_size: int, *, pin_memory: bool) -> Iterator[Nodes]:
    """What a feed joins for batch after batch, in the order of training, for ever."""
    cache: Cache = open_cache(url)
    labels = np.zeros(UNIT_SAMPLES, np.uint32)
    units = range(cache.manifest.num_shards)
    source = MadeSource(shards=[Shard(name=f"made-{unit}", keys=_keys(unit), labels=labels) for unit in units])
    schedule = Schedule(epochs=1_000_000, batch_size=batch_size, seed=0, open_shards=OPEN_UNITS)
    blank = data.BlankRenderer(source, cache.recipe, cache.manifest.seed)
    with Feed(blank, CachedViews(cache, source, [0]), schedule, ("pooled",)) as feed:
        for batch in feed.batches(epoch=0, step=0, workers=0, pin_memory=pin_memory):
            yield batch.nodes
