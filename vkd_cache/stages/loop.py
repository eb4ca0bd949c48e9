"""The steps of a training run, in order, and what happens between them: log lines, evaluations, checkpoints, stops.

An epoch ends in this order: `last.pt` is saved with the evaluation due, the student is evaluated, `best.pt` is saved
where it is one, then `last.pt` again. So a crash or a signal at any moment costs at most what came after the last
checkpoint, and a run that continues does exactly what the uninterrupted one did.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vkd_cache import console
from vkd_cache.config import config_to_json
from vkd_cache.errors import CheckpointError, ConfigError, VkdCacheError
from vkd_cache.optim import cosine_lr
from vkd_cache.runtime import hardware, library_versions, write_atomic
from vkd_cache.stages.checkpoints import BEST, LAST, check_same_run, read_checkpoint, remove_stale, save_checkpoint
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.journal import CURVES_NAME, LOG_NAME, METRIC_LABELS, Journal, draw_curves, read_log
from vkd_cache.stages.learner import step_seed
from vkd_cache.stages.nonfinite import Fault, Incident, StepNote, place_of, remove_reports, report
from vkd_cache.stages.ranks import union
from vkd_cache.stages.run import Run
from vkd_cache.stages.standing import LossWindow, Standing
from vkd_cache.stages.stopping import Stopped, StopSignals
from vkd_cache.stages.supply import Supply, nodes_on_device
from vkd_cache.stages.transfer import ahead_on_device


class Loop:
    """The steps of a run, with what is kept between them.

    Attributes:
        standing: how far the run has come.
        num_broken: broken images that were left out, on all ranks; known when `go` is done.
    """

    def __init__(self, run: Run, supply: Supply, checkpoint: Path | None = None) -> None:
        """`checkpoint`: continue at the step after the one that it was written at.

        Raises:
            CheckpointError: it was made by another run: configuration, data, cache or number of processes differ.
            IncompleteCacheError: views that it was trained with are gone.
        """
        self._run = run
        self._supply = supply
        self._checkpoint = checkpoint
        state = self._checked_state(checkpoint) if checkpoint is not None else None
        # after the checkpoint has said which views: whitening looks at the first
        self._learner = run.learner(supply, fresh=state is None)
        self._feed = run.feed(supply)
        self._output = run.output
        self.standing = Standing()
        self.num_broken = 0
        self._window = LossWindow(self._learner.task.terms, run.split, run.device, self._report)
        self._lr = 0.0
        self._clock, self._samples = time.monotonic(), 0  # since the last log line
        self._stop = StopSignals(run.split, run.device, run.config.train.log_every)
        if state is not None:
            self._load(state)
            console.say(f"train: continuing at step {self.standing.step + 1} from {checkpoint}")

    def _checked_state(self, path: Path) -> dict[str, Any]:
        """The state in a checkpoint of this very run, whose views the run takes over."""
        state = read_checkpoint(path)
        check_same_run(path, state, self._run.config, self._identity())
        self._run.use_views(state["views"], path)
        return state

    def _load(self, state: dict[str, Any]) -> None:
        """Take over what `save` kept.

        Raises:
            CheckpointError: it is not of this run's student, optimizer or losses, whatever it says of itself.
        """
        try:
            self._learner.load_state(state)
            self.standing = Standing.from_json(state["standing"])
            self._window.load(state["window"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{self._checkpoint}: holds a state that does not fit this run ({reason:.200}). Was it edited? Start a "
                "new run in another --output."
            ) from error

    def go(self) -> bool:
        """Train to the end, or to a signal; True when a signal stopped it.

        Raises:
            ConfigError: the data does not fill one step, or the warm-up is as long as the run.
            VkdCacheError: the loss is not finite; what the feed raises.
        """
        total = self.steps_per_epoch() * self._run.config.train.epochs
        self._learning_rate(0, total)
        if self._leads:
            self._output.mkdir(parents=True, exist_ok=True)
            remove_stale(self._output)
            remove_reports(self._output)
            self._bring_best_along()
            self._write_run_file()
        with self._feed, self._stop, self._journal() as journal, console.track("train", total, "steps") as progress:
            progress.advance(self.standing.step)
            stopped = self._train(journal, progress, total)
            self.num_broken = max(self._run.views.num_broken, len(union(self._feed.broken, self._run.split)))
        if self._leads and not stopped:
            name = self._run.config.student.name
            draw_curves(
                self._output / CURVES_NAME,
                {name: read_log(self._output / LOG_NAME)},
                f"{name} on {self._run.source.location}",
            )
        return stopped

    def _bring_best_along(self) -> None:
        """Copy the best student so far, where a run continues in another output: it may never be beaten there."""
        if self._checkpoint is None or self.standing.best_score is None:
            return
        before, here = self._checkpoint.parent / BEST, self._output / BEST
        if before.is_file() and not here.exists():
            write_atomic(here, before.read_bytes())

    def _train(self, journal: Journal | None, progress: console.Progress, total: int) -> bool:
        train, standing = self._run.config.train, self.standing
        if standing.eval_due:
            self._evaluate_due(journal)
        if self._stop.agreed(0):
            return True
        batches = self._feed.batches(
            epoch=standing.epoch, step=standing.batch, workers=train.workers, pin_memory=self._on_gpu
        )
        for group in self._grouped(batches):
            self._one_step(group, total)
            progress.advance(1)
            if standing.step % train.log_every == 0:
                progress.detail(self._log(journal))
            elif self._window.is_full:
                self._look()
            if standing.batch == 0:
                self._end_epoch(journal)
            elif train.checkpoint_every and standing.step % train.checkpoint_every == 0:
                self._save(journal, LAST)
            if self._stop.agreed(standing.step):
                self._save(journal, LAST)
                return True
        return False

    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch.

        Raises:
            ConfigError: the data does not fill one.
        """
        run = self._run
        steps = math.ceil(self._feed.order(0).num_steps / run.config.train.accumulate)
        if steps == 0:
            needed = run.config.train.batch_size * run.split.count
            raise ConfigError(
                f"[train] batch_size: one step takes {needed} samples ({run.split.count} processes of "
                f"{run.config.train.batch_size}), {run.source.location} has fewer usable ones. Use a smaller "
                "--batch-size."
            )
        return steps

    def _grouped(self, batches: Iterator[FedBatch]) -> Iterator[list[tuple[FedBatch, torch.Tensor]]]:
        """The batches of each optimizer step, with pixels on the device; the last step of an epoch may have fewer."""
        group: list[tuple[FedBatch, torch.Tensor]] = []
        for batch, pixels in ahead_on_device(batches, self._run.device, nodes_on_device):
            group.append((batch, pixels))
            if len(group) == self._run.config.train.accumulate or batch.ends_epoch:
                yield group
                group = []

    def _one_step(self, group: list[tuple[FedBatch, torch.Tensor]], total: int) -> None:
        standing, split = self.standing, self._run.split
        self._lr = self._learning_rate(standing.step, total)
        seed = step_seed(self._run.config.train.seed, standing.step, split.index)
        terms = self._learner.step(group, self._supply, self._lr, seed)
        self._samples += sum(len(batch) for batch, _ in group) * split.count
        standing.step += 1
        places = tuple(place_of(batch) for batch, _ in group)
        norm = self._learner.gradient_norm
        self._window.add(StepNote(step=standing.step, lr=self._lr, batches=places, terms=terms, gradient_norm=norm))
        last = group[-1][0]
        standing.epoch, standing.batch = (last.epoch + 1, 0) if last.ends_epoch else (last.epoch, last.step + 1)

    def _learning_rate(self, step: int, total: int) -> float:
        train = self._run.config.train
        warmup = round(train.warmup_epochs * total / train.epochs)
        return cosine_lr(step, total, train.lr, train.min_lr, warmup)

    def _look(self, fault: Fault = Fault.NONE) -> None:
        """Look at the losses so far; here, and when all is saved, the host waits for the device, and nowhere else.

        Raises:
            VkdCacheError: one is not finite, or there is a fault, on any rank; all of them call this.
        """
        sunk = Fault.SCALE if self._learner.scale_has_sunk() else Fault.NONE
        self._window.look(self.standing.step, fault or sunk)

    def _report(self, incident: Incident) -> VkdCacheError:
        return report(incident, self._run, self._supply.nodes)

    def _log(self, journal: Journal | None) -> str:
        """Write a line."""
        standing = self.standing
        self._look()
        means = self._window.take()
        now = time.monotonic()
        rate = self._samples / max(now - self._clock, 1e-9)
        self._clock, self._samples = now, 0
        if journal is not None:
            values = {"epoch": standing.epoch, "lr": self._lr} | means | {"samples_per_s": round(rate, 1)}
            journal.write("step", standing.step, values)
        score = f" | {METRIC_LABELS[self.metric]} {standing.score:.2f}" if standing.score is not None else ""
        shown = " ".join(f"{name} {value:.4f}" for name, value in means.items())
        return f"epoch {standing.epoch}/{self._run.config.train.epochs} {shown} lr {self._lr:.2e}{score}"

    def _end_epoch(self, journal: Journal | None) -> None:
        train, epoch = self._run.config.train, self.standing.epoch
        due = epoch >= train.epochs or (train.eval_every > 0 and epoch % train.eval_every == 0)
        self.standing.eval_due = due and self._run.val_source is not None
        self._save(journal, LAST)
        if self.standing.eval_due:
            self._evaluate_due(journal)

    def _evaluate_due(self, journal: Journal | None) -> None:
        """Evaluate and save; after a signal, leave it due, for the run that continues."""
        try:
            values = self._scores()
        except Stopped:
            return
        standing = self.standing
        if journal is not None:
            journal.write("eval", standing.step, {"epoch": standing.epoch} | values)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in values.items())
        console.say(f"epoch {standing.epoch}: {shown}")
        standing.score = values[self.metric]
        best = max(standing.score, values.get(f"ema_{self.metric}", 0.0))
        improved = standing.best_score is None or best > standing.best_score
        standing.best_score = best if improved else standing.best_score
        standing.eval_due = False
        self._save(journal, *([BEST] if improved else []), LAST)
        self._clock, self._samples = time.monotonic(), 0

    def _scores(self) -> dict[str, float]:
        """The task's metrics of the student and of its average (`ema_...`), percent."""
        run, learner = self._run, self._learner
        learner.align_ranks()
        models: dict[str, torch.nn.Module] = {"": learner.student}
        if learner.ema is not None:
            models["ema_"] = learner.ema.module
        values: dict[str, float] = {}
        for prefix, model in models.items():
            if run.val_source is not None:
                found = learner.task.evaluate(model, run.val_source, run.split, self._stop.check)
                values |= {f"{prefix}{name}": value for name, value in found.items()}
        return values

    def _save(self, journal: Journal | None, *names: str) -> None:
        """Write the state under `names`; all ranks call this, the first one writes."""
        self._look(Fault.NONE if self._learner.is_finite() else Fault.WEIGHTS)
        if journal is None:
            return
        state = self._learner.state() | {
            "standing": self.standing.to_json(),
            "window": self._window.state(),
            "views": list(self._run.views.views),
            "config": json.loads(json.dumps(config_to_json(self._run.config))),
            "num_classes": self._run.num_classes,
            "teacher_width": self._supply.width,
            "identity": self._identity(),
        }
        journal.sync()
        for name in names:
            save_checkpoint(self._output / name, state)

    def _identity(self) -> dict[str, Any]:
        """What else decides a run's result, and cannot be seen in its configuration."""
        run = self._run
        return {
            "source": run.source_hash,
            "cache fingerprint": run.cache.fingerprint if run.cache is not None else None,
            "processes": run.split.count,
        }

    def _journal(self) -> Any:
        if not self._leads:
            return contextlib.nullcontext(None)
        standing = self.standing
        return Journal(
            self._output,
            upto_step=standing.step,
            evaluated=not standing.eval_due,
            tensorboard=self._run.config.train.tensorboard,
        )

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

    @property
    def metric(self) -> str:
        """The metric that is watched."""
        return self._learner.task.metric

    @property
    def _leads(self) -> bool:
        return self._run.split.index == 0

    @property
    def _on_gpu(self) -> bool:
        return self._run.device.type == "cuda"
