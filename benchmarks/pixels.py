"""What stored pixels cost in bytes and extraction, and what they save a training run in CPU time.

    python benchmarks/pixels.py --output benchmarks/results/pixels.json

Three questions, each beside the cache without pixels. How much CPU time does a training sample take, from the unit or
the image file to 8-bit pixels with a checked digest, at the reference recipe and at the fast one? What does storing add
to rendering? And how does a codec move the features of a network: the teacher sees the same as the student, so that is
no error, but it says how far the data set is from the one without?
"""

import argparse
import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import data
import numpy as np
import numpy.typing as npt
import pretrained
import simplejpeg
import torch
from harness import Report, Stopwatch, interleave, parse, parser, require, scratch_folder
from PIL import Image

from vkd_cache.cache.pixel_codecs import JPEG, LOSSLESS, PixelSpec, decode_view, encode_view
from vkd_cache.cache.reader import Cache
from vkd_cache.config import ViewsConfig
from vkd_cache.guard import guarded
from vkd_cache.sources import Source, open_source
from vkd_cache.stages.feed import Feed, Schedule
from vkd_cache.stages.rendering import Renderer, RenderTask
from vkd_cache.stages.stored_pixels import StoredPixels
from vkd_cache.stages.unit_views import CachedViews
from vkd_cache.views.recipe import Recipe, make_recipe

TINY = {
    "images": 12, "shard_size": 6, "size_px": 32, "batch_size": 4, "repetitions": 2, "width": 32, "views": 8,
    "recipes": "vkd",
}  # fmt: skip
Pixels = npt.NDArray[np.uint8]


class Codec(NamedTuple):
    """A way to store one view."""

    encode: Callable[[Pixels], bytes]
    decode: Callable[[bytes], Pixels]


def main() -> int:
    """Run the benchmark."""
    made = parser("Stored pixels: bytes, CPU time of training and of extraction, change of features.", repetitions=5)
    made.add_argument("--images", type=int, default=256, help="JPEG files of 500x375")
    made.add_argument("--shard-size", type=int, default=128, help="images per unit")
    made.add_argument("--size-px", type=int, default=224, help="side of a view")
    made.add_argument("--recipes", default="vkd,fast", help="of the views, with commas")
    made.add_argument("--batch-size", type=int, default=32, help="of the feed")
    made.add_argument("--width", type=int, default=3024, help="channels of the cached node")
    made.add_argument("--quality", type=int, default=90, help="of stored JPEGs")
    made.add_argument("--views", type=int, default=64, help="views that codecs are compared on")
    made.set_defaults(threads=1)  # waiting threads would be counted
    options = parse(made, TINY)
    report = Report("pixels", options)
    with scratch_folder(options) as folder:
        report.facts["mean bytes of an image file"] = round(
            data.make_photos(folder / "photos", options.images, seed=options.seed) / options.images
        )
        source = open_source(str(folder / "photos"), shard_size=options.shard_size)
        for name in options.recipes.split(","):
            measure_recipe(options, source, folder, name, report)
        compare_codecs(options, source, report)
    report.finish(options.output)
    return 0


def specs(options: argparse.Namespace) -> dict[str, PixelSpec | None]:
    """What is compared, by the name of the option's value."""
    return {"none": None, "jpeg": PixelSpec(codec=JPEG, quality=options.quality), "lossless": PixelSpec(codec=LOSSLESS)}


class Training:
    """What a training run does for its images, in this process."""

    def __init__(self, options: argparse.Namespace, source: Source, cache: Cache) -> None:
        self._renderer = Renderer(source, cache.recipe, cache.manifest.seed, stored=StoredPixels.of_cache(cache))
        self._views = CachedViews(cache, source, [0])
        self._schedule = Schedule(
            epochs=1, batch_size=options.batch_size, seed=options.seed, open_shards=8, digest_check=1.0
        )

    def cpu(self) -> float:
        """CPU microseconds per sample: order, units, features, and 8-bit pixels with every digest checked."""
        with Feed(self._renderer, self._views, self._schedule, ("pooled",)) as feed, Stopwatch() as watch:
            count = sum(len(batch) for batch in feed.batches(epoch=0, step=0, workers=0))
        return 1e6 * watch.cpu_s / count

    def main_process(self) -> float:
        """CPU microseconds per sample of the main process, where a worker renders or decodes."""
        with Feed(self._renderer, self._views, self._schedule, ("pooled",)) as feed:
            batches = feed.batches(epoch=0, step=0, workers=1)
            next(batches)  # the worker has started, and units are open
            with Stopwatch() as watch:
                count = sum(len(batch) for batch in batches)
        return 1e6 * watch.cpu_s / max(count, 1)


class Extraction:
    """What an extraction does for the teacher's images, in this process."""

    def __init__(self, options: argparse.Namespace, source: Source, recipe: Recipe, spec: PixelSpec | None) -> None:
        stored = None if spec is None else StoredPixels(spec=spec, url="benchmark", made_with={})
        self._renderer = Renderer(source, recipe, options.seed, stored=stored)
        rows = [(shard, row) for shard, held in enumerate(source.shards) for row in range(len(held.keys))]
        self._batches = [rows[start : start + options.batch_size] for start in range(0, len(rows), options.batch_size)]
        self._count = len(rows)

    def cpu(self) -> float:
        """CPU microseconds per view: reading, rendering, storing, digest."""
        with Stopwatch() as watch:
            for batch in self._batches:
                shard, row = np.array(batch).T
                rendered = self._renderer[RenderTask(tag=None, shard=shard, row=row, view=0)]
                require(rendered.error is None and not rendered.broken, "pixels: a photograph could not be rendered")
        return 1e6 * watch.cpu_s / self._count


