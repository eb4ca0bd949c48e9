"""How fast is extraction, against the teacher alone on images already in memory; what storing a unit costs.

    python benchmarks/extract.py --output benchmarks/results/extract.json

Three rates over the same views: the teacher's forward on mixed images that lie on its device; rendering alone, with
the same worker processes; the whole stage, published units included. On a GPU the stage should run at the rate of the
slower of the first two. On a CPU all of them share the cores, so their times add up and the bound is stated as such.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import data
import torch
from harness import Report, Stopwatch, Target, interleave, parse, parser, require, scratch_folder

from vkd_cache.cache.codecs import resolve_codec
from vkd_cache.cache.schema import Manifest
from vkd_cache.cache.units import UnitId
from vkd_cache.cache.writer import create_cache
from vkd_cache.cli import guarded
from vkd_cache.config import Config, load_config
from vkd_cache.runtime import library_versions, resolve_device, write_atomic
from vkd_cache.sources import Source, open_source, source_identity
from vkd_cache.stages.extract_job import ExtractJob
from vkd_cache.stages.rendering import RenderedBatch, Renderer, render_loader
from vkd_cache.stages.teaching import TeacherRun, start_teacher
from vkd_cache.stages.transfer import mixed_images
from vkd_cache.stages.units import unit_tasks
from vkd_cache.teachers import load_teacher
from vkd_cache.views.recipe import RECIPES, Recipe, make_recipe

TINY = {
    "teacher": "test_resnet", "images": 24, "shard_size": 12, "size_px": 32, "batch_size": 8, "workers": 1,
    "repetitions": 2, "unit_samples": 32, "width": 96,
}  # fmt: skip


def main() -> int:
    """Run the benchmark."""
    made = parser("Extraction against the teacher's forward alone; publishing and reading units.", repetitions=5)
    made.add_argument("--teacher", default="regnety_016", help="timm model, at random weights")
    made.add_argument("--images", type=int, default=256, help="JPEG files of 500x375")
    made.add_argument("--views", type=int, default=1, help="views of each")
    made.add_argument("--shard-size", type=int, default=128, help="images per unit")
    made.add_argument("--size-px", type=int, default=224, help="side of a view")
    made.add_argument("--recipe", default="vkd", choices=sorted(RECIPES), help="view recipe")
    made.add_argument("--batch-size", type=int, default=32, help="of the teacher")
    made.add_argument("--workers", type=int, default=2, help="processes that render")
    made.add_argument("--device", default="auto", help="of the teacher")
    made.add_argument("--autocast", default="off", choices=("off", "float16", "bfloat16"), help="of the teacher")
    made.add_argument("--channels-last", action="store_true", help="memory format of the teacher")
    made.add_argument("--dtype", default="float16", choices=sorted(data.CODECS), help="of the stage's cache")
    made.add_argument("--unit-samples", type=int, default=1024, help="samples of the units published and read")
    made.add_argument("--width", type=int, default=3024, help="channels of these units")
    options = parse(made, TINY)
    report = Report("extract", options)
    with scratch_folder(options) as folder:
        measure_stage(options, folder, report)
        measure_units(options, folder, report)
    report.finish(options.output)
    return 0


class Stage:
    """The three things that are timed, over the same units; each gives views per second."""

    def __init__(self, config: Config, source: Source, run: TeacherRun, manifest: Manifest, folder: Path) -> None:
        self._config = config
        self._source = source
        self._run = run
        self._manifest = manifest
        self._folder = folder
        self._recipe = make_recipe(config.views)
        views = range(int(config.views.count))
        self._units = [UnitId(shard, view) for view in views for shard in range(len(source.shards))]
        self._count = sum(len(source.shards[unit.shard].keys) for unit in self._units)
        self._caches = 0
        batches = list(self._rendered())
        # float images on the device, mixed: the teacher alone has nothing to do but its forward
        self._images = [mixed_images(batch.pixels.to(run.device), batch.mix) for batch in batches]
        run(self._images[0])

    def _rendered(self) -> Iterator[RenderedBatch]:
        seed, size = self._config.views.seed, self._run.batch_size
        tasks = [t for unit in self._units for t in unit_tasks(self._source, self._recipe, seed, unit, size)]
        renderer = Renderer(self._source, self._recipe, seed)
        return render_loader(renderer, tasks, workers=self._config.extract.workers)

    def teacher(self) -> float:
        """The teacher's forward, images in device memory."""
        with Stopwatch(self._run.device) as watch:
            for images in self._images:
                self._run(images)
        return self._count / watch.wall_s

    def rendering(self) -> float:
        """Reading, decoding and augmenting in worker processes, nothing done with the result."""
        with Stopwatch() as watch:
            done = sum(len(batch.row) for batch in self._rendered())
        require(done == self._count, f"rendering: {done} views came out of {self._count}")
        return self._count / watch.wall_s

    def stage(self) -> float:
        """The stage's own loop into a new cache, from starting the workers to the last record on disk."""
        self._caches += 1
        url = str(self._folder / f"stage-{self._caches}")
        writer = create_cache(url, self._manifest, self._run.teacher.head_tensors())
        job = ExtractJob(self._config, self._source, self._recipe, self._run, writer)
        with Stopwatch(self._run.device) as watch:
            job.do(self._units)
        done = job.summary().samples
        require(done == self._count, f"extract: {done} views were published of {self._count}")
        return self._count / watch.wall_s


