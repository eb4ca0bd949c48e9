"""Stage two: train a student from cached teacher features, with no teacher in the process.

    source shards + units -> feed (worker processes render, this one joins) -> student + projector -> losses -> step

Read `train` first: it is the run in the order it happens. What a run is made of lies in `feed` (data), `supply`
(teacher outputs), `learner` (model and one step), `checkpoints` and `journal`.
"""

import contextlib
import dataclasses
import json
import math
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vkd_cache import console
from vkd_cache.cache.reader import Cache, open_cache
from vkd_cache.config import Config, config_to_json, parse_view_range
from vkd_cache.errors import CacheMismatchError, ConfigError, IncompleteCacheError, VkdCacheError
from vkd_cache.optim import cosine_lr
from vkd_cache.runtime import JobSplit, hardware, library_versions, resolve_device, write_atomic
from vkd_cache.sources import Source, open_source, source_identity
from vkd_cache.stages.checkpoints import (
    BEST,
    LAST,
    check_same_run,
    find_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from vkd_cache.stages.evaluate import EvalResult, accuracy_of
from vkd_cache.stages.feed import CachedViews, FedBatch, Feed, PlannedViews, Schedule, Views
from vkd_cache.stages.journal import CURVES_NAME, LOG_NAME, Journal, draw_curves, read_log
from vkd_cache.stages.learner import TERMS, Learner, step_seed
from vkd_cache.stages.rendering import Renderer
from vkd_cache.stages.supply import CachedTeacher, LiveTeacher, NoTeacher, Supply
from vkd_cache.stages.transfer import ahead_on_device
from vkd_cache.views.recipe import Recipe, make_recipe


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A training run, resolved: everything that `train` and `compare` need before the first step."""

    config: Config
    split: JobSplit
    device: torch.device
    source: Source
    val_source: Source | None
    cache: Cache | None
    recipe: Recipe
    views: Views
    num_classes: int

    def supply(self, *, live: bool) -> Supply:
        """Teacher outputs from a live teacher or from the cache, or none where no loss asks for them."""
        loss = self.config.loss
        if loss.feature_weight == 0 and loss.logit_weight == 0:
            return NoTeacher()
        if live:
            return LiveTeacher(self.config, self.num_classes, self.recipe.size_px, self.device)
        if self.cache is None:
            raise ConfigError(
                "[loss] feature_weight and logit_weight ask for a teacher: give --cache, or --live-teacher, or train "
                "without distillation (--plain, or both weights 0)."
            )
        return CachedTeacher(self.cache, loss, self.device)

    def feed(self, supply: Supply) -> Feed:
        """The batches of this rank."""
        train = self.config.train
        renderer = Renderer(self.source, self.recipe, self._view_seed())
        schedule = Schedule(
            epochs=train.epochs,
            batch_size=train.batch_size,
            seed=train.seed,
            open_shards=train.open_shards,
            rank=self.split.index,
            world=self.split.count,
            digest_check=train.digest_check,
        )
        return Feed(renderer, self.views, schedule, supply.nodes)

    def _view_seed(self) -> int:
        return self.cache.manifest.seed if self.cache is not None else self.config.views.seed

    def learner(self, supply: Supply) -> Learner:
        """A student at its initial weights."""
        return Learner(
            self.config,
            num_classes=self.num_classes,
            teacher_width=supply.width,
            device=self.device,
            world=self.split.count,
        )


def train(config: Config, split: JobSplit, *, dry_run: bool = False) -> TrainSummary:
    """Train a student as `config` says; under torchrun, this process' share of it.

    Raises:
        VkdCacheError: a configuration, source, cache or checkpoint that cannot be used; pixels that differ from those
            the teacher saw.
    """
    started = time.monotonic()
    _check_config(config)
    run = prepare_run(config, split)
    checkpoint = find_checkpoint(config)
    if dry_run:
        return _dry_run(run, checkpoint)
    with _process_group(run):
        supply = run.supply(live=config.train.live_teacher)
        loop = _Loop(run, supply)
        if checkpoint is not None:
            loop.resume(checkpoint)
        interrupted = loop.go()
    summary = loop.summary(interrupted, time.monotonic() - started)
    _say_summary(summary)
    return summary


def _check_config(config: Config) -> None:
    problems = [
        f"{where} is empty: give {flag} or set it in the pipeline file."
        for where, value, flag in (
            ("[source] train", config.source.train, "--source"),
            ("[student] name", config.student.name, "--student"),
            ("[train] output", config.train.output, "--output"),
        )
        if not value
    ]
    if config.train.batch_size % 2:
        problems.append(
            f"[train] batch_size: found {config.train.batch_size}, expected an even number, so that the two images of "
            "a mixed pair are in one batch."
        )
    if config.loss.task_weight == config.loss.feature_weight == config.loss.logit_weight == 0:
        problems.append("[loss] all three weights are 0: there is nothing to learn.")
    if problems:
        raise ConfigError("\n".join(problems))


def prepare_run(config: Config, split: JobSplit) -> Run:
    """Open what a run reads, and check that source and cache belong together.

    Raises:
        CacheMismatchError: the cache was made from another data set.
        IncompleteCacheError: not one view of the cache is complete.
    """
    device = torch.device(resolve_device(config.train.device, split.local_index))
    source = open_source(config.source.train, split="train", shard_size=config.source.shard_size)
    cache = open_cache(config.cache.url) if config.cache.url and not _plans_alone(config) else None
    if cache is None:
        recipe = make_recipe(config.views)
        planned = parse_view_range(config.views.count) if config.views.count else range(config.train.epochs)
        views: Views = PlannedViews(source, recipe, config.views.seed, list(planned))
    else:
        check_same_source(cache, source)
        recipe = Recipe.from_json(cache.manifest.recipe)
        config = dataclasses.replace(config, views=dataclasses.replace(config.views, size_px=recipe.size_px))
        views = CachedViews(cache, source, recipe, complete_views(cache, len(source.shards)))
    val_source = _open_val(config)
    return Run(
        config=config,
        split=split,
        device=device,
        source=source,
        val_source=val_source,
        cache=cache,
        recipe=recipe,
        views=views,
        num_classes=source.num_classes,
    )


def _plans_alone(config: Config) -> bool:
    """Training without distillation needs no cache, and a pipeline's may not exist yet."""
    return config.loss.feature_weight == 0 and config.loss.logit_weight == 0


def _open_val(config: Config) -> Source | None:
    """The validation split: the one configured, or val/ beside train/ in the training source's own folder."""
    if config.source.val:
        return open_source(config.source.val, split="val", shard_size=config.source.shard_size)
    root = Path(config.source.train)
    if (root / "train").is_dir() and (root / "val").is_dir():
        return open_source(config.source.train, split="val", shard_size=config.source.shard_size)
    return None


def check_same_source(cache: Cache, source: Source) -> None:
    """Refuse a source that is not the one the cache was made from.

    Raises:
        CacheMismatchError: what differs, with both values.
    """
    ours, theirs = source_identity(source).to_json(), cache.manifest.dataset
    for name, value in ours.items():
        stored = theirs.get(name)
        if stored == value:
            continue
        if isinstance(value, list):
            differing = [i for i, pair in enumerate(zip(value, stored or [], strict=False)) if pair[0] != pair[1]]
            found = f"{len(differing)} of {len(value)} shards differ, first shard {differing[0] if differing else '?'}"
        else:
            found = f"{value!r} here, {stored!r} there"
        raise CacheMismatchError(
            f"{cache.url}: was made from another data set than {source.location}: {name}: {found}. Use the source and "
            "--shard-size that the cache was extracted with, or extract a new cache."
        )


def complete_views(cache: Cache, num_shards: int) -> list[int]:
    """The views whose units are all published, in order; others are named in a warning.

    Raises:
        IncompleteCacheError: there is none.
    """
    published = cache.published()
    complete = sorted(view for view, shards in published.items() if len(shards) == num_shards)
    partial = {view: len(shards) for view, shards in published.items() if len(shards) < num_shards}
    shown = ", ".join(f"view {view}: {count} of {num_shards} units" for view, count in sorted(partial.items())[:5])
    if not complete:
        raise IncompleteCacheError(
            f"{cache.url}: no view is complete ({shown or 'nothing is published'}). Finish it with vkd-cache extract."
        )
    if partial:
        console.warn(f"{cache.url}: views that are not complete are not used: {shown}")
    return complete


@contextlib.contextmanager
def _process_group(run: Run) -> Iterator[None]:
    """Join the other ranks, where there are any; ranks above 0 say nothing."""
    if run.split.count == 1:
        yield
        return
    on_gpu = run.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(run.device)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=run.split.index, world_size=run.split.count)
    console.set_quiet(run.split.index > 0)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Loop:
    """The steps of a run, with what is kept between them."""

    def __init__(self, run: Run, supply: Supply) -> None:
        self._run = run
        self._supply = supply
        self._learner = run.learner(supply)
        self._feed = run.feed(supply)
        self._output = Path(run.config.train.output)
        self._batches_per_epoch = self._feed.order(0).num_steps
        accumulate = run.config.train.accumulate
        self._steps_per_epoch = math.ceil(self._batches_per_epoch / accumulate)
        self._step = 0
        self._epoch, self._batch = 0, 0  # the place of the next batch
        self._window: dict[str, float] = {}  # sums of the loss terms since the last log line
        self._window_steps = 0
        self._top1: float | None = None
        self._best: float | None = None
        self._stop = False
        if self._batches_per_epoch == 0:
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
        """The batches of each optimizer step; the last step of an epoch may have fewer."""
        group: list[tuple[FedBatch, torch.Tensor]] = []
        rendered = {}

        def remembered() -> Iterator[Any]:
            for batch in batches:
                rendered[id(batch.rendered)] = batch
                yield batch.rendered

        for on_host, pixels in ahead_on_device(remembered(), self._run.device):
            batch = rendered.pop(id(on_host))
            group.append((batch, pixels))
            epoch_ends = batch.step + 1 == self._batches_per_epoch
            if len(group) == self._run.config.train.accumulate or epoch_ends:
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
        ends = last.step + 1 == self._batches_per_epoch
        self._epoch, self._batch = (last.epoch + 1, 0) if ends else (last.epoch, last.step + 1)

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


