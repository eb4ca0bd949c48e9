"""Loading weights into a student: ours, the authors' or plain ones, always strictly.

A newcomer would pass `strict=False` to get rid of the projector's entries, and with them of every misspelt name. Here
names are brought to our form first, projector entries are set apart on purpose, and everything else must fit exactly.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vkd_cache.errors import CheckpointError
from vkd_cache.students.student import Student
from vkd_cache.weights import WEIGHT_ENTRIES, bare_tensors, innermost, misfits, read_weights_file

__all__ = ["EMA_ENTRIES", "WEIGHT_ENTRIES", "load_student_weights", "read_torch_file", "select_weights"]

EMA_ENTRIES = ("ema", "student_ema", "model_ema", "state_dict_ema")
_SHOWN = 4  # entries listed of a file without weights


def read_torch_file(path: str | Path) -> dict[str, Any]:
    """A `.safetensors` or torch file as a dictionary, without running code; see `vkd_cache.weights.read_weights_file`.

    Raises:
        CheckpointError: missing, not such a file, or holding Python objects that would have to be executed.
    """
    return read_weights_file(path, CheckpointError)


def load_student_weights(
    student: Student, state: Mapping[str, Any], *, ema: bool = False, where: str = "checkpoint"
) -> tuple[str, ...]:
    """Load weights strictly into a student's network, and into its projector where the kinds agree.

    Args:
        student: built with the same name, classes and input size as the one that was saved.
        state: our checkpoint, the authors', or a plain state dict: nested under `student`, `model` or `state_dict` or
            not, with `module.` and `net.` prefixes or not, with the projector's entries or not.
        ema: take the weight average that the checkpoint holds instead of the weights.
        where: what to call it in an error, normally its path.

    Returns:
        Names of projector entries that were left aside: the student has no projector, or another kind or width. A
        projector for which nothing fits keeps the weights it has. torch's three maps share names and shapes, so that
        entries of one are taken by another.

    Raises:
        CheckpointError: no weights in it, no average where one is asked for, or missing, unexpected or misshapen names.
    """
    named = _canonical_names(select_weights(state, ema, where), where)
    network = {name: value for name, value in named.items() if not name.startswith("projector.")}
    projector = {name: value for name, value in named.items() if name.startswith("projector.")}
    own = student.state_dict()
    expected_projector = {name: value for name, value in own.items() if name.startswith("projector.")}
    fits = projector.keys() == expected_projector.keys() and all(
        projector[name].shape == value.shape for name, value in expected_projector.items()
    )
    expected_network = {name: value for name, value in own.items() if name not in expected_projector}
    _refuse_misfits(network, expected_network, where)
    chosen = network | (projector if fits else expected_projector)
    student.load_state_dict(chosen, strict=True)
    return () if fits else tuple(projector)


def select_weights(state: Mapping[str, Any], ema: bool, where: str) -> Mapping[str, Any]:
    """The mapping of names to tensors inside a checkpoint: its weights, or their average.

    Raises:
        CheckpointError: there is none.
    """
    if ema:
        average = next((state[entry] for entry in EMA_ENTRIES if isinstance(state.get(entry), Mapping)), None)
        if average is None:
            raise CheckpointError(
                f"{where}: holds no weight average, expected one of the entries {', '.join(EMA_ENTRIES)}. Evaluate its "
                "weights instead, or train with train.ema_decay."
            )
        return innermost(average)
    weights = innermost(state)
    if weights is state and not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{where}: found entries {', '.join(map(str, list(state)[:_SHOWN])) or 'none'}, expected weights by name, "
            f"or one of the entries {', '.join(WEIGHT_ENTRIES)}."
        )
    return weights


def _canonical_names(weights: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Names as in our state dict: `net.…` and `projector.…`, without wrappers' prefixes."""
    named: dict[str, Tensor] = {}
    for bare, value in bare_tensors(weights, where, CheckpointError).items():
        name = bare if bare.startswith(("net.", "projector.")) else f"net.{bare}"
        if name in named:
            raise CheckpointError(f"{where}: '{bare}' names a tensor that another entry names too.")
        named[name] = value
    return named


def _refuse_misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    problems = misfits(found, expected)
    if problems:
        raise CheckpointError(
            f"{where}: does not fit the student: {'; '.join(problems)}. Name the student, the number of classes and "
            "the image size it was trained with."
        )
