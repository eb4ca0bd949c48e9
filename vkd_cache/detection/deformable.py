"""The neck: decoder layers in which each [DET] token looks at a few learned places of every patch map.

A newcomer's trap: places are worked out in float32 whatever autocast says. In bfloat16 a coordinate of 100 tokens has
steps of half a token, and bilinear weights would be noise.

Source: Deformable DETR (arXiv 2010.04159), equation 3; ViDT (arXiv 2110.03921), section 3.2. Deviation: all levels,
heads and points are read by one weighted gather, which is also deterministic, instead of a CUDA kernel.

Shapes: b images, Q queries, D channels, M heads, L levels, P points, S tokens of all levels end to end.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vkd_cache.normalisation import full_precision

_SIGMOID_EPS = 1e-5  # logits are cut at +-11.5


class Memory(NamedTuple):
    """What the queries look at.

    Attributes:
        tokens: (b, S, D) patch tokens of all levels.
        padding: (b, S) bool, True on padding.
        sizes: (height, width) of each level, plain numbers.
        sides: (L, 2) int32, the same on the device.
        starts: (L,) int32 place of each level's first token.
        valid: (b, L, 2) float32 share of each level's (width, height) that is not padding, in (0, 1].
    """

    tokens: Tensor
    padding: Tensor
    sizes: tuple[tuple[int, int], ...]
    sides: Tensor
    starts: Tensor
    valid: Tensor


def memory_of(maps: Sequence[Tensor], masks: Sequence[Tensor]) -> Memory:
    """Patch maps (b, D, H, W) and their padding masks (b, H, W), level by level, as one memory."""
    shares = [
        torch.stack([(~mask[:, 0]).float().mean(1), (~mask[:, :, 0]).float().mean(1)], -1) for mask in masks
    ]
    sizes = tuple((int(level.shape[2]), int(level.shape[3])) for level in maps)
    # filled on the device: a copy from the host would wait for everything that runs there
    numbers = [torch.full((1,), side, dtype=torch.int32, device=maps[0].device) for size in sizes for side in size]
    sides = torch.cat(numbers).view(-1, 2)
    lengths = sides[:, 0] * sides[:, 1]
    return Memory(
        tokens=torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1),
        padding=torch.cat([mask.flatten(1) for mask in masks], 1),
        sizes=sizes,
        sides=sides,
        starts=lengths.cumsum(0, dtype=torch.int32) - lengths,
        valid=torch.stack(shares, 1),
    )


class DeformableAttention(nn.Module):
    """Queries look at P places per head and level around their reference boxes."""

    def __init__(self, width: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.grid = (num_heads, num_levels, num_points)
        self.sampling_offsets = nn.Linear(width, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(width, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each head looks in its own direction, point p at p + 1 steps, all points alike."""
        num_heads, num_levels, num_points = self.grid
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, num_points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * steps[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, num_levels, -1, -1).flatten())

    def forward(self, queries: Tensor, boxes: Tensor, memory: Memory) -> Tensor:
        """What the queries see.

        Args:
            queries: (b, Q, D).
            boxes: (b, Q, L, 4) float32 cxcywh in shares of each level's padded (width, height).
            memory: the patch tokens.

        Returns:
            (b, Q, D).
        """
        num_heads, num_levels, num_points = self.grid
        values = self.value_proj(memory.tokens).masked_fill(memory.padding[..., None], 0.0)
        offsets = self.sampling_offsets(queries).unflatten(-1, (*self.grid, 2))
        weights = self.attention_weights(queries).unflatten(-1, (num_heads, -1))
        weights = full_precision(weights).softmax(-1)
        boxes = boxes[:, :, None, :, None]
        places = boxes[..., :2] + full_precision(offsets) / num_points * boxes[..., 2:] * 0.5
        weights = weights.view(*weights.shape[:-1], num_levels, num_points)
        seen = sample(values.unflatten(-1, (num_heads, -1)), memory.sides, memory.starts, places, weights)
        output: Tensor = self.output_proj(seen.to(queries.dtype))
        return output