def _dry_run(run: Run, checkpoint: Path | None) -> TrainSummary:
    config = run.config
    count = sum(len(shard.keys) for shard in run.source.shards)
    teacher = "live" if config.train.live_teacher else f"cache {config.cache.url}" if run.cache else "none"
    batches = count // (config.train.batch_size * run.split.count)
    console.show_table(
        "train, dry run: nothing is written",
        ["what", "value"],
        [
            ["source", f"{run.source.location} ({run.source.kind}, {count} images, {run.num_classes} classes)"],
            ["validation", run.val_source.location if run.val_source else "none: give [source] val"],
            ["views", f"{len(run.views.views)} of recipe {run.recipe.name} at {run.recipe.size_px} px"],
            ["teacher", teacher],
            ["student", f"{config.student.name} on {run.device}, {run.split.count} processes"],
            ["steps", f"{config.train.epochs} epochs of about {math.ceil(batches / config.train.accumulate)}"],
            ["start", f"continue from {checkpoint}" if checkpoint else "new run"],
            ["output", config.train.output],
        ],
    )
    return TrainSummary(
        steps=0, interrupted=False, top1=None, best_top1=None, seconds=0.0, peak_memory_bytes=0, output=""
    )


def _say_summary(summary: TrainSummary) -> None:
    if summary.interrupted:
        console.say(f"train: stopped and saved at step {summary.steps}; the same command with --resume auto continues")
        return
    accuracy = "" if summary.top1 is None else f"top-1 {summary.top1:.2f} (best {summary.best_top1:.2f}), "
    console.say(
        f"train: {summary.steps} steps, {accuracy}{summary.seconds:.1f} s, peak {summary.peak_memory_bytes / 2**20:.0f} "
        f"MiB -> {summary.output}"
    )
