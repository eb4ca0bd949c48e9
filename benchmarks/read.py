"""What the cache join costs a training feed, what the image pipeline costs, and how many bytes a view takes.

    python benchmarks/read.py --output benchmarks/results/read.json

Three questions, each beside its baseline. Is the feed as fast with the join as with images only, same views, same
workers? How much CPU time does the feature path take, over that of the image path? How does the whole image pipeline
compare with torchvision's transforms on PIL images, same recipe and files, one process, one thread?
"""

import argparse
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import data
import numpy as np
import torch
from harness import Report, Stopwatch, Target, interleave, parse, parser, require, scratch_folder
from PIL import Image, ImageFilter
from torchvision import transforms

from vkd_cache.cache.reader import Cache
from vkd_cache.cache.units import UnitId, record_path
from vkd_cache.cli import guarded
from vkd_cache.config import ViewsConfig
from vkd_cache.sources import Source, open_source
from vkd_cache.stages.feed import FedBatch, Feed, Schedule
from vkd_cache.stages.rendering import Renderer, RenderTask
from vkd_cache.stages.transfer import mixed_images
from vkd_cache.stages.unit_views import CachedViews, PlannedViews, Views
from vkd_cache.views.blend import normalise
from vkd_cache.views.recipe import RECIPES, Recipe, make_recipe

TINY = {
    "images": 24, "shard_size": 12, "size_px": 32, "batch_size": 4, "workers": 1, "repetitions": 2, "epochs": 2,
    "width": 96, "unit_samples": 32,
}  # fmt: skip
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAIVE_BYTES_PER_CHANNEL = 2  # float16 features, and as many bytes for each of the logits
IMAGENET_CLASSES = 1000


def main() -> int:
    """Run the benchmark."""
    made = parser("The training feed with cache join against images only; CPU time and bytes per view.", repetitions=5)
    made.add_argument("--images", type=int, default=512, help="JPEG files of 500x375")
    made.add_argument("--shard-size", type=int, default=128, help="images per unit")
    made.add_argument("--size-px", type=int, default=224, help="side of a view")
    made.add_argument("--recipe", default="vkd", choices=sorted(RECIPES), help="of the feed; torchvision's is vkd")
    made.add_argument("--batch-size", type=int, default=32, help="of the feed")
    made.add_argument("--workers", type=int, default=2, help="processes that render")
    made.add_argument("--epochs", type=int, default=2, help="passes over the images per repetition")
    made.add_argument("--width", type=int, default=3024, help="channels of the cached node")
    made.add_argument("--dtype", default="uint8", choices=sorted(data.CODECS), help="stored type of the feed's cache")
    made.add_argument("--backend", default="zarr", choices=("zarr", "webdataset"), help="of the feed's cache")
    made.add_argument("--unit-samples", type=int, default=1024, help="samples of the units whose bytes are counted")
    options = parse(made, TINY)
    report = Report("read", options)
    with scratch_folder(options) as folder:
        report.facts["mean JPEG bytes"] = round(
            data.make_photos(folder / "photos", options.images, seed=options.seed) / options.images
        )
        source = open_source(str(folder / "photos"), shard_size=options.shard_size)
        measure_feed(options, source, folder, report)
        measure_pipeline(options, source, folder, report)
        count_bytes(options, folder, report)
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
        """CPU microseconds per sample of images only, everything in this process."""
        return self._cpu(self._renderer, self._planned, ())

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


def measure_feed(options: argparse.Namespace, source: Source, folder: Path, report: Report) -> None:
    """Throughput with and without the join, and the CPU time of both paths."""
    recipe = make_recipe(ViewsConfig(recipe=options.recipe, size_px=options.size_px))
    form = data.Form(width=options.width, dtype=options.dtype, backend=options.backend)
    writer = data.make_cache(str(folder / "cache"), source, recipe, form, workers=options.workers)
    feeds = Feeds(options, source, writer.cache)
    rates: dict[str, Callable[[], float]] = {"feed with cache": feeds.cached_rate, "feed of images": feeds.image_rate}
    report.measure("samples/s", interleave("feed", rates, options.repetitions))
    report.ratio(
        "feed with cache / feed of images", "feed with cache", "feed of images", Target(bound=0.97, at_most=False)
    )
    # the feature path: all that a feed with a cache does besides pixels, order and stored params included
    times: dict[str, Callable[[], float]] = {
        "CPU, image path": feeds.image_cpu,
        "CPU, feature path": feeds.cached_overhead,
        "CPU, order and mixing of images only": feeds.image_overhead,
    }
    report.measure("us/sample", interleave("CPU time", times, options.repetitions))
    report.ratio(
        "CPU of the feature path / of the image path", "CPU, feature path", "CPU, image path", Target(bound=0.01)
    )


