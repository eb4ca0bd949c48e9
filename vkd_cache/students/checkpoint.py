"""Loading weights into a student: ours, the authors' or plain ones, always strictly.

A newcomer would pass `strict=False` to get rid of the projector's entries, and with them of every misspelt name. Here
names are brought to our form first, projector entries are set apart on purpose, and everything else must fit exactly.
"""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vkd_cache.errors import CheckpointError
from vkd_cache.students.student import Student

WEIGHT_ENTRIES = ("student", "model", "state_dict")
EMA_ENTRIES = ("ema", "student_ema", "model_ema", "state_dict_ema")
_SHOWN = 4  # names listed of each kind of mistake


def read_torch_file(path: str | Path) -> dict[str, Any]:
    """A `.safetensors` or torch file as a dictionary, on the CPU, without running any code from it.

    Args:
        path: the file; a torch file may hold, beside tensors, plain values and the argparse options that the authors
            store.

    Raises:
        CheckpointError: missing, not such a file, or holding Python objects that would have to be executed.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, expected a checkpoint (.safetensors or a torch file).")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a torch file, or one with Python objects that loading would execute, expected tensors and "
            "plain values. Save its state dict alone."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({error}). Is it complete?") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dictionary of weights.")
    return dict(content)


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
    named = _canonical_names(_select_weights(state, ema, where), where)
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


def _select_weights(state: Mapping[str, Any], ema: bool, where: str) -> Mapping[str, Any]:
    """The mapping of names to tensors inside a checkpoint."""
    entries = EMA_ENTRIES if ema else WEIGHT_ENTRIES
    for entry in entries:
        nested = state.get(entry)
        if isinstance(nested, Mapping):
            # one level more, for a state dict inside a saved average or wrapper
            return next((nested[inner] for inner in WEIGHT_ENTRIES if isinstance(nested.get(inner), Mapping)), nested)
    if ema:
        raise CheckpointError(
            f"{where}: holds no weight average, expected one of the entries {', '.join(EMA_ENTRIES)}. Evaluate its "
            "weights instead, or train with train.ema_decay."
        )
    if any(isinstance(value, Tensor) for value in state.values()):
        return state
    raise CheckpointError(
        f"{where}: found entries {', '.join(map(str, list(state)[:_SHOWN])) or 'none'}, expected weights by name, or "
        f"one of the entries {', '.join(WEIGHT_ENTRIES)}."
    )


def _canonical_names(weights: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Names as in our state dict: `net.…` and `projector.…`, without wrappers' prefixes."""
    named: dict[str, Tensor] = {}
    for original, value in weights.items():
        if original == "n_averaged":  # torch's AveragedModel counts its updates among the weights
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{where}: entry '{original}' is a {type(value).__name__}, expected a tensor.")
        name = original
        while name.startswith(("module.", "_orig_mod.")):
            name = name.partition(".")[2]
        if not name.startswith(("net.", "projector.")):
            name = f"net.{name}"
        if name in named:
            raise CheckpointError(f"{where}: '{original}' names a tensor that another entry names too.")
        named[name] = value
    return named


def _refuse_misfits(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {tuple(found[name].shape)} and should be {tuple(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    parts = [
        f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if parts:
        raise CheckpointError(
            f"{where}: does not fit the student: {'; '.join(parts)}. Name the student, the number of classes and the "
            "image size it was trained with."
        )
