"""The plan: from (recipe, cache seed, key, view) to resolved view params.

A newcomer's trap: nothing here looks at pixels. Only the size of the source image enters, because a crop is stored in
whole source pixels. Draws are taken in a fixed order (crop, flip, colour, erasing), which is part of the format.
"""

import functools
import math
import struct

from vkd_cache.views import ops
from vkd_cache.views.draws import Draws, view_seed
from vkd_cache.views.params import ViewParams
from vkd_cache.views.plan_detection import detection_crop
from vkd_cache.views.recipe import Recipe
from vkd_cache.views.sizes import canvas_of

_CROP_TRIES = 10
_ERASE_TRIES = 10
_MAX_LEVEL = 10.0  # RandAugment's magnitude scale
_MIN_FACTOR = 0.1  # of brightness, contrast, saturation and sharpness under RandAugment
_FLOAT32 = struct.Struct("<f")
_NO_ERASE = (0, 0, 0, 0)
_JITTER_ORDERS = (
    (ops.BRIGHTNESS, ops.CONTRAST, ops.SATURATION),
    (ops.BRIGHTNESS, ops.SATURATION, ops.CONTRAST),
    (ops.CONTRAST, ops.BRIGHTNESS, ops.SATURATION),
    (ops.CONTRAST, ops.SATURATION, ops.BRIGHTNESS),
    (ops.SATURATION, ops.BRIGHTNESS, ops.CONTRAST),
    (ops.SATURATION, ops.CONTRAST, ops.BRIGHTNESS),
)
_RAND_AUGMENT = (
    ops.AUTO_CONTRAST,
    ops.EQUALISE,
    ops.INVERT,
    ops.ROTATE,
    ops.POSTERISE,
    ops.SOLARISE,
    ops.SOLARISE_ADD,
    ops.SATURATION,
    ops.CONTRAST,
    ops.BRIGHTNESS,
    ops.SHARPNESS,
    ops.SHEAR_X,
    ops.SHEAR_Y,
    ops.TRANSLATE_X,
    ops.TRANSLATE_Y,
)
_SIGNED_RANGE = {  # value at magnitude 10; the sign is a coin
    ops.ROTATE: 30.0,
    ops.SHEAR_X: 0.3,
    ops.SHEAR_Y: 0.3,
    ops.TRANSLATE_X: 0.45,
    ops.TRANSLATE_Y: 0.45,
}
_ENHANCE = frozenset((ops.SATURATION, ops.CONTRAST, ops.BRIGHTNESS, ops.SHARPNESS))


def plan_view(recipe: Recipe, seed: int, key: str, view: int, *, width_px: int, height_px: int) -> ViewParams:
    """Resolve one view of one sample.

    Args:
        recipe: what to draw from.
        seed: cache seed, in [0, 2**64).
        key: the sample's key.
        view: number of the view, from 0.
        width_px: width of the decoded source image, oriented except for detection.
        height_px: its height.

    Returns:
        Params whose values are exact at the precision of the cache's columns.

    Raises:
        ValueError: the image is empty.
    """
    if width_px < 1 or height_px < 1:
        raise ValueError(f"{key}: found an image of {width_px} x {height_px} pixels, expected at least 1 x 1.")
    stream = view_seed(seed, key, view)
    draws = Draws(stream)
    view_size = (0, 0)
    if recipe.detection is not None:
        crop, view_size = detection_crop(draws, recipe.detection, width_px, height_px)
    elif recipe.geometry == "random_resized_crop":
        crop = _random_crop(draws, recipe, width_px, height_px)
    else:
        crop = (0, 0, height_px, width_px)
    flip = recipe.flip_probability > 0.0 and draws.uniform() < recipe.flip_probability
    operations: tuple[tuple[int, float], ...] = ()
    if recipe.colour == "three_augment":
        operations = _three_augment(draws, recipe)
    elif recipe.colour == "rand_augment":
        operations = _rand_augment(draws, recipe)
    erase = _NO_ERASE
    if recipe.erase_probability > 0.0 and draws.uniform() < recipe.erase_probability:
        erase = _erase_box(draws, recipe)
    return ViewParams(
        seed=stream,
        source_size=(width_px, height_px),
        crop=crop,
        flip=flip,
        ops=operations,
        erase=erase,
        view_size=view_size,
    )


def plan_canvas(
    recipe: Recipe, seed: int, key: str, view: int, *, width_px: int, height_px: int
) -> tuple[int, int]:
    """The canvas (height, width), pixels, that one view of one sample lies on; arguments as in `plan_view`.

    Raises:
        ValueError: the image is empty, or the views of the recipe have no canvas: it is not one for detection.
    """
    if recipe.detection is None:
        raise ValueError(f"{key}: found the recipe '{recipe.name}', expected one for detection.")
    params = plan_view(recipe, seed, key, view, width_px=width_px, height_px=height_px)
    return canvas_of(params.view_size, recipe.detection.canvas_multiple_px)


