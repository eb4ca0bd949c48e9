"""The demo's steps for classification: teacher, cache, and a student without them, with the teacher, from the cache.

A newcomer's trap: the runs go one after the other, although a machine may have more cores: their times and memory are
part of the result.
"""

import dataclasses
from pathlib import Path

from vkd_cache import console
from vkd_cache.config import Config, load_config, parse_view_range
from vkd_cache.stages.demo_data import DemoData, write_digits
from vkd_cache.stages.demo_jobs import Processes, TrainResult, check_cache, fill_cache, fit_teacher, train_student
from vkd_cache.stages.demo_page import Chart, Finding, Panel, Pen
from vkd_cache.stages.demo_report import PLAIN, DemoReport

NUM_SEEDS = 3
SHORT_TEACHER_EPOCHS = 4
SHORT_EPOCHS = 12
SHORT_VIEWS = 4
_PANELS = (Panel("eval", "top1", "top-1 on unseen digits, %"), Panel("step", "task", "loss against the labels"))
_PENS = {PLAIN: Pen("#8a8f98"), "live": Pen("#e08214", "--"), "cached": Pen("#2166ac")}


def compare_classifiers(processes: Processes, config: Config, output: Path, *, short: bool) -> Finding:
    """Everything between the empty folder `output` and the numbers; `short` as in `demo`."""
    data = write_digits(output / "data")
    console.say(
        f"digits: {data.num_train} JPEGs to train on, {data.num_val} to be judged by, and {data.num_in_tars} of "
        f"the first as tar shards, in {output / 'data'}"
    )
    config = _placed(_shortened(config) if short else config, data, output)
    teacher_config = _teacher_config(config, data, output, short)
    console.say(f"teacher: {config.teacher.name}, {teacher_config.train.epochs} epochs, without distillation")
    teacher = processes(fit_teacher, teacher_config)
    views = parse_view_range(config.views.count)
    console.say(f"cache: {len(views)} views of the {data.num_in_tars} images in the shards")
    extraction = processes(fill_cache, config)
    students = _students(processes, config, 1 if short else NUM_SEEDS)
    check = processes(check_cache, config)
    report = DemoReport(
        short=short,
        num_val=data.num_val,
        num_taught=data.num_train,
        num_learnt=data.num_in_tars,
        num_views=len(views),
        epochs=config.train.epochs,
        teacher_name=config.teacher.name,
        student_name=config.student.name,
        teacher=teacher,
        extraction=extraction,
        check=check,
        students=students,
        output=str(output),
    )
    chart = Chart(
        title=f"{report.student_name} on {report.num_learnt} digits, taught by {report.teacher_name}",
        panels=_PANELS,
        pens=_PENS,
        teacher_score=check.teacher_top1,
    )
    return Finding(config=config, report=report, chart=chart)


def _shortened(config: Config) -> Config:
    scale = SHORT_EPOCHS / config.train.epochs
    train = dataclasses.replace(
        config.train,
        epochs=SHORT_EPOCHS,
        warmup_epochs=config.train.warmup_epochs * scale,
        eval_every=SHORT_EPOCHS // 2,
    )
    return dataclasses.replace(config, views=dataclasses.replace(config.views, count=str(SHORT_VIEWS)), train=train)


def _placed(config: Config, data: DemoData, output: Path) -> Config:
    """`config` with the paths of this demo."""
    return dataclasses.replace(
        config,
        source=dataclasses.replace(config.source, train=data.tars, val=str(Path(data.tree) / "val")),
        teacher=dataclasses.replace(config.teacher, weights=str(output / "teacher" / "last.pt")),
        cache=dataclasses.replace(config.cache, url=str(output / "cache")),
    )


def _teacher_config(config: Config, data: DemoData, output: Path, short: bool) -> Config:
    """The pipeline `demo_teacher`, for the network that `config` names as its teacher."""
    recipe = load_config("demo_teacher")
    epochs = SHORT_TEACHER_EPOCHS if short else recipe.train.epochs
    return dataclasses.replace(
        recipe,
        source=dataclasses.replace(recipe.source, train=data.tree),
        views=dataclasses.replace(recipe.views, size_px=config.views.size_px),
        student=dataclasses.replace(recipe.student, name=config.teacher.name),
        train=dataclasses.replace(recipe.train, epochs=epochs, output=str(output / "teacher")),
    )


def _students(processes: Processes, config: Config, num_seeds: int) -> dict[str, list[TrainResult]]:
    """Train the student three ways with each seed."""
    results: dict[str, list[TrainResult]] = {kind: [] for kind in DemoReport.kinds}
    for kind, label in DemoReport.kinds.items():
        for seed in range(num_seeds):
            result = processes(train_student, _student_config(config, kind, seed))
            results[kind].append(result)
            console.say(
                f"{label}, seed {seed}: top-1 {result.score:.2f} after {result.steps} steps, "
                f"{console.clock(result.seconds)}, peak {result.peak_bytes / 2**20:.0f} MiB"
            )
    return results


def _student_config(config: Config, kind: str, seed: int) -> Config:
    """One run: all kinds see the same views in the same order, from the same initial weights."""
    output = Path(config.cache.url).parent / "students" / f"{kind}-{seed}"
    train = dataclasses.replace(config.train, seed=seed, live_teacher=kind == "live", output=str(output))
    loss, cache = config.loss, config.cache
    if kind == PLAIN:
        loss = dataclasses.replace(loss, feature_weight=0.0, logit_weight=0.0)
    if kind != "cached":
        cache = dataclasses.replace(cache, url="")  # these plan the same views themselves
    return dataclasses.replace(config, train=train, loss=loss, cache=cache)
