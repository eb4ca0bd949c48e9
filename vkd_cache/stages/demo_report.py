"""What a demo found: the numbers that all tasks have, and classification's table and sentence.

Shape legend: S seeds.
"""

import abc
import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

from vkd_cache.stages.demo_jobs import CheckResult, ExtractResult, TrainResult

PLAIN = "plain"  # the kind of run without distillation, which the others are compared with


class Gain(NamedTuple):
    """What one kind of run has over training without distillation: mean of the seeds' differences, standard error."""

    mean: float
    error: float

    @property
    def doubt(self) -> str:
        """What to add to a sentence that tells of it."""
        return "" if self.mean > 2 * self.error else ", which the spread of the seeds may explain"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(abc.ABC):
    """One student trained in several ways.

    Attributes:
        short: it was the short form, which shows that all of it runs and not what it gains.
        num_val: images that the scores are of.
        num_taught, num_learnt: images that the teacher and the students were trained on.
        num_views: cached views of each image.
        epochs: of the students.
        teacher_name, student_name: of the networks.
        teacher: its training.
        students: runs by kind, one for each seed 0, 1, ...
        output: where everything lies.
        seconds: wall-clock time of the whole demo, which is known only at its end.
    """

    heading: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    kinds: ClassVar[dict[str, str]]  # what the runs of each kind are called

    short: bool
    num_val: int
    num_taught: int
    num_learnt: int
    num_views: int
    epochs: int
    teacher_name: str
    student_name: str
    teacher: TrainResult
    students: dict[str, list[TrainResult]]
    output: str
    seconds: float = 0.0

    @property
    @abc.abstractmethod
    def sound(self) -> bool:
        """Whether every cache verified."""

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """What the table is of."""

    @abc.abstractmethod
    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, by `columns`."""

    @abc.abstractmethod
    def conclusion(self) -> str:
        """What the numbers show, and no more than that."""

    @abc.abstractmethod
    def story(self) -> str:
        """What was done, for someone who sees only the page."""

    @property
    def exit_code(self) -> int:
        """0, or 3 when a cache did not verify."""
        return 0 if self.sound else 3

    @property
    def over_seeds(self) -> str:
        """What the students' numbers are."""
        seeds = len(self.students[PLAIN])
        return f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"

    def gain(self, kind: str) -> Gain:
        """Points that runs of `kind` have over training without distillation.

        Both runs of a seed have the same initial weights, views and order, so they are compared with each other.
        """
        pairs = zip(self.students[kind], self.students[PLAIN], strict=True)
        gains = [run.score - plain.score for run, plain in pairs]
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
        return Gain(statistics.mean(gains), error)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with every run."""
        gains = {kind: self.gain(kind)._asdict() for kind in self.students if kind != PLAIN}
        return dataclasses.asdict(self) | {"gains": gains}


SHORT_CONCLUSION = "The short form shows that every stage runs; what distillation gains takes the full demo."


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoReport(Comparison):
    """Classification: three ways to train.

    Attributes:
        extraction, check: of the cache.
    """

    heading = "vkd-cache demo"
    columns = ("what", "top-1, %", "seconds", "peak MiB", "cache")
    kinds: ClassVar = {
        PLAIN: "student, no distillation",
        "live": "student, live teacher",
        "cached": "student, from the cache",
    }

    extraction: ExtractResult
    check: CheckResult

    @property
    def sound(self) -> bool:
        """Whether the cache verified."""
        return bool(self.check.report["verdict"] == "sound")

    @property
    def title(self) -> str:
        """What the table is of."""
        return f"Digits: accuracy on {self.num_val} images; students: {self.over_seeds}, time of one run"

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, by `columns`."""
        extraction, cache = self.extraction, size_text(self.extraction.bytes)
        per_view = f"{extraction.bytes_per_view:.0f} B a view"
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
        for kind, label in self.kinds.items():
            runs = self.students[kind]
            seconds = statistics.mean(run.seconds for run in runs)
            peak = _mib(max(run.peak_bytes for run in runs))
            accuracy = mean_and_spread([run.score for run in runs])
            rows.append((label, accuracy, f"{seconds:.1f}", peak, "read" if kind == "cached" else ""))
        checked = verify["levels"]["pixels"]["checked"]
        rows.append(
            (
                f"verify files, pixels and teacher ({checked} views)",
                "",
                f"{verify['seconds']:.1f}",
                "",
                verify["verdict"],
            )
        )
        return rows

    def conclusion(self) -> str:
        """What the numbers show, and no more than that."""
        if self.short:
            return SHORT_CONCLUSION
        live = _mean(self.students["live"]) - _mean(self.students["cached"])
        gain = self.gain("cached")
        return (
            f"Trained from the cache, the student gains {gain.mean:+.1f} ± {gain.error:.1f} points over training "
            f"without distillation{gain.doubt}. The live teacher differs from the cache by {live:+.1f}."
        )

    def story(self) -> str:
        """What was done, for someone who sees only the page."""
        return (
            f"A {self.teacher_name} was trained on {self.num_taught} scanned digits. It then looked once at "
            f"{self.num_views} planned views of {self.num_learnt} of them, and its features went into the cache. The "
            f"same {self.student_name} was trained on these {self.num_learnt} images for {self.epochs} epochs in "
            "three ways, with the same views, order and initial weights: from the labels alone, with the teacher "
            "running beside it, and from the cache with no teacher in the process. Lines are means over the seeds, "
            "bands their range."
        )


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation (n - 1) of S values; the value itself where there is one."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def size_text(num_bytes: float) -> str:
    """Bytes for people."""
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.{1 if num_bytes < 100 * size else 0}f} {unit}"
    return f"{num_bytes:.0f} B"


def _mean(runs: Iterable[TrainResult]) -> float:
    return statistics.mean(run.score for run in runs)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f}"
