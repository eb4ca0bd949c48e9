"""Taps: how the nodes `pooled`, `logits` and `feature_map` are taken out of a network.

`pooled` is by definition the input of the network's classifier, so that a linear head reproduces the logits from it.

Shape legend: B batch, C channels, H/W spatial positions, N tokens, K classes.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vkd_cache.errors import TeacherError

POOLED, LOGITS, FEATURE_MAP = "pooled", "logits", "feature_map"


class Tap(Protocol):
    """Runs a network on normalised pixels (B, 3, H, W) and returns at least the asked nodes."""

    def __call__(self, pixels: Tensor, nodes: Collection[str]) -> dict[str, Tensor]: ...

    def classifier(self) -> nn.Module | None:
        """The layer that may map `pooled` to `logits`; None where there is no single one."""
        ...


def make_tap(model: nn.Module, name: str, probe: Tensor) -> Tap:
    """The tap that fits `model`: timm's interface where it has it, else the last linear layer found by running it.

    Args:
        model: in evaluation mode.
        name: of the teacher, for messages.
        probe: (B, 3, H, W) normalised pixels.
    """
    if callable(getattr(model, "forward_features", None)) and callable(getattr(model, "forward_head", None)):
        return StagedTap(model, name)
    return HookedTap(model, name, probe)


class StagedTap:
    """timm's interface: `forward_features`, then `forward_head` with or without `pre_logits`."""

    def __init__(self, model: Any, name: str) -> None:
        self._model = model
        self._name = name

    def classifier(self) -> nn.Module | None:
        found = self._model.get_classifier() if hasattr(self._model, "get_classifier") else None
        return found if isinstance(found, nn.Module) else None

    def __call__(self, pixels: Tensor, nodes: Collection[str]) -> dict[str, Tensor]:
        if not {POOLED, FEATURE_MAP} & set(nodes):
            return {LOGITS: _logits(self._model(pixels), self._name)}
        features = self._model.forward_features(pixels)
        found: dict[str, Tensor] = {}
        if POOLED in nodes:
            found[POOLED] = _pooled(self._model.forward_head(features, pre_logits=True), self._name)
        if LOGITS in nodes:
            found[LOGITS] = _logits(self._model.forward_head(features), self._name)
        if FEATURE_MAP in nodes:
            found[FEATURE_MAP] = as_feature_map(self._model, features, self._name)
        return found


class HookedTap:
    """Any other network: `pooled` is the input of the linear layer whose output the network returns."""

    def __init__(self, model: nn.Module, name: str, probe: Tensor) -> None:
        self._model = model
        self._name = name
        self._last = _find_last_linear(model, name, probe)
        self._input: Tensor | None = None  # of that layer, while the network runs
        if self._last is not None:
            # for good: a compiler does not follow a hook that comes and goes, and would leave the network as it is
            self._last.register_forward_pre_hook(self._keep)

    def _keep(self, _layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._input = args[0]

    def classifier(self) -> nn.Module | None:
        return self._last

    def __call__(self, pixels: Tensor, nodes: Collection[str]) -> dict[str, Tensor]:
        if FEATURE_MAP in nodes:
            raise TeacherError(f"{self._name}: has no forward_features, so there is no node 'feature_map'.")
        if POOLED not in nodes:
            logits = _logits(self._model(pixels), self._name)
            self._input = None
            return {LOGITS: logits}
        if self._last is None:
            raise TeacherError(
                f"{self._name}: cannot tap 'pooled': no linear layer with one row per image gives its output, and it "
                "has no forward_features and forward_head(x, pre_logits). Add these, or ask for the node 'logits' only."
            )
        logits = _logits(self._model(pixels), self._name)
        pooled, self._input = self._input, None
        return {POOLED: _pooled(pooled, self._name), LOGITS: logits}


def as_feature_map(model: nn.Module, features: Tensor, name: str) -> Tensor:
    """The last features of a timm-like network as (B, C, H, W), whatever its own layout.

    Maps (B, H, W, C) are permuted; tokens (B, prefix + N, C) lose their prefix and are laid out on the patch grid.

    Raises:
        TeacherError: tokens whose grid the network does not state, or something that is neither.
    """
    shape = tuple(features.shape)
    if features.ndim == 4:
        return features.permute(0, 3, 1, 2).contiguous() if _is_channels_last(model, shape) else features
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    prefix = getattr(model, "num_prefix_tokens", 0)
    if features.ndim == 3 and isinstance(grid, (tuple, list)) and len(grid) == 2:
        height, width = (int(side) for side in grid)
        tokens = features[:, prefix:]
        if tokens.shape[1] == height * width:
            return tokens.transpose(1, 2).reshape(shape[0], shape[2], height, width)
    raise TeacherError(
        f"{name}: node 'feature_map': the network's features are {shape[1:]} per image and it states no patch grid "
        f"that these tokens fill (found grid {grid}, {prefix} prefix tokens), expected (C, H, W), (H, W, C) or tokens "
        "on a known grid. Ask for the node 'pooled' instead."
    )


def _is_channels_last(model: nn.Module, shape: tuple[int, ...]) -> bool:
    layout = getattr(model, "output_fmt", None)
    if layout is not None:
        return str(getattr(layout, "value", layout)) == "NHWC"
    channels = getattr(model, "num_features", None)
    return channels is not None and shape[3] == channels and shape[1] != channels


def _find_last_linear(model: nn.Module, name: str, probe: Tensor) -> nn.Linear | None:
    ran: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            ran.append((layer, args[0], output))

    handles = [layer.register_forward_hook(note) for layer in model.modules() if isinstance(layer, nn.Linear)]
    try:
        with torch.no_grad():
            logits = _logits(model(probe), name)
    finally:
        for handle in handles:
            handle.remove()
    for layer, given, output in reversed(ran):
        if given.ndim == 2 and output.shape == logits.shape and torch.equal(output, logits):
            return layer
    # a head that does something after its last linear layer still has pooled features: the input of that layer
    rows = [layer for layer, given, output in ran if given.ndim == 2 and output.shape == logits.shape]
    return rows[-1] if rows else None


def _pooled(value: object, name: str) -> Tensor:
    if isinstance(value, Tensor) and value.ndim > 2 and value.shape[2:].numel() == 1:
        value = value.flatten(1)
    if isinstance(value, Tensor) and value.ndim == 2:
        return value
    raise TeacherError(f"{name}: node 'pooled': found {_describe(value)}, expected one vector (C,) per image.")


def _logits(value: object, name: str) -> Tensor:
    if isinstance(value, Mapping) and LOGITS in value:
        value = value[LOGITS]
    if isinstance(value, Tensor) and value.ndim == 2:
        return value
    raise TeacherError(f"{name}: node 'logits': the network returns {_describe(value)}, expected a tensor (B, K).")


def _describe(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
