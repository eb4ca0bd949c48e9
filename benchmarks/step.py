"""Time and peak memory of a training step: from the cache, without distillation, and with the teacher in memory.

    python benchmarks/step.py --output benchmarks/results/step.json

The same student on the same batches in all three; what differs is where teacher outputs come from. Each kind runs in a
process of its own, so that its peak memory is its own; the processes take turns, repetition by repetition. Batches are
rendered beforehand (what feeding costs is `read.py`'s business), but joining and decoding the cached features is timed.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import data
import torch
import xxhash
from harness import (
    ROOT,
    Report,
    Stopwatch,
    Target,
    interleave,
    parse,
    parser,
    require,
    scratch_folder,
)
from packing import pack_samples

from vkd_cache.cache.reader import Unit
from vkd_cache.cli import guarded
from vkd_cache.config import Config, load_config
from vkd_cache.runtime import JobSplit, peak_memory_bytes, resolve_device
from vkd_cache.stages.extract import extract
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.learner import step_seed
from vkd_cache.stages.run import Run, prepare_run

TINY = {
    "student": "test_vit", "teacher": "test_resnet", "batch_size": 4, "batches": 2, "steps": 2, "size_px": 32,
    "repetitions": 2, "workers": 0,
}  # fmt: skip
KINDS = ("cache", "plain", "live")
IMAGENET_CLASSES = 1000
AMP_OF_TEACHER = {"off": "off", "fp16": "float16", "bf16": "bfloat16"}


def main() -> int:
    """Run the benchmark, or with --child one kind's process of it."""
    if sys.argv[1:2] == ["--child"]:
        return serve(json.loads(sys.argv[2]))
    made = parser("A training step from the cache, without distillation, and with a live teacher.", repetitions=4)
    made.add_argument("--student", default="deit_ti_distilled", help="student")
    made.add_argument("--teacher", default="regnety_160", help="timm model, at random weights")
    made.add_argument("--batch-size", type=int, default=16, help="samples per step")
    made.add_argument("--batches", type=int, default=2, help="different batches, taken in turn")
    made.add_argument("--steps", type=int, default=2, help="timed steps per repetition")
    made.add_argument("--size-px", type=int, default=224, help="side of a view")
    made.add_argument("--dtype", default="uint8", choices=sorted(data.CODECS), help="stored type of the cache")
    made.add_argument("--amp", default="auto", choices=("auto", *AMP_OF_TEACHER), help="auto: fp16 on a GPU, else off")
    made.add_argument("--channels-last", action="store_true", help="memory format of the teacher")
    made.add_argument("--workers", type=int, default=2, help="processes that render, beforehand")
    made.add_argument("--device", default="auto", help="of student and teacher")
    options = parse(made, TINY)
    device = resolve_device(options.device)
    options.amp = ("fp16" if device.startswith("cuda") else "off") if options.amp == "auto" else options.amp
    report = Report("step", options)
    report.facts["device"] = device.partition(":")[0]
    with scratch_folder(options) as folder:
        config = prepare(options, folder)
        measure(options, config, report)
    report.finish(options.output)
    return 0


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, object]]:
    """Make images, the teacher's weights and, with the real stage, the cache; returns the configuration's overrides."""
    count = options.batch_size * options.batches
    labels = [(IMAGENET_CLASSES - 1 - 37 * number) % IMAGENET_CLASSES for number in range(count)]
    keys = [f"photo_{number:06d}" for number in range(count)]
    photos = data.photos(count, seed=options.seed)
    pack_samples(folder / "photos.tar", zip(keys, photos, labels, strict=True))
    weights = data.random_weights(options.teacher, folder / "teacher.safetensors", seed=options.seed)
    autocast = AMP_OF_TEACHER[options.amp]
    config: dict[str, dict[str, object]] = {
        "source": {"train": str(folder / "photos.tar")},
        "views": {"recipe": "vkd", "count": "1", "size_px": options.size_px},
        "teacher": {"name": options.teacher, "weights": weights},
        "cache": {"url": str(folder / "cache"), "dtype": options.dtype},
        "extract": {
            "batch_size": options.batch_size, "workers": options.workers, "device": options.device,
            "autocast": autocast, "channels_last": options.channels_last,
        },
        "student": {"name": options.student},
        "train": {
            "batch_size": options.batch_size, "workers": 0, "device": options.device, "amp": options.amp, "epochs": 1,
            "output": str(folder / "unused"), "digest_check": 1.0,
        },
    }  # fmt: skip
    extract(load_config(None, config), JobSplit())
    return config


