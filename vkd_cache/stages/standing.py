"""How far a training run has come: what a checkpoint holds besides the learner's own state."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vkd_cache.errors import VkdCacheError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.nonfinite import Fault, Incident, SeenStep, StepNote
from vkd_cache.stages.ranks import gathered

MAX_BATCHES = 100  # that may wait to be looked at: a bound of what is remembered, and of the steps done in vain


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

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Standing":
        """Inverse of `to_json`.

        Raises:
            TypeError, ValueError: fields that there are not, of other types, or absurd.
        """
        standing = cls(**body)
        places = (standing.step, standing.epoch, standing.batch)
        scores = (standing.score, standing.best_score)
        if not all(type(place) is int and 0 <= place < 2**53 for place in places):
            raise ValueError(f"standing: found step, epoch and batch {places!r:.100}")
        if type(standing.eval_due) is not bool or not all(type(score) in (float, type(None)) for score in scores):
            raise ValueError(f"standing: found eval_due {standing.eval_due!r:.40} and scores {scores!r:.100}")
        return standing


class LossWindow:
    """The loss terms since the last log line; and what belongs to each step that nobody has looked at yet.

    Adding to it waits for nothing: loss terms stay on the device. Looking brings them to the host.
    """

    def __init__(
        self,
        terms: Sequence[str],
        split: JobSplit,
        device: torch.device,
        report: Callable[[Incident], VkdCacheError],
    ) -> None:
        """`terms`: names of the loss terms that there can be, in the order in which they are shown; `report`: writes
        down what stops the run, and gives the error to raise."""
        self._terms = tuple(terms)
        self._split = split
        self._device = device
        self._report = report
        self._new: list[StepNote] = []
        self._before: SeenStep | None = None
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._ranks: list[dict[str, Any]] = []

    def add(self, note: StepNote) -> None:
        """Count one step."""
        self._new.append(note)

    @property
    def is_full(self) -> bool:
        """Whether it is time to look, log line or not; the same on all ranks."""
        return sum(len(note.batches) for note in self._new) >= MAX_BATCHES

    def look(self, step: int, fault: Fault = Fault.NONE) -> None:
        """Bring all that was added to the host, and tell the other ranks; every rank calls this after the same steps.

        Args:
            step: optimizer steps done.
            fault: what else is wrong with the run, on this rank.

        Raises:
            VkdCacheError: a loss is not finite, or there is a fault, on any rank.
        """
        seen = _on_host(self._new)
        self._new = []
        for each in seen:
            for name, value in each.terms.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += len(seen)
        own = [self._sums.get(name, 0.0) for name in self._terms]
        bad = next((each.step for each in seen if not each.finite), math.inf)
        ranks = self._gathered([*own, *(name in self._sums for name in self._terms), bad, fault])
        first = min(numbers[-2] for numbers in ranks)
        if math.isfinite(first):
            raise self._report(self._incident(seen, int(first), Fault.NONE))
        worst = max(int(numbers[-1]) for numbers in ranks)
        if worst:
            raise self._report(self._incident(seen, step, Fault(worst)))
        self._before = seen[-1] if seen else self._before
        self._ranks = [{"sums": self._named(numbers), "steps": self._steps} for numbers in ranks]

    def take(self) -> dict[str, float]:
        """Means over steps and ranks as of the last look, and start anew."""
        sums = [rank["sums"] for rank in self._ranks]
        names = [name for name in self._terms if any(name in rank for rank in sums)]
        means = {name: sum(rank.get(name, 0.0) for rank in sums) / len(sums) / self._steps for name in names}
        self._sums, self._steps = {}, 0
        return means

    def state(self) -> list[dict[str, Any]]:
        """Sums and number of steps of every rank as of the last look."""
        return self._ranks

    def load(self, ranks: list[dict[str, Any]]) -> None:
        """Continue from `state`.

        Raises:
            LookupError, TypeError, ValueError: it is none.
        """
        own = ranks[self._split.index]
        sums, steps = dict(own["sums"]), own["steps"]
        known = all(name in self._terms and isinstance(value, float) for name, value in sums.items())
        if not known or type(steps) is not int or not 0 <= steps < 2**53:
            raise ValueError(f"loss window: found {own!r:.100}")
        self._sums, self._steps = sums, steps

    def _gathered(self, numbers: Sequence[float]) -> list[list[float]]:
        own = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        return [part.tolist() for part in gathered(own, self._split)]

    def _named(self, numbers: Sequence[float]) -> dict[str, float]:
        """Numbers by loss term, of those that are there; the second half says which."""
        there = numbers[len(self._terms) :]
        return {name: value for name, value, known in zip(self._terms, numbers, there, strict=False) if known}

    def _incident(self, seen: Sequence[SeenStep], step: int, fault: Fault) -> Incident:
        """Every rank calls this."""
        steps = {each.step: each for each in ([self._before] if self._before is not None else []) + list(seen)}
        at = steps.get(step)
        own = at.terms if at is not None else {}
        ranks = self._gathered([*(own.get(name, 0.0) for name in self._terms), *(name in own for name in self._terms)])
        named = [self._named(numbers) for numbers in ranks]
        return Incident(fault=fault, step=step, at=at, before=steps.get(step - 1), ranks=named)


def _on_host(notes: Sequence[StepNote]) -> list[SeenStep]:
    """All numbers in one copy, which waits for the device."""
    scalars = [
        value for note in notes for value in (*note.terms.values(), note.gradient_norm) if value is not None
    ]
    numbers = iter(torch.stack([value.detach() for value in scalars]).tolist() if scalars else [])
    return [
        SeenStep(
            step=note.step,
            lr=note.lr,
            batches=note.batches,
            terms={name: next(numbers) for name in note.terms},
            gradient_norm=None if note.gradient_norm is None else next(numbers),
        )
        for note in notes
    ]
