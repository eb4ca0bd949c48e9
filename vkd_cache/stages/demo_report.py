"""What the demo found: the numbers of every step, the one table, and a sentence on what they show."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from vkd_cache.stages.demo_jobs import CheckResult, ExtractResult, TrainResult

KINDS = {
    "plain": "student, no distillation",
    "live": "student, live teacher",
    "cached": "student, from the cache",
}
COLUMNS = ("what", "top-1, %", "seconds", "peak MiB", "cache")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoReport:
    """The demo's results.

    Attributes:
        short: it was the short form, which shows that all of it runs and not what it gains.
        num_val: images that accuracies are of.
        num_taught, num_learnt: images that the teacher and the students were trained on.
        num_views: cached views of each image.
        epochs: of the students.
        teacher_name, student_name: timm's names.
        teacher: its training.
        extraction, check: of the cache.
        students: runs by kind (`plain`, `live`, `cached`), one for each seed 0, 1, ...
        seconds: wall-clock time of the whole demo.
        output: where everything lies.
    """

    short: bool
    num_val: int
    num_taught: int
    num_learnt: int
    num_views: int
    epochs: int
    teacher_name: str
    student_name: str
    teacher: TrainResult
    extraction: ExtractResult
    check: CheckResult
    students: dict[str, list[TrainResult]]
    seconds: float
    output: str

    @property
    def exit_code(self) -> int:
        """0, or 3 when the cache did not verify."""
        return 0 if self.check.report["verdict"] == "sound" else 3

    @property
    def gains(self) -> list[float]:
        """Points of top-1 that training from the cache has over training without distillation, for each seed.

        Both runs of a seed have the same initial weights, views and order, so they are compared with each other.
        """
        pairs = zip(self.students["cached"], self.students["plain"], strict=True)
        return [cached.top1 - plain.top1 for cached, plain in pairs]

    @property
    def gain(self) -> float:
        """Mean of `gains`."""
        return statistics.mean(self.gains)

    @property
    def gain_error(self) -> float:
        """Standard error of `gain`; 0 with one seed."""
        return statistics.stdev(self.gains) / math.sqrt(len(self.gains)) if len(self.gains) > 1 else 0.0

    @property
    def title(self) -> str:
        """What the table is of."""
        seeds = len(self.students["plain"])
        over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
        return f"Digits: accuracy on {self.num_val} images; students: {over}, time of one run"

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, by COLUMNS."""
        extraction, cache = self.extraction, _size(self.extraction.bytes)
        per_view = f"{extraction.bytes / max(extraction.views, 1):.0f} B a view"
        verify = self.check.report
        rows: list[tuple[str, ...]] = [
            (
                f"teacher {self.teacher_name} ({self.num_taught} images)",
                f"{self.check.teacher_top1:.1f}",
                f"{self.teacher.seconds:.1f}",
                _mib(self.teacher.peak_bytes),
                "",
            ),
            (
                f"extract {self.num_views} views of {self.num_learnt} images",
                f"{self.check.cached_top1:.1f} (mixed views)",
                f"{extraction.seconds:.1f}",
                _mib(extraction.peak_bytes),
                f"{cache}, {per_view}, {', '.join(extraction.codecs.values())}",
            ),
        ]
        for kind, label in KINDS.items():
            runs = self.students[kind]
            accuracy = f"{_mean(runs):.1f}" + (f" ± {_spread(runs):.1f}" if len(runs) > 1 else "")
            seconds = statistics.mean(run.seconds for run in runs)
            peak = _mib(max(run.peak_bytes for run in runs))
            rows.append((label, accuracy, f"{seconds:.1f}", peak, "read" if kind == "cached" else ""))
        checked = verify["levels"]["pixels"]["checked"]
        rows.append(
            (f"verify files, pixels and teacher ({checked} views)", "", f"{verify['seconds']:.1f}", "",
             verify["verdict"])
        )
        return rows

    def conclusion(self) -> str:
        """What the numbers show, and no more than that."""
        if self.short:
            return "The short form shows that every stage runs; what distillation gains takes the full demo."
        live = _mean(self.students["live"]) - _mean(self.students["cached"])
        clear = "" if self.gain > 2 * self.gain_error else ", which the spread of the seeds may explain"
        return (
            f"Trained from the cache, the student gains {self.gain:+.1f} ± {self.gain_error:.1f} points over training "
            f"without distillation{clear}. The live teacher differs from the cache by {live:+.1f}."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with every run."""
        return dataclasses.asdict(self) | {"gain": self.gain, "gain_error": self.gain_error}


def _mean(runs: Sequence[TrainResult]) -> float:
    return statistics.mean(run.top1 for run in runs)


def _spread(runs: Sequence[TrainResult]) -> float:
    """Standard deviation (n - 1); 0 for one run."""
    return statistics.stdev(run.top1 for run in runs) if len(runs) > 1 else 0.0


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e3:.0f} kB" if num_bytes < 1e6 else f"{num_bytes / 1e6:.1f} MB"
