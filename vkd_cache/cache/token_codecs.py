"""Ragged tokens as stored arrays and back: values, where each image's begin, its grid, its sample and its statistics.

A newcomer's trap: `.grid`, `.sum` and `.sumsq` speak of all valid tokens of an image, even where only a sample of them
is stored: that is what keeps the standardisation of a batch exact.

Shape legend: n images, T stored tokens of all of them, C channels.
"""

import itertools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.cache.arrays import Array, check_array, column_of
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
from vkd_cache.cache.schema import NodeSpec
from vkd_cache.errors import CacheError, CacheFormatError
from vkd_cache.tokens import Tokens

Rows = npt.NDArray[np.integer] | slice | None

_MAX_TOKENS = 2**32 - 1
_MAX_GRID = 2**16 - 1


def token_arrays(spec: NodeSpec) -> dict[str, str]:
    """Suffix -> dtype of the stored arrays of a node of layout `tokens`."""
    arrays = {**CODEC_ARRAYS[spec.codec], ".offsets": "<u4", ".grid": "<u2", ".sum": "<f4", ".sumsq": "<f4"}
    return {**arrays, ".index": "<u4"} if spec.tokens < 1 else arrays


def encode_tokens(tokens: Tokens, spec: NodeSpec) -> dict[str, Array]:
    """The arrays to store for a node of layout `tokens`.

    Args:
        tokens: of n images; floating point, or int8 with its scale, which the codec `token_int8` stores as it is. A
            sample where the node stores one, else all tokens.
        spec: the node.

    Returns:
        Array by suffix, see docs/format.md.

    Raises:
        CacheError: a value that the codec cannot hold, with the first such image; or a sample where all tokens are
            wanted, and the reverse.
    """
    offsets = np.asarray(tokens.offsets, np.int64)
    if (tokens.index is not None) != (spec.tokens < 1):
        found = "all tokens" if tokens.index is None else "a sample of the tokens"
        raise CacheError(f"found {found}, expected the share {spec.tokens:g} of them that the manifest names.")
    if len(offsets) and not 0 <= offsets.min() <= offsets.max() <= _MAX_TOKENS:
        raise CacheError(f"found {offsets.max()} tokens, a unit holds at most {_MAX_TOKENS}. Use smaller shards.")
    if tokens.grid.size and not 1 <= tokens.grid.min() <= tokens.grid.max() <= _MAX_GRID:
        raise CacheError(f"found grids of {tokens.grid.min()} to {tokens.grid.max()}, expected 1 to {_MAX_GRID}.")
    arrays = _encode_values(tokens, spec.codec, offsets)
    arrays[".offsets"] = offsets.astype(np.uint32)
    arrays[".grid"] = tokens.grid.astype(np.uint16)
    if tokens.index is not None:
        arrays[".index"] = tokens.index.astype(np.uint32)
    for suffix, statistic in ((".sum", tokens.total), (".sumsq", tokens.squares)):
        exact = statistic.detach().to("cpu", torch.float32)
        arrays[suffix] = as_array(finite(exact, exact, "float32"))
    return arrays


def _encode_values(tokens: Tokens, codec: str, offsets: npt.NDArray[np.int64]) -> dict[str, Array]:
    if tokens.scale is not None and codec == "token_int8":
        scale = tokens.scale.detach().to("cpu", torch.float32)
        return {
            "": as_array(tokens.values.detach().to("cpu")),
            ".scale": as_array(finite(scale, scale, codec, offsets)),
        }
    values = tokens.dense().detach().to("cpu")
    if values.dtype == torch.float64:
        values = finite(values.to(torch.float32), values, "float32", offsets)
    if codec == "token_int8":
        stored, scale = token_int8(finite(values, values, codec, offsets))
        return {"": as_array(stored), ".scale": as_array(scale)}
    return {"": as_array(finite(values.to(FLOATS[codec]), values, codec, offsets))}


def decode_tokens(spec: NodeSpec, arrays: Mapping[str, Array], rows: Rows = None) -> Tokens:
    """Tokens of some images of a unit: the inverse of `encode_tokens`.

    Args:
        spec: the node.
        arrays: its stored arrays by suffix.
        rows: which images; None: all.

    Returns:
        Tokens in the precision that is stored: float32, float16, bfloat16, or int8 with its scale.
    """
    ends = arrays[".offsets"].astype(np.int64)
    chosen = np.arange(len(ends) - 1)[slice(None) if rows is None else rows]
    spans = [slice(start, end) for start, end in zip(ends[chosen].tolist(), ends[chosen + 1].tolist(), strict=True)]
    offsets = np.zeros(len(chosen) + 1, np.int64)
    np.cumsum(ends[chosen + 1] - ends[chosen], out=offsets[1:])
    scale, index = arrays.get(".scale"), arrays.get(".index")
    return Tokens(
        values=as_tensor(_gathered(arrays[""], spans), spec.codec),
        scale=None if scale is None else as_tensor(_gathered(scale, spans)),
        grid=arrays[".grid"][chosen].astype(np.int64),
        offsets=offsets,
        index=None if index is None else _gathered(index, spans).astype(np.int64),
        total=as_tensor(arrays[".sum"][chosen]),
        squares=as_tensor(arrays[".sumsq"][chosen]),
    )


def _gathered(array: Array, spans: list[slice]) -> Array:
    """The spans of `array` end to end; where they already lie so, as they are, without a copy."""
    if not spans:
        return array[:0]
    if all(before.stop == after.start for before, after in itertools.pairwise(spans)):
        return array[spans[0].start : spans[-1].stop]
    return np.concatenate([array[span] for span in spans])


def tokens_rounding_bound(spec: NodeSpec, arrays: Mapping[str, Array], rows: Rows = None) -> torch.Tensor:
    """(T, C) float32: how far each value of `decode_tokens(...).dense()` may be from the one that was encoded."""
    tokens = decode_tokens(spec, arrays, rows)
    if tokens.scale is not None:
        bound = (0.5 * tokens.scale).expand(tokens.values.shape)
    else:
        bound = half_step(tokens.values.to(torch.float32), spec.codec)
    return with_passed(bound, tokens.dense().to(torch.float32), spec.passed) if spec.passed else bound


def check_tokens(columns: Mapping[str, Array], spec: NodeSpec, num_rows: int, where: str) -> None:
    """Check the arrays of a node of layout `tokens` against the format and against each other.

    Raises:
        CacheFormatError: a column is missing or not as the format says; names the column, found and expected.
    """
    name = f"{where}: column 'node.{spec.name}"
    arrays = {suffix: column_of(columns, f"node.{spec.name}{suffix}", where) for suffix in token_arrays(spec)}
    for suffix, shape in ((".offsets", (num_rows + 1,)), (".grid", (num_rows, 2))):
        check_array(arrays[suffix], token_arrays(spec)[suffix], shape, f"{name}{suffix}'")
    offsets, grid = arrays[".offsets"].astype(np.int64), arrays[".grid"].astype(np.int64)
    num_tokens, num_channels = int(offsets[-1]), spec.shape[0]
    shapes = {"": (num_tokens, num_channels), ".scale": (num_tokens, 1), ".index": (num_tokens,)} | dict.fromkeys(
        (".sum", ".sumsq"), (num_rows, num_channels)
    )
    counts, kept = grid[:, 0] * grid[:, 1], np.diff(offsets)
    if offsets[0] != 0 or (kept < 1).any():
        row = 0 if offsets[0] != 0 else int((kept < 1).argmax())
        found = f"found {offsets[row]} to {offsets[min(row + 1, num_rows)]} for row {row}"
        raise CacheFormatError(f"{name}.offsets': {found}, expected offsets from 0 that rise with every row.")
    bad = kept > counts if spec.tokens < 1 else kept != counts
    if bad.any():
        row = int(bad.argmax())
        raise CacheFormatError(
            f"{name}.grid': found {grid[row].tolist()} for row {row}, which has {kept[row]} tokens; expected height * "
            f"width of {'at least' if spec.tokens < 1 else 'exactly'} as many."
        )
    for suffix in arrays.keys() & shapes.keys():
        check_array(arrays[suffix], token_arrays(spec)[suffix], shapes[suffix], f"{name}{suffix}'")
    if spec.tokens < 1:
        _check_index(arrays[".index"].astype(np.int64), offsets, counts, f"{name}.index'")


