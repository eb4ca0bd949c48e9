"""Students by name: VkD's own two, and every classification model of timm.

A newcomer would expect pretrained weights: a student comes with random ones, drawn from torch's global generator, so
seed that first. A run may replace them (`[student] weights`).
"""

import difflib
from typing import Any

import timm
from torch import nn

from vkd_cache.detection.vidt import VIDT_NAMES
from vkd_cache.errors import ConfigError
from vkd_cache.students.deit import DEIT_SHAPES, DistilledVisionTransformer
from vkd_cache.students.student import Student


def create_student(
    name: str,
    num_classes: int = 1000,
    teacher_width: int | None = None,
    *,
    input_px: int = 224,
    drop_path: float = 0.0,
    projector: str = "qr",
) -> Student:
    """Build a student with random weights, in training mode.

    Args:
        name: `deit_ti_distilled`, `deit_s_distilled`, or a timm model name.
        num_classes: classes of its head(s).
        teacher_width: width of the teacher's pooled features; None: no projector (training without the feature loss,
            evaluation).
        input_px: side of the images.
        drop_path: stochastic depth rate.
        projector: kind of the orthogonal map: qr, householder, matrix_exp, cayley, linear.

    Raises:
        ConfigError: unknown name, a detector's name, or a combination the model does not take.
    """
    if name in VIDT_NAMES:
        raise ConfigError(f"student: '{name}' is a detector, and the samples have classes, not boxes.")
    if name in DEIT_SHAPES:
        net: nn.Module = DistilledVisionTransformer(
            DEIT_SHAPES[name], num_classes, input_px=input_px, drop_path=drop_path
        )
    else:
        net = _timm_model(name, num_classes, input_px, drop_path)
    return Student(net, teacher_width, input_px=input_px, projector=projector)


def _timm_model(name: str, num_classes: int, input_px: int, drop_path: float) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, [*DEIT_SHAPES, *timm.list_models()], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"student: found '{name}', expected {', '.join(DEIT_SHAPES)} or a timm model name{hint}")
    options: dict[str, Any] = {"num_classes": num_classes}
    if drop_path > 0:
        options["drop_path_rate"] = drop_path
    try:
        try:
            net = timm.create_model(name, pretrained=False, img_size=input_px, **options)
        except TypeError as error:  # convolutional networks take any size and have no such argument
            if "img_size" not in str(error):
                raise
            net = timm.create_model(name, pretrained=False, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"student '{name}': timm cannot build it with {input_px} px images and {options} ({error})."
        ) from error
    if not isinstance(net, nn.Module):
        raise ConfigError(f"student '{name}': timm built a {type(net).__name__}, not a module.")
    keep_both_heads = getattr(net, "set_distilled_training", None)
    if callable(keep_both_heads):
        keep_both_heads(True)  # without it timm averages the two heads in training too
    return net
