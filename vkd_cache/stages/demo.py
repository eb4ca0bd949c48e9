"""All of it on real digits: teacher, cache, the same student trained several ways, checks, one table, one page.

    digits -> JPEGs -> teacher (our own train, no distillation) -> extract -> students -> verify, eval -> report

What is done lies in `demo_classification` and `demo_detection`; here are the folder it goes to and what is made of the
numbers.

A newcomer's trap: this process builds no model and does not even import torch; every step is a process of its own
(see `demo_jobs`). The recipe is that of a pipeline; only the paths are filled in.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path

from vkd_cache import console
from vkd_cache.config import Config, config_to_json
from vkd_cache.errors import ConfigError
from vkd_cache.runtime import library_versions, write_atomic
from vkd_cache.stages.demo_classification import compare_classifiers
from vkd_cache.stages.demo_detection import DETECTIONS_NAME, compare_detectors
from vkd_cache.stages.demo_jobs import fresh_processes
from vkd_cache.stages.demo_page import CURVES_NAME, Finding, draw_demo, write_page
from vkd_cache.stages.demo_report import PLAIN, Comparison
from vkd_cache.stages.journal import LOG_NAME, read_log

TASKS = {"classification": compare_classifiers, "detection": compare_detectors}
MARK_NAME = ".vkd-cache-demo"  # says that what lies beside it may be replaced
_OURS = ("data", "teacher", "cache", "students", CURVES_NAME, DETECTIONS_NAME, "index.html", "report.json")


def demo(config: Config, output: Path, *, task: str = "classification", short: bool = False) -> Comparison:
    """Run the demo below `output`, replacing a demo that lies there.

    Args:
        config: the pipeline `demo`, for detection `demo_detection`, or one like it; its paths are not used.
        output: a directory to be made, an empty one, or that of an earlier demo.
        task: a key of `TASKS`.
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
        finding = TASKS[task](processes, config, output, short=short)
    report = dataclasses.replace(finding.report, seconds=time.monotonic() - started)
    _publish(dataclasses.replace(finding, report=report), output)
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


def _publish(finding: Finding, output: Path) -> None:
    """Write report, curves and page."""
    report = finding.report
    seeds = range(len(report.students[PLAIN]))
    logs = {
        kind: [read_log(output / "students" / f"{kind}-{seed}" / LOG_NAME) for seed in seeds] for kind in report.kinds
    }
    draw_demo(output / CURVES_NAME, logs, report.kinds, finding.chart)
    document = report.to_json() | {"config": config_to_json(finding.config), "versions": library_versions()}
    write_atomic(output / "report.json", json.dumps(document, indent=2).encode())
    pictures = {CURVES_NAME: f"Curves over steps of the {len(report.kinds)} ways to train"} | dict(finding.pictures)
    page = write_page(output, report, pictures)
    console.say(report.conclusion())
    console.say(f"demo: {console.clock(report.seconds)}; page: {page}")
