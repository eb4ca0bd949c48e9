"""What a cache will take and what it will gain, before any of it is made: measured on a sample of the user's own data.

    sample of the source -> extract into a temporary folder -> train from that, without a teacher, with a live one
    rates, starts, sizes of units -> bytes, hours, memory, break-even epochs and students

Nothing is written but a temporary folder, which is removed. Each measurement has a process of its own.
"""

import dataclasses
import math
import tempfile
import time
from pathlib import Path

from vkd_cache import console
from vkd_cache.cache.schema import BY_VALUE
from vkd_cache.cache.units import UnitId
from vkd_cache.config import Config, parse_view_range
from vkd_cache.errors import ConfigError, TeacherMemoryError
from vkd_cache.runtime import num_cores
from vkd_cache.sources import Source, is_detection, open_source, validation_beside
from vkd_cache.stages.copying import copies_of
from vkd_cache.stages.extract_checks import check_fit
from vkd_cache.stages.planning_break_even import Costs
from vkd_cache.stages.planning_extract import ExtractFound, ExtractRequest, measure_extraction
from vkd_cache.stages.planning_process import ended_as_by_ctrl_c, in_own_process
from vkd_cache.stages.planning_report import (
    CACHED,
    EXTRACT,
    LIVE,
    PLAIN,
    BreakEven,
    CachePlan,
    PlanReport,
    StagePlan,
    break_even,
)
from vkd_cache.stages.planning_sizes import SizeModel, cache_size, size_model
from vkd_cache.stages.planning_teacher import WeightsAtHand, weights_at_hand
from vkd_cache.stages.planning_train import TrainFound, TrainRequest, measure_training
from vkd_cache.stages.target import find_target
from vkd_cache.stages.unit_order import unpublished
from vkd_cache.stages.units import units_of_worker
from vkd_cache.views.recipe import make_recipe

_SHARES = {EXTRACT: 0.35, CACHED: 0.25, PLAIN: 0.15, LIVE: 0.25}  # of the time to measure for
_VAGUE = 0.1  # relative standard error of a rate
_UNITS_WRITTEN = 3  # of extraction, that are in memory at once: as it grows, as it is put together, as it is packed
_WINDOWS_OPEN = 3  # of training: the shards that are shuffled, those before them, and the next ones


def plan(config: Config, *, seconds: float) -> PlanReport:
    """Plan the extraction that `config` describes, and where it names a student, the student's training.

    Args:
        config: both stages.
        seconds: to measure for; starts of processes, and batches that take long, come on top.

    Raises:
        VkdCacheError: what either command would refuse.
        MemoryError: extraction, or training from the cache, does not fit.
    """
    if not math.isfinite(seconds):
        raise ConfigError(f"--seconds: found {seconds}, expected a number of seconds.")
    return _Planning(config, seconds).report()


