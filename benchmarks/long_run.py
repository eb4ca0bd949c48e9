"""Does anything grow in a long job? Memory and open files over thousands of units, and over thousands of steps.

    python benchmarks/long_run.py --output docs/results/long_run.json --figure docs/results/long_run.png

Two real jobs, each a process of its own with two data workers: `vkd-cache extract` of many small units, and `vkd-cache
train` with log lines, checkpoints and evaluations, each of which starts workers of its own. Both are watched from
outside. Images and networks are tiny: what could leak is per unit and per step, not per pixel.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import data
import numpy as np
from harness import ROOT, Report, Target, parse, parser, require, scratch_folder
from processes import Sample, watch

from vkd_cache.cli import guarded
from vkd_cache.runtime import hardware

TINY = {"units": 200, "steps": 150, "every_s": 0.05, "workers": 1, "images": 40, "epochs_per_eval": 30}
SIZE_PX = 32
PHOTO_PX = (48, 40)
UNIT_IMAGES = 8
TEACHER, STUDENT = "test_resnet", "test_vit"
WARM_UP = 0.2  # of a job: imports, caches that fill, the allocator finding its size
CURVE_POINTS = 150
GROWTH = Target(bound=1.05)


def main() -> int:
    """Run the benchmark."""
    made = parser("Memory and open files of long jobs.", repetitions=1)
    made.add_argument("--units", type=int, default=4000, help="units to extract, of 8 images each")
    made.add_argument("--steps", type=int, default=6000, help="steps to train")
    made.add_argument("--images", type=int, default=400, help="images of the training split")
    made.add_argument("--batch-size", type=int, default=16, help="of teacher and student")
    made.add_argument("--epochs-per-eval", type=int, default=20, help="epochs from one evaluation to the next")
    made.add_argument("--workers", type=int, default=2, help="data workers of each job")
    made.add_argument("--every-s", type=float, default=1.0, help="seconds between two looks")
    made.add_argument("--figure", default="", metavar="FILE", help="draw the curves there, as PNG")
    options = parse(made, TINY)
    report = Report("long_run", options)
    report.settings.pop("figure")
    with scratch_folder(options) as folder:
        jobs = Jobs(options, folder)
        for name, unit, run in (("extract", "units", jobs.extract), ("train", "steps", jobs.train)):
            keep(report, name, unit, run())
    report.finish(options.output)
    if options.figure:
        draw(Path(options.figure), report)
    return 0


class Jobs:
    """The two jobs, over the same made data; each gives the samples of its processes by name."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._shards = -(-options.images // UNIT_IMAGES)
        self._views = -(-options.units // self._shards)
        for split, count in (("train", options.images), ("val", 2 * options.batch_size)):
            for number, content in enumerate(data.photos(count, seed=options.seed, sizes_px=[PHOTO_PX])):
                path = folder / "photos" / split / f"class_{number % data.NUM_CLASSES}" / f"photo_{number:06d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        self._file = folder / "job.toml"
        self._file.write_text(self._pipeline(), encoding="utf-8")

    def _pipeline(self) -> str:
        options = self._options
        steps_per_epoch = options.images // options.batch_size
        loader = {"workers": options.workers, "device": "cpu"}
        sections: dict[str, dict[str, Any]] = {
            "source": {"train": str(self._folder / "photos"), "shard_size": UNIT_IMAGES},
            "views": {"size_px": SIZE_PX, "count": str(self._views)},
            "teacher": {"name": TEACHER, "weights": self._teacher()},
            "cache": {"url": str(self._folder / "cache"), "dtype": "float16"},
            "extract": {"batch_size": options.batch_size} | loader,
            "student": {"name": STUDENT},
            "train": {
                "epochs": max(1, options.steps // steps_per_epoch), "batch_size": options.batch_size, "lr": 1e-4,
                "output": str(self._folder / "run"), "log_every": 10, "checkpoint_every": 100,
                "eval_every": options.epochs_per_eval, "digest_check": 0.1, "ema_decay": 0.99,
            } | loader,
            "eval": {"batch_size": options.batch_size, "workers": 1, "device": "cpu"},
        }  # fmt: skip
        lines = []
        for section, fields in sections.items():
            lines += [f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in fields.items())]
        return "\n".join(lines)

    def _teacher(self) -> str:
        return data.random_weights(
            TEACHER, self._folder / "teacher.safetensors", seed=self._options.seed, num_classes=data.NUM_CLASSES
        )

    def extract(self) -> dict[str, list[Sample]]:
        """Progress is the number of published units."""
        records = self._folder / "cache" / "records"
        found = self._watched("extract", lambda: sum(1 for _ in records.glob("*/*.json")))
        published = sum(1 for _ in records.glob("*/*.json"))
        require(published == self._shards * self._views, f"extract: {published} units were published")
        return found

    def train(self) -> dict[str, list[Sample]]:
        """Progress is the step of the last line of the log."""
        return self._watched("train", lambda: last_step(self._folder / "run" / "log.jsonl"))

    def _watched(self, command: str, progress: Callable[[], int]) -> dict[str, list[Sample]]:
        options = self._options
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads or 1), "PYTHONPATH": str(ROOT)}
        said = (self._folder / f"{command}.txt").open("w+", encoding="utf-8")
        with said, subprocess.Popen(
            [sys.executable, "-m", "vkd_cache", command, str(self._file)],
            stdout=said, stderr=said, text=True, env=environment,
        ) as job:  # fmt: skip
            found = watch(job, progress, options.workers, options.every_s)
        said = self._folder / f"{command}.txt"
        require(job.returncode == 0, f"{command} failed: {said.read_text(encoding='utf-8')[-2000:]}")
        require(len(found) == 1 + options.workers, f"{command}: data workers were not seen; use a smaller --every-s")
        return found


