"""A COCO data set as a source: one folder of images, one annotation file, shards in the order of the keys' hashes.

The key of a sample is its image id. Its label is no class: it is a digest of everything annotated about the image, so
that keys and labels together are the identity of the annotation file, as they are of every other source.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

import numpy as np

from vkd_cache.errors import ConfigError
from vkd_cache.sources.boxes import BoxAnnotation, PackedBoxes, record_digests
from vkd_cache.sources.coco_json import read_coco
from vkd_cache.sources.findings import Findings, Problem
from vkd_cache.sources.folder import file_names, read_image
from vkd_cache.sources.keys import PackedShards, hash_order
from vkd_cache.sources.shard import Shard, Source

_NO_FILE = Problem("images of the annotation file are missing", "Download or copy them, or remove their records.")


class CocoSource:
    """Images with boxes, indexed once.

    Attributes:
        kind, location, shards: see `Source`. Labels are digests, see `record_digests`.
        num_classes: the largest category id plus one: 91 for COCO.
        class_names: by category id, "" where there is no such category.
        annotation_file: absolute path, for pycocotools.
        num_crowd, num_degenerate, num_without_boxes: see `PackedBoxes`.
    """

    kind: str = "coco"

    def __init__(
        self, annotation_file: Path, images: Path, *, shard_size: int = 1024, location: str | None = None
    ) -> None:
        """Read `annotation_file` and look whether all of its images are in the folder `images`.

        Args:
            annotation_file: COCO's `instances_*.json`.
            images: the folder that file names are relative to.
            shard_size: samples per shard, at least 1; the last shard may hold fewer.
            location: what the user gave, for messages.

        Warns:
            CocoWarning: see `read_coco`.

        Raises:
            SourceError: see `docs/sources.md`.
            ConfigError: shard_size is not positive.
        """
        if shard_size < 1:
            raise ConfigError(f"shard_size: found {shard_size}, expected at least 1 (the default is 1024).")
        self.location = str(images) if location is None else location
        self.annotation_file = annotation_file.absolute()
        self._folder = str(images.absolute())
        tables = read_coco(annotation_file)
        _find_missing(images, tables.file_names)
        self.class_names: tuple[str, ...] | None = tables.class_names
        self.num_classes = len(tables.class_names)

        keys = [b"%d" % identity for identity in tables.image_ids.tolist()]
        order, _ = hash_order(keys)  # ids are unique, and so are their decimal texts
        self._image_ids, self._sizes = tables.image_ids[order], tables.sizes[order]
        names = [tables.file_names[position].encode("utf-8") for position in order]
        self._names = b"".join(names)
        self._name_ends = np.cumsum([0, *map(len, names)])
        boxes = tables.boxes.in_order(np.argsort(order))
        self._boxes = PackedBoxes(boxes, self._sizes)
        self.num_crowd, self.num_degenerate = self._boxes.num_crowd, self._boxes.num_degenerate
        self.num_without_boxes = self._boxes.num_without_boxes
        cuts = range(0, len(keys), shard_size)
        self._packed = PackedShards(
            [f"block-{number:06d}" for number in range(len(cuts))],
            ([keys[position] for position in order[cut : cut + shard_size]] for cut in cuts),
            record_digests(boxes, self._sizes, self._image_ids),
        )
        self.shards: Sequence[Shard] = self._packed

    def read(self, shard: int, row: int) -> bytes:
        """The encoded image of sample `row` of shard `shard`; see `Source`."""
        sample = self._packed.sample(shard, row)
        name = self._names[slice(*self._name_ends[sample : sample + 2].tolist())]
        return read_image(f"{self._folder}/{name.decode('utf-8')}", self.location)

    def image_size(self, shard: int, row: int) -> tuple[int, int]:
        """(width, height) in pixels, as the annotation file states it.

        Raises:
            IndexError: no such shard, or no such row in it.
        """
        width, height = self._sizes[self._packed.sample(shard, row)].tolist()
        return width, height

    def boxes(self, shard: int, row: int) -> BoxAnnotation:
        """The usable boxes of a sample: none of crowds, none without area.

        Source: what the reference keeps for training (`ConvertCocoPolysToMask`), except that boxes that are not
        finite are left out, too.

        Raises:
            IndexError: no such shard, or no such row in it.
        """
        sample = self._packed.sample(shard, row)
        boxes, labels, area = self._boxes.of(sample)
        return BoxAnnotation(
            image_id=int(self._image_ids[sample]),
            size=self.image_size(shard, row),
            boxes=boxes,
            labels=labels,
            area=area,
        )


def is_detection(source: Source) -> TypeGuard[CocoSource]:
    """Whether samples are annotated with boxes, not with a class."""
    return isinstance(source, CocoSource)


def _find_missing(folder: Path, names: Sequence[str]) -> None:
    """Raise a SourceError that names the images that are not below `folder`; each folder is listed once."""
    findings = Findings(str(folder))
    there: dict[str, set[str]] = {}
    for path in names:
        parent, _, name = path.rpartition("/")
        if parent not in there:
            is_folder = os.path.isdir(folder / parent)  # noqa: PTH112 - Path.is_dir() raises for names too long
            there[parent] = file_names(folder / parent) if is_folder else set()
        if name not in there[parent]:
            findings.add(_NO_FILE, path)
    findings.raise_any()
