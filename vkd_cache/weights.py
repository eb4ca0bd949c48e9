"""Weights files: read without running what is inside, unwrapped, and compared with what a network expects.

A newcomer's trap: a suffix says nothing. Safetensors files are known by their first bytes, torch files hold a state
dict under any of several entries, and names carry the prefixes of whatever wrapped the network when it was saved.
"""

import argparse
import mmap
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError  # only the exception of torch's restricted reader; nothing here unpickles
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vkd_cache.errors import CheckpointError, TeacherError
from vkd_cache.runtime import expand_home
from vkd_cache.sealing import seal_problem

CHECKPOINT_FORMAT = "vkd-cache checkpoint"  # what the entry `format` of a training checkpoint of ours says
_UNSEALED_VERSIONS = (1, 2)  # of our checkpoints, which have had a checksum since
WEIGHT_ENTRIES = ("student", "model", "state_dict")
_WRAPPERS = ("module.", "_orig_mod.")  # left by DistributedDataParallel and averages, and by torch.compile
_UPDATE_COUNT = "n_averaged"  # torch's AveragedModel counts its updates among the weights
_DEEPEST = 4  # entries inside entries; a hostile file may nest without end
_MAX_LISTED = 3

_BYTEARRAY = b"\nbytearray\n"  # how a pickle names it

Refusal = type[CheckpointError] | type[TeacherError]
# what torch's reader meets in damaged bytes; it hands files called .safetensors on to that library
# what torch's restricted reader raises on bytes that are no torch file: it parses them as far as they make sense
_DAMAGE = (
    RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, MemoryError, OSError,
    struct.error, zipfile.BadZipFile, SafetensorError,
)


def read_weights_file(path: str | Path, refusal: Refusal) -> dict[str, Any]:
    """A safetensors or torch file as a dictionary, on the CPU, without running any code from it.

    Args:
        path: the file; a leading `~` is the home folder. A torch file may hold, beside tensors, plain values and the
            argparse options that training scripts store.
        refusal: the error to raise.

    Raises:
        CheckpointError, TeacherError: as `refusal` says: missing, neither format, damaged, not a dictionary, or
            holding Python objects that would have to be executed.
    """
    path = Path(expand_home(path))
    try:
        with path.open("rb") as file:
            start = file.read(9)
        problem = seal_problem(path)
    except OSError as error:
        raise refusal(
            f"{path}: cannot be read ({error.strerror or error}), expected a file of weights: safetensors or torch."
        ) from error
    if problem:
        raise refusal(f"{path}: damaged since it was written: {problem}. Use a copy, or another checkpoint of the run.")
    content = _read_safetensors(path, refusal) if start[8:] == b"{" else _read_torch(path, refusal)
    _refuse_phantoms(content, path, refusal)
    if not isinstance(content, Mapping):
        raise refusal(f"{path}: holds a {type(content).__name__}, expected a dictionary of weights by name.")
    ours = content.get("format") == CHECKPOINT_FORMAT and content.get("version") not in _UNSEALED_VERSIONS
    if ours and problem is None:
        raise refusal(f"{path}: a checkpoint of vkd-cache without the checksum at its end: damaged, or cut short.")
    return dict(content)


def innermost(document: Mapping[str, Any], entries: Sequence[str] = WEIGHT_ENTRIES) -> Mapping[str, Any]:
    """What lies under the first of `entries` that is a dictionary, as deep as they nest; `document` where none is."""
    for _ in range(_DEEPEST):
        nested = next((document[entry] for entry in entries if isinstance(document.get(entry), Mapping)), None)
        if nested is None:
            break
        document = nested
    return document


def bare_tensors(weights: Mapping[str, Any], where: str, refusal: Refusal) -> dict[str, Tensor]:
    """The tensors of a state dict, their names without wrappers' prefixes (`module.`, `_orig_mod.`).

    Raises:
        CheckpointError, TeacherError: as `refusal` says: something that is not a tensor, or two entries of one name.
    """
    named: dict[str, Tensor] = {}
    for original, value in weights.items():
        if original == _UPDATE_COUNT:
            continue
        if not isinstance(value, Tensor):
            raise refusal(
                f"{where}: entry '{original}' is a {type(value).__name__}, expected a tensor: a state dict, plain or "
                f"under {', '.join(WEIGHT_ENTRIES)}."
            )
        name = str(original)
        while name.startswith(_WRAPPERS):
            name = name.partition(".")[2]
        if name in named:
            raise refusal(f"{where}: '{original}' names a tensor that another entry names too.")
        named[name] = value
    return named


def misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, optional: str = "") -> list[str]:
    """What keeps `found` from being loaded as `expected`, as short phrases; empty when it fits.

    Args:
        found, expected: tensors by name; only names and shapes are compared.
        optional: names that end so may be missing; "" stands for none.
    """
    missing = [name for name in expected if name not in found and not (optional and name.endswith(optional))]
    unexpected = [name for name in found if name not in expected]
    reshaped = [
        f"{name} (found {tuple(found[name].shape)}, expected {tuple(value.shape)})"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return [f"{len(names)} {kind}: {_shortly(names)}" for kind, names in kinds.items() if names]


def _read_safetensors(path: Path, refusal: Refusal) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise refusal(f"{path}: looks like a safetensors file but cannot be read: {error}.") from error


def _read_torch(path: Path, refusal: Refusal) -> object:
    try:
        _refuse_bombs(path, refusal)
        # a Namespace holds values and runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its remarks on other pickle protocols; what fails is told below
            content: object = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise refusal(
            f"{path}: refused, for it is not a torch file of tensors and plain values ({_reason(error)}). Save its "
            "state dict alone, best as safetensors."
        ) from error
    except _DAMAGE as error:
        raise refusal(
            f"{path}: neither a safetensors nor a torch file, or a damaged one ({_reason(error)}). Copy or make it "
            "again."
        ) from error
    return content


def _refuse_bombs(path: Path, refusal: Refusal) -> None:
    """Look for what would take more memory than the file has bytes while torch reads it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise refusal(
                    f"{path}: its entries are compressed ({_shortly(packed) or 'or overlap'}), as torch never writes "
                    "them. Save it again with torch, best as safetensors."
                )
            pickles = [archive.read(entry) for entry in entries if entry.filename.endswith(".pkl")]
        makes_arrays = any(_BYTEARRAY in content for content in pickles)
    else:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            makes_arrays = content.find(_BYTEARRAY) >= 0
    if makes_arrays:
        raise refusal(f"{path}: asks for a bytearray of any size, which no weights need. Save its state dict alone.")


def _refuse_phantoms(content: object, path: Path, refusal: Refusal) -> None:
    """Refuse tensors whose numbers are not in the file: a few bytes can claim any shape, and networks follow it."""
    file_bytes = path.stat().st_size
    for value in _tensors_within(content):
        plain = value.layout == torch.strided and value.device.type == "cpu"
        plain = plain and not (value.is_quantized or value.is_nested)
        if plain and value.numel() * value.element_size() <= value.untyped_storage().nbytes() <= file_bytes:
            continue
        raise refusal(
            f"{path}: holds a tensor of shape {tuple(value.shape)} whose numbers are not all in the file ({file_bytes} "
            "bytes), or which is not a plain one. Save its state dict again, each tensor contiguous and dense."
        )


def _tensors_within(content: object) -> Iterator[Tensor]:
    """Every tensor in nested dictionaries and lists, which may contain themselves."""
    pending, seen = [content], set[int]()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (Mapping, list, tuple, set, argparse.Namespace)) and id(value) not in seen:
            seen.add(id(value))
            inner = vars(value) if isinstance(value, argparse.Namespace) else value
            pending.extend(inner.values() if isinstance(inner, Mapping) else inner)


def _reason(error: Exception) -> str:
    """The telling sentence of torch's long message, without its advice to load the file unsafely."""
    # what torch's reader stumbled over stands behind its name, on the same line or on the next
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = next((line for line in lines if "GLOBAL" in line), "")
    if not telling:
        telling = next((line for line in lines if "weights_only" not in line and "only load" not in line), "")
    sentence = telling.partition(". ")[0]
    return sentence[:160].rstrip(".") or type(error).__name__


def _shortly(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
