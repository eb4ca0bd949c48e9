"""Cross-scale fusion of the body's patch maps: coarse maps flow into finer ones before the neck.

A newcomer's trap: the neck of published weights with fusion counts its levels from the coarsest. `CrossScaleFusion`
therefore returns its maps in that order; whoever wants them by stride reverses them.

Source: ViDT (arXiv 2204.07962, the extended version), section on cross-scale fusion; RefineNet-like blocks as in DPT
(arXiv 2103.13413).

Shapes: b images, C channels of a level, D fused channels.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

_BOTTLENECK = 64
_GROUPS = 32


class CrossScaleFusion(nn.Module):
    """Maps (b, C_l, H_l, W_l), fine to coarse, to maps (b, D, H_l, W_l), coarse to fine."""

    def __init__(self, num_channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.num_levels = len(num_channels)
        # one flat module, whose names are those of published weights
        self.multi_scaler = nn.Module()
        for level, channels in enumerate(num_channels):
            self.multi_scaler.add_module(f"layer_{level}_rn", reduction(channels, width))
            self.multi_scaler.add_module(f"p_norm_{level}", nn.GroupNorm(_GROUPS, width))
            block = FusionBlock(width)
            if level == self.num_levels - 1:  # nothing flows into the coarsest
                block.smoothing.requires_grad_(False)
                block.resConfUnit1.requires_grad_(False)
            self.multi_scaler.add_module(f"refinenet_{level}", block)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        fused: list[Tensor] = []
        for level in reversed(range(self.num_levels)):
            reduce, norm, block = (
                self.multi_scaler.get_submodule(name)
                for name in (f"layer_{level}_rn", f"p_norm_{level}", f"refinenet_{level}")
            )
            fused.append(block(norm(reduce(maps[level])), fused[-1] if fused else None))
        return fused


def reduction(channels: int, width: int) -> nn.Conv2d:
    """A fresh 1 x 1 convolution, without bias at the start."""
    convolution = nn.Conv2d(channels, width, kernel_size=1)
    nn.init.xavier_uniform_(convolution.weight)
    nn.init.constant_(convolution.get_parameter("bias"), 0.0)
    return convolution


class FusionBlock(nn.Module):
    """A map, with the coarser map added to it where there is one, refined."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.smoothing = nn.Conv2d(width, width, kernel_size=1)
        self.resConfUnit1 = ResidualUnit(width)
        self.resConfUnit2 = ResidualUnit(width)

    def forward(self, fine: Tensor, coarse: Tensor | None) -> Tensor:
        """(b, D, H, W) and, unless it is the first, (b, D, any, any), to (b, D, H, W)."""
        if coarse is not None:
            grown = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=True)
            fine = self.smoothing(grown) + self.resConfUnit1(fine)
        refined: Tensor = self.resConfUnit2(fine)
        return refined


class ResidualUnit(nn.Module):
    """A bottleneck of three convolutions, each behind a ReLU, around which the input is carried."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, _BOTTLENECK, kernel_size=1)
        self.conv2 = nn.Conv2d(_BOTTLENECK, _BOTTLENECK, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(_BOTTLENECK, width, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        inner = self.conv2(F.relu(self.conv1(F.relu(features))))
        refined: Tensor = features + self.conv3(F.relu(inner))
        return refined
