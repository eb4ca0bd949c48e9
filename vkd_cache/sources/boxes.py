"""Boxes of a detection data set: as an annotation file has them, and packed for training.

The order of an image's boxes never depends on the file: it is that of their values. What training cannot use (crowds,
boxes without area inside their image) is left out of the packed boxes, and still is part of the image's digest.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

_RECORD = np.dtype([("category", "<i8"), ("crowd", "<i8"), ("xywh", "<f8", (4,))])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BoxAnnotation:
    """The usable boxes of one image; the arrays are the caller's own.

    Attributes:
        image_id: COCO's.
        size: (width, height) in pixels as the annotation file states it, without regard to EXIF orientation.
        boxes: (m, 4) float32 left, top, right, bottom in source pixels, inside the image, with a positive area.
        labels: (m,) int64 category ids.
        area: (m,) float32 square pixels as annotated (of the object's mask in COCO), or the area of the box as
            annotated where the file has no usable one.
    """

    image_id: int
    size: tuple[int, int]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    area: npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BoxTable:
    """All annotations of a file, m of them, of n images.

    Attributes:
        image: (m,) int64 position of the image, 0..n-1.
        category: (m,) int64 category ids.
        crowd: (m,) bool.
        xywh: (m, 4) float64 left, top, width, height in pixels; anything, NaN and infinities too.
        area: (m,) float64 square pixels; NaN where the file has none.
    """

    image: npt.NDArray[np.int64]
    category: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]
    xywh: npt.NDArray[np.float64]
    area: npt.NDArray[np.float64]

    def in_order(self, position: npt.NDArray[np.int64]) -> "BoxTable":
        """The table for images that move to `position` (n,), its rows sorted by image, category, box, crowd, area."""
        image = position[self.image]
        xywh = np.where(np.isnan(self.xywh), np.nan, self.xywh) + 0.0  # one NaN, and no negative zero
        order = np.lexsort((self.area, self.crowd, *xywh.T[::-1], self.category, image))
        return BoxTable(
            image=image[order],
            category=self.category[order],
            crowd=self.crowd[order],
            xywh=xywh[order],
            area=self.area[order],
        )

    def starts(self, num_images: int) -> npt.NDArray[np.int64]:
        """(n + 1,) first row of each image, of a table in order."""
        return np.searchsorted(self.image, np.arange(num_images + 1))


class PackedBoxes:
    """The usable boxes of all images: 24 bytes each.

    Attributes:
        num_crowd: annotations left out as crowds.
        num_degenerate: others left out, without area inside their image, or not finite.
        num_without_boxes: images that are left with no box.
    """

    def __init__(self, table: BoxTable, sizes: npt.NDArray[np.int32]) -> None:
        """Pack a table in order; `sizes` (n, 2) are the images' widths and heights."""
        with np.errstate(over="ignore", invalid="ignore"):  # infinities are looked for below
            corners = table.xywh.astype(np.float32)
            corners[:, 2:] += corners[:, :2]
            own_area = table.xywh[:, 2] * table.xywh[:, 3]
            area = np.where(table.area >= 0, table.area, own_area).astype(np.float32)
        finite = np.isfinite(corners).all(axis=1)
        area[~np.isfinite(area)] = 0.0
        boxes = np.clip(corners, 0.0, np.tile(sizes, 2)[table.image].astype(np.float32))
        solid = finite & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        usable = solid & ~table.crowd
        self.num_crowd = int(table.crowd.sum())
        self.num_degenerate = int((~solid & ~table.crowd).sum())
        self._starts = np.searchsorted(table.image[usable], np.arange(len(sizes) + 1))
        self.num_without_boxes = int((np.diff(self._starts) == 0).sum())
        self._boxes = boxes[usable]
        self._labels = table.category[usable].astype(np.int32)
        self._area = area[usable]

    def of(self, image: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Boxes (m, 4), labels (m,) and areas (m,) of the image at position `image`, as copies."""
        rows = slice(*self._starts[image : image + 2].tolist())
        return self._boxes[rows].copy(), self._labels[rows].astype(np.int64), self._area[rows].copy()

    def __len__(self) -> int:
        return len(self._boxes)


def record_digests(
    table: BoxTable, sizes: npt.NDArray[np.int32], image_ids: Sequence[int] | npt.NDArray[np.int64]
) -> npt.NDArray[np.uint32]:
    """(n,) digests of what is annotated about each image: id, size, and every box with category and crowd mark.

    The low half of xxh3_64 over little-endian id, width and height (int64), followed by category, crowd (int64) and
    left, top, width, height (float64) of each annotation, in the order of the table. Areas are not part of it: they
    serve evaluation alone.
    """
    records = np.empty(len(table.image), dtype=_RECORD)
    records["category"], records["crowd"], records["xywh"] = table.category, table.crowd, table.xywh
    heads = np.column_stack([np.asarray(image_ids, dtype="<i8"), sizes.astype("<i8")])
    starts = (table.starts(len(sizes)) * _RECORD.itemsize).tolist()
    body, head = memoryview(records.tobytes()), memoryview(heads.tobytes())
    digests = np.empty(len(sizes), dtype=np.uint32)
    for row in range(len(sizes)):
        digest = xxhash.xxh3_64(head[24 * row : 24 * row + 24])
        digest.update(body[starts[row] : starts[row + 1]])
        digests[row] = digest.intdigest() & 0xFFFFFFFF
    return digests
