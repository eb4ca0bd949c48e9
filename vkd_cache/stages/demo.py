"""All of it on real digits: teacher, cache, the same student trained three ways, checks, one table, one page.

    digits -> JPEGs -> teacher (our own train, no distillation) -> extract -> 3 x 3 students -> verify, eval -> report

A newcomer's trap: this process builds no model and does not even import torch; every step is a process of its own
(see `demo_jobs`). The recipe is that of the pipelines `demo` and `demo_teacher`; only the paths are filled in here.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path

from vkd_cache import console
from vkd_cache.config import Config, config_to_json, load_config, parse_view_range
from vkd_cache.errors import ConfigError
from vkd_cache.runtime import library_versions, write_atomic
from vkd_cache.stages.demo_data import DemoData, write_digits
from vkd_cache.stages.demo_jobs import (
    Processes,
    TrainResult,
    check_cache,
    fill_cache,
    fit_teacher,
    fresh_processes,
    train_student,
)
from vkd_cache.stages.demo_page import CURVES_NAME, draw_demo, write_page
from vkd_cache.stages.demo_report import KINDS, DemoReport
from vkd_cache.stages.journal import LOG_NAME, read_log

NUM_SEEDS = 3
SHORT_TEACHER_EPOCHS = 4
SHORT_EPOCHS = 12
SHORT_VIEWS = 4
MARK_NAME = ".vkd-cache-demo"  # says that what lies beside it may be replaced
_OURS = ("data", "teacher", "cache", "students", CURVES_NAME, "index.html", "report.json")


def demo(config: Config, output: Path, *, short: bool = False) -> DemoReport:
    """Run the demo below `output`, replacing a demo that lies there.

    Args:
        config: the pipeline `demo`, or one like it; its paths are not used.
        output: a directory to be made, an empty one, or that of an earlier demo.
        short: fewer epochs and views and one seed: shows that all of it runs.

    Raises:
        ConfigError: something else lies at `output`, scikit-learn is not installed, or `config` lacks a name.
        VkdCacheError: a stage failed.
    """
    started = time.monotonic()
    for where, name in (("[teacher] name", config.teacher.name), ("[student] name", config.student.name)):
        if not name:
            raise ConfigError(f"demo: {where} is empty: set it in the pipeline file.")
    _prepare(output)
    with fresh_processes() as processes:
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
        seconds=time.monotonic() - started,
        output=str(output),
    )
    _publish(config, report, output)
    return report


def _prepare(output: Path) -> None:
    """Make `output`, or clear an earlier demo in it; files that are not the demo's stay.

    Raises:
        ConfigError: there is something else.
    """
    mark = output / MARK_NAME
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: is a file, expected a directory. Give another --output.")
    if output.is_dir() and any(output.iterdir()) and not mark.is_file():
        raise ConfigError(f"{output}: holds something that is not an earlier demo. Give another --output.")
    output.mkdir(parents=True, exist_ok=True)
    mark.write_text("vkd-cache demo may replace what it made here\n", encoding="utf-8")
    for path in (output / name for name in _OURS):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _shortened(config: Config) -> Config:
    scale = SHORT_EPOCHS / config.train.epochs
    train = dataclasses.replace(
        config.train,
        epochs=SHORT_EPOCHS,
        warmup_epochs=config.train.warmup_epochs * scale,
        eval_every=SHORT_EPOCHS // 2,
    )
    return dataclasses.replace(
        config, views=dataclasses.replace(config.views, count=str(SHORT_VIEWS)), train=train
    )


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
    results: dict[str, list[TrainResult]] = {kind: [] for kind in KINDS}
    for kind, label in KINDS.items():
        for seed in range(num_seeds):
            result = processes(train_student, _student_config(config, kind, seed))
            results[kind].append(result)
            console.say(
                f"{label}, seed {seed}: top-1 {result.top1:.2f} after {result.steps} steps, "
                f"{console.clock(result.seconds)}, peak {result.peak_bytes / 2**20:.0f} MiB"
            )
    return results


def _student_config(config: Config, kind: str, seed: int) -> Config:
    """One run: all kinds see the same views in the same order, from the same initial weights."""
    output = Path(config.cache.url).parent / "students" / f"{kind}-{seed}"
    train = dataclasses.replace(config.train, seed=seed, live_teacher=kind == "live", output=str(output))
    loss, cache = config.loss, config.cache
    if kind == "plain":
        loss = dataclasses.replace(loss, feature_weight=0.0, logit_weight=0.0)
    if kind != "cached":
        cache = dataclasses.replace(cache, url="")  # these plan the same views themselves
    return dataclasses.replace(config, train=train, loss=loss, cache=cache)


def _publish(config: Config, report: DemoReport, output: Path) -> None:
    """Write report, picture and page."""
    seeds = range(len(report.students["plain"]))
    logs = {
        kind: [read_log(output / "students" / f"{kind}-{seed}" / LOG_NAME) for seed in seeds] for kind in KINDS
    }
    draw_demo(output / CURVES_NAME, logs, report)
    document = report.to_json() | {"config": config_to_json(config), "versions": library_versions()}
    write_atomic(output / "report.json", json.dumps(document, indent=2).encode())
    page = write_page(output, report)
    console.say(report.conclusion())
    console.say(f"demo: {console.clock(report.seconds)}; page: {page}")
