"""Where a network keeps its channels: tokens, or a map with channels first or last.

A newcomer would look for the axis that is as long as the network is wide; a 7x7x7 map would defeat that, so a network
that says what it does is believed first, and an ambiguous one is asked again with a larger image.

Shapes: B batch, C channels, N tokens (after P prefix tokens), H/W of a map.
"""

import enum

import torch
from torch import Tensor, nn

from vkd_cache.errors import ConfigError


class Layout(enum.Enum):
    """Axes of a network's last features."""

    TOKENS = "(B, P + N, C)"
    CHANNELS_FIRST = "(B, C, H, W)"
    CHANNELS_LAST = "(B, H, W, C)"


def mean_features(features: Tensor, layout: Layout, num_prefix_tokens: int = 0) -> Tensor:
    """Mean (B, C) over all positions but the prefix (class, distillation, register) tokens."""
    if layout is Layout.TOKENS:
        return features[:, num_prefix_tokens:].mean(dim=1)
    if layout is Layout.CHANNELS_FIRST:
        return features.mean(dim=(2, 3))
    return features.mean(dim=(1, 2))


def num_prefix_tokens(net: nn.Module) -> int:
    """How many tokens stand before the patches; a network that does not say has those of its class token, if any."""
    declared = getattr(net, "num_prefix_tokens", None)
    if declared is not None:
        return int(declared)
    token = getattr(net, "cls_token", None)  # (1, P, C)
    return int(token.shape[1]) if isinstance(token, Tensor) and token.ndim == 3 else 0


def probe_layout(net: nn.Module, input_px: int) -> tuple[Layout, int]:
    """The layout and the width C of `net.forward_features`, found by running it once in evaluation mode.

    Args:
        net: timm-like: `forward_features`, `num_features`; `output_fmt` and `num_prefix_tokens` where it has them.
        input_px: side of the square image it is tried on.

    Raises:
        ConfigError: the network cannot take such an image, or its features are not a map or tokens.
    """
    was_training = net.training
    net.eval()
    try:
        shape = _feature_shape(net, input_px)
        if len(shape) == 3:
            if shape[1] <= num_prefix_tokens(net):
                raise ConfigError(
                    f"student {type(net).__name__}: its features {shape} hold no patch tokens. Use a student that "
                    "returns them, or train without the feature loss."
                )
            return Layout.TOKENS, shape[2]
        if len(shape) != 4:
            raise ConfigError(
                f"student {type(net).__name__}: found features of shape {shape}, expected (B, tokens, C), (B, C, H, W) "
                "or (B, H, W, C)."
            )
        layout = _declared_layout(net) or _layout_by_width(net, shape) or _layout_by_size(net, shape, input_px)
        return layout, shape[1] if layout is Layout.CHANNELS_FIRST else shape[3]
    finally:
        net.train(was_training)


def _feature_shape(net: nn.Module, input_px: int) -> tuple[int, ...]:
    parameter = next(net.parameters())
    image = torch.zeros(1, 3, input_px, input_px, device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.no_grad():
            features = net.forward_features(image)  # type: ignore[operator]
    except (RuntimeError, AssertionError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"student {type(net).__name__}: cannot take an image of {input_px} x {input_px} px ({error}). "
            "Use another views.size_px or another student."
        ) from error
    if not isinstance(features, Tensor):
        raise ConfigError(f"student {type(net).__name__}: its features are {type(features).__name__}, not one tensor.")
    return tuple(features.shape)


def _declared_layout(net: nn.Module) -> Layout | None:
    """timm's models with channels last say so in `output_fmt`."""
    declared = getattr(net, "output_fmt", "")
    name = str(getattr(declared, "value", declared)).upper()  # a string, or timm's own enumeration
    return {"NHWC": Layout.CHANNELS_LAST, "NCHW": Layout.CHANNELS_FIRST}.get(name)


def _layout_by_width(net: nn.Module, shape: tuple[int, ...]) -> Layout | None:
    width = getattr(net, "num_features", None)
    first, last = shape[1] == width, shape[3] == width
    if first == last:
        return None
    return Layout.CHANNELS_FIRST if first else Layout.CHANNELS_LAST


def _layout_by_size(net: nn.Module, shape: tuple[int, ...], input_px: int) -> Layout:
    """The channel axis is the one that does not grow with the image."""
    larger = _feature_shape(net, 2 * input_px)
    grows = tuple(after > before for before, after in zip(shape[1:], larger[1:], strict=True))
    if grows == (False, True, True):
        return Layout.CHANNELS_FIRST
    if grows == (True, True, False):
        return Layout.CHANNELS_LAST
    raise ConfigError(
        f"student {type(net).__name__}: features {shape}, and {larger} for twice the image: cannot tell channels from "
        "space. Give the network an attribute output_fmt, 'NCHW' or 'NHWC'."
    )
