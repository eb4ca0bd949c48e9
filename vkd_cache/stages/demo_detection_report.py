"""What the detection demo found: AP of a student without distillation and from each way to store the same tokens."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any, ClassVar

from vkd_cache.stages.demo_jobs import ExtractResult, TrainResult
from vkd_cache.stages.demo_report import PLAIN, SHORT_CONCLUSION, Comparison, Gain, mean_and_spread, size_text


@dataclasses.dataclass(frozen=True, slots=True)
class Store:
    """A way to store tokens: what it is called, the type of the values, and the share of patch tokens kept."""

    label: str
    dtype: str
    tokens: float


STORES = {
    "float16": Store("float16, all tokens", "float16", 1.0),
    "float16_25": Store("float16, 25 % of tokens", "float16", 0.25),
    "float16_10": Store("float16, 10 % of tokens", "float16", 0.1),
    "int8": Store("int8, all tokens", "int8", 1.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionReport(Comparison):
    """Detection: one student without distillation, and from each of `STORES`.

    Attributes:
        teacher_scores: of the teacher on the validation split, percent, evaluated once more from its file.
        extractions: by name of the store.
        checks: reports of `verify`, all three levels, by name of the store.
    """

    heading = "vkd-cache demo --task detection"
    columns = ("what", "AP, %", "AP50, %", "gain in AP", "an image", "extract, s", "train, s")
    kinds: ClassVar = {PLAIN: "student, no distillation"} | {
        name: f"student, {store.label}" for name, store in STORES.items()
    }

    teacher_scores: dict[str, float]
    extractions: dict[str, ExtractResult]
    checks: dict[str, dict[str, Any]]

    @property
    def sound(self) -> bool:
        """Whether every cache verified."""
        return all(check["verdict"] == "sound" for check in self.checks.values())

    @property
    def title(self) -> str:
        """What the table is of."""
        return (
            f"Digits on photographs: COCO AP on {self.num_val} scenes; students: {self.over_seeds}, time of one run; "
            "gain: by seed, with its standard error; bytes of one view of an image"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, by `columns`."""
        scores, seconds = self.teacher_scores, f"{self.teacher.seconds:.0f}"
        teacher = f"teacher {self.teacher_name} ({self.num_taught} images)"
        rows: list[tuple[str, ...]] = [(teacher, f"{scores['ap']:.1f}", f"{scores['ap50']:.1f}", "", "", "", seconds)]
        for kind, label in self.kinds.items():
            runs = self.students[kind]
            cells = ("", "", "")
            if kind != PLAIN:
                made = self.extractions[kind]
                cells = (self._shown(self.gain(kind)), size_text(made.bytes_per_view), f"{made.seconds:.1f}")
            seconds = f"{statistics.mean(run.seconds for run in runs):.0f}"
            rows.append((label, _scores(runs, "ap"), _scores(runs, "ap50"), *cells, seconds))
        levels = [check["levels"]["pixels"]["checked"] for check in self.checks.values()]
        verdict = "sound" if self.sound else "errors"
        rows.append((f"verify files, pixels and teacher ({sum(levels)} views): {verdict}", "", "", "", "", "", ""))
        return rows

    def conclusion(self) -> str:
        """What the numbers show, and no more than that."""
        if self.short:
            return SHORT_CONCLUSION
        gains = {name: self.gain(name) for name in STORES}
        whole = gains["float16"]
        others = ", ".join(
            f"{self._shown(gains[name])} from {store.label}" for name, store in STORES.items() if name != "float16"
        )
        return (
            f"Trained from the cache, the student gains {self._shown(whole)} points of AP over training without "
            f"distillation{whole.doubt}; {others}."
        )

    def story(self) -> str:
        """What was done, for someone who sees only the page."""
        return (
            f"A {self.teacher_name} was trained on {self.num_taught} photographs with scanned digits on them. It then "
            f"looked at {self.num_views} planned views of {self.num_learnt} of these, and its tokens went into "
            f"{len(STORES)} caches: in 16 and in 8 bits, all of them and seeded samples. The same {self.student_name} "
            f"was trained on the {self.num_learnt} images for {self.epochs} epochs, from the labels alone and from "
            "each cache, with the same views, order and initial weights, and no teacher in the process. Runs go side "
            "by side, one on each core. Lines are means over the seeds, bands their range; pictures are of the first "
            "student from float16 and all tokens."
        )

    def _shown(self, gain: Gain) -> str:
        """With its standard error, where there is one."""
        return f"{gain.mean:+.1f}" + (f" ± {gain.error:.1f}" if len(self.students[PLAIN]) > 1 else "")


def _scores(runs: Sequence[TrainResult], metric: str) -> str:
    return mean_and_spread([run.scores[metric] for run in runs])
