"""The loss of the optional token-label head: every patch token says which classes' boxes cover it.

A newcomer would take channel 0 for the background. It is the opposite: it holds the share of the token that any box
covers, as in the reference, whose class 0 no box of COCO has.

Shape legend: T valid tokens of all images of one level, K classes, n valid tokens of one image, m boxes of one image.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vkd_cache.detection.focal import focal_losses
from vkd_cache.detection.matcher import BoxTargets
from vkd_cache.tokens import to_device

_SUBPIXELS = 4  # each token is looked at in 4 x 4 places: 2 px apart at stride 8


def token_label_losses(
    logits: Mapping[str, Tensor],
    grids: Mapping[str, npt.NDArray[np.int64]],
    targets: Sequence[BoxTargets],
    num_boxes: Tensor,
) -> dict[str, Tensor]:
    """`focal` and `dice` losses of the token labels, unweighted, summed over levels and images.

    Args:
        logits: per patch node (T, K) of the valid tokens, the images end to end.
        grids: per patch node (b, 2) int64 (height, width) of each image's valid tokens.
        targets: b of them.
        num_boxes: scalar to divide by.

    Source: ViDT (arXiv 2110.03921), token labelling; the reference's labels come from instance masks, ours from boxes.
    """
    focal, dice = num_boxes.new_zeros(()), num_boxes.new_zeros(())
    for name, rows in logits.items():
        counts = grids[name].prod(1).tolist()
        for image, grid, target in zip(torch.split(rows.float(), counts), grids[name].tolist(), targets, strict=True):
            shares = to_device(token_shares(target, grid, rows.shape[1]), rows.device)
            focal = focal + focal_losses(image, shares).mean(0).sum()
            probs = image.sigmoid()
            dice = dice + 1 - (2 * (probs * shares).sum() + 1) / (probs.sum() + shares.sum() + 1)
    return {"focal": focal / num_boxes, "dice": dice / num_boxes}


def token_shares(target: BoxTargets, grid: Sequence[int], num_classes: int) -> Tensor:
    """Which share of each token each class covers: (n, K) float32 on the CPU, channel 0 the share of any box.

    Where boxes overlap, the first one counts.

    Args:
        target: boxes of one image.
        grid: (height, width) of its valid tokens, n = height * width.
        num_classes: K.
    """
    height, width = grid
    centres = [(torch.arange(size * _SUBPIXELS) + 0.5) / (size * _SUBPIXELS) for size in (height, width)]
    # one class more, for what no box covers
    cover = torch.full((height * _SUBPIXELS, width * _SUBPIXELS), num_classes)
    for label, (x, y, box_width, box_height) in reversed(
        list(zip(target.labels.tolist(), target.boxes.tolist(), strict=True))
    ):
        inside = [
            (places - middle).abs() <= size / 2
            for places, middle, size in ((centres[0], y, box_height), (centres[1], x, box_width))
        ]
        cover[inside[0][:, None] & inside[1][None, :]] = label
    token = torch.arange(height * width).view(height, width).repeat_interleave(_SUBPIXELS, 0)
    token = token.repeat_interleave(_SUBPIXELS, 1)
    places = (token * (num_classes + 1) + cover).flatten()
    shares = torch.bincount(places, minlength=height * width * (num_classes + 1)).float() / _SUBPIXELS**2
    shares = shares.view(height * width, num_classes + 1)
    shares[:, 0] = 1 - shares[:, -1]
    return shares[:, :-1]