class _Planning:
    """One plan in the making."""

    def __init__(self, config: Config, seconds: float) -> None:
        self._begun = time.monotonic()
        self._config = config
        self._seconds = seconds
        _check_config(config)
        self._source = self._opened(config.source.train, "train")
        self._recipe = make_recipe(config.views)
        check_fit(config, self._source, self._recipe)
        self._existing = find_target(config.cache.url, "--cache") if config.cache.url else None
        self._open_s = time.monotonic() - self._begun
        val = config.source.val or validation_beside(config.source.train)
        self._val = self._opened(val, "val") if val and config.student.name else None
        self._open_both_s = time.monotonic() - self._begun
        self._samples = sum(len(shard.keys) for shard in self._source.shards)
        self._steps_per_epoch = self._steps() if config.student.name else 0

    def _opened(self, spec: str, split: str) -> Source:
        source = self._config.source
        return open_source(spec, split=split, shard_size=source.shard_size, copies=copies_of(source))

    def report(self) -> PlanReport:
        """Measure, and work out the rest."""
        with ended_as_by_ctrl_c(), tempfile.TemporaryDirectory(prefix="vkd-cache-plan-") as name:
            folder = Path(name)
            weights = weights_at_hand(self._config.teacher, self._source.num_classes, folder)
            config = dataclasses.replace(
                self._config,
                teacher=weights.teacher,
                student=dataclasses.replace(self._config.student, weights=""),  # as fast with random ones
            )
            kinds = self._kinds()
            with console.track("plan", 1 + len(kinds), "measurements") as progress:
                progress.detail(EXTRACT)
                extracted = self._extraction(config, weights, folder)
                progress.advance()
                trained: dict[str, TrainFound | str] = {}
                for kind in kinds:
                    progress.detail(kind)
                    trained[kind] = self._training(kind, config, extracted, trained, folder)
                    progress.advance()
        return self._worked_out(extracted, trained, weights)

    def _kinds(self) -> list[str]:
        """The ways of training that there are to compare."""
        loss = self._config.loss
        if not self._config.student.name:
            return []
        distils = loss.feature_weight > 0 or (loss.logit_weight > 0 and not is_detection(self._source))
        taught, plain = [CACHED] if distils else [], [PLAIN] if loss.task_weight > 0 else []
        return [*taught, *plain, *([LIVE] if distils else [])]

    def _extraction(self, config: Config, weights: WeightsAtHand, folder: Path) -> ExtractFound:
        request = ExtractRequest(
            config=config,
            source=self._source,
            known=weights.known,
            folder=str(folder / "cache"),
            seconds=self._seconds * (_SHARES[EXTRACT] if self._config.student.name else 1.0),
        )
        try:
            return in_own_process(measure_extraction, request, "extraction")
        except MemoryError as error:
            raise TeacherMemoryError(f"out of memory: {error}. Give a smaller [extract] batch_size.") from error

    def _training(
        self,
        kind: str,
        config: Config,
        extracted: ExtractFound,
        before: dict[str, TrainFound | str],
        folder: Path,
    ) -> TrainFound | str:
        """What was measured, or why it could not be."""
        known = next((found for found in before.values() if isinstance(found, TrainFound)), None)
        sample_s = known.step_s / config.train.batch_size / config.train.accumulate if known is not None else 0.0
        if kind == PLAIN:
            config = dataclasses.replace(
                config, loss=dataclasses.replace(config.loss, feature_weight=0.0, logit_weight=0.0)
            )
        reads = kind == CACHED or (kind == LIVE and config.loss.normalisation == "whiten")
        request = TrainRequest(
            config=config,
            source=self._source,
            places=extracted.places,
            cache=str(folder / "cache") if reads else "",
            live=kind == LIVE,
            sample_s=sample_s + (extracted.teacher_s if kind == LIVE else 0.0),
            val=self._val if known is None else None,
            folder=str(folder),
            seconds=self._seconds * _SHARES[kind],
        )
        try:
            return in_own_process(measure_training, request, f"training {kind}")
        except (MemoryError, TeacherMemoryError) as error:
            if kind == CACHED:
                raise
            return f"out of memory ({error})"

    def _steps(self) -> int:
        """Optimizer steps of an epoch.

        Raises:
            ConfigError: the data does not fill one.
        """
        train = self._config.train
        slots = sum((len(shard.keys) + 1) // 2 for shard in self._source.shards)
        steps = math.ceil(slots // (train.batch_size // 2) / train.accumulate)
        if steps == 0:
            raise ConfigError(
                f"[train] batch_size: one step takes {train.batch_size} samples, {self._source.location} has "
                f"{self._samples}. Use a smaller --batch-size."
            )
        return steps

    def _worked_out(
        self, extracted: ExtractFound, trained: dict[str, TrainFound | str], weights: WeightsAtHand
    ) -> PlanReport:
        config, source = self._config, self._source
        model = size_model(extracted.units, extracted.tokens_per_view)
        cache = self._cache(model, extracted)
        stages = [self._extract_stage(extracted, cache, model)]
        stages += [self._train_stage(kind, found, trained, extracted, model) for kind, found in trained.items()]
        return PlanReport(
            source={
                "location": source.location,
                "kind": source.kind,
                "samples": self._samples,
                "shards": len(source.shards),
                "classes": source.num_classes,
            },
            teacher=config.teacher.name,
            student=config.student.name,
            epochs=config.train.epochs if config.student.name else 0,
            steps_per_epoch=self._steps_per_epoch,
            evaluations=self._evaluations(),
            cache=cache,
            stages=tuple(stages),
            limit=_limit(extracted),
            break_even=self._break_even(stages),
            assumptions=tuple(self._assumptions(extracted, stages, weights)),
            measured_s=time.monotonic() - self._begun,
        )

    def _cache(self, model: SizeModel, extracted: ExtractFound) -> CachePlan:
        views = parse_view_range(self._config.views.count)
        units = units_of_worker(len(self._source.shards), views, 0, 1)
        todo = unpublished(self._existing, units)
        whole, missing = cache_size(model, self._source, units), cache_size(model, self._source, todo)
        return CachePlan(
            views=len(views),
            units=len(units),
            units_there=len(units) - len(todo),
            views_to_make=sum(len(self._source.shards[shard].keys) * count for shard, count in _counts(todo).items()),
            bytes=whole.stored_bytes,
            bytes_to_write=missing.stored_bytes,
            plain_bytes=whole.plain_bytes,
            nodes=extracted.nodes,
        )

    def _extract_stage(self, found: ExtractFound, cache: CachePlan, model: SizeModel) -> StagePlan:
        start_s = self._open_s + found.start_s
        held = max(0.0, self._unit_bytes(model) - found.units[0].plain_bytes)
        return StagePlan(
            stage=EXTRACT,
            images_per_s=1 / found.view_s,
            spread=_known(found.spread),
            seconds=(start_s + cache.views_to_make * found.view_s) if cache.views_to_make else 0.0,
            start_s=start_s,
            device=found.device,
            batch_size=found.batch_size,
            measured_batch_size=found.measured_batch_size,
            host_bytes=found.host_bytes + round(_UNITS_WRITTEN * held),
            gpu_bytes=found.gpu_bytes or None,
        )

    def _unit_bytes(self, model: SizeModel) -> float:
        """Of the first, usually the largest unit, in memory."""
        keys = self._source.shards[0].keys
        return model.plain_bytes(len(keys), sum(len(key.encode()) for key in keys))

    def _train_stage(
        self,
        kind: str,
        found: TrainFound | str,
        trained: dict[str, TrainFound | str],
        extracted: ExtractFound,
        model: SizeModel,
    ) -> StagePlan:
        train = self._config.train
        if isinstance(found, str):
            return StagePlan(stage=kind, batch_size=train.batch_size, problem=found)
        start_s, epoch_s = self._open_both_s + found.start_s + found.finish_s, self._epoch_s(found, trained)
        # the first that was measured has evaluated, too
        more = next(other.more_host_bytes for other in trained.values() if isinstance(other, TrainFound))
        open_units = min(_WINDOWS_OPEN * train.open_shards, len(self._source.shards))
        held = open_units * self._unit_bytes(model) - sum(unit.plain_bytes for unit in extracted.units)
        return StagePlan(
            stage=kind,
            images_per_s=train.batch_size * train.accumulate / found.step_s,
            spread=_known(found.spread),
            seconds=start_s + train.epochs * epoch_s,
            start_s=start_s,
            device=found.device,
            batch_size=train.batch_size,
            measured_batch_size=found.batch_size,
            host_bytes=found.host_bytes + more + (round(max(0.0, held)) if kind == CACHED else 0),
            gpu_bytes=found.gpu_bytes or None,
        )

    def _epoch_s(self, found: TrainFound, trained: dict[str, TrainFound | str]) -> float:
        """Seconds of an epoch, with its share of the evaluations and what is saved on the way."""
        train = self._config.train
        saved = 1.0 + (self._steps_per_epoch / train.checkpoint_every if train.checkpoint_every else 0.0)
        seconds = self._steps_per_epoch * found.step_s + saved * found.checkpoint_s
        lines = (other.evaluation for other in trained.values() if isinstance(other, TrainFound))
        evaluation = next((line for line in lines if line is not None), None)
        if self._val is not None and evaluation is not None:
            images = sum(len(shard.keys) for shard in self._val.shards)
            # after each one: the best student, if it is one, and where the run stands
            each_s = evaluation.at(images) + 2 * found.checkpoint_s
            seconds += self._evaluations() / train.epochs * each_s
        return seconds

    def _evaluations(self) -> int:
        """In a run: every so many epochs, and at the end."""
        if self._val is None:
            return 0
        every, epochs = self._config.train.eval_every, self._config.train.epochs
        return 1 if every == 0 else math.ceil(epochs / every)

    def _break_even(self, stages: list[StagePlan]) -> BreakEven | None:
        found = {stage.stage: stage for stage in stages if not stage.problem}
        if CACHED not in found or LIVE not in found:
            return None
        epochs = self._config.train.epochs
        cached, live = found[CACHED], found[LIVE]
        costs = Costs(
            extract_s=found[EXTRACT].seconds,
            cached_start_s=cached.start_s,
            cached_epoch_s=(cached.seconds - cached.start_s) / epochs,
            live_start_s=live.start_s,
            live_epoch_s=(live.seconds - live.start_s) / epochs,
        )
        return break_even(costs, epochs)

    def _assumptions(
        self, extracted: ExtractFound, stages: list[StagePlan], weights: WeightsAtHand
    ) -> list[str]:
        config = self._config
        said = [
            f"One process. Measured on {extracted.views} views of the first images of the source, into a temporary "
            "folder: a source or cache on a slower disk than these takes longer.",
            f"The teacher's weights: {weights.said}.",
            "Training reads images that the extraction of the sample has just read: from memory, most likely."
            if config.cache.pixels == "none"
            else f"The bytes count the views themselves, stored as {config.cache.pixels}: training reads no images.",
            "Host memory is the peak resident size of the main process, without its data workers; GPU memory is the "
            "peak of what torch allocates.",
        ]
        if not weights.known and config.cache.dtype in BY_VALUE:
            said.append("Stored types and compression are those of random features: the teacher's own may differ.")
        if is_detection(self._source):
            said.append("Tokens a view: the mean over some hundred planned views of the data.")
        spreads = {stage.stage: stage.spread or 0.0 for stage in stages}
        vague = [f"{name} (± {100 * spread:.0f} %)" for name, spread in spreads.items() if spread > _VAGUE]
        if vague:
            said.append(f"Too few measurements to rely on: {', '.join(vague)}. Give more --seconds.")
        for stage in stages:
            if stage.measured_batch_size < stage.batch_size:
                said.append(
                    f"{stage.stage}: batches of {stage.batch_size} were too slow to measure, or more than the sample; "
                    f"those of {stage.measured_batch_size} were, and time and memory extrapolated."
                )
        if max(config.extract.workers, config.train.workers if config.student.name else 0) > num_cores():
            said.append(f"There are more data workers than the {num_cores()} cores of this machine.")
        return said


def _check_config(config: Config) -> None:
    """Refuse what either stage would.

    Raises:
        ConfigError: all of it, in one message.
    """
    problems = [
        f"[{section}] batch_size: found {size}, expected an even number, so that the two images of a mixed pair are in "
        "one batch."
        for section, size in (("extract", config.extract.batch_size), ("train", config.train.batch_size))
        if size % 2
    ]
    loss = config.loss
    if config.student.name and loss.task_weight == loss.feature_weight == loss.logit_weight == 0:
        problems.append("[loss] all three weights are 0: there is nothing to learn.")
    try:
        parse_view_range(config.views.count)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def _counts(units: list[UnitId]) -> dict[int, int]:
    """How many of `units` each shard has."""
    found: dict[int, int] = {}
    for unit in units:
        found[unit.shard] = found.get(unit.shard, 0) + 1
    return found


def _limit(found: ExtractFound) -> str:
    """What extraction waits for; on a CPU, what takes more of it."""
    if found.device.startswith("cuda"):
        return "data" if found.view_s > found.teacher_s / 0.9 else "teacher"
    return "data" if found.render_s / num_cores() > found.teacher_s else "teacher"


def _known(value: float) -> float | None:
    """NaN is no JSON."""
    return None if math.isnan(value) else value

