"""Weights files: read safetensors and torch files without running what is inside, and load them strictly.

A newcomer's trap: the hash of a teacher is that of the *model's* state after loading, not of the file, so that the same
weights as safetensors, as a torch file, nested, prefixed or fetched by timm are the same teacher.
"""

import argparse
import hashlib
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError  # only the exception of torch's restricted reader; nothing here unpickles

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor, nn

from vkd_cache.errors import TeacherError

State = dict[str, Tensor]

OWN_FORMAT = "vkd-cache checkpoint"
_NESTINGS = ("state_dict", "model", "student")
_WRAPPERS = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile
_COUNTERS = "num_batches_tracked"  # of batch norm: never used in evaluation, absent from old files
_MAX_LISTED = 3


def read_weights(path: str) -> State:
    """The tensors of a weights file by parameter name.

    Accepted are safetensors files (known by content, not by suffix) and torch files holding a state dict, plain or
    under `model`, `state_dict` or `student`, with or without `module.` prefixes; of a checkpoint of `vkd-cache train`
    the network is taken and the projector left out.

    Raises:
        TeacherError: no such file, neither format, something else than tensors and plain values inside, no state dict.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TeacherError(f"{path}: cannot read the teacher's weights: {error.strerror or error}.") from error
    document = _parse_safetensors(path, data) if data[8:9] == b"{" else _parse_torch(path)
    if isinstance(document, Mapping) and document.get("format") == OWN_FORMAT:
        student = _as_state(path, document.get("student"))
        return {name.removeprefix("net."): value for name, value in student.items() if name.startswith("net.")}
    while isinstance(document, Mapping):
        nesting = next((key for key in _NESTINGS if isinstance(document.get(key), Mapping)), None)
        if nesting is None:
            break
        document = document[nesting]
    return _as_state(path, document)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load `state` into `model`: every tensor of the model from the file, every tensor of the file into the model.

    Only batch norm's update counters may be missing. `where` names the file in messages.

    Raises:
        TeacherError: names missing, unexpected or of another shape, a few of each and their numbers.
    """
    problems = mismatches(model, state)
    if problems:
        raise TeacherError(
            f"{where}: these weights do not fit the teacher ({type(model).__name__}): {'; '.join(problems)}. Give the "
            "name of the architecture that the file was saved from, and its number of classes and input size."
        )
    own = model.state_dict()
    complete = dict(state) | {name: value for name, value in own.items() if name not in state}
    model.load_state_dict(complete, strict=True)


def mismatches(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What keeps `state` from fitting `model`, as short phrases; empty when it fits."""
    own = model.state_dict()
    missing = [name for name in own if name not in state and not name.endswith(_COUNTERS)]
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} (found {tuple(state[name].shape)}, expected {tuple(value.shape)})"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return [f"{len(names)} {kind}: {_shortly(names)}" for kind, names in kinds.items() if names]


def state_sha256(model: nn.Module) -> str:
    """Hex sha256 over name, dtype, shape and bytes of every tensor of the model's state, in name order."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parse_safetensors(path: str, data: bytes) -> State:
    try:
        return parse_safetensors(data)
    except SafetensorError as error:
        raise TeacherError(f"{path}: looks like a safetensors file but cannot be read: {error}.") from error


def _parse_torch(path: str) -> object:
    # argparse's options lie in most training checkpoints; a Namespace holds values and runs nothing
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its remarks on other pickle protocols; what fails is told below
            document: object = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise TeacherError(
            f"{path}: refused, for it is not a torch file of tensors and plain values ({_reason(error)}). Save its "
            "state dict alone, best as safetensors."
        ) from error
    except (
        RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, OSError, zipfile.BadZipFile
    ) as error:  # what torch's reader meets in damaged bytes
        raise TeacherError(
            f"{path}: neither a safetensors nor a torch file, or a damaged one ({_reason(error)})."
        ) from error
    return document


def _reason(error: Exception) -> str:
    """The telling line of torch's long message, without its advice to load the file unsafely."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "weights_only" not in line] or lines
    return telling[0][:160].rstrip(".") if telling else type(error).__name__


def _as_state(path: str, document: object) -> State:
    if not isinstance(document, Mapping) or not document:
        raise TeacherError(f"{path}: found {type(document).__name__}, expected a state dict (names to tensors).")
    wrong = next((name for name, value in document.items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        raise TeacherError(
            f"{path}: entry '{wrong}' is a {type(document[wrong]).__name__}, expected a tensor: a state dict, plain or "
            f"under {', '.join(_NESTINGS)}."
        )
    state = {str(name): value for name, value in document.items()}
    for wrapper in _WRAPPERS * 2:  # either may be outside the other
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return state


def _shortly(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MAX_LISTED} more" if len(listed) > _MAX_LISTED else ""
    return ", ".join(listed[:_MAX_LISTED]) + more
