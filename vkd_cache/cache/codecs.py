"""Node values as stored arrays and back: float32, float16, bfloat16, codecs of 8 and 4 bits; and which one is chosen.

A newcomer's trap: layout `tokens` is ragged and has more arrays than one per codec; see `token_codecs`.

Shape legend: n samples, C channels, H, W positions.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.cache.arrays import Array
from vkd_cache.cache.rounding import (
    CODEC_ARRAYS,
    FLOATS,
    as_array,
    as_tensor,
    finite,
    half_step,
    token_int8,
    with_passed,
)
from vkd_cache.cache.schema import BY_VALUE, UNIT_SCALED, NodeSpec
from vkd_cache.cache.sqrt_codecs import encode_sqrt, sqrt_bound, stored_channels, unpacked_levels
from vkd_cache.cache.token_codecs import choose_token_codec, token_arrays
from vkd_cache.errors import CacheError
from vkd_cache.stored_rows import StoredRows
from vkd_cache.tokens import Tokens


def stored_arrays(spec: NodeSpec) -> dict[str, str]:
    """Suffix -> dtype of the stored arrays of a node."""
    return token_arrays(spec) if spec.layout == "tokens" else CODEC_ARRAYS[spec.codec]


def array_shapes(spec: NodeSpec, num_samples: int) -> dict[str, tuple[int, ...]]:
    """Shape of each stored array of a dense node, by suffix, for a unit of `num_samples` rows."""
    shapes = {"": (num_samples, stored_channels(spec.codec, spec.shape[0]), *spec.shape[1:])}
    if spec.codec in UNIT_SCALED:
        shapes[".scale"] = spec.shape[:1]
    if spec.codec == "token_int8":
        shapes[".scale"] = (num_samples, 1, *spec.shape[1:])
    return shapes


def encode_node(values: torch.Tensor, codec: str) -> dict[str, Array]:
    """The arrays to store for a node.

    Args:
        values: (n, C) or (n, C, H, W), any floating dtype, finite; not negative for UNIT_SCALED.
        codec: one of `vkd_cache.cache.schema.CODECS`.

    Returns:
        Array by suffix, see CODEC_ARRAYS.

    Raises:
        CacheError: a value that the codec cannot hold, with the first such sample.
    """
    values = values.detach().to("cpu")
    if codec not in FLOATS and values.dtype == torch.float64:
        values = finite(values.to(torch.float32), values, "float32")
    if codec in UNIT_SCALED:
        return encode_sqrt(finite(values, values, codec), codec)
    if codec == "token_int8":
        stored, scale = token_int8(finite(values, values, codec))
        return {"": as_array(stored), ".scale": as_array(scale)}
    return {"": as_array(finite(values.to(FLOATS[codec]), values, codec))}


def decode_node(
    spec: NodeSpec, arrays: Mapping[str, Array], rows: npt.NDArray[np.integer] | slice | None = None
) -> torch.Tensor:
    """The values of a node: the inverse of `encode_node`.

    Args:
        spec: the node.
        arrays: its stored arrays by suffix.
        rows: which rows of the unit; None: all.

    Returns:
        (n, C) or (n, C, H, W): float16 and bfloat16 stay what they are, everything else is float32.
    """
    return stored_rows(spec, arrays, rows).dense()


def stored_rows(
    spec: NodeSpec, arrays: Mapping[str, Array], rows: npt.NDArray[np.integer] | slice | None = None
) -> StoredRows:
    """The values of a node as they are stored; arguments as for `decode_node`."""
    chosen = slice(None) if rows is None else rows
    stored = as_tensor(arrays[""][chosen], spec.codec)
    if spec.codec == "sqrt_uint4":  # from here on one in a byte, like those of 8 bits
        stored = unpacked_levels(stored, spec.shape[0])
    if spec.codec in UNIT_SCALED:
        return StoredRows(values=stored, scale=as_tensor(arrays[".scale"])[None])
    if spec.codec == "token_int8":
        return StoredRows(values=stored, scale=as_tensor(arrays[".scale"][chosen]))
    return StoredRows(values=stored)


def rounding_bound(
    spec: NodeSpec, arrays: Mapping[str, Array], rows: npt.NDArray[np.integer] | slice | None = None
) -> torch.Tensor:
    """How far each stored value may be from the one that was encoded; arguments and shape as for `decode_node`."""
    values = decode_node(spec, arrays, rows).to(torch.float32)
    if spec.codec == "token_int8":
        scale = as_tensor(arrays[".scale"][slice(None) if rows is None else rows])
        bound = (0.5 * scale).expand(values.shape)
    elif spec.codec in UNIT_SCALED:
        bound = sqrt_bound(values, as_tensor(arrays[".scale"]))
    else:
        bound = half_step(values, spec.codec)
    largest = None
    if not set(UNIT_SCALED).isdisjoint(spec.passed) and len(arrays[""]):
        whole = decode_node(spec, arrays).to(torch.float32)
        largest = whole.amax([axis for axis in range(whole.ndim) if axis != 1], keepdim=True)
    return with_passed(bound, values, spec.passed, largest)


def resolve_codec(
    name: str,
    dtype: str,
    values: torch.Tensor | Tokens,
    head: Mapping[str, torch.Tensor] | None = None,
    fraction: float = 1.0,
) -> NodeSpec:
    """The node as it will be stored: its shape and layout read off `values`, its codec decided.

    Args:
        name: the node's name; `logits` are recognised by it.
        dtype: what the user asked for, one of `vkd_cache.cache.schema.DTYPES`.
        values: (n, C) or (n, C, H, W) of the first samples of the first unit, n > 0; or their tokens, all of them or
            a sample.
        head: `weight` (K, C) and `bias` (K,) that turn this node into logits, where there is such a head.
        fraction: of each image's tokens that will be stored, in (0, 1].

    Raises:
        CacheError: values that are not finite.
    """
    measured: dict[str, float] = {}
    codec = {"int8": "token_int8"}.get(dtype, dtype)
    if isinstance(values, Tokens):
        if dtype == "auto":
            codec, measured = choose_token_codec(values)
        elif dtype in BY_VALUE:
            codec = "token_int8"  # tokens are signed
        return NodeSpec(
            name=name,
            layout="tokens",
            shape=tuple(values.values.shape[1:]),
            dtype=dtype,
            codec=codec,
            tokens=fraction,
            measured=measured,
        )
    layout = "feature_map" if values.ndim == 4 else "logits" if name == "logits" else "pooled"
    if dtype == "auto":
        codec, measured = choose_codec(name, values, head)
    elif dtype in BY_VALUE:
        codec = _smallest_codec(name, values, "sqrt_uint4" if dtype == "uint4" else "sqrt_uint8")
    if dtype == "uint4":
        measured = effects_of(codec, name, finite(values.detach().to("cpu", torch.float32), values, "float32"), head)
    return NodeSpec(
        name=name, layout=layout, shape=tuple(values.shape[1:]), dtype=dtype, codec=codec, measured=measured
    )


def choose_codec(
    name: str, values: torch.Tensor, head: Mapping[str, torch.Tensor] | None = None
) -> tuple[str, dict[str, float]]:
    """The smallest codec that training cannot tell from float32, by measurement on `values`.

    Returns:
        The codec, and what was measured of it: `layer_norm_error`, `feature_loss_change` and, with a head or for
        logits, `logit_loss_change`, all relative and rounded to three digits.

    Raises:
        CacheError: values that are not finite.
    """
    exact = finite(values.detach().to("cpu", torch.float32), values, "float32")
    measured: dict[str, float] = {}
    for codec in (_smallest_codec(name, exact, "sqrt_uint8"), "float16"):
        try:
            measured = effects_of(codec, name, exact, head)
        except CacheError:
            continue  # float16 that would overflow
        within = {effect: value <= _LIMITS[effect] for effect, value in measured.items()}
        if all(within.values()):
            return codec, measured
    return "float32", dict.fromkeys(measured, 0.0)


_MEASURED_SAMPLES = 256  # enough for a stable loss effect, and seconds on a CPU
_MEASURED_TOKENS = 2**17  # the same for tokens of all nodes: about ten images at 800 px


def enough_to_measure(num_samples: int, num_tokens: int) -> bool:
    """Whether codecs can be decided on so many samples of the first unit, or on so many tokens of all its nodes."""
    return num_samples >= _MEASURED_SAMPLES or num_tokens >= _MEASURED_TOKENS


# Relative effects below which a codec is taken for float32; DESIGN's figures for 8 bits are 0.0043 and 0.00003.
_LIMITS = {"layer_norm_error": 0.01, "feature_loss_change": 0.005, "logit_loss_change": 0.005}
_STUDENT_WIDTH = 192


def _smallest_codec(name: str, values: torch.Tensor, unsigned: str) -> str:
    """`unsigned`, unless there are signed values, or may be."""
    signed = name == "logits" or (values.numel() > 0 and bool(values.min() < 0))
    return "token_int8" if signed else unsigned


def effects_of(
    codec: str, name: str, exact: torch.Tensor, head: Mapping[str, torch.Tensor] | None = None
) -> dict[str, float]:
    """What a codec does to the terms of the loss, see `choose_codec`; `exact` (n, C, ...) is float32 and finite.

    Raises:
        CacheError: values that it cannot hold.
    """
    spec = NodeSpec(name=name, layout="pooled", shape=tuple(exact.shape[1:]), dtype="auto", codec=codec)
    return _loss_effects(name, exact, decode_node(spec, encode_node(exact, codec)).float(), head)


def _loss_effects(
    name: str, exact: torch.Tensor, stored: torch.Tensor, head: Mapping[str, torch.Tensor] | None
) -> dict[str, float]:
    """How much the terms of VkD's loss change for a student that is as near the teacher as its width allows."""
    if name == "logits":
        return {"logit_loss_change": _logit_loss_change(exact, stored)}
    target, coded = _layer_norm(exact), _layer_norm(stored)
    student = _narrow(target)
    effects = {
        "layer_norm_error": _rounded(float((coded - target).norm()), float(target.norm())),
        "feature_loss_change": _relative_change(
            float(torch.nn.functional.smooth_l1_loss(student, target)),
            float(torch.nn.functional.smooth_l1_loss(student, coded)),
        ),
    }
    if head is not None and exact.ndim == 2:
        weight = head["weight"].detach().to("cpu", torch.float32)
        bias = head["bias"].detach().to("cpu", torch.float32)
        logits = [torch.nn.functional.linear(features, weight, bias) for features in (exact, stored)]
        effects["logit_loss_change"] = _logit_loss_change(*logits)
    return effects


def _layer_norm(values: torch.Tensor) -> torch.Tensor:
    channels_last = values.movedim(1, -1)
    return torch.nn.functional.layer_norm(channels_last, channels_last.shape[-1:])


def _narrow(target: torch.Tensor) -> torch.Tensor:
    """(..., C) projected onto a seeded random subspace of a student's width."""
    num_channels = target.shape[-1]
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(
        torch.randn(num_channels, max(1, min(_STUDENT_WIDTH, num_channels // 2)), generator=generator)
    )[0]
    projected: torch.Tensor = target @ basis @ basis.T
    return projected


def _logit_loss_change(exact: torch.Tensor, stored: torch.Tensor) -> float:
    student = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    losses = [
        float(torch.nn.functional.kl_div(student, logits.log_softmax(1), reduction="batchmean", log_target=True))
        for logits in (exact, stored)
    ]
    return _relative_change(*losses)


def _relative_change(before: float, after: float) -> float:
    return _rounded(abs(after - before), abs(before))


def _rounded(difference: float, size: float) -> float:
    # rounded, because the last digits depend on the machine and the manifest must not
    if difference == 0:
        return 0.0
    return float(f"{difference / size:.3g}") if size > 0 else 1e9
