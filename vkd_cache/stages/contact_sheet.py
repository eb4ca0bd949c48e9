"""A contact sheet of detections: pictures in pairs, the annotated boxes left and the detected ones right.

A newcomer's trap: which pictures are shown does not depend on how well they went. They are spread evenly over the
source, whose order is that of key hashes; only pictures without any annotated box come last.
"""

import dataclasses
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vkd_cache.errors import BrokenImageError
from vkd_cache.runtime import write_atomic
from vkd_cache.sources.coco import CocoSource
from vkd_cache.stages.coco_scores import Found
from vkd_cache.views.decode import decode_image

NUM_PICTURES = 12
MIN_SCORE = 0.3
_MAX_BOXES = 25  # detections drawn in one picture, the best ones
_MAX_TILE_PX, _MIN_TILE_PX = (420, 300), 220  # width and height; either
_GAP_PX, _CAPTION_PX, _HEADER_PX = 10, 22, 34
_FONT_PX = 13
_PAIRS_A_ROW = 2
_PAPER, _INK = (255, 255, 255), (40, 40, 40)
_COLOURS = (
    (230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240),
    (240, 50, 230), (210, 245, 60), (0, 128, 128), (255, 225, 25), (170, 110, 40), (128, 128, 255),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class _Box:
    """A box in source pixels (x0, y0, x1, y1), its category id, and the score of a detection."""

    corners: tuple[float, float, float, float]
    label: int
    score: float | None = None


def write_contact_sheet(
    path: Path, source: CocoSource, detections: Iterable[Found], *, title: str, num_pictures: int = NUM_PICTURES
) -> None:
    """Write a PNG of up to `num_pictures` pictures, each with its annotated and its detected boxes.

    Args:
        path: the file to write.
        source: the evaluated images.
        detections: COCO results of these images; those with a score of at least `MIN_SCORE` are drawn.
        title: whose detections they are.
        num_pictures: at least 1.
    """
    by_image: dict[int, list[_Box]] = defaultdict(list)
    for entry in detections:
        if entry["score"] >= MIN_SCORE:
            x, y, width, height = entry["bbox"]
            corners = (x, y, x + width, y + height)
            by_image[entry["image_id"]].append(_Box(corners, int(entry["category_id"]), float(entry["score"])))
    pairs = [_pair(source, shard, row, by_image) for shard, row in _spread(source, num_pictures)]
    heading = (
        f"{title}: annotated boxes left; right the detections with a score of at least {MIN_SCORE:.2f}, "
        f"at most {_MAX_BOXES} a picture"
    )
    content = io.BytesIO()
    _sheet(pairs, heading).save(content, "PNG")
    write_atomic(path, content.getvalue())


def _spread(source: CocoSource, count: int) -> list[tuple[int, int]]:
    """Shard and row of up to `count` images, evenly over those with boxes; then over the others."""
    places = [(shard, row) for shard, part in enumerate(source.shards) for row in range(len(part.keys))]
    with_boxes = [place for place in places if len(source.boxes(*place).labels)]
    chosen = _evenly(with_boxes, count)
    if len(chosen) < count:
        taken = set(chosen)
        chosen += _evenly([place for place in places if place not in taken], count - len(chosen))
    return chosen


def _evenly(places: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    picked = np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int))
    return [places[index] for index in picked]


class _Tile(NamedTuple):
    """A picture with its boxes, None where the image is broken, and what is written above it."""

    picture: Image.Image | None
    caption: str


