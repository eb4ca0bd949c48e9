"""The student in a checkpoint file, built and loaded, classifier or detector: ours, the authors', or a state dict.

A newcomer's trap: our checkpoints hold the configuration they were trained with, and it goes before the caller's: a
student trained at 32 pixels is a 32-pixel student whatever the pipeline says now.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vkd_cache.config import Config, ViewsConfig
from vkd_cache.detection.vidt import VIDT_NAMES
from vkd_cache.errors import CheckpointError, ConfigError
from vkd_cache.students import Student, create_student
from vkd_cache.students.checkpoint import WEIGHT_ENTRIES, load_student_weights, read_torch_file, select_weights
from vkd_cache.weights import CHECKPOINT_FORMAT

if TYPE_CHECKING:
    from vkd_cache.students.detector import DetectionStudent

_CLASSIFIERS = ("head", "fc", "head.fc", "classifier")  # where timm's networks, and the authors', keep theirs


def load_student(
    where: str, config: Config, num_classes: int, *, ema: bool = False
) -> tuple[str, "Student | DetectionStudent"]:
    """The student in the checkpoint `where`, without its projector, and what to call it.

    Args:
        where: the file.
        config: `student.name` and `views.size_px` are used for files that are not our own checkpoints.
        num_classes: of the source; used where neither the checkpoint nor its head's weight says. A detector has the
            classes and optional heads that its file has.
        ema: the weight average instead of the weights.

    Raises:
        ConfigError: nothing says which student it is.
        CheckpointError: the file cannot be read or does not fit the student.
    """
    state = read_torch_file(where)
    wanted, side_px = config.student.name, config.views.size_px
    if state.get("format") == CHECKPOINT_FORMAT:
        found, side_px, num_classes = _own_settings(state, where)
        if wanted and wanted != found:
            raise CheckpointError(f"{where}: holds a '{found}', this run asks for '{wanted}'. Leave --student out.")
        wanted = found
    else:
        num_classes = _classes_in(state) or num_classes
    if not wanted:
        raise ConfigError(
            f"{where}: does not say which student it holds. Give --student, as in deit_ti_distilled or vidt_swin_nano."
        )
    called = f"student {wanted}" + (" (EMA)" if ema else "")
    with torch.random.fork_rng(devices=[]):  # its random initial weights are replaced at once
        if wanted in VIDT_NAMES:
            from vkd_cache.students.detector import saved_detector  # classification does without scipy

            return called, saved_detector(wanted, select_weights(state, ema, where), where)
        student = create_student(wanted, num_classes, input_px=side_px)
    load_student_weights(student, state, ema=ema, where=where)
    return called, student


def trained_sizes(where: str, views: ViewsConfig) -> ViewsConfig:
    """`views` with the sizes of detection views that our own checkpoint `where` was trained with.

    Raises:
        CheckpointError: the file cannot be read.
    """
    state = read_torch_file(where)
    if state.get("format") != CHECKPOINT_FORMAT:
        return views
    saved = state["config"]["views"]
    if "scales" not in saved:  # made before there was detection
        return views
    return dataclasses.replace(
        views,
        scales=tuple(saved["scales"]),
        max_size_px=saved["max_size_px"],
        canvas_multiple_px=saved["canvas_multiple_px"],
    )


def start_student(student: nn.Module, where: str) -> None:
    """Give a new student the weights in the file `where`: a student's, or for a detector also a body's alone.

    Raises:
        CheckpointError: the file cannot be read or does not fit the student.
    """
    state = read_torch_file(where)
    if isinstance(student, Student):
        load_student_weights(student, state, where=where)
        return
    from vkd_cache.students.detector import DetectionStudent, start_detector

    if isinstance(student, DetectionStudent):
        start_detector(student, state, where)


def _own_settings(state: Mapping[str, Any], where: str) -> tuple[str, int, int]:
    """Name, input side and number of classes of the student in one of our checkpoints."""
    try:
        config = state["config"]
        name, side_px, num_classes = config["student"]["name"], config["views"]["size_px"], state["num_classes"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where}: says it is a checkpoint of vkd-cache, but lacks {error}. Was it cut short or edited?"
        ) from error
    return str(name), int(side_px), int(num_classes)


def _classes_in(state: Mapping[str, Any]) -> int:
    """Rows of the head's weight in a foreign checkpoint; 0: not found."""
    weights = next((state[entry] for entry in WEIGHT_ENTRIES if isinstance(state.get(entry), Mapping)), state)
    for name, value in weights.items():
        bare = str(name).removeprefix("module.").removeprefix("net.")
        if bare.removesuffix(".weight") in _CLASSIFIERS and isinstance(value, Tensor):
            return int(value.shape[0])
    return 0
