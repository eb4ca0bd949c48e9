"""The demo's steps for detection: a teacher, four caches of its tokens, and a student from none and from each.

    scenes -> teacher, and beside it the students without distillation -> 4 x extract -> students -> verify, eval

A newcomer's trap: what does not depend on each other runs side by side, a process for each core, so times are those of
a machine that is busy with the demo.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import NamedTuple

from vkd_cache import console
from vkd_cache.config import Config, load_config, parse_view_range
from vkd_cache.stages import demo_scenes
from vkd_cache.stages.demo_detection_report import STORES, DetectionReport
from vkd_cache.stages.demo_jobs import (
    ExtractResult,
    Processes,
    TrainResult,
    evaluate_teacher,
    fill_one_of_many,
    fit_teacher,
    train_student,
    verify_cache,
)
from vkd_cache.stages.demo_page import Chart, Finding, Panel, Pen
from vkd_cache.stages.demo_report import PLAIN, size_text

NUM_SEEDS = 3
DETECTIONS_NAME = "detections.png"
_PANELS = (
    Panel("eval", "ap", "AP on unseen scenes, %"),
    Panel("step", "class", "class loss"),
    Panel("step", "giou", "overlap loss"),
)
_PENS = {
    PLAIN: Pen("#8a8f98"),
    "float16": Pen("#2166ac"),
    "float16_25": Pen("#1b9e77", "--"),
    "float16_10": Pen("#e08214", "--"),
    "int8": Pen("#7b3294", ":"),
}


class _Counts(NamedTuple):
    """How many scenes there are: for the teacher, of these for the students, and to be judged by."""

    train: int = demo_scenes.NUM_TRAIN
    learnt: int = demo_scenes.NUM_LEARNT
    val: int = demo_scenes.NUM_VAL


_SHORT_COUNTS = _Counts(train=32, learnt=16, val=8)
SHORT_EPOCHS = 2
SHORT_BATCH_SIZE = 8
SHORT_VIEWS = 2

Students = dict[str, list[TrainResult]]
_Slot = tuple[str, int]  # kind and seed of a run


def compare_detectors(processes: Processes, config: Config, output: Path, *, short: bool) -> Finding:
    """Everything between the empty folder `output` and the numbers; `short` as in `demo`."""
    counts = _SHORT_COUNTS if short else _Counts()
    scenes = demo_scenes.write_scenes(output / "data" / "scenes", num_train=counts.train, num_val=counts.val)
    demo_scenes.first_scenes(scenes, output / "data" / "learnt", counts.learnt)
    console.say(
        f"scenes: {counts.train} to train on, {counts.learnt} of them for students, and {counts.val} to be judged by, "
        f"in {output / 'data'}"
    )
    config = _placed(_shortened(config) if short else config, output)
    students: Students = {kind: [] for kind in DetectionReport.kinds}
    seeds = range(1 if short else NUM_SEEDS)
    teacher = _fit_teacher(processes, config, students, [(PLAIN, seed) for seed in seeds], output, short)
    views = parse_view_range(config.views.count)
    extractions = _extract(processes, config, len(views) * counts.learnt, output)
    _train(processes, config, students, [(kind, seed) for seed in seeds for kind in STORES], output)
    console.say(f"verify: {len(STORES)} caches, on all levels; eval: the teacher")
    jobs = [(verify_cache, _stored(config, name, output)) for name in STORES]
    found = dict(processes.side_by_side([*jobs, (evaluate_teacher, config)]))
    shutil.copyfile(output / "students" / "float16-0" / DETECTIONS_NAME, output / DETECTIONS_NAME)
    report = DetectionReport(
        short=short,
        num_val=counts.val,
        num_taught=counts.train,
        num_learnt=counts.learnt,
        num_views=len(views),
        epochs=config.train.epochs,
        teacher_name=config.teacher.name,
        student_name=config.student.name,
        teacher=teacher,
        teacher_scores=found[len(jobs)],
        extractions=extractions,
        checks={name: found[number] for number, name in enumerate(STORES)},
        students=students,
        output=str(output),
    )
    chart = Chart(
        title=f"{report.student_name} on {report.num_learnt} scenes, taught by {report.teacher_name}",
        panels=_PANELS,
        pens=_PENS,
        teacher_score=report.teacher_scores["ap"],
    )
    pictures = {DETECTIONS_NAME: "Annotated boxes beside those that the student detects"}
    return Finding(config=_stored(config, "float16", output), report=report, chart=chart, pictures=pictures)


def _shortened(config: Config, *, epochs: int = SHORT_EPOCHS) -> Config:
    train = dataclasses.replace(
        config.train, epochs=epochs, batch_size=SHORT_BATCH_SIZE, warmup_epochs=0.0, eval_every=1, log_every=1
    )
    return dataclasses.replace(config, views=dataclasses.replace(config.views, count=str(SHORT_VIEWS)), train=train)


def _placed(config: Config, output: Path) -> Config:
    """`config` with the paths of this demo, and no cache."""
    learnt, scenes = (str(output / "data" / name) for name in ("learnt", "scenes"))
    return dataclasses.replace(
        config,
        source=dataclasses.replace(config.source, train=learnt, val=scenes),
        teacher=dataclasses.replace(config.teacher, weights=str(output / "teacher" / "last.pt")),
        cache=dataclasses.replace(config.cache, url=""),
    )


def _stored(config: Config, name: str, output: Path) -> Config:
    """`config` with the cache that stores tokens as `STORES` says."""
    store, url = STORES[name], str(output / "cache" / name)
    return dataclasses.replace(
        config, cache=dataclasses.replace(config.cache, url=url, dtype=store.dtype, tokens=store.tokens)
    )


def _teacher_config(config: Config, output: Path, short: bool) -> Config:
    """The pipeline `demo_detection_teacher`, for the network that `config` names as its teacher."""
    recipe = load_config("demo_detection_teacher")
    if short:
        recipe = _shortened(recipe, epochs=1)
    return dataclasses.replace(
        recipe,
        source=dataclasses.replace(recipe.source, train=config.source.val),
        views=dataclasses.replace(recipe.views, count="", scales=config.views.scales),
        student=dataclasses.replace(recipe.student, name=config.teacher.name),
        train=dataclasses.replace(recipe.train, output=str(output / "teacher")),
    )


def _student_config(config: Config, kind: str, seed: int, output: Path) -> Config:
    """One run: all kinds see the same views in the same order, from the same initial weights."""
    train = dataclasses.replace(config.train, seed=seed, output=str(output / "students" / f"{kind}-{seed}"))
    if kind == PLAIN:
        loss = dataclasses.replace(config.loss, feature_weight=0.0)
        return dataclasses.replace(config, train=train, loss=loss)
    return dataclasses.replace(_stored(config, kind, output), train=train)


def _fit_teacher(
    processes: Processes, config: Config, students: Students, slots: list[_Slot], output: Path, short: bool
) -> TrainResult:
    """Train the teacher, and beside it those students that do without one."""
    teacher_config = _teacher_config(config, output, short)
    console.say(
        f"teacher: {config.teacher.name}, {teacher_config.train.epochs} epochs, without distillation; students "
        "without a teacher train beside it"
    )
    jobs = [(fit_teacher, teacher_config)]
    jobs += [(train_student, _student_config(config, *slot, output)) for slot in slots]
    results: dict[int, TrainResult] = {}
    for number, result in processes.side_by_side(jobs):
        results[number] = result
        if number:
            _say_student(slots[number - 1], result)
    for number, (kind, _) in enumerate(slots, start=1):
        students[kind].append(results[number])
    return results[0]


def _extract(processes: Processes, config: Config, num_views: int, output: Path) -> dict[str, ExtractResult]:
    """Fill all caches; they hold the same views."""
    console.say(f"cache: {num_views} views, stored in {len(STORES)} ways")
    names = list(STORES)
    found: dict[str, ExtractResult] = {}
    for number, result in processes.side_by_side([(fill_one_of_many, _stored(config, name, output)) for name in names]):
        found[names[number]] = result
        console.say(
            f"cache, {STORES[names[number]].label}: {size_text(result.bytes)}, "
            f"{size_text(result.bytes_per_view)} a view, {console.clock(result.seconds)}"
        )
    return {name: found[name] for name in names}


def _train(processes: Processes, config: Config, students: Students, slots: list[_Slot], output: Path) -> None:
    """Train the students of `slots`, the seeds of a kind in order, into `students`."""
    jobs = [(train_student, _student_config(config, *slot, output)) for slot in slots]
    results: dict[int, TrainResult] = {}
    for number, result in processes.side_by_side(jobs):
        results[number] = result
        _say_student(slots[number], result)
    for number, (kind, _) in enumerate(slots):
        students[kind].append(results[number])


def _say_student(slot: _Slot, result: TrainResult) -> None:
    kind, seed = slot
    console.say(
        f"{DetectionReport.kinds[kind]}, seed {seed}: AP {result.score:.2f} after {result.steps} steps, "
        f"{console.clock(result.seconds)}, peak {result.peak_bytes / 2**20:.0f} MiB"
    )
