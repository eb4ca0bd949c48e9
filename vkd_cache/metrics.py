"""Exact counters of top-1 and top-5 accuracy, and the mean and spread of repeated results.

A newcomer would average accuracies of batches; these are integers that add up over batches and ranks.

Shapes: B batch, K classes.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vkd_cache.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    """Numbers of samples: seen, with the label first, with the label among the first five (all K where K < 5)."""

    count: int = 0
    correct1: int = 0
    correct5: int = 0

    def __add__(self, other: "TopK") -> "TopK":
        return TopK(
            count=self.count + other.count,
            correct1=self.correct1 + other.correct1,
            correct5=self.correct5 + other.correct5,
        )

    @property
    def top1(self) -> float:
        """Percent in [0, 100]; NaN when nothing was counted."""
        return 100.0 * self.correct1 / self.count if self.count else math.nan

    @property
    def top5(self) -> float:
        """Percent in [0, 100]; NaN when nothing was counted."""
        return 100.0 * self.correct5 / self.count if self.count else math.nan

    def to_tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """(3,) int64 (count, correct1, correct5), to be summed over ranks."""
        return torch.tensor([self.count, self.correct1, self.correct5], dtype=torch.int64, device=device)

    @classmethod
    def from_tensor(cls, counts: Tensor) -> "TopK":
        """The inverse of `to_tensor`."""
        count, correct1, correct5 = (int(value) for value in counts.tolist())
        return cls(count=count, correct1=correct1, correct5=correct5)


def top_k(logits: Tensor, labels: Tensor) -> TopK:
    """Count a batch.

    A label's rank is the number of classes with a higher score, plus those with the same score and a lower number, so
    that ties are decided the same way everywhere. A row with a NaN counts as wrong.

    Args:
        logits: (B, K), any float type.
        labels: (B,) integers in [0, K).

    Raises:
        ConfigError: shapes that do not belong together, or a label outside [0, K).
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        found = f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}"
        raise ConfigError(f"top-k: found {found}, expected (B, K) and (B,).")
    labels = labels.to(logits.device, torch.int64)
    num_classes = logits.shape[1]
    if bool(((labels < 0) | (labels >= num_classes)).any()):
        raise ConfigError(
            f"top-k: found labels {int(labels.min())}..{int(labels.max())}, but the model has {num_classes} classes."
        )
    score = logits.gather(1, labels.unsqueeze(1))
    before = torch.arange(num_classes, device=logits.device) < labels.unsqueeze(1)
    rank = ((logits > score) | ((logits == score) & before)).sum(1)
    rank = rank.masked_fill(logits.isnan().any(1), num_classes + 5)
    correct1, correct5 = torch.stack([rank < 1, rank < 5]).sum(1).tolist()
    return TopK(count=len(labels), correct1=correct1, correct5=correct5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """A repeated result: mean, sample standard deviation (0 for one repetition) and number of repetitions."""

    mean: float
    std: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.std:.2f} (n={self.count})"


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of at least one value.

    Raises:
        ConfigError: no values.
    """
    if not values:
        raise ConfigError("spread: found no values, expected at least one.")
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return Spread(mean=mean, std=math.sqrt(variance), count=len(values))
