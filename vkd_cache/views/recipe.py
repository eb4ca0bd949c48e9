"""View recipes: what may be drawn for a view, as plain data that goes into the manifest of a cache.

A newcomer's trap: a recipe has no seed and no view count. It is the distribution; the plan (`vkd_cache.views.plan`)
draws from it, and the drawn values are stored beside the features.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from vkd_cache.config import MAX_SIDE_PX, ViewsConfig
from vkd_cache.errors import CacheFormatError, ConfigError
from vkd_cache.views.geometry import DetectionGeometry, geometry_problems

Geometry = Literal["random_resized_crop", "center_crop", "detection"]
Colour = Literal["three_augment", "rand_augment", "none"]
Decoder = Literal["pillow", "simplejpeg"]
Resizer = Literal["pillow", "torch"]
ColourKernel = Literal["pillow", "affine"]
Interpolation = Literal["bicubic", "bilinear"]

LARGEST_BLUR = 16.0  # radius, pixels, under the affine kernel, whose weights are 256ths
_LARGEST = 2**53  # of a number in a manifest
# fields that recipes did not always have; as long as they hold this, a manifest does not say them
_UNSAID: Mapping[str, Any] = types.MappingProxyType({"resizer": "pillow", "colour_kernel": "pillow", "detection": None})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The distribution that the views of a cache are drawn from.

    Attributes:
        name: what a user calls it; one of `RECIPES`, or anything for a recipe of one's own.
        decoder: library that turns bytes into pixels; simplejpeg: JPEG files only, Pillow the others.
        resizer: library of the resize kernel; torch goes with simplejpeg, and has other weights than Pillow.
        geometry: a random resized crop, one centre crop, or what `detection` says.
        size_px: height and width of a view, pixels; detection: the largest short side.
        interpolation: resize kernel, antialiased; bilinear for detection, bicubic for all else.
        scale: share of the source's area that a random crop aims at, (low, high) in (0, 1].
        ratio: width over height of a random crop, (low, high), drawn log-uniformly.
        crop_fraction: centre crop: `size_px` over the resized short side, in (0, 1].
        flip_probability: of mirroring left to right, in [0, 1].
        colour: which operations follow the flip.
        colour_kernel: three-augment: pillow: one 8-bit image after another; affine: the jitter and grey are one affine
            map, applied on the device, the other operations whole-number arithmetic; goes with simplejpeg.
        jitter: three-augment: brightness, contrast and saturation factors are uniform in [1 - jitter, 1 + jitter].
        blur_radius: three-augment: radius of the Gaussian blur, (low, high), pixels of the view.
        solarise_threshold: three-augment: values from here on are inverted, in [0, 256].
        num_ops: RandAugment: operations chosen per view, with replacement.
        op_probability: RandAugment: probability that a chosen operation is applied.
        magnitude: RandAugment: mean of the magnitude, 0 to 10.
        magnitude_std: RandAugment: standard deviation of the magnitude before clipping to [0, 10].
        erase_probability: of random erasing, in [0, 1].
        erase_area: share of the view's area that is erased, (low, high).
        erase_ratio: height over width of the erased box, (low, high), drawn log-uniformly.
        mix_probability: that a pair of the matching is mixed at all, in [0, 1].
        mixup_alpha: Beta parameter of Mixup; 0 turns Mixup off.
        cutmix_alpha: Beta parameter of CutMix; 0 turns CutMix off.
        cutmix_switch: probability of CutMix for a mixed pair when both are on, in [0, 1].
        detection: sizes and crops of detection views; None for the other geometries.
    """

    name: str
    decoder: Decoder = "pillow"
    geometry: Geometry = "random_resized_crop"
    size_px: int = 224
    interpolation: Interpolation = "bicubic"
    resizer: Resizer = "pillow"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3.0 / 4.0, 4.0 / 3.0)
    crop_fraction: float = 0.875
    flip_probability: float = 0.5
    colour: Colour = "none"
    colour_kernel: ColourKernel = "pillow"
    jitter: float = 0.3
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarise_threshold: int = 128
    num_ops: int = 2
    op_probability: float = 0.5
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    erase_probability: float = 0.0
    erase_area: tuple[float, float] = (0.02, 1.0 / 3.0)
    erase_ratio: tuple[float, float] = (0.3, 1.0 / 0.3)
    mix_probability: float = 0.0
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    cutmix_switch: float = 0.5
    detection: DetectionGeometry | None = None

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ConfigError("\n".join(f"recipe '{self.name}': {problem}" for problem in problems))

    @property
    def max_ops(self) -> int:
        """K, the most operations that a view of this recipe can have: the width of the `op_id` column."""
        if self.colour == "three_augment":
            return 4
        return self.num_ops if self.colour == "rand_augment" else 0

    @property
    def mixes(self) -> bool:
        """Whether any pair can be mixed."""
        return self.mix_probability > 0.0 and (self.mixup_alpha > 0.0 or self.cutmix_alpha > 0.0)

    @property
    def fast(self) -> bool:
        """Whether views are rendered without Pillow, from arrays: see `vkd_cache.views.fast`."""
        return self.decoder == "simplejpeg"

    @property
    def libraries(self) -> tuple[str, ...]:
        """Distributions that decide pixels of this recipe besides those that all caches name."""
        return ("simplejpeg",) if self.fast else ()

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, without those that say nothing new; `from_json` gives back an equal recipe."""
        document = _to_json(self)
        if self.detection is not None:
            document["detection"] = _to_json(self.detection)
        return {name: value for name, value in document.items() if name not in _UNSAID or value != _UNSAID[name]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Recipe":
        """The inverse of `to_json`.

        Raises:
            CacheFormatError: a field is missing, unknown or of the wrong type, or its value is out of range.
        """
        values, problems = _fields_from_json(cls, {**_UNSAID, **document})
        if problems:
            raise CacheFormatError(
                f"recipe: {'; '.join(problems)}. It was written by another version of vkd-cache: use that one, or "
                "extract anew."
            )
        try:
            return cls(**values)
        except ConfigError as error:
            raise CacheFormatError(str(error)) from error


def _to_json(fields: Recipe | DetectionGeometry) -> dict[str, Any]:
    return {
        field.name: list(value) if isinstance(value := getattr(fields, field.name), tuple) else value
        for field in dataclasses.fields(fields)
    }


def _fields_from_json(cls: type, document: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of a dataclass, and what is wrong with them."""
    hints = typing.get_type_hints(cls)
    problems = [f"missing field '{name}'" for name in hints if name not in document]
    problems += [f"unknown field '{name}'" for name in document if name not in hints]
    values: dict[str, Any] = {}
    for name in hints.keys() & document.keys():
        try:
            values[name] = _from_json_value(document[name], hints[name])
        except TypeError as error:
            problems.append(f"field '{name}': {error}")
    return values, sorted(problems)