def _pair(source: CocoSource, shard: int, row: int, detected: dict[int, list[_Box]]) -> tuple[_Tile, _Tile]:
    """One image with its annotated boxes, and with its detected ones."""
    truth = source.boxes(shard, row)
    annotated = [
        _Box((float(x0), float(y0), float(x1), float(y1)), int(label))
        for (x0, y0, x1, y1), label in zip(truth.boxes, truth.labels, strict=True)
    ]
    best = sorted(detected.get(truth.image_id, ()), key=lambda box: -(box.score or 0.0))[:_MAX_BOXES]
    key, names = source.shards[shard].keys[row], source.class_names or ()
    try:
        picture = decode_image(source.read(shard, row), oriented=False)
    except BrokenImageError:
        return _Tile(None, f"{key}: {len(annotated)} annotated"), _Tile(None, "broken image")
    return (
        _Tile(_drawn(picture, annotated, names), f"{key}: {len(annotated)} annotated"),
        _Tile(_drawn(picture, best, names), f"{len(best)} detected"),
    )


def _drawn(picture: Image.Image, boxes: Sequence[_Box], names: Sequence[str]) -> Image.Image:
    """`picture` with `boxes`, as large as a tile has room for."""
    width, height = _MAX_TILE_PX
    scale = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    tile = picture.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(tile)
    for box in reversed(boxes):  # the best one on top
        corners = [value * scale for value in box.corners]
        draw.rectangle(_within(corners, size), outline=_colour(box.label), width=2)
    for box in reversed(boxes):  # no label under another box's line
        _write_label(draw, box, [value * scale for value in box.corners], size, names)
    return tile


def _within(corners: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Corners inside the tile, the second never before the first."""
    x0, y0 = (min(max(value, 0.0), side - 1.0) for value, side in zip(corners[:2], size, strict=True))
    x1, y1 = (min(max(value, 0.0), side - 1.0) for value, side in zip(corners[2:], size, strict=True))
    return x0, y0, max(x0, x1), max(y0, y1)


def _write_label(
    draw: ImageDraw.ImageDraw, box: _Box, corners: Sequence[float], size: tuple[int, int], names: Sequence[str]
) -> None:
    """Name and score on a ground of the box's colour: above it, or inside where there is no room above."""
    name = (names[box.label] if box.label < len(names) else "") or f"category {box.label}"
    text = name if box.score is None else f"{name} {box.score:.2f}"
    font = _font(_FONT_PX)
    width, height = draw.textlength(text, font=font) + 4, _FONT_PX + 4
    left = min(max(corners[0], 0.0), max(0.0, size[0] - width))
    top = corners[1] - height
    if top < 0:
        top = min(max(corners[1], 0.0), max(0.0, size[1] - height))
    colour = _colour(box.label)
    red, green, blue = colour
    draw.rectangle((left, top, left + width, top + height), fill=colour)
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 140  # luma, ITU-R BT.601
    draw.text((left + 2, top + 1), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)


def _sheet(pairs: Sequence[tuple[_Tile, _Tile]], heading: str) -> Image.Image:
    """All pairs below the heading, row by row, in tiles of the size of the largest picture."""
    sizes = [tile.picture.size for pair in pairs for tile in pair if tile.picture is not None]
    width = max([_MIN_TILE_PX, *(size[0] for size in sizes)]) + _GAP_PX
    height = max([_MIN_TILE_PX, *(size[1] for size in sizes)]) + _CAPTION_PX + _GAP_PX
    pair_width = 2 * width + 2 * _GAP_PX
    num_rows = -(-len(pairs) // _PAIRS_A_ROW)
    sheet = Image.new("RGB", (_PAIRS_A_ROW * pair_width, _HEADER_PX + num_rows * height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP_PX, 9), heading, fill=_INK, font=_font(_FONT_PX + 2))
    for number, pair in enumerate(pairs):
        row, column = divmod(number, _PAIRS_A_ROW)
        for side, tile in enumerate(pair):
            left, top = _GAP_PX + column * pair_width + side * width, _HEADER_PX + row * height
            draw.text((left, top + 3), tile.caption, fill=_INK, font=_font(_FONT_PX))
            if tile.picture is not None:
                sheet.paste(tile.picture, (left, top + _CAPTION_PX))
    return sheet


def _colour(label: int) -> tuple[int, int, int]:
    return _COLOURS[label % len(_COLOURS)]


def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)
