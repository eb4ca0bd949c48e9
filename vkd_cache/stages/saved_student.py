"""The student in a checkpoint file, built and loaded, classifier or detector: ours, the authors', or a state dict.

A newcomer's trap: our checkpoints hold the configuration they were trained with, and it goes before the caller's: a
student trained at 32 pixels is a 32-pixel student whatever the pipeline says now.
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vkd_cache.config import MAX_CLASSES, MAX_SIDE_PX, Config, ViewsConfig, load_config
from vkd_cache.detection.vidt import VIDT_NAMES
from vkd_cache.errors import CheckpointError, ConfigError
from vkd_cache.students import Student, create_student
from vkd_cache.students.checkpoint import WEIGHT_ENTRIES, load_student_weights, read_torch_file, select_weights
from vkd_cache.weights import CHECKPOINT_FORMAT

if TYPE_CHECKING:
    from vkd_cache.students.detector import DetectionStudent

_CLASSIFIERS = ("head", "fc", "head.fc", "classifier")  # where timm's networks, and the authors', keep theirs
_TRAINED_SIZES = ("scales", "max_size_px", "canvas_multiple_px")
_FREE_NUMBERS = 2**22  # a student may be this much larger than the file says before anybody minds


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
        _refuse_larger(wanted, num_classes, side_px, select_weights(state, ema, where), where)
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
    saved = state["config"].get("views") if isinstance(state.get("config"), Mapping) else None
    if not isinstance(saved, Mapping) or "scales" not in saved:  # made before there was detection
        return views
    try:
        trained = load_config(overrides={"views": {name: saved.get(name) for name in _TRAINED_SIZES}}).views
    except ConfigError as error:
        raise CheckpointError(f"{where}: holds sizes of views that cannot be used ({error}). Was it edited?") from error
    return dataclasses.replace(views, **{name: getattr(trained, name) for name in _TRAINED_SIZES})


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
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{where}: says it is a checkpoint of vkd-cache, but lacks {error}. Was it cut short or edited?"
        ) from error
    fits = type(name) is str and type(side_px) is int and type(num_classes) is int
    if not fits or not (1 <= side_px <= MAX_SIDE_PX and 1 <= num_classes <= MAX_CLASSES):
        raise CheckpointError(
            f"{where}: says it is a checkpoint of vkd-cache, of a student {reprlib.repr(name)} of {side_px!r:.40} px "
            f"and {num_classes!r:.40} classes, expected at most {MAX_SIDE_PX} px and {MAX_CLASSES} classes. Was it "
            "edited?"
        )
    return name, side_px, num_classes


def _refuse_larger(name: str, num_classes: int, side_px: int, weights: Mapping[str, Any], where: str) -> None:
    """Refuse a student far larger than the weights that are there, before memory is taken for it.

    A file of a few bytes can name any network and any number of classes.
    """
    with torch.device("meta"):  # shapes without numbers
        student = create_student(name, num_classes, input_px=side_px)
    wanted = sum(value.numel() for value in student.state_dict().values())
    found = sum(value.numel() for value in weights.values() if isinstance(value, Tensor))
    if wanted > 2 * found + _FREE_NUMBERS:
        raise CheckpointError(
            f"{where}: does not fit the student: '{name}' with {num_classes} classes at {side_px} px has {wanted} "
            f"weights, the file {found}. Name the student, its classes and the image size it was trained with."
        )


def _classes_in(state: Mapping[str, Any]) -> int:
    """Rows of the head's weight in a foreign checkpoint; 0: not found."""
    weights = next((state[entry] for entry in WEIGHT_ENTRIES if isinstance(state.get(entry), Mapping)), state)
    for name, value in weights.items():
        bare = str(name).removeprefix("module.").removeprefix("net.")
        if bare.removesuffix(".weight") in _CLASSIFIERS and isinstance(value, Tensor) and value.numel():
            return len(value) if value.ndim else 0
    return 0
