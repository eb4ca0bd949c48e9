"""Variants against each other, seed by seed: means, differences, and what of them is noise.

A newcomer's trap: the deviation of three differences is itself so uncertain that it is no measure of noise. All runs
together are one: what is left of each after its variant's mean and its seed's mean is taken away.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy.stats import t as student_t

from vkd_cache.runtime import write_atomic

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Pair:
    """A claim: that `variant` is better than `baseline`, or as good where it says `equal`."""

    claim: str
    variant: str
    baseline: str
    equal: bool = False


class Table:
    """Values by variant, one a seed.

    Attributes:
        pairs: what is compared.
        noise: half of the 95 % interval of a difference between two variants' means; nan with a single seed or variant.
    """

    def __init__(self, values: Mapping[str, Sequence[float]], pairs: Sequence[Pair], notes: Mapping[str, str]) -> None:
        self._values = values
        self._notes = notes
        self.pairs = pairs
        self.noise = noise_of_differences(list(values.values()))

    def difference(self, pair: Pair) -> str:
        """Mean and standard deviation of the differences, and the verdict."""
        mean, deviation = self._difference(pair)
        return f"{mean:+.2f} ± {deviation:.2f}, {self._verdict(pair)}"

    def markdown(self) -> str:
        """Both tables."""
        seeds = range(max(map(len, self._values.values())))
        lines = ["| student | top-1, % | " + "".join(f"seed {seed} | " for seed in seeds) + "stored |"]
        lines += ["|---|---|" + "---|" * len(seeds) + "---|"]
        for name, values in self._values.items():
            single = "".join(f"{value:.2f} | " for value in values)
            whole = f"{statistics.mean(values):.2f} ± {_deviation(values):.2f}"
            lines.append(f"| {name} | {whole} | {single}{self._notes[name]} |")
        lines += ["", f"Mean ± standard deviation. Noise of a difference of two rows (95 %): {self.noise:.2f} points."]
        lines.append("")
        lines += ["| claim | compared | difference, points | verdict |", "|---|---|---|---|"]
        for pair in self.pairs:
            mean, deviation = self._difference(pair)
            shown = f"{mean:+.2f} ± {deviation:.2f}"
            lines.append(f"| {pair.claim} | {pair.variant} - {pair.baseline} | {shown} | {self._verdict(pair)} |")
        return "\n".join(lines)

    def _difference(self, pair: Pair) -> tuple[float, float]:
        both = zip(self._values[pair.variant], self._values[pair.baseline], strict=True)
        differences = [value - baseline for value, baseline in both]
        return statistics.mean(differences), _deviation(differences)

    def _verdict(self, pair: Pair) -> str:
        mean, _ = self._difference(pair)
        if math.isnan(self.noise):
            return "one seed says nothing"
        if abs(mean) <= self.noise:
            return "holds, within noise" if pair.equal else "within noise"
        if pair.equal:
            return "does not hold: " + ("better" if mean > 0 else "worse")
        return "holds" if mean > 0 else "does not hold: the other way round"


def noise_of_differences(values: Sequence[Sequence[float]]) -> float:
    """Half of the 95 % interval of the difference between two rows' means, from the residuals of all rows.

    Args:
        values: one row a variant, one column a seed; rows and columns have effects that add up, what is left is noise.
    """
    rows, columns = len(values), len(values[0])
    freedom = (rows - 1) * (columns - 1)
    if freedom == 0:
        return math.nan
    row_means = [statistics.mean(row) for row in values]
    column_means = [statistics.mean(column) for column in zip(*values, strict=True)]
    everything = statistics.mean(row_means)
    residuals = [
        value - row_means[row] - column_means[column] + everything
        for row, line in enumerate(values)
        for column, value in enumerate(line)
    ]
    variance = sum(residual**2 for residual in residuals) / freedom
    return float(student_t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(2 * variance / columns)


def write_part(page: Path, text: str, script: str = "evidence.py") -> None:
    """Replace what lies between a script's two marks in a page, or append it with them; the rest is written by hand."""
    first, last = (f"<!-- made by benchmarks/{script}: {which} -->" for which in ("begin", "end"))
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    head, begin, rest = before.partition(first)
    tail = rest.partition(last)[2] if begin else "\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page, f"{head}{first}\n\n{text}\n\n{last}{tail}".encode())


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan
