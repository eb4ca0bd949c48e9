"""The teacher of a plan: with its own weights where they are at hand, else with random ones, which are as fast.

A newcomer's trap: no stage runs a teacher with random weights, and this is no exception to that rule. The random ones
are written to a temporary file, and loaded from it like any others.
"""

import dataclasses
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from vkd_cache.config import TeacherConfig
from vkd_cache.detection.vidt import VIDT_NAMES, create_vidt
from vkd_cache.errors import TeacherError
from vkd_cache.runtime import expand_home
from vkd_cache.teachers import is_detector, names_code


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsAtHand:
    """Which weights a plan measures with.

    Attributes:
        teacher: the configuration, with a file where there is one, or has to be.
        known: they are those that an extraction would use.
        said: what they are, for people.
    """

    teacher: TeacherConfig
    known: bool
    said: str


def weights_at_hand(teacher: TeacherConfig, num_classes: int, folder: Path) -> WeightsAtHand:
    """The weights that `teacher` names, if they are on this machine; else random ones, written into `folder`.

    Nothing is downloaded.

    Args:
        teacher: as it is configured.
        num_classes: of the source; used where neither the configuration nor the architecture says.
        folder: exists.

    Raises:
        TeacherError: timm does not know the network.
    """
    if teacher.weights and Path(expand_home(teacher.weights)).exists():
        return WeightsAtHand(teacher=teacher, known=True, said="its own")
    if names_code(teacher.name):
        missing = f", without {teacher.weights}, which is not there" if teacher.weights else ""
        own = dataclasses.replace(teacher, weights="")
        return WeightsAtHand(teacher=own, known=not teacher.weights, said=f"those that the callable has{missing}")
    why = f"{teacher.weights} is not there" if teacher.weights else "no --teacher-weights, and nothing is downloaded"
    path = folder / "teacher.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _network(teacher, num_classes)
    safetensors.torch.save_model(net, str(path))
    return WeightsAtHand(
        teacher=dataclasses.replace(teacher, weights=str(path)), known=False, said=f"random ({why})"
    )


def _network(teacher: TeacherConfig, num_classes: int) -> nn.Module:
    if is_detector(teacher.name):
        if teacher.name not in VIDT_NAMES:
            raise TeacherError(
                f"[teacher] name: found '{teacher.name}', expected one of the detectors {', '.join(VIDT_NAMES)}."
            )
        return create_vidt(teacher.name, teacher.num_classes or num_classes)
    classes: dict[str, Any] = {}
    if teacher.num_classes or teacher.weights:
        classes = {"num_classes": teacher.num_classes or num_classes}
    try:
        model: nn.Module = timm.create_model(teacher.name, pretrained=False, **classes)
    except (RuntimeError, ValueError) as error:  # no such network, or no such tag
        raise TeacherError(
            f"[teacher] name: found '{teacher.name}', which timm {timm.__version__} cannot build "
            f"({str(error).splitlines()[0]:.200}). Expected a timm model, or package.module:callable."
        ) from error
    return model
