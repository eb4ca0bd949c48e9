"""The steps of a training run, in order, with what is kept between them: place, sums, best, and the wish to stop."""

import contextlib
import dataclasses
import json
import math
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vkd_cache import console
from vkd_cache.config import config_to_json
from vkd_cache.errors import ConfigError, IncompleteCacheError, VkdCacheError
from vkd_cache.optim import cosine_lr
from vkd_cache.runtime import hardware, library_versions, write_atomic
from vkd_cache.stages.checkpoints import BEST, LAST, check_same_run, read_checkpoint, save_checkpoint
from vkd_cache.stages.evaluate import EvalResult, accuracy_of
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.journal import CURVES_NAME, LOG_NAME, Journal, draw_curves, read_log
from vkd_cache.stages.learner import TERMS, step_seed
from vkd_cache.stages.run import Run
from vkd_cache.stages.supply import Supply
from vkd_cache.stages.transfer import ahead_on_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """What one run came to.

    Attributes:
        steps: optimizer steps done in all.
        interrupted: a signal stopped it; the checkpoint continues.
        top1, best_top1: accuracy at the end and at best, percent; None without a validation split.
        seconds: wall-clock time of this process' part.
        peak_memory_bytes: largest resident size of the process, plus the GPU's peak.
        output: where checkpoints, logs and curves are.
    """

    steps: int
    interrupted: bool
    top1: float | None
    best_top1: float | None
    seconds: float
    peak_memory_bytes: int
    output: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