def _from_json_value(value: object, hint: Any) -> Any:
    if hint == DetectionGeometry | None:
        return None if value is None else _detection_from_json(value)
    if hint == tuple[int, ...]:
        if not isinstance(value, list):
            raise TypeError(f"found {value!r:.100}, expected a list of whole numbers")
        return tuple(_from_json_value(item, int) for item in value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) > _LARGEST:  # before Python says that it is too large a whole number
            raise TypeError(f"found a number beyond {_LARGEST:g}")
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return value
    if hint is str and isinstance(value, str):
        return value
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise TypeError(f"found {value!r:.100}, expected one of {', '.join(typing.get_args(hint))}")
    if typing.get_origin(hint) is tuple and isinstance(value, list) and len(value) == 2:
        return tuple(_from_json_value(item, float) for item in value)
    expected = hint.__name__ if isinstance(hint, type) else str(hint)
    raise TypeError(f"found {value!r:.100}, expected {'two numbers' if typing.get_origin(hint) is tuple else expected}")


def _detection_from_json(value: object) -> DetectionGeometry:
    if not isinstance(value, Mapping):
        raise TypeError(f"found {value!r:.100}, expected an object")
    values, problems = _fields_from_json(DetectionGeometry, value)
    if problems:
        raise TypeError("; ".join(problems))
    return DetectionGeometry(**values)