def measure_recipe(options: argparse.Namespace, source: Source, folder: Path, name: str, report: Report) -> None:
    """Bytes and CPU time of a recipe's views, with and without stored pixels."""
    recipe = make_recipe(ViewsConfig(recipe=name, size_px=options.size_px))
    training, workers, extraction = {}, {}, {}
    for kind, spec in specs(options).items():
        form = data.Form(width=options.width, dtype="uint8", backend="zarr", pixels=spec)
        cache = data.make_cache(str(folder / f"{name}-{kind}"), source, recipe, form, workers=0).cache
        units = [cache.record(*unit) for unit in cache.units]
        total, count = sum(unit.num_bytes for unit in units), sum(unit.num_samples for unit in units)
        report.facts[f"bytes per view, {name}, {kind}"] = round(total / count)
        trained = Training(options, source, cache)
        training[f"training CPU, {name}, {kind}"] = trained.cpu
        workers[f"CPU of the main process, {name}, {kind}"] = trained.main_process
        extraction[f"extraction CPU, {name}, {kind}"] = Extraction(options, source, recipe, spec).cpu
    for title, series in (("training", training), ("main process", workers), ("extraction", extraction)):
        report.measure("us/sample", interleave(f"{name}, {title}", series, options.repetitions))
    for kind in ("jpeg", "lossless"):
        report.ratio(
            f"training CPU, {name}, none / {kind}", f"training CPU, {name}, none", f"training CPU, {name}, {kind}"
        )
        report.ratio(
            f"extraction CPU, {name}, {kind} / none", f"extraction CPU, {name}, {kind}", f"extraction CPU, {name}, none"
        )
        before, after = (report.measurements[f"training CPU, {name}, {which}"]["median"] for which in ("none", kind))
        bare, full = (report.facts[f"bytes per view, {name}, {which}"] for which in ("none", kind))
        saved = round((before - after) / (full - bare) * 1e3, 1)
        report.facts[f"CPU us saved per epoch and kB, {name}, {kind}"] = saved


def compare_codecs(options: argparse.Namespace, source: Source, report: Report) -> None:
    """Bytes, CPU time and change of features of the codecs that were to choose from."""
    recipe = make_recipe(ViewsConfig(recipe="vkd", size_px=options.size_px))
    renderer = Renderer(source, recipe, options.seed)
    row = np.arange(min(options.views, len(source.shards[0].keys)))
    views = list(renderer[RenderTask(tag=None, shard=np.zeros_like(row), row=row, view=0)].pixels.numpy())
    codecs = choices(options)
    encoded = {name: [codec.encode(view) for view in views] for name, codec in codecs.items()}

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        def once() -> float:
            with Stopwatch() as watch:
                work()
            return 1e6 * watch.cpu_s / len(views)

        return once

    def encoding(codec: Codec) -> Callable[[], object]:
        return lambda: [codec.encode(view) for view in views]

    def decoding(name: str, codec: Codec) -> Callable[[], object]:
        return lambda: [codec.decode(code) for code in encoded[name]]

    series = {f"encode, {name}": timed(encoding(codec)) for name, codec in codecs.items()}
    series |= {f"decode, {name}": timed(decoding(name, codec)) for name, codec in codecs.items()}
    report.measure("us/view", interleave("codecs", series, min(options.repetitions, 3)))
    model, trained = pretrained.lite0(options.seed)
    report.facts["network whose features move"] = f"{pretrained.NAME}, {'ImageNet' if trained else 'random'} weights"
    exact = features(model, views)
    for name, codec in codecs.items():
        moved = features(model, [codec.decode(code) for code in encoded[name]])
        change = (moved - exact).norm(dim=1) / exact.norm(dim=1)
        report.facts[f"bytes, {name}"] = round(sum(map(len, encoded[name])) / len(views))
        report.facts[f"mean change of features, {name}"] = round(float(change.mean()), 4)


def choices(options: argparse.Namespace) -> Mapping[str, Codec]:
    """The codecs to choose from: JPEG by quality and subsampling, ours without loss, and PNG beside it."""
    found = {f"jpeg {quality} {name}": jpeg(quality, name) for quality in (85, 90, 95) for name in ("444", "420")}
    lossless, shape = PixelSpec(codec=LOSSLESS), (options.size_px, options.size_px, 3)

    def ours(code: bytes) -> Pixels:
        out = np.empty(shape, np.uint8)
        decode_view(code, lossless, out)
        return out

    found["delta_zstd"] = Codec(lambda view: encode_view(view, lossless), ours)
    found["png 1"] = Codec(as_png, lambda code: np.asarray(Image.open(io.BytesIO(code))))
    return found


def jpeg(quality: int, subsampling: str) -> Codec:
    """JPEG as simplejpeg writes it."""
    return Codec(
        lambda view: simplejpeg.encode_jpeg(view, quality=quality, colorspace="RGB", colorsubsampling=subsampling),
        lambda code: simplejpeg.decode_jpeg(code, colorspace="RGB"),
    )


def as_png(view: Pixels) -> bytes:
    """PNG at its fastest."""
    stream = io.BytesIO()
    Image.fromarray(view).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def features(model: torch.nn.Module, views: list[Pixels]) -> torch.Tensor:
    """(n, C) pooled features of views, normalised to [-1, 1]."""
    with torch.inference_mode():
        parts = [
            model.forward_head(model.forward_features(batch), pre_logits=True)
            for batch in (torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 127.5 - 1).split(16)
        ]
    return torch.cat(parts)


if __name__ == "__main__":
    sys.exit(guarded(main))
