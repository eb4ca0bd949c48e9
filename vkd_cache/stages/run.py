"""A training run before its first step: what it reads, opened and checked against each other."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from vkd_cache import console
from vkd_cache.cache.reader import Cache, find_cache, open_cache
from vkd_cache.config import Config, LossConfig, ViewsConfig, parse_view_range
from vkd_cache.errors import ConfigError, IncompleteCacheError
from vkd_cache.normalisation import Whitening
from vkd_cache.runtime import JobSplit, expand_home
from vkd_cache.sources import Source, is_detection, open_source, source_identity, validation_beside
from vkd_cache.stages.classification_task import ClassificationTask
from vkd_cache.stages.copying import copies_of
from vkd_cache.stages.drift import check_same_source, check_same_teacher, say_other_settings
from vkd_cache.stages.feed import Feed, Schedule
from vkd_cache.stages.learner import Learner
from vkd_cache.stages.ranks import take_device
from vkd_cache.stages.rendering import Renderer
from vkd_cache.stages.stored_pixels import StoredPixels
from vkd_cache.stages.supply import CachedTeacher, LiveTeacher, NoTeacher, Supply, whitening_of_cache
from vkd_cache.stages.task import Task
from vkd_cache.stages.unit_views import CachedViews, PlannedViews, Views
from vkd_cache.views.recipe import Recipe, make_recipe


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

    @property
    def cached(self) -> Cache:
        """The cache, for stages that cannot do without.

        Raises:
            ConfigError: the run has none.
        """
        if self.cache is None:
            raise ConfigError("[cache] url is empty: give --cache or set it in the pipeline file.")
        return self.cache

    @property
    def output(self) -> Path:
        """Directory of what the run leaves."""
        return Path(expand_home(self.config.train.output))

    @functools.cached_property
    def source_hash(self) -> str:
        """Hash of the identity of the training source: independent of where it lies.

        Worked out once: it goes through every key, and every checkpoint asks for it.
        """
        document = json.dumps(source_identity(self.source).to_json(), sort_keys=True)
        return hashlib.sha256(document.encode()).hexdigest()

    def supply(self, *, live: bool) -> Supply:
        """Teacher outputs from a live teacher or from the cache, or none where no loss asks for them.

        Raises:
            ConfigError: there is no teacher of that kind, or its logits are of other classes than the student's.
            CacheMismatchError: a live teacher beside the cache of another one.
        """
        if not self.distils:
            return NoTeacher()
        if self.cache is None and not live:
            raise ConfigError(
                "[loss] feature_weight and logit_weight ask for a teacher: give --cache, or --live-teacher, or train "
                "without distillation (--plain, or both weights 0)."
            )
        supply = self._token_supply(live=live) if is_detection(self.source) else self._supply(live=live)
        if live and self.cache is not None:
            check_same_teacher(self.cache, supply)
        return supply

    def _supply(self, *, live: bool) -> Supply:
        loss = self.config.loss
        supply: Supply
        if live:
            supply = LiveTeacher(self.config, self.num_classes, self.recipe.size_px, self.device)
        else:
            supply = CachedTeacher(self.cached, loss, self.device)
        if loss.logit_weight > 0 and supply.num_classes != self.num_classes:
            raise ConfigError(
                f"[loss] logit_weight: the teacher has {supply.num_classes} classes, {self.source.location} has "
                f"{self.num_classes}, so their probabilities cannot be compared. Set [loss] logit_weight = 0."
            )
        return supply

    @property
    def distils(self) -> bool:
        """Whether a loss that is on asks for a teacher."""
        loss = self.config.loss
        return loss.feature_weight > 0 or (loss.logit_weight > 0 and not is_detection(self.source))

    def _token_supply(self, *, live: bool) -> Supply:
        """Where there is a cache, a live teacher gives the nodes that it holds."""
        from vkd_cache.stages.token_supply import CachedTokens, LiveTokens

        cached = CachedTokens(self.cache, self.device) if self.cache is not None else None
        if cached is not None and not live:
            return cached
        return LiveTokens(self.config, cached.distilled if cached else (), self.num_classes, self.device)

    def feed(self, supply: Supply) -> Feed:
        """The batches of this rank."""
        train = self.config.train
        made_with = self.cache.manifest.versions if self.cache is not None else None
        # without a cache, a live teacher sees what an extraction would have stored
        wanted = StoredPixels.wanted(self.config.cache) if train.live_teacher and self.cache is None else None
        stored = StoredPixels.of_cache(self.cache) or wanted
        seed = self.config.views.seed
        renderer = Renderer(self.source, self.recipe, seed, made_with=made_with, stored=stored)
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

    def learner(self, supply: Supply, *, fresh: bool = True) -> Learner:
        """A student at its initial weights, with its losses and optimizer; not `fresh`: a state will be loaded."""
        return Learner(self.config, self._task(supply), device=self.device, world=self.split.count, fresh=fresh)

    def _task(self, supply: Supply) -> Task:
        if is_detection(self.source):
            from vkd_cache.stages.detection_task import DetectionTask  # classification does without scipy

            return DetectionTask(
                self.config,
                num_classes=self.num_classes,
                distilled=supply.distilled,
                teacher_width=supply.width,
                device=self.device,
            )
        return ClassificationTask(
            self.config,
            num_classes=self.num_classes,
            teacher_width=supply.width,
            device=self.device,
            whitening=self._whitening(),
        )

    def _whitening(self) -> Whitening | None:
        """Statistics for the normalisation `whiten`, where it is used: from the first units of the cache.

        Raises:
            ConfigError: there is no cache to take them from.
        """
        loss = self.config.loss
        if loss.normalisation != "whiten" or loss.feature_weight == 0:
            return None
        if self.cache is None:
            raise ConfigError(
                "[loss] normalisation: whiten takes the teacher's statistics from the first units of a cache, and this "
                "run has none. Give --cache, or use layer_norm."
            )
        return whitening_of_cache(self.cache, self.views.views[0]).to(self.device)

    def use_views(self, views: list[int], where: Path) -> None:
        """Go on with the views that the run in checkpoint `where` began with; a cache may have grown since.

        Raises:
            IncompleteCacheError: they are not all there any more.
        """
        missing = sorted(set(views) - set(self.views.views))
        if missing:
            raise IncompleteCacheError(
                f"{where}: was made with views {_listed(views)}; of these {_listed(missing)} are not complete in "
                f"{self.config.cache.url or 'this run'} any more. Finish them with vkd-cache extract."
            )
        self.views.views = views


def prepare_run(config: Config, split: JobSplit) -> Run:
    """Open what a run reads, and check that its parts belong together.

    Raises:
        ConfigError: what the configuration lacks, or validation labels that the student has no class for.
        CacheMismatchError: the cache was made from another data set.
        IncompleteCacheError: not one view of the cache is complete.
    """
    _check_config(config)
    device = take_device(config.train.device, split.local_index)
    cache = _open_cache(config)
    source = open_source(
        config.source.train,
        split="train",
        shard_size=shard_size_of(config, cache),
        copies=copies_of(config.source),
    )
    if cache is None:
        recipe = make_recipe(config.views)
        planned = parse_view_range(config.views.count) if config.views.count else range(config.train.epochs)
        views: Views = PlannedViews(source, recipe, config.views.seed, list(planned))
    else:
        check_same_source(cache, source)
        if split.index == 0:
            say_other_settings(cache, config)
        recipe = cache.recipe
        config = dataclasses.replace(config, views=_views_of(cache, recipe))
        views = CachedViews(cache, source, complete_views(cache, len(source.shards), warn=split.index == 0))
    val_source = _open_val(config)
    if val_source is not None:
        _check_val(source, val_source)
    _check_loss(config, source)
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


def _check_val(source: Source, val: Source) -> None:
    """Refuse a validation split that the student cannot be evaluated on.

    Raises:
        ConfigError: other annotations, more classes, or other categories.
    """
    if is_detection(source) != is_detection(val):
        kinds = ["boxes" if is_detection(each) else "classes" for each in (source, val)]
        raise ConfigError(
            f"{val.location}: its samples are annotated with {kinds[1]}, those of {source.location} with {kinds[0]}. "
            "Give the validation split of the same data."
        )
    if val.num_classes > source.num_classes:
        raise ConfigError(
            f"{val.location}: has {val.num_classes} classes, {source.location} has "
            f"{source.num_classes}, and the student has as many as that. Give the validation split of the same data."
        )
    if is_detection(source) and is_detection(val):
        from vkd_cache.stages.coco_accuracy import check_same_categories

        check_same_categories(source, val)


def _check_loss(config: Config, source: Source) -> None:
    """Refuse weights that a detector's losses do not have.

    Raises:
        ConfigError: a logit loss, or nothing to learn.
    """
    loss = config.loss
    if is_detection(source) and loss.logit_weight not in (0.0, LossConfig().logit_weight):
        raise ConfigError(
            f"[loss] logit_weight: found {loss.logit_weight}, but a detector has no logit loss. Leave it out, or set 0."
        )
    if is_detection(source) and loss.task_weight == loss.feature_weight == 0:
        raise ConfigError("[loss] task_weight and feature_weight are 0: there is nothing for a detector to learn.")


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


def _open_cache(config: Config) -> Cache | None:
    """The cache that a run reads; it must be there unless the teacher is live or there is nothing to distil."""
    loss, url = config.loss, config.cache.url
    if not url or loss.feature_weight == loss.logit_weight == 0:
        return None
    if config.train.live_teacher:
        cache = find_cache(url, copies=copies_of(config.source))
        if cache is None:
            console.say(f"train: no cache at {url}, so views are planned as an extraction would")
        return cache
    return open_cache(url, copies=copies_of(config.source))


def _views_of(cache: Cache, recipe: Recipe) -> ViewsConfig:
    """The cache decides how views are planned, whatever the configuration says; run files hold what was used."""
    if recipe.detection is not None:
        geometry = recipe.detection
        return ViewsConfig(
            recipe=recipe.name,
            seed=cache.manifest.seed,
            flip_probability=recipe.flip_probability,
            scales=geometry.scales,
            max_size_px=geometry.max_size_px,
            crop_scales=geometry.crop_scales,
            crop_min_px=geometry.crop_min_px,
            crop_max_px=geometry.crop_max_px,
            canvas_multiple_px=geometry.canvas_multiple_px,
        )
    return ViewsConfig(
        recipe=recipe.name,
        size_px=recipe.size_px,
        seed=cache.manifest.seed,
        flip_probability=recipe.flip_probability,
        mix_probability=recipe.mix_probability,
        mixup_alpha=recipe.mixup_alpha,
        cutmix_alpha=recipe.cutmix_alpha,
        cutmix_switch=recipe.cutmix_switch,
    )


def shard_size_of(config: Config, cache: Cache | None) -> int:
    """The shard size to cut a folder source with: the one that the cache was extracted with, where there is one."""
    counts = cache.manifest.dataset["shard_counts"] if cache is not None else []
    return max(counts, default=config.source.shard_size)


def _open_val(config: Config) -> Source | None:
    """The validation split: the one configured, or the one that lies beside the training split."""
    spec = config.source.val or validation_beside(config.source.train)
    if not spec:
        return None
    return open_source(spec, split="val", shard_size=config.source.shard_size, copies=copies_of(config.source))


def complete_views(cache: Cache, num_shards: int, *, warn: bool = True) -> list[int]:
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
    if partial and warn:
        console.warn(f"{cache.url}: views that are not complete are not used: {shown}")
    return complete


def _listed(views: Sequence[int]) -> str:
    return ", ".join(map(str, views[:8])) + (", ..." if len(views) > 8 else "")