def measure_stage(options: argparse.Namespace, folder: Path, report: Report) -> None:
    """The rates of the teacher, of rendering and of the stage."""
    photo_bytes = data.make_photos(folder / "photos", options.images, seed=options.seed)
    weights = data.random_weights(options.teacher, folder / "teacher.safetensors", seed=options.seed)
    config = _config(options, folder, weights)
    source = open_source(config.source.train, shard_size=config.source.shard_size)
    teacher = load_teacher(config.teacher, nodes=("pooled",), num_classes=1000, view_px=options.size_px)
    run = start_teacher(teacher, config.extract, torch.device(resolve_device(config.extract.device)))
    stage = Stage(config, source, run, _manifest(config, source, run), folder)
    kinds: dict[str, Callable[[], float]] = {
        "teacher alone": stage.teacher, "rendering alone": stage.rendering, "extract": stage.stage,
    }  # fmt: skip
    found = interleave("extract", kinds, options.repetitions)
    report.measure("views/s", found)
    on_gpu = run.device.type == "cuda"
    faster_data = report.measurements["rendering alone"]["median"] > report.measurements["teacher alone"]["median"]
    target = Target(bound=0.95, at_most=False) if on_gpu and faster_data else None
    report.ratio("extract / teacher alone", "extract", "teacher alone", target)
    report.ratio("extract / rendering alone", "extract", "rendering alone")
    each = zip(found["extract"], found["teacher alone"], found["rendering alone"], strict=True)
    if not on_gpu:
        shared = [rate * (1 / teacher + 1 / rendering) for rate, teacher, rendering in each]
        report.ratio_of("extract / both one after the other", shared)
    report.facts |= {
        "device": run.device.type,
        "limit": f"the {'teacher' if faster_data else 'rendering'} is the slower side"
        + ("" if on_gpu else "; teacher and rendering share the cores"),
        "mean JPEG bytes": round(photo_bytes / options.images),
        "views per repetition": options.images * options.views,
    }


def _config(options: argparse.Namespace, folder: Path, weights: str) -> Config:
    sections: dict[str, dict[str, object]] = {
        "source": {"train": str(folder / "photos"), "shard_size": options.shard_size},
        "views": {"recipe": options.recipe, "count": str(options.views), "size_px": options.size_px},
        "teacher": {"name": options.teacher, "weights": weights},
        "cache": {"url": str(folder / "unused"), "dtype": options.dtype},
        "extract": {
            "batch_size": options.batch_size, "workers": options.workers, "device": options.device,
            "autocast": options.autocast, "channels_last": options.channels_last,
        },
    }  # fmt: skip
    return load_config(None, sections)


