"""Is training from the cache training with the live teacher? Measured twice, on the same views.

In lockstep: at every step one student computes both losses, and their gradients, from one forward pass; the cached
ones move it. What differs is the cache alone, so bounds can be stated. Free-running: two students start equal and go
their own ways; small differences grow as they do between any two runs, so the curves are shown beside each other.
"""

import dataclasses
import functools
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vkd_cache import console
from vkd_cache.cache.reader import Cache
from vkd_cache.config import Config, config_to_json
from vkd_cache.errors import ConfigError
from vkd_cache.optim import cosine_lr
from vkd_cache.runtime import JobSplit, hardware, library_versions, write_atomic
from vkd_cache.stages.drift import say_other_numerics
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.journal import draw_curves
from vkd_cache.stages.learner import Learner, step_seed
from vkd_cache.stages.nonfinite import StepNote, place_of, report
from vkd_cache.stages.run import Run, prepare_run
from vkd_cache.stages.standing import LossWindow
from vkd_cache.stages.supply import Supply, nodes_on_device
from vkd_cache.stages.transfer import ahead_on_device

# largest relative gap of a loss term at any step, by codec (the contract's targets)
BOUNDS = {
    "float32": 1e-3, "float16": 1e-3, "bfloat16": 5e-3, "sqrt_uint8": 5e-3, "sqrt_uint4": 0.1, "token_int8": 5e-3,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareReport:
    """Gaps between the cached and the live teacher.

    Attributes:
        steps: steps compared.
        codecs: codec of each node of the cache.
        bound: largest relative loss gap allowed at any step.
        lockstep: per loss term, |cached - live| / |live| of each step.
        gradient: |g_cached - g_live| / |g_live| of each step, over all parameters; without the steps that fp16's
            scaler skips because a gradient overflows.
        gradient_cosine: cosine between both gradients, of the same steps.
        cached, live: loss terms of the free-running students, of each step.
    """

    steps: int
    codecs: dict[str, str]
    bound: float
    lockstep: dict[str, list[float]]
    gradient: list[float]
    gradient_cosine: list[float]
    cached: dict[str, list[float]]
    live: dict[str, list[float]]

    @property
    def within_bound(self) -> bool:
        """Whether every loss term stayed within the bound at every step."""
        return all(gap <= self.bound for gaps in self.lockstep.values() for gap in gaps)

    @property
    def exit_code(self) -> int:
        """0, or 1 when a gap is larger than the bound."""
        return 0 if self.within_bound else 1

    def to_json(self) -> dict[str, Any]:
        """Both comparisons in short, plain JSON; `curves` has every step."""
        gaps = [
            {"gap of": f"{name} loss"} | _spread(values) | {"bound": self.bound}
            for name, values in self.lockstep.items()
        ]
        return {
            "steps": self.steps,
            "codecs": self.codecs,
            "bound": self.bound,
            "within_bound": self.within_bound,
            "lockstep": [*gaps, {"gap of": "gradient"} | _spread(self.gradient) | {"bound": None}],
            "gradient_cosine": min(self.gradient_cosine, default=None),
            "free_running": [
                {"loss at the end": name, "cached": _tail(self.cached[name]), "live": _tail(self.live[name])}
                for name in self.lockstep
            ],
        }

    def curves(self) -> dict[str, Any]:
        """Every number of every step, plain JSON."""
        names = ("lockstep", "gradient", "gradient_cosine", "cached", "live")
        return {name: getattr(self, name) for name in names}


def compare(config: Config, *, steps: int) -> CompareReport:
    """Train `steps` steps from the cache and with the live teacher, in lockstep and free-running.

    Raises:
        VkdCacheError: as `train` and `extract` do for what they read; a loss that is not finite.
    """
    if not config.cache.url or not config.teacher.name:
        raise ConfigError("compare needs both teachers: --cache, and --teacher with its weights (or a pipeline file).")
    # every view is checked: a gap must not come from other pixels
    train = dataclasses.replace(config.train, epochs=10**6, digest_check=1.0)
    run = prepare_run(dataclasses.replace(config, train=train), JobSplit())
    if not run.distils:
        raise ConfigError(
            "[loss] feature_weight and logit_weight are 0: no teacher to compare (detectors have no logit loss)."
        )
    cached, live = run.supply(live=False), run.supply(live=True)
    say_other_numerics(run.cached, live)
    lockstep, gradient, cosine = _lockstep(run, cached, live, steps)
    stored = [run.cached.manifest.node(name) for name in cached.nodes]
    report = CompareReport(
        steps=steps,
        codecs={node.name: node.codec for node in run.cached.manifest.nodes},
        bound=max(BOUNDS[codec] for node in stored for codec in (*node.passed, node.codec)),
        lockstep=lockstep,
        gradient=gradient,
        gradient_cosine=cosine,
        cached=_free(run, cached, cached, steps, "compare: from the cache"),
        live=_free(run, live, cached, steps, "compare: live teacher"),
    )
    _write(run.output, dataclasses.replace(run.config, train=config.train), run.cached, report)
    verdict = "within" if report.within_bound else "NOT within"
    console.say(f"compare: every loss is {verdict} {report.bound:g} of the live teacher's at every step")
    return report


def _batches(run: Run, nodes_of: Supply, steps: int) -> Iterator[tuple[int, FedBatch, Tensor]]:
    """The first `steps` batches with their pixels on the device; `nodes_of` says which stored values ride along."""
    on_gpu = run.device.type == "cuda"
    with run.feed(nodes_of) as feed:
        if feed.order(0).num_steps == 0:
            raise ConfigError(
                f"[train] batch_size: found {run.config.train.batch_size}, and {run.source.location} has fewer usable "
                "samples. Use a smaller --batch-size."
            )
        fed = feed.batches(epoch=0, step=0, workers=run.config.train.workers, pin_memory=on_gpu)
        ahead = ahead_on_device(fed, run.device, nodes_on_device)
        for step, (batch, pixels) in enumerate(itertools.islice(ahead, steps)):
            yield step, batch, pixels


class _Watch:
    """Stops at the first loss that is not finite: no gap could be told from it."""

    def __init__(self, run: Run, nodes_of: Supply, terms: Sequence[str]) -> None:
        reported = functools.partial(report, run=run, nodes=nodes_of.nodes, command="compare")
        self._window = LossWindow(terms, run.split, run.device, reported)

    def see(self, step: int, batch: FedBatch, lr: float, terms: Mapping[str, Tensor]) -> None:
        """Look at the loss terms of one step, counted from 0.

        Raises:
            VkdCacheError: one is not finite.
        """
        self._window.add(StepNote(step=step + 1, lr=lr, batches=(place_of(batch),), terms=terms))
        self._window.look(step + 1)


def _lockstep(
    run: Run, cached: Supply, live: Supply, steps: int
) -> tuple[dict[str, list[float]], list[float], list[float]]:
    learner = run.learner(cached)
    gaps: dict[str, list[float]] = {}
    gradient, cosine = [], []
    sides = ("live", "cached")
    watch = _Watch(run, cached, [f"{side} {name}" for side in sides for name in learner.task.terms])
    with console.track("compare: lockstep", steps, "steps") as progress:
        for step, batch, pixels in _batches(run, cached, steps):
            lr = _lr(run.config, step, steps)
            images = learner.task.images(batch, pixels)
            learner.model.train()
            torch.manual_seed(step_seed(run.config.train.seed, step, 0))
            outputs = learner.outputs(images)
            both = [learner.task.losses(outputs, batch, supply(batch, images)) for supply in (live, cached)]
            terms = {f"{side} {name}": one[name] for side, one in zip(sides, both, strict=True) for name in one}
            watch.see(step, batch, lr, terms)
            for name in (name for name in learner.task.terms if name in both[0]):
                reference, value = (float(terms[name].detach()) for terms in both)
                gaps.setdefault(name, []).append(abs(value - reference) / max(abs(reference), 1e-12))
            live_gradient = _gradient(learner, both[0]["total"], keep_graph=True)
            cached_gradient = _gradient(learner, both[1]["total"], keep_graph=False)
            if bool((live_gradient + cached_gradient).isfinite().all()):
                norm = live_gradient.norm().clamp_min(1e-30)
                gradient.append(float((cached_gradient - live_gradient).norm() / norm))
                cosine.append(float(torch.nn.functional.cosine_similarity(cached_gradient, live_gradient, dim=0)))
            learner.update(lr)
            progress.advance(1)
            progress.detail(f"largest gap {max(max(values) for values in gaps.values()):.2e}")
    return gaps, gradient, cosine


def _gradient(learner: Learner, loss: Tensor, *, keep_graph: bool) -> Tensor:
    """All gradients of `loss` as one float64 vector, scaled under fp16; they are also left on the parameters."""
    learner.optimizer.zero_grad(set_to_none=True)
    learner.backward(loss, keep_graph=keep_graph)
    return torch.cat([p.grad.flatten().double() for p in learner.student.parameters() if p.grad is not None])


def _lr(config: Config, step: int, steps: int) -> float:
    return cosine_lr(step, steps, config.train.lr, config.train.min_lr, 0)


def _free(run: Run, supply: Supply, nodes_of: Supply, steps: int, title: str) -> dict[str, list[float]]:
    learner = run.learner(supply)
    terms: dict[str, list[float]] = {}
    watch = _Watch(run, nodes_of, learner.task.terms)
    with console.track(title, steps, "steps") as progress:
        for step, batch, pixels in _batches(run, nodes_of, steps):
            seed, lr = step_seed(run.config.train.seed, step, 0), _lr(run.config, step, steps)
            values = learner.step([(batch, pixels)], supply, lr, seed)
            watch.see(step, batch, lr, values)
            for name, value in values.items():
                terms.setdefault(name, []).append(float(value))
            progress.advance(1)
    return terms


def _spread(gaps: Sequence[float]) -> dict[str, float | None]:
    return {"median": statistics.median(gaps) if gaps else None, "largest": max(gaps, default=None)}


def _tail(values: Sequence[float]) -> float:
    return statistics.fmean(values[-max(1, math.ceil(len(values) / 10)) :])


def _write(output: Path, config: Config, cache: Cache, report: CompareReport) -> None:
    output.mkdir(parents=True, exist_ok=True)
    document = report.to_json() | {
        "curves": report.curves(),
        "command": "compare",
        "config": config_to_json(config),
        "cache_fingerprint": cache.fingerprint,
        "versions": library_versions(),
        "hardware": hardware(),
    }
    write_atomic(output / "compare.json", json.dumps(document, indent=2).encode())
    lines = {
        title: [
            {"kind": "step", "step": step + 1} | {name: values[step] for name, values in terms.items()}
            for step in range(report.steps)
        ]
        for title, terms in (("from the cache", report.cached), ("live teacher", report.live))
    }
    draw_curves(output / "compare.png", lines, "free-running: from the cache against the live teacher")
