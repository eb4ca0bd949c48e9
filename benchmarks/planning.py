"""What `vkd-cache plan` says, against what then happens: bytes, times and memory of the real commands.

    python benchmarks/planning.py --output benchmarks/results/planning.json

The plan is made first, then one command after the other is run as anybody would run it, and timed from outside. A plan
is right where it lies within 20 % of that. On a machine that does something else meanwhile it cannot be.
"""

import argparse
import dataclasses
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import data
from harness import ROOT, Report, parse, parser, require, scratch_folder

from vkd_cache.cli import guarded
from vkd_cache.stages.planning_break_even import Costs, break_even_epochs, break_even_students
from vkd_cache.stages.planning_report import CACHED, EXTRACT, LIVE, PLAIN

TINY = {
    "teacher": "test_resnet", "student": "test_vit", "images": 24, "shard_size": 12, "size_px": 32, "batch_size": 8,
    "workers": 1, "epochs": 1, "views": 1, "seconds": 0.5, "repetitions": 1,
}  # fmt: skip
WITHIN = (0.8, 1.25)  # predicted over real


def main() -> int:
    """Run the benchmark."""
    made = parser("The plan against the real commands.", repetitions=1)
    made.add_argument("--teacher", default="resnet18", help="timm model, at random weights")
    made.add_argument("--student", default="deit_ti_distilled", help="of the training runs")
    made.add_argument("--images", type=int, default=768, help="JPEG files of 500x375")
    made.add_argument("--views", type=int, default=2, help="views of each")
    made.add_argument("--epochs", type=int, default=2, help="of each training run")
    made.add_argument("--shard-size", type=int, default=256, help="images per unit")
    made.add_argument("--size-px", type=int, default=112, help="side of a view")
    made.add_argument("--recipe", default="vkd", help="view recipe")
    made.add_argument("--dtype", default="auto", help="of the cache")
    made.add_argument("--batch-size", type=int, default=32, help="of teacher and student")
    made.add_argument("--workers", type=int, default=2, help="processes that render")
    made.add_argument("--autocast", default="off", choices=("off", "float16", "bfloat16"), help="of the teacher")
    made.add_argument("--channels-last", action="store_true", help="memory format of the teacher")
    made.add_argument("--amp", default="off", choices=("off", "bf16", "fp16"), help="of the student")
    made.add_argument("--seconds", type=float, default=30.0, help="that the plan may measure for")
    options = parse(made, TINY)
    report = Report("planning", options)
    with scratch_folder(options) as folder:
        data.make_photos(folder / "data" / "train", options.images, seed=options.seed)
        data.make_photos(folder / "data" / "val", max(data.NUM_CLASSES, options.images // 8), seed=options.seed + 1)
        data.random_weights(options.teacher, folder / "teacher.safetensors", seed=options.seed)
        measured = [_repetition(options, folder, number) for number in range(options.repetitions)]
    _compare(report, measured, options)
    report.finish(options.output)
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One repetition: numbers by name, as planned and as they were."""

    planned: dict[str, float]
    real: dict[str, float]
    costs: tuple[Costs, Costs]  # planned, and as they were


def _repetition(options: argparse.Namespace, folder: Path, number: int) -> Outcome:
    """Plan, then do it."""
    home = folder / f"repetition-{number}"
    home.mkdir()
    pipeline = _pipeline(options, folder, home)
    document = json.loads(_run("plan", pipeline, "--seconds", str(options.seconds), "--json")[1])
    require(not (home / "cache").exists(), "plan: wrote into the cache")
    real: dict[str, float] = {}
    real[f"{EXTRACT}, s"], _, _ = _run("extract", pipeline)
    units = [path.stat().st_size for part in ("units", "records") for path in (home / "cache" / part).rglob("*.*")]
    real["bytes"] = sum(units)
    for kind, flags in ((CACHED, []), (PLAIN, ["--plain"]), (LIVE, ["--live-teacher", "--cache", str(home / "none")])):
        seconds, _, said = _run("train", pipeline, "--output", str(home / kind.replace(" ", "_")), *flags)
        real[f"{kind}, s"] = seconds
        peak = re.search(r"peak (\d+) MiB", said)
        require(peak is not None, f"train: says no peak memory: {said[-500:]}")
        real[f"{kind}, peak MiB"] = float(peak[1]) if peak else math.nan
    planned = {"bytes": float(document["cache"]["bytes_to_write"])}
    for stage in document["stages"]:
        planned[f"{stage['stage']}, s"] = stage["seconds"]
        if stage["stage"] != EXTRACT:
            planned[f"{stage['stage']}, peak MiB"] = (stage["host_bytes"] + (stage["gpu_bytes"] or 0)) / 2**20
    require(document["break_even"] is not None, "plan: the live teacher could not be measured, see its document")
    costs = Costs(**document["break_even"]["costs"])
    return Outcome(planned=planned, real=real, costs=(costs, _real_costs(costs, real, options.epochs)))


def _real_costs(planned: Costs, real: Mapping[str, float], epochs: int) -> Costs:
    """What the commands took; of their starts nothing is known but what the plan says."""
    return Costs(
        extract_s=real[f"{EXTRACT}, s"],
        cached_start_s=planned.cached_start_s,
        cached_epoch_s=(real[f"{CACHED}, s"] - planned.cached_start_s) / epochs,
        live_start_s=planned.live_start_s,
        live_epoch_s=(real[f"{LIVE}, s"] - planned.live_start_s) / epochs,
    )


def _compare(report: Report, found: list[Outcome], options: argparse.Namespace) -> None:
    names = list(found[0].real)
    for side in ("planned", "real"):
        series = {name: [getattr(outcome, side)[name] for outcome in found] for name in names}
        for name, values in series.items():
            unit = name.rpartition(", ")[2].rpartition(" ")[2]
            report.measure(unit if "," in name else "B", {f"{side}: {name}": values})
    for name in names:
        report.ratio(f"planned / real: {name}", f"planned: {name}", f"real: {name}")
        _judge(report.ratios[f"planned / real: {name}"])
    for side, number in (("planned", 0), ("real", 1)):
        report.facts[f"break-even epochs, {side}"] = [break_even_epochs(outcome.costs[number]) for outcome in found]
        report.facts[f"break-even students, {side}"] = [
            break_even_students(outcome.costs[number], options.epochs) for outcome in found
        ]


def _judge(ratio: dict[str, Any]) -> None:
    """Two-sided, which `Target` is not."""
    low, high = WITHIN
    ratio |= {"target": f"{low:g} to {high:g}", "met": low <= ratio["median"] <= high}


def _pipeline(options: argparse.Namespace, folder: Path, home: Path) -> str:
    sections: dict[str, dict[str, object]] = {
        "source": {"train": str(folder / "data"), "shard_size": options.shard_size},
        "views": {"recipe": options.recipe, "size_px": options.size_px, "count": str(options.views)},
        "teacher": {"name": options.teacher, "weights": str(folder / "teacher.safetensors")},
        "cache": {"url": str(home / "cache"), "dtype": options.dtype},
        "extract": {
            "batch_size": options.batch_size, "workers": options.workers, "autocast": options.autocast,
            "channels_last": options.channels_last,
        },
        "student": {"name": options.student},
        "loss": {"logit_weight": 0.0},  # the teacher's classes are not those of the folders
        "train": {
            "epochs": options.epochs, "batch_size": options.batch_size, "workers": options.workers, "amp": options.amp,
            "log_every": 5,
        },
        "eval": {"workers": options.workers, "batch_size": options.batch_size},
    }  # fmt: skip
    lines = []
    for section, fields in sections.items():
        lines += [f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in fields.items())]
    path = home / "pipeline.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def _run(*arguments: str) -> tuple[float, str, str]:
    """Seconds of a command, from outside, and what it printed."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *arguments], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - begun
    require(done.returncode == 0, f"{arguments[0]}: ended with {done.returncode}: {done.stderr[-2000:]}")
    return seconds, done.stdout, done.stderr


if __name__ == "__main__":
    sys.exit(guarded(main))