def _random_crop(draws: Draws, recipe: Recipe, width_px: int, height_px: int) -> tuple[int, int, int, int]:
    """(top, left, height, width): area and log-ratio uniform, ten tries, else the largest centred allowed crop.

    Source: torchvision's RandomResizedCrop, the same distribution from our own draws.
    """
    area_px = width_px * height_px
    low, high = recipe.scale
    log_low, log_high = _log_range(recipe.ratio)
    for _ in range(_CROP_TRIES):
        target_px = area_px * (low + (high - low) * draws.uniform())
        ratio = math.exp(log_low + (log_high - log_low) * draws.uniform())
        width = round(math.sqrt(target_px * ratio))
        height = round(math.sqrt(target_px / ratio))
        if 0 < width <= width_px and 0 < height <= height_px:
            top = draws.integer(0, height_px - height + 1)
            return top, draws.integer(0, width_px - width + 1), height, width
    width, height = width_px, height_px
    if width_px < recipe.ratio[0] * height_px:
        height = max(1, min(height_px, round(width_px / recipe.ratio[0])))
    elif width_px > recipe.ratio[1] * height_px:
        width = max(1, min(width_px, round(height_px * recipe.ratio[1])))
    return (height_px - height) // 2, (width_px - width) // 2, height, width


def _three_augment(draws: Draws, recipe: Recipe) -> tuple[tuple[int, float], ...]:
    """One of grey, solarise and blur, then the three jitters in random order.

    Source: 3-Augment of DeiT III (arXiv 2204.07118), as VkD uses it.
    """
    choice = draws.integer(0, 3)
    if choice == 0:
        first = (ops.GREY, 0.0)
    elif choice == 1:
        first = (ops.SOLARISE, float(recipe.solarise_threshold))
    else:
        low, high = recipe.blur_radius
        first = (ops.GAUSSIAN_BLUR, _float32(low + (high - low) * draws.uniform()))
    one, two, three = _JITTER_ORDERS[draws.integer(0, 6)]
    low, span = 1.0 - recipe.jitter, 2.0 * recipe.jitter
    return (
        first,
        (one, _float32(low + span * draws.uniform())),
        (two, _float32(low + span * draws.uniform())),
        (three, _float32(low + span * draws.uniform())),
    )


def _rand_augment(draws: Draws, recipe: Recipe) -> tuple[tuple[int, float], ...]:
    """Operations chosen with replacement, each applied or not; only those that are applied are returned.

    Source: timm's `rand-m9-mstd0.5-inc1` (RandAugment, arXiv 1909.13719).
    """
    chosen = [_RAND_AUGMENT[draws.integer(0, len(_RAND_AUGMENT))] for _ in range(recipe.num_ops)]
    return tuple(
        (op, _float32(_rand_augment_value(draws, op, recipe)))
        for op in chosen
        if draws.uniform() < recipe.op_probability
    )


def _rand_augment_value(draws: Draws, op: int, recipe: Recipe) -> float:
    """The argument of one operation, from a magnitude drawn for it and, where it has one, a sign."""
    magnitude = recipe.magnitude
    if recipe.magnitude_std > 0.0:
        magnitude = draws.normal(magnitude, recipe.magnitude_std)
    level = max(0.0, min(magnitude, _MAX_LEVEL)) / _MAX_LEVEL
    if op in _SIGNED_RANGE:
        return _signed(draws, level * _SIGNED_RANGE[op])
    if op in _ENHANCE:
        return max(_MIN_FACTOR, 1.0 + _signed(draws, level * 0.9))
    if op == ops.POSTERISE:
        return 4.0 - int(level * 4)
    if op == ops.SOLARISE:
        return 256.0 - min(256, int(level * 256))
    if op == ops.SOLARISE_ADD:
        return float(min(128, int(level * 110)))
    return 0.0


def _erase_box(draws: Draws, recipe: Recipe) -> tuple[int, int, int, int]:
    """(top, left, height, width) in view pixels; nothing when ten tries do not fit.

    Source: Random Erasing (arXiv 1708.04896) with timm's geometry.
    """
    size = recipe.size_px
    low, high = recipe.erase_area
    log_low, log_high = _log_range(recipe.erase_ratio)
    for _ in range(_ERASE_TRIES):
        target_px = size * size * (low + (high - low) * draws.uniform())
        ratio = math.exp(log_low + (log_high - log_low) * draws.uniform())
        height = round(math.sqrt(target_px * ratio))
        width = round(math.sqrt(target_px / ratio))
        if 0 < height < size and 0 < width < size:
            top = draws.integer(0, size - height + 1)
            return top, draws.integer(0, size - width + 1), height, width
    return _NO_ERASE


def _signed(draws: Draws, value: float) -> float:
    return -value if draws.uniform() < 0.5 else value


@functools.lru_cache(maxsize=64)
def _log_range(ratio: tuple[float, float]) -> tuple[float, float]:
    return math.log(ratio[0]), math.log(ratio[1])


def _float32(value: float) -> float:
    """`value` at the precision of the `op_value` column, so that planned and replayed params are equal."""
    rounded: float = _FLOAT32.unpack(_FLOAT32.pack(value))[0]
    return rounded
