"""What the cache join costs a training feed.

    python benchmarks/read.py --output benchmarks/results/read.json

Two questions, each beside its baseline, under the reference recipe and under the fast one. Is the feed as fast with the
join as with images only, same views, same workers? How much CPU time does the feature path take, over that of the image
path? Other loaders are compared in `pipelines.py`, bytes counted in `bytes.py`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import data
import torch
from harness import Report, Stopwatch, Target, interleave, parse, parser, require, scratch_folder

from vkd_cache.cache.reader import Cache
from vkd_cache.cli import guarded
from vkd_cache.config import ViewsConfig
from vkd_cache.sources import Source, open_source
from vkd_cache.stages.feed import FedBatch, Feed, Schedule
from vkd_cache.stages.rendering import Renderer
from vkd_cache.stages.unit_views import CachedViews, PlannedViews, Views
from vkd_cache.views.recipe import RECIPES, Recipe, make_recipe

TINY = {
    "images": 24, "shard_size": 12, "size_px": 32, "batch_size": 4, "workers": 1, "repetitions": 2, "epochs": 2,
    "width": 96,
}  # fmt: skip


def main() -> int:
    """Run the benchmark."""
    made = parser("The training feed with cache join against images only; CPU time.", repetitions=5)
    made.add_argument("--images", type=int, default=1024, help="JPEG files of 500x375")
    made.add_argument("--shard-size", type=int, default=512, help="images per unit")
    made.add_argument("--size-px", type=int, default=224, help="side of a view")
    made.add_argument("--recipes", nargs="+", default=["vkd", "fast"], choices=sorted(RECIPES), help="of the feed")
    made.add_argument("--batch-size", type=int, default=32, help="of the feed")
    made.add_argument("--workers", type=int, default=2, help="processes that render")
    made.add_argument("--epochs", type=int, default=1, help="passes over the images per repetition")
    made.add_argument("--width", type=int, default=3024, help="channels of the cached node")
    made.add_argument("--dtype", default="uint8", choices=sorted(data.CODECS), help="stored type of the feed's cache")
    made.add_argument("--backend", default="zarr", choices=("zarr", "webdataset"), help="of the feed's cache")
    options = parse(made, TINY)
    report = Report("read", options)
    with scratch_folder(options) as folder:
        report.facts["mean JPEG bytes"] = round(
            data.make_photos(folder / "photos", options.images, seed=options.seed) / options.images
        )
        source = open_source(str(folder / "photos"), shard_size=options.shard_size)
        for recipe in options.recipes:
            measure_feed(options, recipe, source, folder, report)
    report.finish(options.output)
    return 0


class Feeds:
    """The feed in its variants, over the same views in the same order."""

    def __init__(self, options: argparse.Namespace, source: Source, cache: Cache) -> None:
        recipe = Recipe.from_json(cache.manifest.recipe)
        self._renderer = Renderer(source, recipe, cache.manifest.seed)
        self._blank = data.BlankRenderer(source, recipe, cache.manifest.seed)
        self._cached: Views = CachedViews(cache, source, [0])
        self._planned: Views = PlannedViews(source, recipe, cache.manifest.seed, [0])
        self._workers = options.workers
        self._schedule = Schedule(
            epochs=options.epochs, batch_size=options.batch_size, seed=options.seed, open_shards=8, digest_check=0.1
        )

    def cached_rate(self) -> float:
        """Samples per second with the join."""
        return self._rate(self._cached, ("pooled",))

    def image_rate(self) -> float:
        """Samples per second of images only."""
        return self._rate(self._planned, ())

    def image_cpu(self) -> float:
        """CPU microseconds per sample of images only, everything in this process, with a data worker's one thread."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._cpu(self._renderer, self._planned, ())
        finally:
            torch.set_num_threads(threads)

    def cached_overhead(self) -> float:
        """The same without any pixels, with the join."""
        return self._cpu(self._blank, self._cached, ("pooled",))

    def image_overhead(self) -> float:
        """The same without any pixels, images only: order and mixing."""
        return self._cpu(self._blank, self._planned, ())

    def _batches(self, feed: Feed, workers: int) -> Iterator[FedBatch]:
        return feed.batches(epoch=0, step=0, workers=workers)

    def _rate(self, views: Views, nodes: tuple[str, ...]) -> float:
        """Once every worker is at work: the first batches are not counted."""
        with Feed(self._renderer, views, self._schedule, nodes) as feed:
            batches = self._batches(feed, self._workers)
            for _ in range(2 * max(self._workers, 1)):
                next(batches, None)
            with Stopwatch() as watch:
                count = sum(self._checked(batch, nodes) for batch in batches)
        require(count > 0, "feed: nothing is left after the first batches; use more --images or --epochs")
        return count / watch.wall_s

    def _cpu(self, renderer: Renderer, views: Views, nodes: tuple[str, ...]) -> float:
        with Feed(renderer, views, self._schedule, nodes) as feed, Stopwatch() as watch:
            count = sum(self._checked(batch, nodes) for batch in self._batches(feed, 0))
        return 1e6 * watch.cpu_s / count

    @staticmethod
    def _checked(batch: FedBatch, nodes: tuple[str, ...]) -> int:
        count = len(batch.rendered.row)
        require(all(len(batch.nodes[name]) == count for name in nodes), "feed: a batch came without its features")
        return count


def measure_feed(options: argparse.Namespace, name: str, source: Source, folder: Path, report: Report) -> None:
    """Throughput with and without the join under one recipe, and the CPU time of both paths."""
    recipe = make_recipe(ViewsConfig(recipe=name, size_px=options.size_px))
    form = data.Form(width=options.width, dtype=options.dtype, backend=options.backend)
    writer = data.make_cache(str(folder / f"cache-{name}"), source, recipe, form, workers=options.workers)
    feeds = Feeds(options, source, writer.cache)
    rates: dict[str, Callable[[], float]] = {
        f"feed with cache, {name}": feeds.cached_rate,
        f"feed of images, {name}": feeds.image_rate,
    }
    report.measure("samples/s", interleave(f"feed, {name}", rates, options.repetitions))
    target = Target(bound=0.97, at_most=False)
    report.ratio(f"feed with cache / feed of images, {name}", *rates, target=target)
    # the feature path: all that a feed with a cache does besides pixels, order and stored params included
    times: dict[str, Callable[[], float]] = {
        f"CPU, feature path, {name}": feeds.cached_overhead,
        f"CPU, image path, {name}": feeds.image_cpu,
        f"CPU, order and mixing of images only, {name}": feeds.image_overhead,
    }
    report.measure("us/sample", interleave(f"CPU time, {name}", times, options.repetitions))
    report.ratio(
        f"CPU of the feature path / of the image path, {name}", *list(times)[:2], target=Target(bound=0.01)
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
