"""The focal loss of class probabilities, and the cost that the matcher derives from it.

A newcomer would average it. It is summed, and divided by the number of boxes, since nearly all of its terms are easy
and near zero.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ALPHA, GAMMA = 0.25, 2.0
_LOG_FLOOR = 1e-8  # the reference's; it caps the cost of a class at 18.4


def focal_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Focal loss of each number: weight 0.25 for what is there, 0.75 for what is not, focus 2.

    Args:
        logits, targets: float32 of any one shape; targets in [0, 1].

    Source: Lin et al. (arXiv 1708.02002), equation 5; between 0 and 1 the reference's interpolation.
    """
    probs = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    right = torch.lerp(1 - probs, probs, targets)
    alpha = (1 - ALPHA) + (2 * ALPHA - 1) * targets
    return alpha * entropy * (1 - right) ** GAMMA


def focal_costs(logits: Tensor) -> Tensor:
    """What it costs to let a prediction stand for a box: loss as present minus loss as absent, of each class logit."""
    probs = logits.sigmoid()
    present = ALPHA * (1 - probs) ** GAMMA * -(probs + _LOG_FLOOR).log()
    absent = (1 - ALPHA) * probs**GAMMA * -(1 - probs + _LOG_FLOOR).log()
    return present - absent
