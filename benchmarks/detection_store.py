"""Bytes and read rates of the ragged store, for every choice of what to store of a detector's tokens.

Bytes are those of published units, files and records counted. Rates are of the training feed with pixels left out:
order, stored params, reading units with their checksums, taking each batch's tokens and joining them.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import cast

import data
import detection_data
import torch
from harness import Report, Stopwatch, Target, interleave, require

from vkd_cache.cache.reader import Cache
from vkd_cache.cache.schema import NodeSpec
from vkd_cache.cache.units import UnitId, record_path
from vkd_cache.cache.writer import CacheWriter, create_cache
from vkd_cache.config import ViewsConfig
from vkd_cache.detection.canvas import NODES, PATCHES
from vkd_cache.detection.vidt import ViDTConfig, body_config
from vkd_cache.sources import CocoSource, open_source
from vkd_cache.stages.feed import Feed, Schedule
from vkd_cache.stages.rendering import RenderedBatch, Renderer, render_loader
from vkd_cache.stages.unit_views import CachedViews
from vkd_cache.stages.units import UnitAssembly, unit_tasks
from vkd_cache.tokens import Tokens
from vkd_cache.views.recipe import Recipe, make_recipe

COCO_IMAGES = 118_287
BASELINE = "float16"  # all tokens of all nodes
RENDER_BATCH = 4
PLANNED_VIEWS = 2048


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is stored: type, share of the patch tokens, nodes."""

    dtype: str
    share: float = 1.0
    nodes: tuple[str, ...] = NODES

    @property
    def name(self) -> str:
        """What tables call it."""
        share = "" if self.share == 1.0 else f", {100 * self.share:g} %"
        return self.dtype + share + ("" if self.nodes == NODES else f", {' and '.join(self.nodes)}")


CHOICES = tuple(
    Choice(dtype, share, nodes)
    for share, nodes in ((1.0, NODES), (0.25, NODES), (0.1, NODES), (1.0, ("patch_3", "neck_det")))
    for dtype in ("float16", "int8")
)


class MadeUnits:
    """Rendered views of every shard of a source with made tokens for them, to be published in any choice."""

    def __init__(self, source: CocoSource, recipe: Recipe, teacher: ViDTConfig, *, seed: int) -> None:
        self.source = source
        self.recipe = recipe
        self.teacher = teacher
        self._seed = seed
        self._rendered = [self._render(UnitId(shard, 0)) for shard in range(len(source.shards))]

    def _render(self, unit: UnitId) -> list[tuple[RenderedBatch, dict[str, Tokens]]]:
        made = detection_data.MadeTokens(self.teacher, seed=self._seed + unit.shard)
        tasks = unit_tasks(self.source, self.recipe, 0, unit, RENDER_BATCH)
        found = []
        for batch in render_loader(Renderer(self.source, self.recipe, 0), tasks, workers=0):
            tokens = made(batch)
            batch.pixels = torch.empty(0)  # its digest is in the columns
            found.append((batch, tokens))
        return found

    def specs(self, choice: Choice) -> dict[str, NodeSpec]:
        """The nodes of a choice, by name."""
        width = self.teacher.width
        return {name: detection_data.token_spec(name, width, choice.dtype, choice.share) for name in choice.nodes}

    def publish(self, choice: Choice, url: Path, backend: str) -> CacheWriter:
        """A cache of all units, by the same code as extraction's."""
        nodes = tuple(self.specs(choice).values())
        manifest = detection_data.make_manifest(self.source, self.recipe, nodes, backend)
        writer = create_cache(str(url), manifest)
        for shard, batches in enumerate(self._rendered):
            assembly = UnitAssembly(self.source, UnitId(shard, 0), manifest.nodes, seed=manifest.seed)
            for batch, tokens in batches:
                assembly.add(batch, {name: tokens[name] for name in choice.nodes})
            writer.publish(shard, 0, *assembly.finish())
        return writer


def file_bytes(cache: Cache) -> int:
    """Bytes of the files of all units, and of their records."""
    paths = [path for unit in cache.units for path in (cache.record(*unit).files[0][0], record_path(unit))]
    return sum((Path(cache.url) / path).stat().st_size for path in paths)


