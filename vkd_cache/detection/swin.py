"""Swin body with reconfigured attention: patch tokens see their windows, [DET] tokens see each other and the last map.

A newcomer's trap: half of the tensors below `downsample`, and `norm1`..`norm3`, take part in nothing. They exist
because published files hold them; they are frozen, so that DistributedDataParallel does not wait for gradients that
never come.

Source: Swin Transformer (arXiv 2103.14030); ViDT (arXiv 2110.03921), section 3.1. Deviations: patch and [DET] tokens
are kept apart instead of concatenated, and of the map that [DET] tokens look at only keys and values are computed.

Shapes: b images, H/W the token grid of a stage, Q [DET] tokens, C channels of a stage, h heads, d channels of a head,
n windows of w x w tokens.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PATCH_PX = 4
_BLOCKED = -100.0  # added to attention logits that must not count; finite, as published weights were trained with it
_POSITION_STD = 0.02


class SwinBody(nn.Module):
    """Images to four patch maps, at strides 8, 16, 32 and 64, and refined [DET] tokens.

    Args:
        width: channels of the first stage; each of the four stages doubles them.
        depths, heads: blocks and attention heads of each stage.
        num_queries: number of [DET] tokens.
        out_width: channels of the last map, and of the positions of the [DET] tokens.
        window: side of a window, in tokens.
        drop_path: chance in [0, 1) that a branch of the last block is left out for a sample in training; rises
            linearly from 0 at the first block.
    """

    def __init__(
        self, width: int, depths: Sequence[int], heads: Sequence[int], *, num_queries: int, out_width: int,
        window: int = 7, drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(len(depths))]
        self.num_channels = [*widths[1:], out_width]
        self.det_token = nn.Parameter(_small(1, num_queries, width))
        self.det_pos_embed = nn.Parameter(_small(1, num_queries, out_width))
        self.patch_embed = PatchEmbedding(width)
        rates = torch.split(torch.linspace(0, drop_path, sum(depths), device="cpu"), list(depths))
        self.layers = nn.ModuleList(
            SwinStage(
                stage_width, num_heads, rate.tolist(), window=window, position_width=out_width, merged_width=merged,
                attends_globally=stage_width == widths[-1],
            )
            for stage_width, num_heads, rate, merged in zip(widths, heads, rates, self.num_channels, strict=True)
        )
        for stage, stage_width in enumerate(widths[1:], 1):
            self.add_module(f"norm{stage}", nn.LayerNorm(stage_width).requires_grad_(False))

    def forward(self, images: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Tokens of a batch.

        Args:
            images: (b, 3, height, width) normalised, zero in the padding; any size.
            mask: (b, height, width) bool, True on padding.

        Returns:
            The four maps, each (b, C, H, W); [DET] tokens of the last stage (b, Q, C); their positions
            (1, Q, out_width).
        """
        patches = self.patch_embed(images)
        det = self.det_token.expand(len(images), -1, -1)
        # through 1/32 of the token grid, as the reference: another way rounds otherwise where sides are no multiples
        coarse = nearest_mask(mask, (max(1, patches.shape[1] // 8), max(1, patches.shape[2] // 8)))
        maps = []
        merged, merged_det = patches, det
        for layer in self.layers:
            patches, det, merged, merged_det = layer(merged, merged_det, self.det_pos_embed, coarse)
            maps.append(patches)
        return [tokens.permute(0, 3, 1, 2) for tokens in [*maps[1:], merged]], det, self.det_pos_embed


class PatchEmbedding(nn.Module):
    """Non-overlapping 4 x 4 pixel patches to tokens: (b, 3, height, width) to (b, H, W, C), H = ceil(height / 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=_PATCH_PX, stride=_PATCH_PX)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        tokens = self.proj(F.pad(images, (0, -width % _PATCH_PX, 0, -height % _PATCH_PX)))
        normed: Tensor = self.norm(tokens.permute(0, 2, 3, 1))
        return normed


class SwinStage(nn.Module):
    """Blocks of one resolution, then the merging of 2 x 2 tokens."""

    def __init__(
        self, width: int, num_heads: int, drop_path: Sequence[float], *, window: int, position_width: int,
        merged_width: int, attends_globally: bool,
    ) -> None:
        super().__init__()
        self.window, self.attends_globally = window, attends_globally
        self.blocks = nn.ModuleList(
            SwinBlock(
                width, num_heads, window=window, shift=window // 2 if index % 2 else 0, drop_path=rate,
                position_width=position_width,
            )
            for index, rate in enumerate(drop_path)
        )
        self.downsample = PatchMerging(width, merged_width)

    def forward(
        self, patches: Tensor, det: Tensor, positions: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Refine the tokens of this resolution.

        Args:
            patches: (b, H, W, C).
            det: (b, Q, C).
            positions: (1, Q, P) positions of the [DET] tokens.
            mask: (b, any, any) bool, True on padding; brought to (H, W) where it is needed.

        Returns:
            Patch and [DET] tokens of this stage, then both after merging: (b, H/2, W/2, C') and (b, Q, C').
        """
        height, width, channels = patches.shape[1:]
        regions = shifted_regions((height, width), self.window, patches.device)
        context = None
        if self.attends_globally:
            mask = nearest_mask(mask, (height, width))
            blocked = F.pad(mask.flatten(1), (0, det.shape[1]))[:, None, None]
            context = (sine_positions(mask, channels), blocked.to(torch.float32) * _BLOCKED)
        for block in self.blocks:
            patches, det = block(patches, det, positions, regions, context)
        merged, merged_det = self.downsample(patches, det)
        return patches, det, merged, merged_det


class SwinBlock(nn.Module):
    """Windowed attention of patch tokens, attention of [DET] tokens, and a feed-forward net over both."""

    def __init__(
        self, width: int, num_heads: int, *, window: int, shift: int, drop_path: float, position_width: int
    ) -> None:
        super().__init__()
        self.window, self.shift, self.drop_path = window, shift, drop_path
        self.norm1 = nn.LayerNorm(width)
        self.attn = ReconfiguredAttention(width, num_heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, 4 * width)
        self.det_pos_linear = nn.Linear(position_width, width)

    def forward(
        self, patches: Tensor, det: Tensor, positions: Tensor, regions: Tensor, context: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens to tokens of the same shapes.

        Args:
            patches, det: (b, H, W, C) and (b, Q, C).
            positions: (1, Q, P).
            regions: (n, w*w, w*w) bool, True where two tokens of a shifted window are neighbours only by wrapping.
            context: positions of the patch tokens (b, H, W, C) and what is added to the logits of the [DET] tokens
                (b, 1, 1, H*W + Q), where [DET] tokens look at the map; None where they look only at each other.
        """
        normed, normed_det = self.norm1(patches), self.norm1(det) + self.det_pos_linear(positions)
        seen = None
        if context is not None:
            seen = (normed + context[0].to(normed.dtype)).flatten(1, 2)
        attended_det = self.attn.tokens(normed_det, seen, None if context is None else context[1])
        attended = self._windows(normed, regions)

        drop = self._kept(patches)
        patches = patches + _scaled(attended, drop)
        det = det + _scaled(attended_det, drop)
        drop = self._kept(patches)
        patches = patches + _scaled(self.mlp(self.norm2(patches)), drop)
        det = det + _scaled(self.mlp(self.norm2(det)), drop)
        return patches, det

    def _windows(self, normed: Tensor, regions: Tensor) -> Tensor:
        height, width = normed.shape[1:3]
        padded = F.pad(normed, (0, 0, 0, -width % self.window, 0, -height % self.window))
        if self.shift:
            padded = padded.roll((-self.shift, -self.shift), (1, 2))
        size = (padded.shape[1], padded.shape[2])
        attended = self.attn.windows(split_windows(padded, self.window), regions if self.shift else None)
        padded = join_windows(attended, self.window, size)
        if self.shift:
            padded = padded.roll((self.shift, self.shift), (1, 2))
        return padded[:, :height, :width]

    def _kept(self, tokens: Tensor) -> Tensor | None:
        """(b,) factor of a branch: 0 where it is left out for a sample, 1 / (1 - rate) elsewhere; None: always kept."""
        if not self.training or self.drop_path == 0:
            return None
        keep = 1 - self.drop_path
        return torch.empty(len(tokens), device=tokens.device, dtype=tokens.dtype).bernoulli_(keep) / keep


class ReconfiguredAttention(nn.Module):
    """One set of attention weights used three ways: within windows, among [DET] tokens, from [DET] to patch tokens."""

    relative_position_index: Tensor

    def __init__(self, width: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(_small((2 * window - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_index(window))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def windows(self, tokens: Tensor, regions: Tensor | None) -> Tensor:
        """Attention within each window: (b, n, w*w, C) to the same shape; `regions` (n, w*w, w*w) bool, as above."""
        batch, count, area, _ = tokens.shape
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        queries, keys, values = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        if regions is None:
            queries, keys, values = queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
        else:
            # windows beside heads, so that one bias serves every image of the batch
            queries, keys, values = queries.flatten(1, 2), keys.flatten(1, 2), values.flatten(1, 2)
            bias = (bias + regions[:, None].to(bias.dtype) * _BLOCKED).flatten(0, 1)[None]
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias.to(queries.dtype))
        heads_first = attended.reshape(batch, count, self.num_heads, area, -1)
        projected: Tensor = self.proj(heads_first.transpose(2, 3).flatten(3))
        return projected

    def tokens(self, det: Tensor, seen: Tensor | None, blocked: Tensor | None) -> Tensor:
        """Attention of [DET] tokens (b, Q, C) to `seen` (b, N, C), if any, and themselves; `blocked` (b, 1, 1, N+Q)."""
        queries, keys, values = self.qkv(det).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if seen is not None:
            channels = seen.shape[-1]
            pairs = F.linear(seen, self.qkv.weight[channels:], self.qkv.bias[channels:])
            pairs = pairs.view(*seen.shape[:2], 2, self.num_heads, -1)
            seen_keys, seen_values = pairs.permute(2, 0, 3, 1, 4)
            keys, values = torch.cat([seen_keys, keys], 2), torch.cat([seen_values, values], 2)
        mask = None if blocked is None else blocked.to(queries.dtype).expand(-1, -1, queries.shape[2], -1)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        projected: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return projected


class FeedForward(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner_width)
        self.fc2 = nn.Linear(inner_width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        refined: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return refined


class PatchMerging(nn.Module):
    """2 x 2 neighbouring tokens to one of `merged_width` channels; a [DET] token stands for four equal ones."""

    def __init__(self, width: int, merged_width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, merged_width, bias=False)
        self.norm = nn.LayerNorm(4 * width)
        self.expansion = nn.Linear(width, merged_width, bias=False).requires_grad_(False)
        self.norm2 = nn.LayerNorm(width).requires_grad_(False)

    def forward(self, patches: Tensor, det: Tensor) -> tuple[Tensor, Tensor]:
        height, width = patches.shape[1:3]
        padded = F.pad(patches, (0, 0, 0, width % 2, 0, height % 2))
        # the order of published weights: down the column first
        four = torch.cat([padded[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        return self.reduction(self.norm(four)), self.reduction(self.norm(det.repeat(1, 1, 4)))


def split_windows(tokens: Tensor, window: int) -> Tensor:
    """(b, H, W, C) with sides that are multiples of `window` to (b, n, window * window, C), windows row by row."""
    batch, height, width, channels = tokens.shape
    grid = tokens.view(batch, height // window, window, width // window, window, channels)
    return grid.transpose(2, 3).reshape(batch, -1, window * window, channels)


def join_windows(windows: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    """Inverse of `split_windows`: (b, n, window * window, C) to (b, *size, C)."""
    height, width = size
    grid = windows.view(len(windows), height // window, width // window, window, window, -1)
    return grid.transpose(2, 3).reshape(len(windows), height, width, -1)


def relative_index(window: int) -> Tensor:
    """(w*w, w*w) int64: row of the bias table for each pair of tokens of a window; a pure function of their offset."""
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    down = rows[:, None] - rows[None] + window - 1
    across = columns[:, None] - columns[None] + window - 1
    return down * (2 * window - 1) + across


def shifted_regions(size: tuple[int, int], window: int, device: torch.device) -> Tensor:
    """(n, w*w, w*w) bool: True for pairs in a shifted window that wrapping around the edge has brought together."""

    def bands(side: int) -> Tensor:
        padded = side + -side % window
        place = torch.arange(padded, device=device)
        return (place >= padded - window).long() + (place >= padded - window // 2).long()

    cells = bands(size[0])[:, None] * 3 + bands(size[1])[None]
    region = split_windows(cells[None, :, :, None], window)[0, :, :, 0]
    return region[:, None] != region[:, :, None]


def nearest_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Padding mask (b, height, width) bool at another size (b, *size), by the nearest pixel towards the top left."""
    if mask.shape[1:] == size:
        return mask
    return F.interpolate(mask[None].to(torch.float32), size=size)[0].to(torch.bool)


def sine_positions(mask: Tensor, channels: int) -> Tensor:
    """Sines and cosines of each token's place within the valid part, float32.

    Args:
        mask: (b, H, W) bool, True on padding.
        channels: a multiple of 4; the first half tells the row, the second the column.

    Returns:
        (b, H, W, channels).
    """
    half = channels // 2
    valid = ~mask
    slot = torch.arange(half, device=mask.device, dtype=torch.float32)
    wavelength = 10000 ** (2 * (slot // 2) / half)
    parts = []
    for axis in (1, 2):
        place = valid.cumsum(axis, dtype=torch.float32)
        length = place.narrow(axis, place.shape[axis] - 1, 1)
        phase = (place / (length + 1e-6) * (2 * math.pi))[..., None] / wavelength
        parts.append(torch.stack([phase[..., 0::2].sin(), phase[..., 1::2].cos()], -1).flatten(-2))
    return torch.cat(parts, -1)


def _scaled(branch: Tensor, factor: Tensor | None) -> Tensor:
    return branch if factor is None else branch * factor.view(-1, *[1] * (branch.ndim - 1))


def _small(*shape: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(shape), std=_POSITION_STD)
