"""A part of a data set as a data set of its own: what a plan measures on.

A newcomer's trap: a part's shards are not the whole's. Each is a few of the batches that a real unit is cut into, so
that batches have the shapes of a real job (a detector's are of one canvas each) however short the measurement is.

Shape legend: n samples of a shard.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from vkd_cache.cache.units import UnitId
from vkd_cache.sources import BoxAnnotation, CocoSource, Shard, Source, is_detection
from vkd_cache.stages.units import unit_tasks
from vkd_cache.views.recipe import Recipe

Rows = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where the samples of one shard of a part lie in the whole: a shard, and (n,) rows of it."""

    shard: int
    rows: Rows


class PartOfSource:
    """Some samples of a source, in shards of their own; see `Source`."""

    def __init__(self, whole: Source, places: Sequence[Place]) -> None:
        self.kind = whole.kind
        self.location = whole.location
        self.num_classes = whole.num_classes
        self.class_names = whole.class_names
        self.shards: Sequence[Shard] = _shards(whole, places)
        self._whole = whole
        self._places = tuple(places)

    def read(self, shard: int, row: int) -> bytes:
        """The encoded image of a sample; see `Source`."""
        return self._whole.read(*_in_whole(self._places, shard, row))


class PartOfBoxes(CocoSource):
    """Some samples of a COCO source, in shards of their own; the annotation file is the whole's."""

    def __init__(self, whole: CocoSource, places: Sequence[Place]) -> None:
        # not CocoSource's own: the annotation file has been read
        self.location = whole.location
        self.annotation_file = whole.annotation_file
        self.class_names = whole.class_names
        self.num_classes = whole.num_classes
        self.num_crowd, self.num_degenerate = whole.num_crowd, whole.num_degenerate
        self.num_without_boxes = whole.num_without_boxes
        self.shards = _shards(whole, places)
        self._whole = whole
        self._places = tuple(places)

    def read(self, shard: int, row: int) -> bytes:
        """The encoded image of a sample; see `Source`."""
        return self._whole.read(*_in_whole(self._places, shard, row))

    def image_size(self, shard: int, row: int) -> tuple[int, int]:
        """(width, height) in pixels, as the annotation file states it."""
        return self._whole.image_size(*_in_whole(self._places, shard, row))

    def boxes(self, shard: int, row: int) -> BoxAnnotation:
        """The usable boxes of a sample."""
        return self._whole.boxes(*_in_whole(self._places, shard, row))


def part_of(whole: Source, places: Sequence[Place]) -> Source:
    """The samples of `whole` at `places`, a shard for each."""
    return PartOfBoxes(whole, places) if is_detection(whole) else PartOfSource(whole, places)


def _shards(whole: Source, places: Sequence[Place]) -> list[Shard]:
    made = []
    for number, place in enumerate(places):
        shard = whole.shards[place.shard]
        keys = tuple(shard.keys[row] for row in place.rows.tolist())
        made.append(Shard(name=f"part-{number:06d}", keys=keys, labels=shard.labels[place.rows]))
    return made


def _in_whole(places: Sequence[Place], shard: int, row: int) -> tuple[int, int]:
    place = places[shard]
    return place.shard, int(place.rows[row])


def sampled_places(
    source: Source, recipe: Recipe, seed: int, *, batch_size: int, batches: int, shards: int
) -> list[Place]:
    """Places of at most `shards` shards of `batches` batches of the source's first units each, and of half a shard.

    The half one, which repeats samples of the first, tells what a unit costs whatever its size.
    """
    places: list[Place] = []
    for number in range(len(source.shards)):
        for rows in _chunks(source, recipe, seed, number, batch_size, batches):
            if len(places) < shards:
                places.append(Place(shard=number, rows=rows))
        if len(places) >= shards:
            break
    first = places[0]
    return [*places, Place(shard=first.shard, rows=first.rows[: max(1, len(first.rows) // 2)])]


def _chunks(
    source: Source, recipe: Recipe, seed: int, shard: int, batch_size: int, batches: int
) -> Iterator[Rows]:
    tasks = unit_tasks(source, recipe, seed, UnitId(shard, 0), batch_size)
    if is_detection(source):  # where they come canvas by canvas
        order = np.random.default_rng([seed, shard]).permutation(len(tasks))
        tasks = [tasks[number] for number in order]
    chunk: list[Rows] = []
    for task in tasks:
        chunk.append(task.row)
        # a mixed pair, at least: a detector's batch may be one image with a canvas of its own
        if len(chunk) >= batches and sum(map(len, chunk)) >= 2:
            yield np.sort(np.concatenate(chunk))
            chunk = []
    if chunk:
        yield np.sort(np.concatenate(chunk))


def first_places(source: Source, count: int) -> list[Place]:
    """The first `count` samples of a source, in its own order."""
    places = []
    for number, shard in enumerate(source.shards):
        size = min(len(shard.keys), count)
        if size <= 0:
            break
        places.append(Place(shard=number, rows=np.arange(size)))
        count -= size
    return places