def _check_index(
    index: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], where: str
) -> None:
    falls = np.zeros(len(index), np.bool_)
    falls[1:] = np.diff(index) <= 0
    falls[offsets[:-1]] = False  # an image's first token
    bad = index[offsets[1:] - 1] >= counts
    bad[np.searchsorted(offsets, np.flatnonzero(falls), "right") - 1] = True
    if bad.any():
        row = int(bad.argmax())
        raise CacheFormatError(
            f"{where}: found places of row {row} that do not rise, or that end with {index[offsets[row + 1] - 1]}; "
            f"expected rising places below {counts[row]}."
        )


# Relative effects below which a codec is taken for float32, as for the dense layouts.
_LIMITS = {"standardised_error": 0.01, "feature_loss_change": 0.005}
_MEASURED_TOKENS = 16384
_EPS = 1e-6


def choose_token_codec(tokens: Tokens) -> tuple[str, dict[str, float]]:
    """The smallest codec that training cannot tell from float32, by measurement on `tokens`.

    Measured on at most 16,384 tokens, evenly spaced. Both sides are standardised with the statistics of the exact
    values, because those are what a cache stores beside any codec.

    Returns:
        The codec, and what was measured of it: `standardised_error` and `feature_loss_change` (smooth L1 of a student
        of half the width), relative and rounded to three digits.

    Raises:
        CacheError: values that are not finite.
    """
    values = tokens.dense().detach()
    finite(values, values, "float32", tokens.offsets)
    fits_half = not values.numel() or bool(torch.isfinite(torch.stack(values.aminmax()).half()).all())
    step = max(1, -(-len(values) // _MEASURED_TOKENS))
    exact = values[::step].to("cpu", torch.float32)
    measured: dict[str, float] = {}
    for codec in ("token_int8", "float16"):
        if codec == "float16" and not fits_half:
            continue
        measured = _loss_effects(exact, _coded(exact, codec))
        if all(effect <= _LIMITS[name] for name, effect in measured.items()):
            return codec, measured
    return "float32", dict.fromkeys(measured, 0.0)


def _coded(exact: torch.Tensor, codec: str) -> torch.Tensor:
    if codec == "token_int8":
        stored, scale = token_int8(exact)
        return stored.to(torch.float32) * scale
    return exact.to(FLOATS[codec]).to(torch.float32)


def _loss_effects(exact: torch.Tensor, coded: torch.Tensor) -> dict[str, float]:
    mean = exact.mean(0)
    spread = exact.var(0, correction=0).sqrt() + _EPS
    target, stored = (exact - mean) / spread, (coded - mean) / spread
    num_channels = exact.shape[1]
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(num_channels, max(1, num_channels // 2), generator=generator))[0]
    student = target @ basis @ basis.T
    losses = [float(torch.nn.functional.smooth_l1_loss(student, side)) for side in (target, stored)]
    return {
        "standardised_error": _rounded(float((stored - target).norm()), float(target.norm())),
        "feature_loss_change": _rounded(abs(losses[1] - losses[0]), losses[0]),
    }


def _rounded(difference: float, size: float) -> float:
    # rounded, because the last digits depend on the machine and the manifest must not
    if difference == 0:
        return 0.0
    return float(f"{difference / size:.3g}") if size > 0 else 1e9
