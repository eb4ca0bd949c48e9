"""The geometry of detection views: how an image may be cropped and resized, as plain data of a recipe.

A newcomer's trap: `crop_min_px` and `crop_max_px` are pixels of the *pre-resized* image (short side one of
`crop_scales`), not of the source and not of the view.
"""

import dataclasses

from vkd_cache.views.sizes import SIDE_MULTIPLE_PX

MAX_SCALE_PX = 4096
SCALES = tuple(range(480, 801, 16))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionGeometry:
    """What the size and crop of a detection view are drawn from.

    Source: the training transforms of ViDT in the VkD release, with its numbers as defaults.

    Attributes:
        scales: short sides of a view, one drawn uniformly, pixels; each 16 to 4096.
        max_size_px: about the most that a long side may have, pixels; see `vkd_cache.views.sizes.resized_size`.
        crop_probability: of cropping before the resize, in [0, 1].
        crop_scales: short sides of the frame in which the crop is drawn, pixels; may be empty if nothing is cropped.
        crop_min_px: least side of a crop in that frame, pixels; at most the smallest of `crop_scales`.
        crop_max_px: greatest side of a crop in that frame, pixels.
        canvas_multiple_px: sides of a canvas are multiples of this, itself a multiple of 16.
    """

    scales: tuple[int, ...] = SCALES
    max_size_px: int = 1333
    crop_probability: float = 0.5
    crop_scales: tuple[int, ...] = (400, 500, 600)
    crop_min_px: int = 384
    crop_max_px: int = 600
    canvas_multiple_px: int = 128


def geometry_problems(geometry: DetectionGeometry) -> list[str]:
    """Every value that cannot be drawn from, as texts."""
    found = []

    def check(name: str, good: bool, expected: str) -> None:
        if not good:
            found.append(f"{name}: found {getattr(geometry, name)}, expected {expected}")

    sides = f"sides of {SIDE_MULTIPLE_PX} to {MAX_SCALE_PX} pixels"
    for name in ("scales", "crop_scales"):
        check(name, all(SIDE_MULTIPLE_PX <= side <= MAX_SCALE_PX for side in getattr(geometry, name)), sides)
    check("scales", len(geometry.scales) > 0, "at least one side")
    check(
        "max_size_px",
        SIDE_MULTIPLE_PX <= geometry.max_size_px <= 2 * MAX_SCALE_PX,
        f"{SIDE_MULTIPLE_PX} to {2 * MAX_SCALE_PX} pixels",
    )
    check("crop_probability", 0.0 <= geometry.crop_probability <= 1.0, "a probability")
    if geometry.crop_probability > 0.0:
        check("crop_scales", len(geometry.crop_scales) > 0, "at least one side, or a crop_probability of 0")
        least = min(geometry.crop_scales, default=geometry.crop_min_px)
        check("crop_min_px", 1 <= geometry.crop_min_px <= least, f"1 to {least}, the smallest of crop_scales")
        check("crop_max_px", geometry.crop_min_px <= geometry.crop_max_px, "at least crop_min_px")
    multiple = geometry.canvas_multiple_px
    check(
        "canvas_multiple_px",
        SIDE_MULTIPLE_PX <= multiple <= MAX_SCALE_PX and multiple % SIDE_MULTIPLE_PX == 0,
        f"a multiple of {SIDE_MULTIPLE_PX} up to {MAX_SCALE_PX}",
    )
    return found
