"""What a plan says: numbers as one JSON document, and as tables for people.

Stages are named as a reader thinks of them: `extract`; and a student trained `from the cache`, `without distillation`,
and with the `live teacher`.
"""

import dataclasses
from typing import Any

from vkd_cache import console
from vkd_cache.stages.planning_break_even import Costs, break_even_epochs, break_even_students

EXTRACT, CACHED, PLAIN, LIVE = "extract", "from the cache", "without distillation", "live teacher"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePlan:
    """What the cache will hold.

    Attributes:
        views: of each sample.
        units, units_there: of all views asked for, and those of them that are published.
        views_to_make: renderings that are still missing.
        bytes: of all units, when they are there.
        bytes_to_write: of those that are missing.
        plain_bytes: of all units before compression.
        nodes: codec by node.
    """

    views: int
    units: int
    units_there: int
    views_to_make: int
    bytes: int
    bytes_to_write: int
    plain_bytes: int
    nodes: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage, or one way to train a student.

    Attributes:
        stage: EXTRACT, CACHED, PLAIN or LIVE.
        images_per_s: in a job that is under way.
        spread: standard error of that, relative; None: too few measurements.
        seconds: of all of it: start, views or steps, evaluations, checkpoints.
        start_s: of that, what comes before the first view or step, or after the last one.
        device: `cpu`, `cuda:0`.
        batch_size: configured.
        measured_batch_size: that the rate was measured with.
        host_bytes: peak resident memory of the main process, without its data workers.
        gpu_bytes: peak of what is allocated on the GPU; None: there is none.
        problem: why the stage cannot be run here; then all numbers are 0.
    """

    stage: str
    images_per_s: float = 0.0
    spread: float | None = None
    seconds: float = 0.0
    start_s: float = 0.0
    device: str = ""
    batch_size: int = 0
    measured_batch_size: int = 0
    host_bytes: int = 0
    gpu_bytes: int | None = None
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with hours."""
        return dataclasses.asdict(self) | {"hours": self.seconds / 3600}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BreakEven:
    """When the cache pays, against the live teacher.

    Attributes:
        costs: what was compared.
        epochs: configured.
        least_epochs: for one student; None: at no number.
        least_students: of the configured epochs; None: at no number.
    """

    costs: Costs
    epochs: int
    least_epochs: int | None
    least_students: int | None

    def verdict(self) -> str:
        """In a sentence."""
        cached, live = self.costs.cached_s(self.epochs), self.costs.live_s(self.epochs)
        one = f"{console.clock(cached)} with the cache, {console.clock(live)} with the live teacher"
        if self.least_students is None:
            return (
                f"The cache never pays in time: a student of {self.epochs} epochs takes {one}, and training from it is "
                "no faster than with this teacher in the loop."
            )
        if self.least_students == 1:
            return f"The cache pays from the first student on: {self.epochs} epochs take {one}."
        return (
            f"For one student the cache does not pay: {self.epochs} epochs take {one}. It pays from "
            f"{self.least_students} students on."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "least_epochs": self.least_epochs,
            "least_students": self.least_students,
            "verdict": self.verdict(),
            "costs": dataclasses.asdict(self.costs),
        }


def break_even(costs: Costs, epochs: int) -> BreakEven:
    """Both break-even numbers of `costs`."""
    return BreakEven(
        costs=costs,
        epochs=epochs,
        least_epochs=break_even_epochs(costs),
        least_students=break_even_students(costs, epochs),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanReport:
    """A plan.

    Attributes:
        source: location, kind, samples, shards, classes of the data.
        teacher, student: their names; no student: "".
        epochs, steps_per_epoch: of a training run; 0 without a student.
        evaluations: in such a run.
        cache: what it will hold.
        stages: those that were planned.
        limit: what extraction waits for, `teacher` or `data`.
        break_even: None where there is nothing to compare.
        assumptions: what the numbers rest on, in sentences.
        measured_s: seconds that planning took.
    """

    source: dict[str, Any]
    teacher: str
    student: str
    epochs: int
    steps_per_epoch: int
    evaluations: int
    cache: CachePlan
    stages: tuple[StagePlan, ...]
    limit: str
    break_even: BreakEven | None
    assumptions: tuple[str, ...]
    measured_s: float

    def stage(self, name: str) -> StagePlan | None:
        """The stage of that name, if it was planned."""
        return next((stage for stage in self.stages if stage.stage == name), None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; see docs/plan.md."""
        return {
            "source": self.source,
            "teacher": self.teacher,
            "student": self.student,
            "epochs": self.epochs,
            "steps_per_epoch": self.steps_per_epoch,
            "evaluations": self.evaluations,
            "cache": dataclasses.asdict(self.cache),
            "stages": [stage.to_json() for stage in self.stages],
            "extraction_waits_for": self.limit,
            "break_even": self.break_even.to_json() if self.break_even is not None else None,
            "assumptions": list(self.assumptions),
            "measured_s": self.measured_s,
        }

    def show(self) -> None:
        """Tables on stdout."""
        console.show_table("plan: nothing was written", ("what", "value"), self._facts())
        columns = ("stage", "images/s", "±", "time", "host memory", "GPU memory", "batch", "device")
        console.show_table("", columns, [_cells(stage) for stage in self.stages])
        if self.break_even is not None:
            found = self.break_even
            rows = [
                ("one student, from this many epochs on", _count(found.least_epochs)),
                (f"students of {found.epochs} epochs each", _count(found.least_students)),
                ("in short", found.verdict()),
            ]
            console.show_table("The cache pays, against the live teacher, at", ("what", "value"), rows)
        console.show_table("", ("these numbers rest on",), [(text,) for text in self.assumptions])

    def _facts(self) -> list[tuple[str, str]]:
        cache, source = self.cache, self.source
        per_view = cache.bytes / max(1, cache.views * source["samples"])
        rows = [
            ("source", f"{source['location']} ({source['kind']}): {console.counted(source['samples'], 'image')}, "
                       f"{console.counted(source['shards'], 'shard')}"),
            ("cache", f"{console.counted(cache.views, 'view')}, {console.counted(cache.units, 'unit')}, "
                      f"{cache.units_there} there; "
                      + ", ".join(f"{name} as {codec}" for name, codec in cache.nodes.items())),
            ("bytes of the cache", f"{_size(cache.bytes)}: {per_view:.0f} a view, {_size(cache.plain_bytes)} before "
                                   "compression"),
            ("bytes to write", _size(cache.bytes_to_write)),
            ("extraction waits for", f"the {self.limit}"),
        ]  # fmt: skip
        if self.student:
            steps = f"{self.epochs} epochs of {console.counted(self.steps_per_epoch, 'step')}"
            rows.append(("student", f"{self.student}, {steps}, {console.counted(self.evaluations, 'evaluation')}"))
        return rows


def _count(value: int | None) -> str:
    return "never" if value is None else str(value)


def _cells(stage: StagePlan) -> tuple[str, ...]:
    if stage.problem:
        return (stage.stage, "", "", stage.problem, "", "", str(stage.batch_size), stage.device)
    measured = "" if stage.measured_batch_size == stage.batch_size else f" (measured: {stage.measured_batch_size})"
    return (
        stage.stage,
        f"{stage.images_per_s:.4g}",
        "" if stage.spread is None else f"{100 * stage.spread:.1f} %",
        console.clock(stage.seconds),
        _size(stage.host_bytes),
        "" if stage.gpu_bytes is None else _size(stage.gpu_bytes),
        f"{stage.batch_size}{measured}",
        stage.device,
    )


def _size(count: float) -> str:
    """Bytes for people: 10^3, 10^6, ..."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
