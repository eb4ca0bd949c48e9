"""ViDT: a Swin body with [DET] tokens, a deformable neck, and heads after every decoder layer.

A newcomer's trap: predictions come as one stack of `num_layers + 1`, and index 0 is the body's own: the neck's input,
not its first output. GroupNorm sees the padding too, so an image's tokens depend on its canvas: run a teacher and a
student on the same one (vkd_cache.detection.canvas).

Source: ViDT (arXiv 2110.03921; optional heads arXiv 2204.07962). Tensor names and shapes are the published ones.

Shapes: b images, D width of the neck, Q queries, K classes, L decoder layers, h/w the token grid of a level.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vkd_cache.detection.deformable import DecoderLayer, Neck, memory_of
from vkd_cache.detection.fusion import CrossScaleFusion, reduction
from vkd_cache.detection.swin import SwinBody, nearest_mask
from vkd_cache.errors import ConfigError

STRIDES = (8, 16, 32, 64)  # pixels per token of the four patch maps
_GROUPS = 32
_PRIOR = 0.01  # what a class head says before it has learned anything
_SMALL_BOX = -2.0  # logit of a body box's first width and height


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ViDTConfig:
    """What a ViDT is built from.

    Attributes:
        body_width: channels of the body's first stage; doubles at each.
        depths, heads: blocks and attention heads of the four stages.
        num_classes: K, outputs of a class head: largest category id + 1.
        num_queries: Q, [DET] tokens; at most so many objects are found in an image.
        width: D, a multiple of 32 and of `neck_heads`.
        num_layers: L, decoder layers.
        inner_width: of their feed-forward nets.
        neck_heads, points: attention heads of the neck; places each of them looks at on each of the four maps.
        dropout: of the decoder layers, in [0, 1).
        drop_path: of the body's last block in training, in [0, 1), rising from 0 at the first.
        cross_scale_fusion: patch maps are fused, instead of each being projected alone.
        iou_aware: heads that predict a box's IoU with its object.
        token_label: a class head on every patch token.
    """

    body_width: int
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    num_classes: int = 91
    num_queries: int = 100
    width: int = 256
    num_layers: int = 6
    inner_width: int = 1024
    neck_heads: int = 8
    points: int = 4
    dropout: float = 0.1
    drop_path: float = 0.0
    cross_scale_fusion: bool = False
    iou_aware: bool = False
    token_label: bool = False


_TINY = ViDTConfig(
    body_width=16, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8), num_queries=16, width=64, num_layers=2, inner_width=128
)
_BODIES = {
    "vidt_swin_nano": ViDTConfig(body_width=48, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)),
    "vidt_swin_tiny": ViDTConfig(body_width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)),
    "vidt_swin_small": ViDTConfig(body_width=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24)),
    "vidt_swin_base": ViDTConfig(body_width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)),
    "test_vidt": _TINY,
    "test_vidt2": dataclasses.replace(_TINY, body_width=32, depths=(1, 1, 2, 1)),
}
VIDT_NAMES = tuple(_BODIES)


class ViDTOutput(NamedTuple):
    """Predictions and the tokens behind them; index 0 of a stack is the body's own, -1 the final one.

    Attributes:
        logits: (L+1, b, Q, K) of independent classes, to be put through a sigmoid.
        boxes: (L+1, b, Q, 4) cxcywh in [0, 1] of the image's valid part, float32.
        ious: (L+1, b, Q, 1) logits of each box's IoU; None without that head.
        token_logits: per level (b, h, w, K), fine to coarse; None without that head.
        patches: per level (b, D, h, w), fine to coarse, padding included.
        body_det: (b, Q, D) the body's [DET] tokens after projection.
        neck_det: (L+1, b, Q, D); index 0 is `body_det`.
    """

    logits: Tensor
    boxes: Tensor
    ious: Tensor | None
    token_logits: list[Tensor] | None
    patches: list[Tensor]
    body_det: Tensor
    neck_det: Tensor


class ViDT(nn.Module):
    """The detector.

    Raises:
        ConfigError: widths that do not divide as they must, or counts below 1.
    """

    def __init__(self, config: ViDTConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.num_classes, self.num_queries = config.num_classes, config.num_queries
        self.width, self.num_layers = config.width, config.num_layers
        width, num_predictions = config.width, config.num_layers + 1
        bbox_embed = _box_heads(width, num_predictions)
        self.transformer = Neck(
            width, len(STRIDES), self._decoder_layer, bbox_embed, config.num_classes if config.token_label else 0
        )
        self.class_embed = _copies(_prior(nn.Linear(width, config.num_classes)), num_predictions)
        self.bbox_embed = bbox_embed
        self.backbone = SwinBody(
            config.body_width, config.depths, config.heads, num_queries=config.num_queries, out_width=width,
            drop_path=config.drop_path,
        )
        channels = self.backbone.num_channels
        self.fusion = CrossScaleFusion(channels, width) if config.cross_scale_fusion else None
        if self.fusion is None:
            self.input_proj = nn.ModuleList(_reduction(count, width) for count in channels)
        self.tgt_proj = _reduction(channels[-2], width)
        self.query_pos_proj = _reduction(width, width)
        if config.token_label:
            _prior(self.transformer.token_embed)
        if config.iou_aware:
            self.iou_embed = _copies(Mlp(width, width, 1), num_predictions)

    def forward(self, images: Tensor, mask: Tensor) -> ViDTOutput:
        """Detect.

        Args:
            images: (b, 3, height, width) normalised with ImageNet's mean and spread, zero in the padding.
            mask: (b, height, width) bool, True on padding; content sits top left.
        """
        maps, body_det, positions = self.backbone(images, mask)
        body_det = _project(self.tgt_proj, body_det)
        positions = _project(self.query_pos_proj, positions)
        if self.fusion is None:
            patches = [project(level) for project, level in zip(self.input_proj, maps, strict=True)]
            levels = patches
        else:
            levels = self.fusion(maps)
            patches = levels[::-1]
        memory = memory_of(levels, [nearest_mask(mask, (level.shape[2], level.shape[3])) for level in levels])
        neck_det, boxes = self.transformer(body_det, positions, memory)
        token_logits = None
        if self.config.token_label:
            token_logits = self.transformer.token_logits(memory)
            token_logits = token_logits if self.fusion is None else token_logits[::-1]
        return ViDTOutput(
            logits=_each(self.class_embed, neck_det),
            boxes=boxes,
            ious=_each(self.iou_embed, neck_det) if self.config.iou_aware else None,
            token_logits=token_logits,
            patches=patches,
            body_det=body_det,
            neck_det=neck_det,
        )

    def _decoder_layer(self) -> DecoderLayer:
        config = self.config
        return DecoderLayer(
            config.width, config.inner_width, num_heads=config.neck_heads, num_levels=len(STRIDES),
            num_points=config.points, dropout=config.dropout,
        )


class Mlp(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, width: int, inner_width: int, out_width: int) -> None:
        super().__init__()
        widths = (width, inner_width, inner_width, out_width)
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(widths))

    def forward(self, tokens: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            tokens = F.relu(layer(tokens))
        output: Tensor = last(tokens)
        return output


def create_vidt(
    name: str, num_classes: int = 91, *, drop_path: float = 0.0, cross_scale_fusion: bool = False,
    iou_aware: bool = False, token_label: bool = False,
) -> ViDT:
    """A ViDT by name, with fresh weights.

    Args:
        name: one of VIDT_NAMES.
        num_classes, drop_path, cross_scale_fusion, iou_aware, token_label: as in ViDTConfig. The reference trains
            tiny with a drop path of 0.2, small and base with 0.3.

    Raises:
        ConfigError: unknown name, or values out of range.
    """
    return ViDT(
        dataclasses.replace(
            body_config(name), num_classes=num_classes, drop_path=drop_path, cross_scale_fusion=cross_scale_fusion,
            iou_aware=iou_aware, token_label=token_label,
        )
    )


def body_config(name: str) -> ViDTConfig:
    """What the ViDT called `name` is built from, where nothing else is asked for.

    Raises:
        ConfigError: unknown name.
    """
    if name not in _BODIES:
        raise ConfigError(f"ViDT: found '{name}', expected one of {', '.join(VIDT_NAMES)}.")
    return _BODIES[name]


def valid_grids(view_size: npt.NDArray[np.int64], canvas: tuple[int, int]) -> list[npt.NDArray[np.int64]]:
    """Which tokens of each patch map are content: all above and left of these numbers.

    Args:
        view_size: (b, 2) int64 (height, width) of each image's content, in pixels, at most the canvas.
        canvas: (height, width) in pixels.

    Returns:
        Per stride (b, 2) int64 (height, width) of the valid token rectangle.
    """
    grids = []
    size = [-(-side // 4) for side in canvas]
    for _ in STRIDES:
        size = [-(-side // 2) for side in size]
        counts = []
        for axis, (num_tokens, side) in enumerate(zip(size, canvas, strict=True)):
            # the pixel that stands for a token, in float32 as the mask's interpolation works it out
            pixel = np.floor(np.arange(num_tokens, dtype=np.float32) * np.float32(side / num_tokens)).astype(np.int64)
            counts.append((pixel[None] < view_size[:, axis, None]).sum(1))
        grids.append(np.stack(counts, 1).astype(np.int64))
    return grids


def _check(config: ViDTConfig) -> None:
    if config.width % _GROUPS or config.width % config.neck_heads:
        raise ConfigError(
            f"ViDT: found width {config.width}, expected a multiple of {_GROUPS} and of {config.neck_heads} heads."
        )
    for name in ("num_classes", "num_queries", "num_layers", "points"):
        if getattr(config, name) < 1:
            raise ConfigError(f"ViDT: found {name} {getattr(config, name)}, expected at least 1.")
    for stage, num_heads in enumerate(config.heads):
        channels = config.body_width * 2**stage
        if num_heads < 1 or channels % num_heads:
            raise ConfigError(
                f"ViDT: found {num_heads} heads in stage {stage + 1}, expected a divisor of its {channels} channels."
            )
    for name in ("dropout", "drop_path"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"ViDT: found {name} {getattr(config, name)}, expected a number in [0, 1).")


def _box_heads(width: int, count: int) -> nn.ModuleList:
    """Heads that leave a box where it was, but for the body's, which starts with small ones."""
    head = Mlp(width, width, 4)
    nn.init.constant_(head.get_parameter("layers.2.weight"), 0.0)
    nn.init.constant_(head.get_parameter("layers.2.bias"), 0.0)
    heads = _copies(head, count)
    nn.init.constant_(heads.get_parameter("0.layers.2.bias")[2:].detach(), _SMALL_BOX)
    return heads


def _prior(head: nn.Linear) -> nn.Linear:
    nn.init.constant_(head.bias, -math.log((1 - _PRIOR) / _PRIOR))
    return head


def _copies(head: nn.Module, count: int) -> nn.ModuleList:
    """Heads that start alike and part in training."""
    return nn.ModuleList(copy.deepcopy(head) for _ in range(count))


def _reduction(channels: int, width: int) -> nn.Sequential:
    """1 x 1 convolution and GroupNorm."""
    return nn.Sequential(reduction(channels, width), nn.GroupNorm(_GROUPS, width))


def _project(layer: nn.Sequential, tokens: Tensor) -> Tensor:
    """(b, Q, C) to (b, Q, D) through a layer made for maps."""
    projected: Tensor = layer(tokens.transpose(1, 2).unsqueeze(-1))
    return projected.squeeze(-1).transpose(1, 2)


def _each(heads: Sequence[nn.Module] | nn.ModuleList, stack: Tensor) -> Tensor:
    """Head i on part i of a stack."""
    return torch.stack([head(tokens) for head, tokens in zip(heads, stack, strict=True)])
