"""How far a training run has come: what a checkpoint holds besides the learner's own state."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vkd_cache.errors import VkdCacheError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.ranks import gathered


@dataclasses.dataclass(slots=True, kw_only=True)
class Standing:
    """The place of a run.

    Attributes:
        step: optimizer steps done.
        epoch, batch: the next batch to train on.
        eval_due: the epoch before it has ended and is not evaluated yet.
        score, best_score: the watched metric at the last evaluation and at the best one, percent.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    eval_due: bool = False
    score: float | None = None
    best_score: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


class LossWindow:
    """Sums of the loss terms since the last log line, on the device: adding to them waits for nothing."""

    def __init__(self, terms: Sequence[str], split: JobSplit, device: torch.device) -> None:
        """`terms`: names of the loss terms that there can be, in the order in which they are shown."""
        self._terms = terms
        self._split = split
        self._device = device
        self._sums: dict[str, Tensor | float] = {}
        self._steps = 0

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Count one step."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1

    def take(self, step: int) -> dict[str, float]:
        """Means over steps and ranks, and start anew; every rank calls this, and waits for its device.

        Raises:
            VkdCacheError: a loss is not finite.
        """
        state = self.state(step)
        self._sums, self._steps = {}, 0
        sums = [rank["sums"] for rank in state]
        names = [name for name in self._terms if any(name in rank for rank in sums)]
        return {name: sum(rank.get(name, 0.0) for rank in sums) / len(sums) / state[0]["steps"] for name in names}

    def state(self, step: int) -> list[dict[str, Any]]:
        """Sums and number of steps of every rank; every rank calls this, and waits for its device.

        Raises:
            VkdCacheError: a loss is not finite.
        """
        own = [float(self._sums.get(name, math.nan)) for name in self._terms]
        present = [float(name in self._sums) for name in self._terms]
        packed = torch.tensor([own, present], dtype=torch.float64, device=self._device)
        ranks = []
        for values, there in (part.tolist() for part in gathered(packed, self._split)):
            sums = {name: value for name, value, known in zip(self._terms, values, there, strict=True) if known}
            if not all(map(math.isfinite, sums.values())):
                shown = ", ".join(f"{name} {value / self._steps:g}" for name, value in sums.items())
                raise not_finite(step, f"the loss of the last {self._steps} steps is {shown}")
            ranks.append({"sums": sums, "steps": self._steps})
        return ranks

    def load(self, ranks: list[dict[str, Any]]) -> None:
        """Continue from `state`."""
        own = ranks[self._split.index]
        self._sums, self._steps = dict(own["sums"]), own["steps"]


def not_finite(step: int, what: str) -> VkdCacheError:
    """The error of a run that has diverged."""
    return VkdCacheError(
        f"train: step {step}: {what}. Nothing is saved from here; the last checkpoint is intact. Use a smaller --lr, "
        "a warm-up ([train] warmup_epochs), [train] clip_grad, or --amp bf16 or off, in a new --output."
    )
