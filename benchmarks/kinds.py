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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from harness import ROOT, Report, Stopwatch, interleave, require

from vkd_cache.cli import guarded
from vkd_cache.config import Config, load_config
from vkd_cache.runtime import JobSplit, peak_memory_bytes
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.joining import Nodes, Part, joined_nodes
from vkd_cache.stages.learner import Learner, step_seed
from vkd_cache.stages.run import Run, prepare_run
from vkd_cache.stages.supply import nodes_on_device

Overrides = Mapping[str, Mapping[str, object]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of step.

    Attributes:
        config: its configuration.
        live: whether its teacher is in memory.
        timm: whether timm's feature distillation takes the steps; `config` is one without distillation then.
        joined_from: a cache of `made_cache`, from which its features are joined instead of its own.
    """

    config: Overrides
    live: bool = False
    timm: bool = False
    joined_from: str = ""


def without_distillation(config: Overrides) -> Kind:
    """The same student on the same views, with no teacher at all."""
    return Kind(config={**config, "loss": {"feature_weight": 0.0, "logit_weight": 0.0}})


class Child:
    """The process of one kind: ready once it has done its first step, then one repetition per line sent to it."""

    def __init__(self, name: str, kind: Kind, options: argparse.Namespace) -> None:
        self._name = name
        request = dataclasses.asdict(kind)
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
        for name, kind in kinds.items():  # one after the other: together, their first steps may not fit a GPU
            children[name] = Child(name, kind, options)
            children[name].wait()
        pixels = {child.ready["pixels"] for child in children.values()}
        require(len(pixels) == 1, f"step: the kinds were given different pixels: {pixels}")
        steps: dict[str, Callable[[], float]] = {f"step, {name}": child.repetition for name, child in children.items()}
        found = interleave("step", steps, options.repetitions)
        report.measure("s", found)
        rates = {name: [options.batch_size / seconds for seconds in found[f"step, {name}"]] for name in children}
        report.measure("images/s", {f"rate, {name}": rate for name, rate in rates.items()})
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

    def __init__(self, kind: Kind, count: int) -> None:
        config = load_config(None, kind.config)
        self._run: Run = prepare_run(config, JobSplit())
        self._supply = self._run.supply(live=kind.live)
        learner = self._run.learner(self._supply)
        self._device = self._run.device
        self._learner = _timm_learner(config, learner, self._device) if kind.timm else learner
        self._on_gpu = self._device.type == "cuda"
        self._joined = _joined_batches(kind.joined_from, config, self._on_gpu) if kind.joined_from else None
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
        batch, _ = nodes_on_device(self._with_nodes(joined), self._device)
        train = self._run.config.train
        terms = self._learner.step([(batch, pixels)], self._supply, train.lr, step_seed(train.seed, self._step, 0))
        self._step += 1
        return terms

    def _with_nodes(self, joined: Joined) -> FedBatch:
        """The batch with what its feed would have joined, in pinned memory for a GPU."""
        if self._joined is not None:
            return dataclasses.replace(joined.batch, nodes=next(self._joined))
        batch = joined.again(self._supply.nodes)
        if not self._on_gpu:
            return batch
        return dataclasses.replace(batch, nodes={name: values.pin_memory() for name, values in batch.nodes.items()})


def _timm_learner(config: Config, learner: Learner, device: torch.device) -> Any:
    from timm_task import TimmLearner  # no other kind has timm's tasks in its memory

    return TimmLearner(config, learner, device)


def _joined_batches(url: str, config: Config, pin_memory: bool) -> Iterator[Nodes]:
    from made_cache import joined_batches

    return joined_batches(url, config.train.batch_size, pin_memory=pin_memory)


def serve() -> int:
    """Be the process of one kind: answer every line on stdin (`steps` or `flops`) with a line of JSON on stdout."""
    request = json.loads(sys.argv[1])
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    before = peak_memory_bytes()
    kind = Kind(**{field.name: request[field.name] for field in dataclasses.fields(Kind)})
    steps = Steps(kind, request["batches"])
    on_gpu = torch.cuda.is_available()
    steps.timed(1)
    _make_room(on_gpu)
    _say({"pixels": steps.pixels, "before_bytes": before})
    for line in sys.stdin:
        if line.strip() == "flops":
            _say({"flops": steps.flops()})
            continue
        if on_gpu:
            steps.timed(1)  # asks the driver for its memory again
        step_s = steps.timed(request["steps"])
        _make_room(on_gpu)
        _say(
            {
                "step_s": step_s,
                "loss": steps.loss,
                "peak_bytes": peak_memory_bytes(),
                "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
            }
        )
    return 0


def _make_room(on_gpu: bool) -> None:
    """Give back what the allocator keeps: the other kinds' processes are on the same GPU."""
    if on_gpu:
        torch.cuda.empty_cache()


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(guarded(serve))
