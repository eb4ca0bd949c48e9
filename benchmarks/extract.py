"""How fast is extraction, against the teacher alone on images already in memory; what storing a unit costs.

    python benchmarks/extract.py --output benchmarks/results/extract.json

Three rates over the same views: the teacher's forward on mixed images that lie on its device; rendering alone, with
the same worker processes; the whole stage, published units included. The stage should run at the rate of the slower of
the first two. On a CPU all of them share the cores, so their times add up and the bound is stated as such; there they
are measured once more with one core for the teacher and the others for workers and writer, where that bound holds.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import data
from extract_stage import Stage, apart, can_be_apart, stage_config
from harness import Report, Stopwatch, Target, interleave, parse, parser, scratch_folder

from vkd_cache.guard import guarded
from vkd_cache.runtime import write_atomic
from vkd_cache.views.recipe import RECIPES, Recipe

KINDS = ("teacher alone", "rendering alone", "extract")
APART = ", a core for the teacher"  # and the others for data workers and writer
TINY = {
    "teacher": "test_resnet", "images": 24, "shard_size": 12, "size_px": 32, "batch_size": 8, "workers": 1,
    "repetitions": 2, "unit_samples": 32, "width": 96,
}  # fmt: skip


def main() -> int:
    """Run the benchmark."""
    made = parser("Extraction against the teacher's forward alone; publishing and reading units.", repetitions=3)
    made.add_argument("--teacher", default="regnety_016", help="timm model, at random weights")
    made.add_argument("--images", type=int, default=320, help="JPEG files of 500x375")
    made.add_argument("--views", type=int, default=1, help="views of each")
    made.add_argument("--shard-size", type=int, default=160, help="images per unit")
    made.add_argument("--size-px", type=int, default=224, help="side of a view")
    made.add_argument("--recipe", default="vkd", choices=sorted(RECIPES), help="view recipe")
    made.add_argument("--batch-size", type=size, default=16, metavar="N|auto", help="of the teacher")
    made.add_argument("--workers", type=int, default=2, help="processes that render")
    made.add_argument("--device", default="auto", help="of the teacher")
    made.add_argument("--autocast", default="off", choices=("off", "float16", "bfloat16"), help="of the teacher")
    made.add_argument("--channels-last", action="store_true", help="memory format of the teacher")
    made.add_argument("--compile", action="store_true", help="torch.compile the teacher")
    made.add_argument("--no-apart", action="store_true", help="not once more with a core for the teacher alone")
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


def size(text: str) -> int:
    """A batch size; `auto` is 0."""
    return 0 if text == "auto" else int(text)


def measure_stage(options: argparse.Namespace, folder: Path, report: Report) -> None:
    """The rates of the teacher, of rendering and of the stage, as they come and on cores of their own."""
    photo_bytes = data.make_photos(folder / "photos", options.images, seed=options.seed)
    weights = data.random_weights(options.teacher, folder / "teacher.safetensors", seed=options.seed)
    config = stage_config(options, folder, weights)
    stage = Stage(config, folder)
    on_gpu = stage.run.device.type == "cuda"
    found = interleave("extract", stage.kinds, options.repetitions)
    report.measure("views/s", found)
    relate(report, found, "", Target(bound=0.95, at_most=False) if on_gpu else None)
    if not on_gpu:
        each = zip(*(found[name] for name in KINDS), strict=True)
        shared = [rate * (1 / teacher + 1 / rendering) for teacher, rendering, rate in each]
        report.ratio_of("extract / both one after the other", shared)
    report.facts |= {
        "device": stage.run.device.type,
        "batch size": stage.run.batch_size,
        "batch sizes tried": [f"{trial.batch_size}: {trial.rate:.4g}/s" for trial in stage.tried],
        "limited by, as the stage says": stage.limits,
        "mean JPEG bytes": round(photo_bytes / options.images),
        "views per repetition": options.images * options.views,
    }
    del stage  # and its images
    if on_gpu or options.no_apart:
        return
    if not can_be_apart():
        report.facts["a core for the teacher alone"] = "not measured: needs Linux and two cores"
        return
    alone, limits = apart(config, folder / "apart", options.repetitions)
    alone = {f"{name}{APART}": rates for name, rates in alone.items()}
    report.measure("views/s", alone)
    relate(report, alone, APART, Target(bound=0.95, at_most=False))
    report.facts[f"limited by, as the stage says{APART}"] = limits


def relate(report: Report, found: Mapping[str, Sequence[float]], where: str, target: Target | None) -> None:
    """The stage's rate over those of the teacher, of rendering, and of the slower of both, which is its limit."""
    teacher, rendering, stage = (f"{name}{where}" for name in KINDS)
    report.ratio(f"extract / teacher alone{where}", stage, teacher)
    report.ratio(f"extract / rendering alone{where}", stage, rendering)
    each = zip(found[teacher], found[rendering], found[stage], strict=True)
    report.ratio_of(f"extract / the slower of both{where}", [rate / min(a, b) for a, b, rate in each], target)


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
