"""Which views a verification looks at, and where it notes what it finds."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vkd_cache.cache.check import Finding
from vkd_cache.cache.units import UnitId

MAX_FINDINGS = 50  # of one level: a wrong source would otherwise give one for each view


@dataclasses.dataclass(kw_only=True)
class Level:
    """One level of a verification.

    Attributes:
        name: `files`, `pixels` or `teacher`.
        checked: units (files) or views (pixels, teacher) that were looked at.
        errors: findings that are errors, those not kept included.
        findings: the first of them.
        measured: numbers worth reporting, by name.
    """

    name: str
    checked: int = 0
    errors: int = 0
    findings: list[Finding] = dataclasses.field(default_factory=list)
    measured: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        """Note a finding; beyond MAX_FINDINGS errors are only counted."""
        self.errors += finding.is_error
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)

    def error(self, where: str, message: str) -> None:
        """Note an error."""
        self.add(Finding(where=where, message=message))

    def note(self, where: str, message: str) -> None:
        """Note something that harms nobody."""
        self.add(Finding(where=where, message=message, is_error=False))

    def to_json(self) -> dict[str, Any]:
        """Counts and measured numbers; the findings are listed elsewhere."""
        return {"checked": self.checked, "errors": self.errors, **self.measured}


def choose_rows(counts: Mapping[UnitId, int], sample: int, seed: int) -> dict[UnitId, npt.NDArray[np.int64]]:
    """A sample of views, drawn evenly from all of them: rows of the source shards, rising, by unit.

    Args:
        counts: rows of the source shard of each unit, broken ones included.
        sample: how many; 0 for all.
        seed: the same seed chooses the same views.
    """
    total = sum(counts.values())
    if sample == 0 or sample >= total:
        return {unit: np.arange(count) for unit, count in counts.items()}
    chosen = np.sort(np.random.default_rng(seed).choice(total, sample, replace=False))
    ends = np.cumsum(list(counts.values()))
    rows: dict[UnitId, npt.NDArray[np.int64]] = {}
    for (unit, count), end in zip(counts.items(), ends.tolist(), strict=True):
        inside = chosen[np.searchsorted(chosen, end - count) : np.searchsorted(chosen, end)]
        if len(inside):
            rows[unit] = (inside - (end - count)).astype(np.int64)
    return rows