def _problems(recipe: Recipe) -> list[str]:
    """Every value that cannot be drawn from, as texts."""
    found = []

    def check(name: str, good: bool, expected: str) -> None:
        if not good:
            found.append(f"{name}: found {getattr(recipe, name)}, expected {expected}")

    check("size_px", 1 <= recipe.size_px <= MAX_SIDE_PX, f"1 to {MAX_SIDE_PX} pixels")
    check("crop_fraction", 0.0 < recipe.crop_fraction <= 1.0, "more than 0 and at most 1")
    for name in ("flip_probability", "op_probability", "erase_probability", "mix_probability", "cutmix_switch"):
        check(name, 0.0 <= getattr(recipe, name) <= 1.0, "a probability")
    for name in ("scale", "erase_area"):
        low, high = getattr(recipe, name)
        check(name, 0.0 < low <= high <= 1.0, "0 < low <= high <= 1")
    for name in ("ratio", "erase_ratio"):
        low, high = getattr(recipe, name)
        check(name, 0.0 < low <= high < math.inf, "0 < low <= high")
    low, high = recipe.blur_radius
    check("blur_radius", 0.0 <= low <= high < math.inf, "0 <= low <= high")
    check("jitter", 0.0 <= recipe.jitter <= 1.0, "0 to 1")
    check("solarise_threshold", 0 <= recipe.solarise_threshold <= 256, "0 to 256")
    check("num_ops", 0 <= recipe.num_ops <= 16, "0 to 16")
    check("magnitude", 0.0 <= recipe.magnitude <= 10.0, "0 to 10")
    check("magnitude_std", 0.0 <= recipe.magnitude_std < math.inf, "a number from 0")
    for name in ("mixup_alpha", "cutmix_alpha"):
        check(name, 0.0 <= getattr(recipe, name) < math.inf, "a number from 0")
    if (recipe.detection is not None) != (recipe.geometry == "detection"):
        found.append(f"geometry: found '{recipe.geometry}', expected 'detection' with sizes and crops, and only there")
    kernel = "bicubic" if recipe.detection is None else "bilinear"
    check("interpolation", recipe.interpolation == kernel, f"{kernel} for this geometry")
    if recipe.detection is not None:
        found += geometry_problems(recipe.detection)
        check("size_px", recipe.size_px == max(recipe.detection.scales, default=0), "the largest of scales")
        check("colour", recipe.colour == "none", "'none': boxes cannot follow colour operations that move pixels")
        check("erase_probability", recipe.erase_probability == 0.0, "0: views with boxes are not erased")
        check("mix_probability", recipe.mix_probability == 0.0, "0: views with boxes are not mixed")
    return found + _fast_problems(recipe)


def _fast_problems(recipe: Recipe) -> list[str]:
    """What the fast path cannot render, as texts."""
    found = []
    kernels = (recipe.resizer, recipe.colour_kernel)
    affine = recipe.fast and recipe.colour != "none"
    expected = ("torch" if recipe.fast else "pillow", "affine" if affine else "pillow")
    if kernels != expected:
        names = "resizer and colour_kernel"
        found.append(f"{names}: found {kernels}, expected {expected} with decoder '{recipe.decoder}' and this colour")
    if recipe.fast and (recipe.colour == "rand_augment" or recipe.erase_probability > 0.0):
        found.append("decoder: found 'simplejpeg', expected 'pillow' with RandAugment or random erasing")
    if recipe.fast and recipe.geometry == "center_crop":
        found.append("decoder: found 'simplejpeg', expected 'pillow' for centre crops")
    if affine and recipe.blur_radius[1] > LARGEST_BLUR:
        found.append(f"blur_radius: found {recipe.blur_radius}, expected at most {LARGEST_BLUR:g} with 'affine'")
    return found