def last_step(log: Path) -> int:
    """The step of the last whole line of a run's log; 0 without one."""
    if not log.is_file():
        return 0
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def keep(report: Report, job: str, unit: str, found: dict[str, list[Sample]]) -> None:
    """Put what was seen of a job into the report: curves, slopes, and the second half held against the first."""
    for name, samples in found.items():
        whole, total = f"{job}, {name}", samples[-1].done
        # until the last unit or step: then the processes end, and pages that they shared become somebody's own
        steady = [sample for sample in samples if WARM_UP * total <= sample.done < total]
        require(len(steady) >= 8, f"{whole}: {len(steady)} looks are too few; use a smaller --every-s")
        half = len(steady) // 2
        first, last = steady[:half], steady[half:]
        report.measure("MiB", {f"private memory, {whole}": [sample.private_mib for sample in steady]})
        report.measure("files", {f"open files, {whole}": [sample.files for sample in steady]})
        before, after = (statistics.median(sample.private_mib for sample in part) for part in (first, last))
        report.ratio_of(f"private memory, second half / first, {whole}", [after / before], GROWTH)
        report.facts[f"{whole}: KiB per 1,000 {unit}"] = 1024 * slope(steady, [s.private_mib for s in steady])
        report.facts[f"{whole}: open files per 1,000 {unit}"] = slope(steady, [s.files for s in steady])
        for which, part in (("first", first), ("second", last)):
            report.facts[f"{whole}: most open files, {which} half"] = max(sample.files for sample in part)
        thinned = samples[:: -(-len(samples) // CURVE_POINTS)]
        report.curves[whole] = {
            field: [round(getattr(sample, field), 2) for sample in thinned]
            for field in ("done", "seconds", "private_mib", "resident_mib", "files")
        }


def slope(samples: Sequence[Sample], values: Sequence[float]) -> float:
    """Least squares: change of `values` per thousand units or steps."""
    done = np.array([sample.done for sample in samples], np.float64)
    return float(np.polyfit(done / 1000, np.array(values, np.float64), 1)[0]) if np.ptp(done) else 0.0


def draw(path: Path, report: Report) -> None:
    """Two panels a job: private memory and open files over what was done, one line a process."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    machine = hardware()
    figure.suptitle(f"Long jobs on {machine['cores']} cores, {machine['cpu']}, {report.to_json()['date'][:10]}")
    for row, (job, unit) in enumerate((("extract", "units published"), ("train", "steps"))):
        for column, (field, title) in enumerate((("private_mib", "private memory, MiB"), ("files", "open files"))):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            for name, curve in report.curves.items():
                if name.startswith(f"{job}, "):
                    axes.plot(curve["done"], curve[field], label=name.partition(", ")[2], lw=1)
            axes.set_title(f"{job}: {title}", fontsize=10)
            axes.set_xlabel(unit)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            if row == column == 0:
                axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(guarded(main))
