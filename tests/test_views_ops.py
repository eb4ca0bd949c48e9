"""Operations: pixel for pixel those of timm and torchvision with the same resolved arguments."""

from collections.abc import Callable

import numpy as np
import pytest
import timm.data.auto_augment as theirs
import torchvision.transforms.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps

from vkd_cache.views import ops
from vkd_cache.views.ops import OP_NAMES, apply_op

timm_arguments = {"fillcolor": ops.FILL, "resample": Image.Resampling.BICUBIC}


def timm(function: Callable[..., Image.Image], whole: bool = False) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, value: function(image, int(value) if whole else value, **timm_arguments)


def unary(function: Callable[..., Image.Image]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, _: function(image)


CASES: list[tuple[int, list[float], Callable[[Image.Image, float], Image.Image]]] = [
    (ops.GREY, [0.0], lambda image, _: functional.to_grayscale(image, 3)),
    (ops.SOLARISE, [128.0], lambda image, value: ImageOps.solarize(image, int(value))),
    (ops.SOLARISE, [0.0, 26.0, 256.0], timm(theirs.solarize, whole=True)),
    (ops.GAUSSIAN_BLUR, [0.1, 0.77, 2.0], lambda image, value: image.filter(ImageFilter.GaussianBlur(radius=value))),
    (ops.BRIGHTNESS, [0.7, 1.0, 1.3], functional.adjust_brightness),
    (ops.CONTRAST, [0.7, 1.0, 1.3], functional.adjust_contrast),
    (ops.SATURATION, [0.7, 1.0, 1.3], functional.adjust_saturation),
    (ops.BRIGHTNESS, [0.1, 1.81], timm(theirs.brightness)),
    (ops.CONTRAST, [0.1, 1.81], timm(theirs.contrast)),
    (ops.SATURATION, [0.1, 1.81], timm(theirs.color)),
    (ops.SHARPNESS, [0.1, 1.81], timm(theirs.sharpness)),
    (ops.AUTO_CONTRAST, [0.0], unary(theirs.auto_contrast)),
    (ops.EQUALISE, [0.0], unary(theirs.equalize)),
    (ops.INVERT, [0.0], unary(theirs.invert)),
    (ops.ROTATE, [-30.0, 0.0, 27.3], timm(theirs.rotate)),
    (ops.POSTERISE, [1.0, 2.0, 4.0, 8.0], timm(theirs.posterize, whole=True)),
    (ops.SOLARISE_ADD, [0.0, 99.0, 110.0], timm(theirs.solarize_add, whole=True)),
    (ops.SHEAR_X, [-0.3, 0.27], timm(theirs.shear_x)),
    (ops.SHEAR_Y, [-0.3, 0.27], timm(theirs.shear_y)),
    (ops.TRANSLATE_X, [-0.45, 0.405], timm(theirs.translate_x_rel)),
    (ops.TRANSLATE_Y, [-0.45, 0.405], timm(theirs.translate_y_rel)),
]


@pytest.mark.parametrize(("op_id", "values", "reference"), CASES, ids=[OP_NAMES[case[0]] for case in CASES])
def test_an_operation_equals_the_reference(
    op_id: int, values: list[float], reference: Callable[[Image.Image, float], Image.Image]
) -> None:
    for value in np.float32(values).tolist():
        for image in (photo(61, 45), Image.new("RGB", (16, 16), (7, 200, 90))):
            assert np.array_equal(np.asarray(apply_op(image, op_id, value)), np.asarray(reference(image, value)))


def test_every_operation_is_compared() -> None:
    assert {op_id for op_id, _, _ in CASES} == set(OP_NAMES)


def test_posterising_to_no_bits_is_black() -> None:
    assert not np.asarray(apply_op(photo(9, 9), ops.POSTERISE, 0.0)).any()


def test_numbers_are_part_of_the_format() -> None:
    assert {name: number for number, name in OP_NAMES.items()} == {
        "grey": 1,
        "solarise": 2,
        "gaussian_blur": 3,
        "brightness": 4,
        "contrast": 5,
        "saturation": 6,
        "sharpness": 7,
        "auto_contrast": 8,
        "equalise": 9,
        "invert": 10,
        "rotate": 11,
        "posterise": 12,
        "solarise_add": 13,
        "shear_x": 14,
        "shear_y": 15,
        "translate_x": 16,
        "translate_y": 17,
    }


def test_an_unknown_number_is_refused() -> None:
    with pytest.raises(ValueError, match="found number 99, expected 1 to 17"):
        apply_op(photo(8, 8), 99, 0.0)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(OP_NAMES)), st.integers(1, 9), st.integers(1, 9), st.floats(0.0, 8.0, width=32))
def test_any_operation_takes_any_size(op_id: int, width: int, height: int, value: float) -> None:
    result = apply_op(photo(width, height), op_id, value)
    assert (result.size, result.mode) == ((width, height), "RGB")


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours with some noise, as in a photograph."""
    generator = np.random.default_rng(width * 1000 + height)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    noisy = np.clip(smooth + generator.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy)