def _detection_recipe(
    name: str, geometry: DetectionGeometry, *, flip_probability: float, fast: bool = False
) -> Recipe:
    return Recipe(
        name=name,
        decoder="simplejpeg" if fast else "pillow",
        resizer="torch" if fast else "pillow",
        geometry="detection",
        size_px=max(geometry.scales, default=1),
        interpolation="bilinear",
        flip_probability=flip_probability,
        detection=geometry,
    )


RECIPES: Mapping[str, Recipe] = types.MappingProxyType(
    {
        "vkd": Recipe(name="vkd", colour="three_augment", mix_probability=1.0),
        "randaugment": Recipe(name="randaugment", colour="rand_augment", erase_probability=0.25, mix_probability=1.0),
        "crop_flip": Recipe(name="crop_flip"),
        "none": Recipe(name="none", geometry="center_crop", flip_probability=0.0),
        "vidt": _detection_recipe("vidt", DetectionGeometry(), flip_probability=0.5),
        "fast": Recipe(
            name="fast",
            decoder="simplejpeg",
            resizer="torch",
            colour="three_augment",
            colour_kernel="affine",
            mix_probability=1.0,
        ),
        "fast_detection": _detection_recipe("fast_detection", DetectionGeometry(), flip_probability=0.5, fast=True),
    }
)


def detection_eval_recipe(size_px: int, max_size_px: int, canvas_multiple_px: int) -> Recipe:
    """The views that a detector is evaluated on: the whole image at one scale, not flipped.

    Args:
        size_px: short side, pixels; 800 in the reference.
        max_size_px: bound of the long side, pixels; 1333 in the reference.
        canvas_multiple_px: sides of a canvas are multiples of this.

    Raises:
        ConfigError: a value that cannot be used.
    """
    geometry = DetectionGeometry(
        scales=(size_px,),
        max_size_px=max_size_px,
        crop_probability=0.0,
        crop_scales=(),
        canvas_multiple_px=canvas_multiple_px,
    )
    return _detection_recipe("vidt_eval", geometry, flip_probability=0.0)


def make_recipe(views: ViewsConfig) -> Recipe:
    """The recipe that a `[views]` section asks for: the preset with the section's sizes, mirroring and mixing.

    A detection preset takes `scales` and what follows it from the section, the others `size_px` and the mixing.

    Raises:
        ConfigError: no preset of that name, or a value that cannot be drawn from.
    """
    preset = RECIPES.get(views.recipe)
    if preset is None:
        raise ConfigError(f"[views] recipe: found '{views.recipe}', expected one of {', '.join(RECIPES)}.")
    probability = preset.mix_probability if views.mix_probability is None else views.mix_probability
    flips = preset.flip_probability if views.flip_probability is None else views.flip_probability
    if preset.detection is not None:
        geometry = DetectionGeometry(
            scales=views.scales,
            max_size_px=views.max_size_px,
            crop_probability=preset.detection.crop_probability if views.crop_scales else 0.0,
            crop_scales=views.crop_scales,
            crop_min_px=views.crop_min_px,
            crop_max_px=views.crop_max_px,
            canvas_multiple_px=views.canvas_multiple_px,
        )
        recipe = _detection_recipe(preset.name, geometry, flip_probability=float(flips), fast=preset.fast)
        return dataclasses.replace(recipe, mix_probability=float(probability))
    return dataclasses.replace(
        preset,
        size_px=views.size_px,
        flip_probability=float(flips),
        mix_probability=float(probability),
        mixup_alpha=float(views.mixup_alpha),
        cutmix_alpha=float(views.cutmix_alpha),
        cutmix_switch=float(views.cutmix_switch),
    )
