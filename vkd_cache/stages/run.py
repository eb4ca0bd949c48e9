"""A training run before its first step: what it reads, opened and checked against each other."""

import dataclasses

import torch

from vkd_cache import console
from vkd_cache.cache.reader import Cache, open_cache
from vkd_cache.config import Config, parse_view_range
from vkd_cache.errors import CacheMismatchError, ConfigError, IncompleteCacheError
from vkd_cache.runtime import JobSplit, resolve_device
from vkd_cache.sources import Source, open_source, source_identity, validation_beside
from vkd_cache.stages.feed import Feed, Schedule
from vkd_cache.stages.learner import Learner
from vkd_cache.stages.rendering import Renderer
from vkd_cache.stages.supply import CachedTeacher, LiveTeacher, NoTeacher, Supply
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


def prepare_run(config: Config, split: JobSplit) -> Run:
    """Open what a run reads, and check that source and cache belong together.

    Raises:
        CacheMismatchError: the cache was made from another data set.
        IncompleteCacheError: not one view of the cache is complete.
    """
    device = torch.device(resolve_device(config.train.device, split.local_index))
    cache = open_cache(config.cache.url) if config.cache.url and not _plans_alone(config) else None
    source = open_source(config.source.train, split="train", shard_size=shard_size_of(config, cache))
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


def shard_size_of(config: Config, cache: Cache | None) -> int:
    """The shard size to cut a folder source with: the one that the cache was extracted with, where there is one."""
    counts = cache.manifest.dataset["shard_counts"] if cache is not None else []
    return max(counts, default=config.source.shard_size)


def _plans_alone(config: Config) -> bool:
    """Training without distillation needs no cache, and a pipeline's may not exist yet."""
    return config.loss.feature_weight == 0 and config.loss.logit_weight == 0


def _open_val(config: Config) -> Source | None:
    """The validation split: the one configured, or the one that lies beside the training split."""
    spec = config.source.val or validation_beside(config.source.train)
    return open_source(spec, split="val", shard_size=config.source.shard_size) if spec else None


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
            f"{cache.url}: was made from another data set than {source.location}: {name}: {found}. Use the source "
            "that the cache was extracted from, or extract a new cache."
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