def sample(values: Tensor, sides: Tensor, starts: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of values read bilinearly at places; outside a map everything is zero.

    Args:
        values: (b, S, M, d) of all levels end to end.
        sides, starts: (L, 2) int32 (height, width) of each level and (L,) int32 place of its first token.
        places: (b, Q, M, L, P, 2) float32 (x, y) in shares of the level's width and height: token i's centre lies at
            (i + 0.5) / width.
        weights: (b, Q, M, L, P) float32.

    Returns:
        (b, Q, M * d) float32.
    """
    batch, length, num_heads, _ = values.shape
    device = values.device
    heights, widths, starts = (side[:, None, None] for side in (*sides.unbind(1), starts))
    # int32 throughout: half the bytes, and sorted faster in the backward pass
    corner = torch.arange(4, device=device, dtype=torch.int32)  # of the four tokens around a place, row by row
    rows, row_weights = _neighbours(places[..., 1], heights, corner // 2)
    columns, column_weights = _neighbours(places[..., 0], widths, corner % 2)
    images = torch.arange(batch, device=device, dtype=torch.int32).view(-1, 1, 1, 1, 1, 1)
    heads = torch.arange(num_heads, device=device, dtype=torch.int32).view(1, 1, -1, 1, 1, 1)
    index = (images * length + starts + rows * widths + columns) * num_heads + heads
    weight = row_weights * column_weights * weights[..., None]
    with torch.autocast(device.type, enabled=False):
        seen = F.embedding_bag(
            index.flatten(0, 2).flatten(1), full_precision(values).reshape(-1, values.shape[-1]), mode="sum",
            per_sample_weights=weight.flatten(0, 2).flatten(1),
        )
    return seen.view(batch, places.shape[1], -1)


def _neighbours(share: Tensor, side: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (or columns) of the tokens around places, and their bilinear weights, 0 outside the map.

    Args:
        share: (b, Q, M, L, P) places in shares of the side.
        side: (L, 1, 1) int32.
        step: (4,) int32, 0 for the token before the place and 1 for the one after.

    Returns:
        (b, Q, M, L, P, 4) int32 in [0, side) and float32.
    """
    # a place further away reads nothing, and its number might not fit an integer
    place = (share[..., None] * side - 0.5).clamp(min=torch.full_like(side, -1), max=side)
    before = place.detach().floor()
    index = before.to(torch.int32) + step
    weight = 1 - (place - (before + step)).abs()
    inside = (index >= 0) & (index < side)
    return index.clamp(min=torch.zeros_like(side), max=side - 1), weight * inside


class DecoderLayer(nn.Module):
    """Attention among [DET] tokens, deformable attention to the patch maps, feed-forward; normalised after each."""

    def __init__(
        self, width: int, inner_width: int, *, num_heads: int, num_levels: int, num_points: int, dropout: float
    ) -> None:
        super().__init__()
        self.cross_attn = DeformableAttention(width, num_levels, num_heads, num_points)
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, num_heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, inner_width)
        self.linear2 = nn.Linear(inner_width, width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, det: Tensor, positions: Tensor, boxes: Tensor, memory: Memory) -> Tensor:
        """(b, Q, D) to (b, Q, D), with `positions` (1, Q, D) and `boxes` (b, Q, L, 4) as in the attention."""
        placed = det + positions
        attended = self.self_attn(placed, placed, det, need_weights=False)[0]
        det = self.norm2(det + self.dropout(attended))
        det = self.norm1(det + self.dropout(self.cross_attn(det + positions, boxes, memory)))
        inner = self.dropout(F.relu(self.linear1(det)))
        refined: Tensor = self.norm3(det + self.dropout(self.linear2(inner)))
        return refined