class Child:
    """The process of one kind: ready once it has done its first step, then one repetition per line sent to it."""

    def __init__(self, kind: str, options: argparse.Namespace, config: dict[str, dict[str, object]]) -> None:
        self._kind = kind
        request = {"kind": kind, "config": config, "steps": options.steps, "batches": options.batches}
        request["threads"] = options.threads
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "step.py"), "--child", json.dumps(request)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.ready: dict[str, Any] = {}
        self.last: dict[str, Any] = {}

    def wait(self) -> None:
        """Until its student is built and has done one step."""
        self.ready = self._answer()

    def repetition(self) -> float:
        """Seconds per step."""
        self.last = self._ask("steps")
        return float(self.last["step_s"])

    def flops(self) -> int:
        """FLOPs of one step; asked for last, because counting takes memory of its own."""
        return int(self._ask("flops")["flops"])

    def _ask(self, what: str) -> dict[str, Any]:
        require(self._process.poll() is None, f"step: the process of kind '{self._kind}' ended early")
        self._process.stdin.write(f"{what}\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        require(bool(line), f"step: the process of kind '{self._kind}' ended early; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


def measure(options: argparse.Namespace, config: dict[str, dict[str, object]], report: Report) -> None:
    """Start the three processes, and let them take turns once all are ready."""
    children: dict[str, Child] = {}
    try:
        for kind in KINDS:
            children[kind] = Child(kind, options, config)
        for child in children.values():
            child.wait()
        pixels = {child.ready["pixels"] for child in children.values()}
        require(len(pixels) == 1, f"step: the kinds were given different pixels: {pixels}")
        kinds: dict[str, Callable[[], float]] = {f"step, {kind}": child.repetition for kind, child in children.items()}
        report.measure("s", interleave("step", kinds, options.repetitions))
        for kind, child in children.items():
            own = child.last["peak_bytes"] - child.ready["before_bytes"]  # without Python and libraries
            report.measure("MiB", {f"peak memory, {kind}": [own / 2**20]})
            if child.last["peak_gpu_bytes"]:
                report.measure("MiB", {f"peak GPU memory, {kind}": [child.last["peak_gpu_bytes"] / 2**20]})
        flops = {kind: child.flops() for kind, child in children.items()}
    finally:
        for child in children.values():
            child.close()
    report.ratio("cache / plain", "step, cache", "step, plain", Target(bound=1.03))
    report.ratio("live / cache", "step, live", "step, cache")
    report.ratio("peak memory, live / cache", "peak memory, live", "peak memory, cache")
    report.facts["MiB of libraries, not counted in peak memory"] = children["plain"].ready["before_bytes"] / 2**20
    report.facts |= {f"GFLOPs per image, {kind}": 1e-9 * value / options.batch_size for kind, value in flops.items()}
    report.facts["live / cache by FLOPs alone"] = flops["live"] / flops["cache"]
    report.facts["loss after the timed steps"] = {k: round(child.last["loss"], 4) for k, child in children.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined:
    """Where a batch's features lie in their unit; joining them anew is what a feed does for every batch."""

    batch: FedBatch
    unit: Unit | None
    rows: Any

    def again(self, nodes: Sequence[str]) -> FedBatch:
        """The batch with its features decoded once more from the unit's stored form."""
        if self.unit is None:
            return self.batch
        return dataclasses.replace(self.batch, nodes={name: self.unit.node(name, self.rows) for name in nodes})


class Steps:
    """One kind's student with its batches in memory."""

    def __init__(self, config: Config, kind: str, count: int) -> None:
        self._run: Run = prepare_run(config, JobSplit())
        self._supply = self._run.supply(live=kind == "live")
        self._learner = self._run.learner(self._supply)
        self._device = self._run.device
        with self._run.feed(self._supply) as feed:
            batches = list(feed.batches(epoch=0, step=0, workers=0))
        require(len(batches) == count, f"step: {len(batches)} batches were fed, expected {count}")
        unit = self._run.cached.read(0, 0) if kind == "cache" else None
        self._batches = [
            (Joined(batch=batch, unit=unit, rows=None if unit is None else unit.rows.searchsorted(batch.rendered.row)),
             batch.pixels.to(self._device))
            for batch in batches
        ]  # fmt: skip
        self._step = 0
        self.loss = 0.0

    @property
    def pixels(self) -> str:
        """Digest of all pixels, in order."""
        digest = xxhash.xxh3_64()
        for _, pixels in self._batches:
            digest.update(pixels.cpu().numpy().tobytes())
        return digest.hexdigest()

    def timed(self, steps: int) -> float:
        """Seconds per step, features joined, over `steps` steps."""
        with Stopwatch(self._device) as watch:
            for _ in range(steps):
                terms = self._one()
        self.loss = float(terms["total"])
        return watch.wall_s / steps

    def flops(self) -> int:
        """FLOPs of one step, as counted from its convolutions and matrix products."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self._one()
        return int(counter.get_total_flops())

    def _one(self) -> dict[str, torch.Tensor]:
        joined, pixels = self._batches[self._step % len(self._batches)]
        batch = joined.again(self._supply.nodes)
        train = self._run.config.train
        terms = self._learner.step([(batch, pixels)], self._supply, train.lr, step_seed(train.seed, self._step, 0))
        self._step += 1
        return terms


def serve(request: dict[str, Any]) -> int:
    """Be the process of one kind: answer every line on stdin (`steps` or `flops`) with a line of JSON on stdout."""
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    overrides = dict(request["config"])
    if request["kind"] == "plain":
        overrides["loss"] = {"feature_weight": 0.0, "logit_weight": 0.0}
    before = peak_memory_bytes()
    steps = Steps(load_config(None, overrides), request["kind"], request["batches"])
    steps.timed(1)
    _say({"pixels": steps.pixels, "before_bytes": before})
    for line in sys.stdin:
        if line.strip() == "flops":
            _say({"flops": steps.flops()})
            continue
        step_s = steps.timed(request["steps"])
        on_gpu = torch.cuda.is_available()
        _say(
            {
                "step_s": step_s,
                "loss": steps.loss,
                "peak_bytes": peak_memory_bytes(),
                "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
            }
        )
    return 0


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(guarded(main))
