"""VkD's distilled vision transformers with a convolutional stem, under the published parameter names.

A newcomer would look for a distillation *parameter*: the second token is not learned, it is the mean of the patch
tokens before the position embedding is added.

Shapes: B batch, C width, N = (px / 16)^2 patches, T = 2 + N tokens, K classes.
"""

import dataclasses
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vkd_cache.errors import ConfigError

STEM_WIDTH = 64
STEM_STRIDE = 2
PATCH_SIZE = 8  # of the stem's map, so 16 pixels of the image
PATCH_PX = STEM_STRIDE * PATCH_SIZE
NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeitShape:
    """Size of the transformer: channels of a token, number of blocks, attention heads per block."""

    width: int
    depth: int
    heads: int


DEIT_SHAPES = {
    "deit_ti_distilled": DeitShape(width=192, depth=12, heads=3),
    "deit_s_distilled": DeitShape(width=384, depth=12, heads=6),
}


class TokenNorm(nn.LayerNorm):
    """Layer norm over the channels of a token, with the reference's eps."""

    def __init__(self, width: int, **placement: Any) -> None:
        super().__init__(width, eps=NORM_EPS, **placement)


class ConvEmbed(nn.Module):
    """Pixels (B, 3, px, px) -> patch tokens (B, N, C): three convolutions with batch norm, then one 8x8 patch each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, kernel, stride in ((3, 7, STEM_STRIDE), (STEM_WIDTH, 3, 1), (STEM_WIDTH, 3, 1)):
            convolution = nn.Conv2d(channels, STEM_WIDTH, kernel, stride=stride, padding=kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(STEM_WIDTH), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(STEM_WIDTH, width, PATCH_SIZE, stride=PATCH_SIZE)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.proj(self.conv(pixels))
        return tokens.flatten(2).transpose(1, 2)


class DistilledVisionTransformer(nn.Module):
    """The student of VkD's classification experiments.

    It speaks timm's protocol: `forward_features(pixels)` gives all tokens (B, T, C) after the final norm, class token
    first, distillation token second; `forward_head(tokens)` gives both heads' logits in training and their mean in
    evaluation.

    Source: VkD (arXiv 2403.06213), section 4.1, on DeiT (arXiv 2012.12877); names, sizes and initial
    statistics as published.

    Args:
        shape: size of the transformer.
        num_classes: K.
        input_px: side of the input, a multiple of 16.
        drop_path: stochastic depth rate of the last block, growing linearly from 0 at the first.

    Raises:
        ConfigError: `input_px` is not a positive multiple of 16.
    """

    num_prefix_tokens = 2

    def __init__(
        self, shape: DeitShape, num_classes: int = 1000, *, input_px: int = 224, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        if input_px < PATCH_PX or input_px % PATCH_PX:
            raise ConfigError(f"student: found input of {input_px} px, expected a positive multiple of {PATCH_PX}.")
        self.num_features = width = shape.width
        self.num_classes = num_classes
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 2 + (input_px // PATCH_PX) ** 2, width))
        rates = [drop_path * block / max(1, shape.depth - 1) for block in range(shape.depth)]
        self.blocks = nn.ModuleList(
            Block(width, shape.heads, qkv_bias=True, drop_path=rate, norm_layer=TokenNorm) for rate in rates
        )
        self.norm = TokenNorm(width)
        self.head = nn.Linear(width, num_classes)
        self.conv_embed = ConvEmbed(width)
        self.head_dist = nn.Linear(width, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed although they are not 1-D."""
        return {"cls_token", "pos_embed"}

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, px, px) -> tokens (B, T, C)."""
        patches = self.conv_embed(pixels)
        classes = self.cls_token.expand(patches.shape[0], -1, -1)
        tokens = torch.cat([classes, patches.mean(dim=1, keepdim=True), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        normed: Tensor = self.norm(tokens)
        return normed

    def forward_head(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens (B, T, C) -> both heads' logits (B, K), task first, in training; their mean (B, K) in evaluation."""
        logits: Tensor = self.head(tokens[:, 0])
        distill_logits: Tensor = self.head_dist(tokens[:, 1])
        return (logits, distill_logits) if self.training else (logits + distill_logits) / 2

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(pixels))