class Decoder(nn.Module):
    """Layers, and a box head for the tokens before the first and after each; a layer starts where the last box was."""

    def __init__(self, layers: Sequence[DecoderLayer], bbox_embed: nn.ModuleList) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.bbox_embed = bbox_embed

    def forward(
        self, det: Tensor, positions: Tensor, centres: Tensor, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """Refine tokens and boxes.

        Args:
            det: (b, Q, D) the body's tokens.
            positions: (1, Q, D).
            centres: (1, Q, 2) in [0, 1], where each query starts.
            memory: the patch tokens.

        Returns:
            Tokens (layers + 1, b, Q, D) and boxes (layers + 1, b, Q, 4) cxcywh in [0, 1] of the image's valid part;
            index 0 is the body's own. A box passes no gradient to the boxes before it.
        """
        valid = torch.cat([memory.valid, memory.valid], -1)[:, None]
        start = F.pad(logit(centres), (0, 2))
        tokens, boxes = [det], [(full_precision(self.bbox_embed[0](det)) + start).sigmoid()]
        for layer, head in zip(self.layers, list(self.bbox_embed)[1:], strict=True):
            before = boxes[-1].detach()
            det = layer(det, positions, before[:, :, None] * valid, memory)
            tokens.append(det)
            boxes.append((full_precision(head(det)) + logit(before)).sigmoid())
        return torch.stack(tokens), torch.stack(boxes)


class Neck(nn.Module):
    """The decoder with its reference points, and, for token labels, a class head on every patch token.

    Args:
        width, num_levels: D and L.
        layer: makes a decoder layer.
        bbox_embed: box heads, one more than layers.
        num_token_classes: outputs of the token-label head; 0: no such head.
    """

    def __init__(
        self, width: int, num_levels: int, layer: Callable[[], DecoderLayer], bbox_embed: nn.ModuleList,
        num_token_classes: int = 0,
    ) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(num_levels, width), requires_grad=False)  # published, never used
        self.decoder = Decoder([layer() for _ in range(len(bbox_embed) - 1)], bbox_embed)
        self.reference_points = nn.Linear(width, 2)
        self.num_token_classes = num_token_classes
        if num_token_classes:
            self.enc_output = nn.Linear(width, width)
            self.enc_output_norm = nn.LayerNorm(width)
            self.token_embed = nn.Linear(width, num_token_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for every matrix but those of the box heads and of where to look."""
        nn.init.normal_(self.level_embed)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and not name.startswith(("decoder.bbox_embed", "level_embed")):
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()

    def forward(self, det: Tensor, positions: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Tokens and boxes before the first and after each layer, as `Decoder.forward`; arguments likewise."""
        centres = full_precision(self.reference_points(positions)).sigmoid()
        refined: tuple[Tensor, Tensor] = self.decoder(det, positions, centres, memory)
        return refined

    def token_logits(self, memory: Memory) -> list[Tensor]:
        """Class logits of every patch token, per level (b, H, W, num_token_classes)."""
        levels = zip(memory.sizes, memory.valid.unbind(1), strict=True)
        keep = torch.cat([_well_inside(size, valid) for size, valid in levels], 1)
        inside = memory.tokens.masked_fill((memory.padding | ~keep)[..., None], 0.0)
        logits = self.token_embed(self.enc_output_norm(self.enc_output(inside)))
        parts = torch.split(logits, [height * width for height, width in memory.sizes], 1)
        return [part.reshape(len(part), *size, -1) for part, size in zip(parts, memory.sizes, strict=True)]


def logit(share: Tensor) -> Tensor:
    """Inverse of the sigmoid for shares in [0, 1], cut at 1e-5 from both ends."""
    return (share.clamp(_SIGMOID_EPS, 1) / (1 - share).clamp(_SIGMOID_EPS, 1)).log()


def _well_inside(size: tuple[int, int], valid: Tensor) -> Tensor:
    """(b, H * W) bool: tokens whose centre is more than 1 % of the valid sides away from the edges.

    Args:
        size: (H, W) of the level.
        valid: (b, 2) share of (width, height) that is valid.
    """
    inside = []
    for side, share in zip(size, (valid[:, 1], valid[:, 0]), strict=True):
        centre = (torch.arange(side, device=valid.device) + 0.5) / (share[:, None] * side).round()
        inside.append((centre > 0.01) & (centre < 0.99))
    return (inside[0][:, :, None] & inside[1][:, None]).flatten(1)