class Stores:
    """A cache of two units for every choice, over the same photographs."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        root = detection_data.write_coco(folder / "photos", options.store_images, seed=options.seed)
        source = cast(CocoSource, open_source(root, shard_size=-(-options.store_images // 2)))
        recipe = make_recipe(whole_views(options.store_px, options.canvas_multiple_px))
        self.units = MadeUnits(source, recipe, body_config(options.teacher), seed=options.seed)
        self._caches = {
            choice: self.units.publish(choice, folder / f"store-{number}", options.backend).cache
            for number, choice in enumerate(CHOICES)
        }

    def image_bytes(self, choice: Choice) -> float:
        """Bytes per image, on the disk."""
        return file_bytes(self._caches[choice]) / self._options.store_images

    def kept(self, choice: Choice) -> dict[str, float]:
        """Stored tokens of each node, mean over the images."""
        cache = self._caches[choice]
        read = [cache.read(unit) for unit in cache.units]
        return {
            name: sum(len(unit.tokens(name).values) for unit in read) / self._options.store_images
            for name in choice.nodes
        }

    def rate(self, choice: Choice) -> float:
        """Images per second of a feed without pixels, in this process."""
        options, source = self._options, self.units.source
        views = CachedViews(self._caches[choice], source, [0])
        schedule = Schedule(epochs=options.epochs, batch_size=options.batch_size, seed=options.seed, open_shards=2)
        count = 0
        blank = data.BlankRenderer(source, self.units.recipe, 0)
        with Feed(blank, views, schedule, choice.nodes) as feed, Stopwatch() as watch:
            for batch in feed.batches(epoch=0, step=0, workers=0):
                require(set(batch.nodes) == set(choice.nodes), "store: a batch came without its tokens")
                count += len(batch)
        return count / watch.wall_s


def whole_views(side_px: int, canvas_multiple_px: int) -> ViewsConfig:
    """Views of whole images with a short side of `side_px`, the long one bounded as in the reference (1333 at 800)."""
    return ViewsConfig(
        recipe="vidt",
        count="1",
        scales=(side_px,),
        max_size_px=side_px * 1333 // 800,
        crop_scales=(),
        canvas_multiple_px=canvas_multiple_px,
    )


def training_recipe() -> Recipe:
    """The views that a COCO run caches: short sides of 480 to 800 px, half of them crops."""
    return make_recipe(ViewsConfig(recipe="vidt"))


def count_bytes(stores: Stores, options: argparse.Namespace, report: Report) -> None:
    """Bytes per image as stored, and of a pass over COCO: of such views, and of the training recipe's."""
    teacher = stores.units.teacher
    counts = detection_data.mean_token_counts(teacher, training_recipe(), options.planned, seed=options.seed)
    report.facts["patch tokens of a training view, mean of planned views"] = sum(counts[name] for name in PATCHES)
    whole = stores.kept(Choice(BASELINE))
    report.facts[f"patch tokens of a view at {options.store_px} px, mean"] = sum(whole[name] for name in PATCHES)
    baseline = stores.image_bytes(Choice(BASELINE))
    for choice in CHOICES:
        specs, found = stores.units.specs(choice), stores.image_bytes(choice)
        kept = stores.kept(choice)
        besides = found - detection_data.stored_bytes(specs, kept)  # params, keys, record, container
        planned = {name: spec.tokens * counts[name] for name, spec in specs.items()}
        passed = besides + detection_data.stored_bytes(specs, planned)
        report.facts[f"kB per image at {options.store_px} px, {choice.name}"] = found / 1e3
        report.facts[f"GB per COCO pass at {options.store_px} px, {choice.name}"] = found * COCO_IMAGES / 1e9
        report.facts[f"GB per COCO pass of training views, {choice.name}"] = passed * COCO_IMAGES / 1e9
        if choice.name != BASELINE:
            report.ratio_of(f"bytes, {choice.name} / {BASELINE}", [found / baseline])


def measure_reading(stores: Stores, options: argparse.Namespace, report: Report) -> None:
    """Images per second of each choice, against what a student of this machine and of a GPU takes."""
    rates: dict[str, Callable[[], float]] = {
        f"read and join, {choice.name}": lambda choice=choice: stores.rate(choice)  # type: ignore[misc]
        for choice in CHOICES
    }
    report.measure("images/s", interleave("reading", rates, options.repetitions))
    steps = report.measurements["step, cache"]["values"]
    need = [options.batch_size / step for step in steps]
    for choice in CHOICES:
        found = report.measurements[f"read and join, {choice.name}"]["values"]
        size = stores.image_bytes(choice) / 1e6
        report.measure("MB/s", {f"read and join in bytes, {choice.name}": [rate * size for rate in found]})
        report.ratio_of(
            f"read / a GPU student's {options.gpu_images_per_s:g} images/s, {choice.name}",
            [rate / options.gpu_images_per_s for rate in found],
            Target(bound=1.0, at_most=False),
        )
        report.ratio_of(
            f"read / this student's need, {choice.name}", [a / b for a, b in zip(found, need, strict=True)]
        )
