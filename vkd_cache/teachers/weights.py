"""A teacher's weights: the network's part of a weights file, loaded strictly, and the hash that names it.

A newcomer's trap: the hash of a teacher is that of the *model's* state after loading, not of the file, so that the same
weights as safetensors, as a torch file, nested, prefixed or fetched by timm are the same teacher.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vkd_cache.errors import TeacherError
from vkd_cache.weights import CHECKPOINT_FORMAT, bare_tensors, innermost, misfits, read_weights_file

State = dict[str, Tensor]

_NETWORK = "net."  # where a student keeps the network; its projector lies beside it
_COUNTERS = "num_batches_tracked"  # of batch norm: never used in evaluation, absent from old files


def read_weights(path: str) -> State:
    """The tensors of a weights file by parameter name.

    Accepted are safetensors files (known by content, not by suffix) and torch files holding a state dict, plain or
    under `student`, `model` or `state_dict`, with or without `module.` prefixes; of a checkpoint of `vkd-cache train`
    the network is taken and the projector left out.

    Raises:
        TeacherError: no such file, neither format, something else than tensors and plain values inside, no weights.
    """
    document = read_weights_file(path, TeacherError)
    state = bare_tensors(innermost(document), path, TeacherError)
    if document.get("format") == CHECKPOINT_FORMAT:
        state = {name.removeprefix(_NETWORK): value for name, value in state.items() if name.startswith(_NETWORK)}
    if not state:
        raise TeacherError(f"{path}: holds no weights, expected a state dict (names to tensors).")
    return state


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
    return misfits(state, model.state_dict(), optional=_COUNTERS)


def state_sha256(model: nn.Module) -> str:
    """Hex sha256 over name, dtype, shape and bytes of every tensor of the model's state, in name order."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
