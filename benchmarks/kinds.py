"""Kinds of a training step that are compared: each in a process of its own, taking turns, on the very same batches.

What differs between kinds is where teacher outputs come from. Batches are rendered beforehand (what feeding costs is
`read.py`'s business), but reading rows of the unit, decoding and joining what is cached is part of the timed step. A
newcomer's trap: this file is also the program of each kind's process, see `serve`.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from harness import ROOT, Report, Stopwatch, interleave, require

from vkd_cache.cli import guarded
from vkd_cache.config import Config, load_config
from vkd_cache.runtime import JobSplit, peak_memory_bytes
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.joining import Part, joined_nodes
from vkd_cache.stages.learner import step_seed
from vkd_cache.stages.run import Run, prepare_run

Overrides = Mapping[str, Mapping[str, object]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of step: its configuration, and whether its teacher is in memory."""

    config: Overrides
    live: bool = False


def without_distillation(config: Overrides) -> Kind:
    """The same student on the same views, with no teacher at all."""
    return Kind(config={**config, "loss": {"feature_weight": 0.0, "logit_weight": 0.0}})


class Child:
    """The process of one kind: ready once it has done its first step, then one repetition per line sent to it."""

    def __init__(self, name: str, kind: Kind, options: argparse.Namespace) -> None:
        self._name = name
        request = {"config": kind.config, "live": kind.live}
        request |= {"steps": options.steps, "batches": options.batches, "threads": options.threads}
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "kinds.py"), json.dumps(request)],
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
        require(self._process.poll() is None, f"step: the process of kind '{self._name}' ended early")
        self._process.stdin.write(f"{what}\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        require(bool(line), f"step: the process of kind '{self._name}' ended early; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


def measure_kinds(kinds: Mapping[str, Kind], options: argparse.Namespace, report: Report) -> dict[str, int]:
    """Let the processes of all kinds take turns: time and peak memory of a step, by kind; `plain` is one of them.

    Args:
        kinds: by name.
        options: steps and repetitions, number of batches, batch size, threads.
        report: gets the measurements `step, <kind>` and `peak memory, <kind>`, and facts.

    Returns:
        FLOPs of a step by kind.
    """
    children: dict[str, Child] = {}
    try:
        for name, kind in kinds.items():
            children[name] = Child(name, kind, options)
        for child in children.values():
            child.wait()
        pixels = {child.ready["pixels"] for child in children.values()}
        require(len(pixels) == 1, f"step: the kinds were given different pixels: {pixels}")
        steps: dict[str, Callable[[], float]] = {f"step, {name}": child.repetition for name, child in children.items()}
        report.measure("s", interleave("step", steps, options.repetitions))
        for name, child in children.items():
            own = child.last["peak_bytes"] - child.ready["before_bytes"]  # without Python and libraries
            report.measure("MiB", {f"peak memory, {name}": [own / 2**20]})
            if child.last["peak_gpu_bytes"]:
                report.measure("MiB", {f"peak GPU memory, {name}": [child.last["peak_gpu_bytes"] / 2**20]})
        flops = {name: child.flops() for name, child in children.items()}
    finally:
        for child in children.values():
            child.close()
    report.facts["MiB of libraries, not counted in peak memory"] = children["plain"].ready["before_bytes"] / 2**20
    report.facts |= {f"GFLOPs per image, {name}": 1e-9 * value / options.batch_size for name, value in flops.items()}
    report.facts["loss after the timed steps"] = {k: round(child.last["loss"], 4) for k, child in children.items()}
    return flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined:
    """Which rows of a unit belong to a batch; joining them anew is what a feed does for every batch."""

    batch: FedBatch
    part: Part | None

    def again(self, nodes: tuple[str, ...]) -> FedBatch:
        """The batch with its teacher outputs decoded once more from the unit's stored form."""
        if self.part is None:
            return self.batch
        return dataclasses.replace(self.batch, nodes=joined_nodes([self.part], len(self.batch), nodes))


class Steps:
    """One kind's student with its batches in memory."""

    def __init__(self, config: Config, *, live: bool, count: int) -> None:
        self._run: Run = prepare_run(config, JobSplit())
        self._supply = self._run.supply(live=live)
        self._learner = self._run.learner(self._supply)
        self._device = self._run.device
        with self._run.feed(self._supply) as feed:
            batches = list(feed.batches(epoch=0, step=0, workers=0))
        require(len(batches) == count, f"step: {len(batches)} batches were fed, expected {count}")
        # all images are in one shard, so every batch is of its unit alone
        content = self._run.views.open(0, 0) if self._supply.nodes else None
        self._batches = [
            (Joined(
                batch=batch,
                part=None if content is None else Part(content, np.arange(len(batch)), batch.rendered.row),
             ),
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
        """Seconds per step, teacher outputs joined, over `steps` steps."""
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


def serve() -> int:
    """Be the process of one kind: answer every line on stdin (`steps` or `flops`) with a line of JSON on stdout."""
    request = json.loads(sys.argv[1])
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    before = peak_memory_bytes()
    steps = Steps(load_config(None, request["config"]), live=request["live"], count=request["batches"])
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
    sys.exit(guarded(serve))
