"""The crop and the size of a detection view.

A newcomer's trap: the reference resizes an image twice around its crop. Here the same crop is drawn in the same frame,
but carried back to the source, rounded to whole source pixels and resized once; boxes follow the rounded crop.
"""

from collections.abc import Sequence

from vkd_cache.views.draws import Draws
from vkd_cache.views.geometry import DetectionGeometry
from vkd_cache.views.sizes import resized_size

CropBox = tuple[int, int, int, int]


def detection_crop(
    draws: Draws, geometry: DetectionGeometry, width_px: int, height_px: int
) -> tuple[CropBox, tuple[int, int]]:
    """Draw the crop and the size of a view, in this order: whether to crop, frame, width, height, top, left, scale.

    Source: ViDT's training transforms: with probability one half only a resize to one of `scales`, else a resize to
    one of `crop_scales`, a crop with sides uniform in [crop_min, min(frame side, crop_max)] at a uniform place, and a
    resize to one of `scales`. Deviation: see the module.

    Args:
        draws: the view's stream.
        geometry: what to draw from.
        width_px: width of the source image.
        height_px: its height.

    Returns:
        The crop (top, left, height, width) in source pixels, and the view's (height, width).
    """
    crop = (0, 0, height_px, width_px)
    width, height = width_px, height_px
    if geometry.crop_probability > 0.0 and draws.uniform() < geometry.crop_probability:
        frame_height, frame_width = resized_size(width_px, height_px, _one_of(draws, geometry.crop_scales), None)
        width = _side(draws, geometry, frame_width)
        height = _side(draws, geometry, frame_height)
        frame_top = draws.integer(0, frame_height - height + 1)
        frame_left = draws.integer(0, frame_width - width + 1)
        top, source_height = span_in_source(frame_top, height, frame_height, height_px)
        left, source_width = span_in_source(frame_left, width, frame_width, width_px)
        crop = (top, left, source_height, source_width)
    return crop, resized_size(width, height, _one_of(draws, geometry.scales), geometry.max_size_px)


def _one_of(draws: Draws, sides_px: Sequence[int]) -> int:
    return sides_px[draws.integer(0, len(sides_px))]


def _side(draws: Draws, geometry: DetectionGeometry, frame_px: int) -> int:
    """A crop's side. The frame can be up to 15 pixels below its scale, and so below `crop_min_px`."""
    high = min(frame_px, geometry.crop_max_px)
    return draws.integer(min(geometry.crop_min_px, high), high + 1)


def span_in_source(start: int, length: int, frame_px: int, source_px: int) -> tuple[int, int]:
    """A span of the frame in source pixels.

    Args:
        start: first pixel of the span in the frame.
        length: of the span, from 1.
        frame_px: side of the frame.
        source_px: side of the source.

    Returns:
        (start, length): both ends rounded to the nearest pixel, halves up; at least one pixel, inside the source.
    """
    first, last = (
        (2 * position * source_px + frame_px) // (2 * frame_px) for position in (start, start + length)
    )
    length = max(1, last - first)
    return min(first, source_px - length), length
