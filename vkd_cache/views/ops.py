"""Colour and shape operations on a view, by stable number.

A newcomer's trap: the numbers are part of the cache format. Never renumber or reuse one; add at the end. The value of
an operation is final (degrees, factor, bits, ...): signs, magnitudes and probabilities were resolved when planning.

Source: RandAugment's operations behave as timm's `auto_augment` with bicubic resampling and the ImageNet mean as fill,
three-augment's as torchvision's on PIL images (tests compare pixel for pixel). Deviation: `POSTERISE` keeps its old
meaning at 0 bits (a black image), where Pillow 13 raises an error and timm with it.
"""

from collections.abc import Callable, Mapping

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

GREY = 1
SOLARISE = 2
GAUSSIAN_BLUR = 3
BRIGHTNESS = 4
CONTRAST = 5
SATURATION = 6
SHARPNESS = 7
AUTO_CONTRAST = 8
EQUALISE = 9
INVERT = 10
ROTATE = 11
POSTERISE = 12
SOLARISE_ADD = 13
SHEAR_X = 14
SHEAR_Y = 15
TRANSLATE_X = 16
TRANSLATE_Y = 17

FILL = (124, 116, 104)  # ImageNet mean, for what a rotation, shear or translation uncovers
_SOLARISE_ADD_BELOW = 128


def _grey(image: Image.Image, _: float) -> Image.Image:
    return image.convert("L").convert("RGB")


def _posterise(image: Image.Image, bits: float) -> Image.Image:
    mask = 0xFF00 >> int(bits) & 0xFF
    return image.point([level & mask for level in range(256)] * 3)


def _solarise_add(image: Image.Image, add: float) -> Image.Image:
    table = [min(255, level + int(add)) if level < _SOLARISE_ADD_BELOW else level for level in range(256)]
    return image.point(table * 3)


def _affine(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=FILL
    )


_OPERATIONS: Mapping[int, Callable[[Image.Image, float], Image.Image]] = {
    GREY: _grey,
    SOLARISE: lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    GAUSSIAN_BLUR: lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
    BRIGHTNESS: lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    CONTRAST: lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    SATURATION: lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    SHARPNESS: lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    AUTO_CONTRAST: lambda image, _: ImageOps.autocontrast(image),
    EQUALISE: lambda image, _: ImageOps.equalize(image),
    INVERT: lambda image, _: ImageOps.invert(image),
    ROTATE: lambda image, degrees: image.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=FILL),
    POSTERISE: _posterise,
    SOLARISE_ADD: _solarise_add,
    SHEAR_X: lambda image, factor: _affine(image, (1, factor, 0, 0, 1, 0)),
    SHEAR_Y: lambda image, factor: _affine(image, (1, 0, 0, factor, 1, 0)),
    TRANSLATE_X: lambda image, share: _affine(image, (1, 0, share * image.width, 0, 1, 0)),
    TRANSLATE_Y: lambda image, share: _affine(image, (1, 0, 0, 0, 1, share * image.height)),
}

OP_NAMES: Mapping[int, str] = {
    GREY: "grey",
    SOLARISE: "solarise",
    GAUSSIAN_BLUR: "gaussian_blur",
    BRIGHTNESS: "brightness",
    CONTRAST: "contrast",
    SATURATION: "saturation",
    SHARPNESS: "sharpness",
    AUTO_CONTRAST: "auto_contrast",
    EQUALISE: "equalise",
    INVERT: "invert",
    ROTATE: "rotate",
    POSTERISE: "posterise",
    SOLARISE_ADD: "solarise_add",
    SHEAR_X: "shear_x",
    SHEAR_Y: "shear_y",
    TRANSLATE_X: "translate_x",
    TRANSLATE_Y: "translate_y",
}


def apply_op(image: Image.Image, op_id: int, value: float) -> Image.Image:
    """Apply one operation.

    Args:
        image: RGB.
        op_id: one of this module's numbers.
        value: its argument: threshold 0-256 (solarise), radius in pixels (blur), factor with 1 for no change
            (brightness, contrast, saturation, sharpness), degrees counter-clockwise (rotate), bits kept 0-8
            (posterise), levels added below 128 (solarise_add), slope (shear), share of the side (translate);
            unused by grey, auto_contrast, equalise and invert.

    Returns:
        RGB image of the same size.

    Raises:
        ValueError: the number is not known.
    """
    operation = _OPERATIONS.get(op_id)
    if operation is None:
        raise ValueError(f"operation: found number {op_id}, expected 1 to {max(_OPERATIONS)}. Update vkd-cache.")
    return operation(image, value)