class Pipelines:
    """The image pipelines from a file to normalised float images; each gives CPU microseconds per image."""

    def __init__(self, options: argparse.Namespace, source: Source, folder: Path) -> None:
        self._recipe = make_recipe(ViewsConfig(recipe="vkd", size_px=options.size_px))
        self._renderer = Renderer(source, self._recipe, options.seed)
        self._batch_size = options.batch_size
        self._rows = [(shard, row) for shard, held in enumerate(source.shards) for row in range(len(held.keys))]
        self._paths = sorted((folder / "photos").rglob("*.jpg"))
        self._transform = torchvision_vkd(options.size_px)

    def ours(self) -> float:
        """Read, decode, plan, render, digest; then, as the device would, convert and normalise."""
        return self._ours(finish=True)

    def ours_to_device(self) -> float:
        """The same up to the 8-bit pixels that leave the CPU when there is a GPU."""
        return self._ours(finish=False)

    def _ours(self, *, finish: bool) -> float:
        with Stopwatch() as watch:
            for start in range(0, len(self._rows), self._batch_size):
                shard, row = np.array(self._rows[start : start + self._batch_size]).T
                batch = self._renderer[RenderTask(tag=None, shard=shard, row=row, view=0)]
                require(batch.error is None and not batch.broken, "pipeline: a photograph could not be rendered")
                if finish:
                    normalise(mixed_images(batch.pixels, None), MEAN, STD)
        return 1e6 * watch.cpu_s / len(self._rows)

    def torchvision(self) -> float:
        """Read, decode with PIL, torchvision's transforms, stack."""
        with Stopwatch() as watch:
            for start in range(0, len(self._paths), self._batch_size):
                paths = self._paths[start : start + self._batch_size]
                torch.stack([self._transform(_pil_image(path)) for path in paths])
        return 1e6 * watch.cpu_s / len(self._paths)


def _pil_image(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")


class PilBlur:
    """Gaussian blur of a radius drawn from [0.1, 2], by PIL."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))


def torchvision_vkd(size_px: int) -> Callable[[Image.Image], torch.Tensor]:
    """The vkd recipe, without mixing, as torchvision's transforms."""
    one_of_three = [transforms.Grayscale(num_output_channels=3), transforms.RandomSolarize(128, p=1.0), PilBlur()]
    made: Callable[[Image.Image], torch.Tensor] = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                size_px, scale=(0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.RandomChoice(one_of_three),
            transforms.ColorJitter(0.3, 0.3, 0.3),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return made


def measure_pipeline(options: argparse.Namespace, source: Source, folder: Path, report: Report) -> None:
    """CPU time of our image pipeline and of torchvision's."""
    pipelines = Pipelines(options, source, folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting threads would be counted
    kinds: dict[str, Callable[[], float]] = {
        "CPU, our pipeline": pipelines.ours,
        "CPU, our pipeline to 8-bit pixels": pipelines.ours_to_device,
        "CPU, torchvision pipeline": pipelines.torchvision,
    }
    report.measure("us/image", interleave("image pipeline", kinds, options.repetitions))
    torch.set_num_threads(threads)
    target = Target(bound=0.5)
    for name in list(kinds)[:2]:
        report.ratio(f"{name.removeprefix('CPU, ')} / torchvision's", name, "CPU, torchvision pipeline", target)


def count_bytes(options: argparse.Namespace, folder: Path, report: Report) -> None:
    """Bytes per view, files of units and records counted, for every type and backend; zarr compresses, tar does not."""
    recipe = RECIPES["vkd"]
    columns = data.unit_columns(recipe, data.imagenet_keys(options.unit_samples), seed=options.seed)
    values = data.pooled_features(options.unit_samples, options.width, seed=options.seed)
    naive = NAIVE_BYTES_PER_CHANNEL * (options.width + IMAGENET_CLASSES)
    for backend in ("zarr", "webdataset"):
        for dtype in data.CODECS:
            url = folder / f"{backend}-{dtype}"
            form = data.Form(width=options.width, dtype=dtype, backend=backend)
            writer = data.unit_store(str(url), recipe, form, units=1, count=options.unit_samples)
            record = writer.publish(0, 0, columns, {"pooled": values})
            files = (url / record.files[0][0], url / record_path(UnitId(0, 0)))
            view_bytes = sum(file.stat().st_size for file in files) / options.unit_samples
            report.facts[f"bytes per view, {backend} {dtype}"] = view_bytes
            report.ratio_of(f"bytes per view, {backend} {dtype} / naive", [view_bytes / naive])
            if dtype == "uint8":
                report.ratio_of(f"bytes per view, {backend} uint8 / 3.1 kB", [view_bytes / 3100], Target(bound=1.0))
    described = sum(column.nbytes for column in columns.values()) / options.unit_samples
    report.facts |= {"bytes per view, everything but features, uncompressed": described, "bytes per view, naive": naive}


if __name__ == "__main__":
    sys.exit(guarded(main))
