"""Sizes of detection views: the resize rule, and the canvas that a view lies on.

A newcomer's trap: sizes are (height, width) everywhere here, while an image's own size is (width, height) as Pillow has
it. A view is not square, and its shape is only roughly the image's: both sides are rounded down to multiples of 16.
"""

SIDE_MULTIPLE_PX = 16


def resized_size(width_px: int, height_px: int, short_px: int, max_px: int | None) -> tuple[int, int]:
    """The size that an image is resized to.

    The short side becomes `short_px`, or less so that the long one stays within about `max_px`; the long side follows,
    rounded down; then both are rounded down to multiples of 16.

    Source: ViDT's resize (detection transforms of the VkD release), exactly, wherever it gives a size. Deviation:
    where it gives a side of zero (images longer than about 1 : 80), that side is 16 pixels, the other at most `max_px`.

    Args:
        width_px: width of the image, from 1.
        height_px: its height, from 1.
        short_px: aim for the short side, at least 16.
        max_px: bound of the long side, at least 16; None: no bound.

    Returns:
        (height, width) in pixels, multiples of 16 and at least 16.
    """
    short_source, long_source = sorted((width_px, height_px))
    short = short_px
    if max_px is not None and long_source * short_px > max_px * short_source:
        short = round(max_px * short_source / long_source)
    long = short * long_source // short_source
    if short < SIDE_MULTIPLE_PX and max_px is not None:
        short, long = SIDE_MULTIPLE_PX, max_px
    short, long = (side - side % SIDE_MULTIPLE_PX for side in (short, long))
    return (long, short) if width_px < height_px else (short, long)


def canvas_of(view_size: tuple[int, int], multiple_px: int) -> tuple[int, int]:
    """The padded size that a network sees a view in: each side rounded up to a multiple.

    Args:
        view_size: (height, width) of the view, pixels.
        multiple_px: `DetectionGeometry.canvas_multiple_px`.

    Returns:
        (height, width) in pixels, a function of the plan alone: no other image of a batch changes it.
    """
    height, width = (max(1, -(-side // multiple_px)) * multiple_px for side in view_size)
    return height, width
