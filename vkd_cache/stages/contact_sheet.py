"""A contact sheet of detections: pictures in pairs, the annotated boxes left and the detected ones right.

A newcomer's trap: which pictures are shown does not depend on how well they went. They are spread evenly over the
source, whose order is that of key hashes; only pictures without any annotated box come last.
"""

import dataclasses
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vkd_cache.errors import BrokenImageError
from vkd_cache.runtime import write_atomic
from vkd_cache.sources.coco import CocoSource
from vkd_cache.stages.coco_scores import Detection
from vkd_cache.views.decode import decode_image

NUM_PICTURES = 12
MIN_SCORE = 0.3
_MAX_BOXES = 25  # detections drawn in one picture, the best ones
_TILE_PX = (420, 300)  # width, height
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
    path: Path, source: CocoSource, detections: Iterable[Detection], *, title: str, num_pictures: int = NUM_PICTURES
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


def _pair(source: CocoSource, shard: int, row: int, detected: dict[int, list[_Box]]) -> Image.Image:
    """Both tiles of one image, with a caption each."""
    truth = source.boxes(shard, row)
    annotated = [
        _Box((float(x0), float(y0), float(x1), float(y1)), int(label))
        for (x0, y0, x1, y1), label in zip(truth.boxes, truth.labels, strict=True)
    ]
    best = sorted(detected.get(truth.image_id, ()), key=lambda box: -(box.score or 0.0))[:_MAX_BOXES]
    try:
        picture: Image.Image | None = decode_image(source.read(shard, row), oriented=False)
    except BrokenImageError:
        picture = None
    captions = (f"{source.shards[shard].keys[row]}: {len(annotated)} annotated", f"{len(best)} detected")
    width, height = _TILE_PX
    pair = Image.new("RGB", (2 * width + _GAP_PX, height + _CAPTION_PX), _PAPER)
    names = source.class_names or ()
    for side, (caption, boxes) in enumerate(zip(captions, (annotated, best), strict=True)):
        left = side * (width + _GAP_PX)
        text = caption if picture is not None else f"{caption} (broken image)"
        ImageDraw.Draw(pair).text((left, 3), text, fill=_INK, font=_font(_FONT_PX))
        if picture is not None:
            pair.paste(_tile(picture, boxes, names), (left, _CAPTION_PX))
    return pair


def _tile(picture: Image.Image, boxes: Sequence[_Box], names: Sequence[str]) -> Image.Image:
    """`picture` with `boxes`, as large as a tile has room for."""
    width, height = _TILE_PX
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


def _sheet(pairs: Sequence[Image.Image], heading: str) -> Image.Image:
    """All pairs below the heading, row by row."""
    a_row = min(_PAIRS_A_ROW, max(1, len(pairs)))
    pair_width, pair_height = 2 * _TILE_PX[0] + _GAP_PX, _TILE_PX[1] + _CAPTION_PX
    num_rows = -(-len(pairs) // a_row)
    width = a_row * (pair_width + 3 * _GAP_PX) - _GAP_PX
    sheet = Image.new("RGB", (width, _HEADER_PX + num_rows * (pair_height + _GAP_PX)), _PAPER)
    ImageDraw.Draw(sheet).text((_GAP_PX, 9), heading, fill=_INK, font=_font(_FONT_PX + 2))
    for number, pair in enumerate(pairs):
        row, column = divmod(number, a_row)
        place = _GAP_PX + column * (pair_width + 3 * _GAP_PX), _HEADER_PX + row * (pair_height + _GAP_PX)
        sheet.paste(pair, place)
    return sheet


def _colour(label: int) -> tuple[int, int, int]:
    return _COLOURS[label % len(_COLOURS)]


def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)