class Loop:
    """The steps of a run, with what is kept between them."""

    def __init__(self, run: Run, supply: Supply) -> None:
        self._run = run
        self._supply = supply
        self._learner = run.learner(supply)
        self._feed = run.feed(supply)
        self._output = Path(run.config.train.output)
        self._steps_per_epoch = math.ceil(self._feed.order(0).num_steps / run.config.train.accumulate)
        self._step = 0
        self._epoch, self._batch = 0, 0  # the place of the next batch
        self._window: dict[str, torch.Tensor | float] = {}  # sums of the loss terms since the last log line
        self._window_steps = 0
        self._top1: float | None = None
        self._best: float | None = None
        self._stop = False
        if self._steps_per_epoch == 0:
            needed = run.config.train.batch_size * run.split.count
            raise ConfigError(
                f"[train] batch_size: one step takes {needed} samples ({run.split.count} processes of "
                f"{run.config.train.batch_size}), {run.source.location} has fewer usable ones. Use a smaller "
                "--batch-size."
            )

    def resume(self, path: Path) -> None:
        """Continue at the step after the one that `path` was written at."""
        state = read_checkpoint(path)
        check_same_run(path, state, self._run.config)
        self._learner.load_state(state)
        self._step, self._epoch, self._batch = state["step"], state["epoch"], state["batch"]
        self._window, self._window_steps = dict(state["window"]), state["window_steps"]
        self._top1, self._best = state["top1"], state["best_top1"]
        if list(self._run.views.views)[: len(state["views"])] != state["views"]:
            raise IncompleteCacheError(
                f"{path}: was made with views {state['views']}, of which the cache does not hold all any more."
            )
        self._run.views.views = state["views"]  # a cache may have grown since; this run goes on as it began
        console.say(f"train: continuing at step {self._step + 1} from {path}")

    def go(self) -> bool:
        """Train to the end, or to a signal; True when a signal stopped it."""
        train = self._run.config.train
        if self._leads:
            self._output.mkdir(parents=True, exist_ok=True)
            self._write_run_file()
        total = self._steps_per_epoch * train.epochs
        with (
            self._feed,
            self._listening(),
            self._journal() as journal,
            console.track("train", total, "steps") as progress,
        ):
            progress.advance(self._step)
            batches = self._feed.batches(
                epoch=self._epoch, step=self._batch, workers=train.workers, pin_memory=self._on_gpu
            )
            for group in self._grouped(batches):
                self._one_step(group, total)
                progress.advance(1)
                if self._step % train.log_every == 0:
                    progress.detail(self._log(journal))
                if self._batch == 0:
                    self._end_epoch(journal)
                elif train.checkpoint_every and self._step % train.checkpoint_every == 0:
                    self._save(LAST)
                if self._should_stop():
                    self._save(LAST)
                    return True
        if self._leads:
            draw_curves(
                self._output / CURVES_NAME,
                {self._run.config.student.name: read_log(self._output / LOG_NAME)},
                f"{self._run.config.student.name} on {self._run.source.location}",
            )
        return False

    def _grouped(self, batches: Iterator[FedBatch]) -> Iterator[list[tuple[FedBatch, torch.Tensor]]]:
        """The batches of each optimizer step, with pixels on the device; the last step of an epoch may have fewer."""
        group: list[tuple[FedBatch, torch.Tensor]] = []
        for batch, pixels in ahead_on_device(batches, self._run.device):
            group.append((batch, pixels))
            if len(group) == self._run.config.train.accumulate or batch.ends_epoch:
                yield group
                group = []

    def _one_step(self, group: list[tuple[FedBatch, torch.Tensor]], total: int) -> None:
        train = self._run.config.train
        self._lr = cosine_lr(
            self._step, total, train.lr, train.min_lr, round(train.warmup_epochs * self._steps_per_epoch)
        )
        seed = step_seed(train.seed, self._step, self._run.split.index)
        terms = self._learner.step(group, self._supply, self._lr, seed)
        for name, value in terms.items():
            self._window[name] = self._window.get(name, 0.0) + value
        self._window_steps += 1
        self._step += 1
        last = group[-1][0]
        self._epoch, self._batch = (last.epoch + 1, 0) if last.ends_epoch else (last.epoch, last.step + 1)

    def _log(self, journal: Journal | None) -> str:
        """Write a line; here, and only here, the host waits for the device."""
        means = {name: float(value) / self._window_steps for name, value in self._window.items()}
        self._window, self._window_steps = {}, 0
        if not math.isfinite(means["total"]):
            raise VkdCacheError(
                f"step {self._step}: the loss is {means['total']} ({means}). The last checkpoint is intact; use a "
                "smaller --lr, --amp bf16 or off, or [train] clip_grad."
            )
        if journal is not None:
            ordered = {name: means[name] for name in TERMS if name in means}
            journal.write("step", self._step, {"epoch": self._epoch, "lr": self._lr} | ordered)
        accuracy = f" | top-1 {self._top1:.2f}" if self._top1 is not None else ""
        shown = " ".join(f"{name} {means[name]:.4f}" for name in TERMS if name in means)
        return f"epoch {self._epoch}/{self._run.config.train.epochs} {shown} lr {self._lr:.2e}{accuracy}"

    def _end_epoch(self, journal: Journal | None) -> None:
        train = self._run.config.train
        due = self._epoch == train.epochs or (train.eval_every and self._epoch % train.eval_every == 0)
        improved = False
        if due and self._run.val_source is not None:
            improved = self._evaluate(journal)
        self._save(LAST)
        if improved:
            self._save(BEST)

    def _evaluate(self, journal: Journal | None) -> bool:
        """Accuracy of the student and of its average; True when the better one is the best so far."""
        results = {"": self._accuracy(self._learner.student)}
        if self._learner.ema is not None:
            results["ema_"] = self._accuracy(self._learner.ema.module)
        values: dict[str, Any] = {"epoch": self._epoch}
        for prefix, result in results.items():
            values |= {f"{prefix}top1": result.top1, f"{prefix}top5": result.top5}
        if journal is not None:
            journal.write("eval", self._step, values)
        self._top1 = results[""].top1
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in values.items() if name != "epoch")
        console.say(f"epoch {self._epoch}: {shown}")
        best = max(result.top1 for result in results.values())
        improved = self._best is None or best > self._best
        self._best = best if improved else self._best
        return improved

    def _accuracy(self, model: torch.nn.Module) -> EvalResult:
        run = self._run
        if run.val_source is None:
            raise ConfigError("[source] val is empty")
        return accuracy_of(model, run.val_source, run.config, run.device, run.split)

    def _save(self, name: str) -> None:
        if not self._leads:
            return
        state = self._learner.state() | {
            "step": self._step,
            "epoch": self._epoch,
            "batch": self._batch,
            "window": {term: float(value) for term, value in self._window.items()},
            "window_steps": self._window_steps,
            "top1": self._top1,
            "best_top1": self._best,
            "views": list(self._run.views.views),
            "config": json.loads(json.dumps(config_to_json(self._run.config))),
            "num_classes": self._run.num_classes,
            "teacher_width": self._supply.width,
            "fingerprint": self._run.cache.fingerprint if self._run.cache is not None else None,
        }
        save_checkpoint(self._output / name, state)

    def _journal(self) -> Any:
        if not self._leads:
            return contextlib.nullcontext(None)
        return Journal(self._output, upto_step=self._step, tensorboard=self._run.config.train.tensorboard)

    def _write_run_file(self) -> None:
        cache = self._run.cache
        document = {
            "command": "train",
            "config": config_to_json(self._run.config),
            "processes": self._run.split.count,
            "cache_fingerprint": cache.fingerprint if cache is not None else None,
            "views": list(self._run.views.views),
            "versions": library_versions(),
            "hardware": hardware(),
        }
        write_atomic(self._output / "run.json", json.dumps(document, indent=2).encode())

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask for a stop at the next step boundary; a second SIGINT stops at once."""

        def ask(number: int, _: Any) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            console.say(f"train: {signal.Signals(number).name}: saving after this step")

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _should_stop(self) -> bool:
        """Whether any rank was asked to stop; all ranks must leave at the same step."""
        if self._run.split.count == 1:
            return self._stop
        if self._on_gpu and self._step % self._run.config.train.log_every:
            return False  # asking makes the host wait for the GPU
        asked = torch.tensor(int(self._stop), device=self._run.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    @property
    def _leads(self) -> bool:
        return self._run.split.index == 0

    @property
    def _on_gpu(self) -> bool:
        return self._run.device.type == "cuda"

    def summary(self, interrupted: bool, seconds: float) -> TrainSummary:
        """What the run came to."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self._on_gpu:
            peak += torch.cuda.max_memory_allocated(self._run.device)
        return TrainSummary(
            steps=self._step,
            interrupted=interrupted,
            top1=self._top1,
            best_top1=self._best,
            seconds=seconds,
            peak_memory_bytes=peak,
            output=str(self._output),
        )