def _manifest(config: Config, source: Source, run: TeacherRun) -> Manifest:
    """As the stage plans it, without measuring a codec."""
    side = config.views.size_px
    values = run(torch.rand(2, 3, side, side, device=run.device))
    head = run.teacher.head_tensors()
    return Manifest(
        dataset=source_identity(source).to_json(),
        recipe=make_recipe(config.views).to_json(),
        seed=config.views.seed,
        nodes=tuple(resolve_codec(name, config.cache.dtype, value.cpu(), head) for name, value in values.items()),
        teacher=run.teacher.identity,
        head=None,
        numerics=run.numerics(),
        versions=library_versions(),
        backend=config.cache.backend,
    )


class UnitCost:
    """Publishing and reading units of one backend and type; each call gives microseconds per sample."""

    def __init__(self, options: argparse.Namespace, folder: Path, backend: str, dtype: str) -> None:
        recipe: Recipe = RECIPES["vkd"]
        self._count = options.unit_samples
        self._columns = data.unit_columns(recipe, data.imagenet_keys(self._count), seed=options.seed)
        self._values = data.pooled_features(self._count, options.width, seed=options.seed)
        self._folder = folder / f"{backend}-{dtype}"
        form = data.Form(width=options.width, dtype=dtype, backend=backend)
        self._writer = data.unit_store(
            str(self._folder), recipe, form, units=options.repetitions + 1, count=self._count
        )
        self._backend = backend
        self._published = 0
        self.publish()
        self.file = self._folder / self._writer.cache.record(0, 0).files[0][0]

    def publish(self) -> float:
        """Encode, pack, checksum, write, fsync, rename; then the same for the record."""
        with Stopwatch() as watch:
            self._writer.publish(self._published, 0, self._columns, {"pooled": self._values})
        self._published += 1
        return 1e6 * watch.wall_s / self._count

    def read(self) -> float:
        """Read, verify, unpack, and decode every value."""
        with Stopwatch() as watch:
            self._writer.cache.read(0, 0).node("pooled").float()
        return 1e6 * watch.wall_s / self._count

    def write_plain(self) -> float:
        """The same bytes as one file, with fsync and rename: the disk's share."""
        content = self.file.read_bytes()
        with Stopwatch() as watch:
            write_atomic(self._folder / "plain", content)
        return 1e6 * watch.wall_s / self._count

    def read_plain(self) -> float:
        """The same bytes read and dropped."""
        with Stopwatch() as watch:
            self.file.read_bytes()
        return 1e6 * watch.wall_s / self._count


def measure_units(options: argparse.Namespace, folder: Path, report: Report) -> None:
    """Publishing and reading, per sample, beside plain files of the same bytes."""
    kinds: dict[str, Callable[[], float]] = {}
    for backend in ("zarr", "webdataset"):
        for dtype in ("float16", "uint8"):
            cost = UnitCost(options, folder, backend, dtype)
            name = f"{backend} {dtype}"
            kinds |= {
                f"publish {name}": cost.publish, f"write plain {name}": cost.write_plain,
                f"read {name}": cost.read, f"read plain {name}": cost.read_plain,
            }  # fmt: skip
            report.facts[f"unit bytes per sample, {name}"] = cost.file.stat().st_size / options.unit_samples
    report.measure("us/sample", interleave("units", kinds, options.repetitions))
    for name in (name for name in kinds if name.startswith("publish")):
        budget = [value / 30.0 for value in report.measurements[name]["values"]]
        report.ratio_of(f"{name} / 30 us", budget, Target(bound=1.0))
        report.ratio(f"{name} / plain file", name, name.replace("publish", "write plain"))


if __name__ == "__main__":
    sys.exit(guarded(main))
