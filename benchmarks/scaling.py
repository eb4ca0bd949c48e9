"""How long a job takes to start when the data set and its cache are large, and how much memory that needs.

    python benchmarks/scaling.py --layout imagenet --output benchmarks/results/scaling-imagenet.json
    python benchmarks/scaling.py --layout coco --output benchmarks/results/scaling-coco.json

Two caches that no teacher has made, of the size of those that people will have: 1,281,167 samples in 1,282 tar shards
with 300 views, and 118,287 images of COCO's layout with 50. Every record is there, sealed as extraction seals it, and
so are the unit files that the first batch needs. Each question is asked of a process of its own, which says what it
took and how much memory it came to hold beyond Python and its libraries.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import data
import detection_data
import torch
from harness import ROOT, Report, Target, interleave, parse, parser, require, scratch_folder
from packing import jpeg, pack_samples
from PIL import Image

from vkd_cache.cache.reader import open_cache
from vkd_cache.cache.schema import UnitRecord
from vkd_cache.cache.units import UnitId, record_path, unit_path
from vkd_cache.cache.writer import CacheWriter, create_cache
from vkd_cache.cli import guarded
from vkd_cache.config import Config, config_to_json, load_config
from vkd_cache.runtime import JobSplit, peak_memory_bytes
from vkd_cache.sources import Source, open_source
from vkd_cache.stages.copying import copies_of
from vkd_cache.stages.extract_checks import nodes_to_store
from vkd_cache.stages.extract_job import ExtractJob
from vkd_cache.stages.extract_plan import ExtractPlan
from vkd_cache.stages.order import EpochOrder
from vkd_cache.stages.run import complete_views, prepare_run
from vkd_cache.stages.teaching import start_teacher
from vkd_cache.stages.unit_order import unpublished
from vkd_cache.stages.units import units_of_worker
from vkd_cache.teachers import load_teacher
from vkd_cache.views.recipe import make_recipe

TINY = {"samples": 48, "views": 3, "shard_size": 8, "repetitions": 1}
SIZES: Mapping[str, Mapping[str, int]] = {
    "imagenet": {"samples": 1_281_167, "views": 300, "shard_size": 1000},
    "coco": {"samples": 118_287, "views": 50, "shard_size": 128},
}
PICTURE_PX = 48  # the images are small: nothing here is about decoding
TEACHERS = {"imagenet": "test_resnet", "coco": "vidt_swin_nano"}
STUDENTS = {"imagenet": "test_vit", "coco": "vidt_swin_nano"}
OPEN_SHARDS = 2
SECONDS = Target(bound=30.0)  # seconds, not minutes
LINKS = 30_000  # to one file, below what file systems allow


def main() -> int:
    """Run the benchmark."""
    made = parser("Start-up time and memory with large data sets and caches.", repetitions=3)
    made.add_argument("--layout", choices=sorted(SIZES), default="imagenet", help="tar shards, or COCO's layout")
    made.add_argument("--samples", type=int, default=0, help="samples; 0: as many as the data set has")
    made.add_argument("--views", type=int, default=0, help="views in the cache; 0: 300, or 50 for coco")
    made.add_argument("--shard-size", type=int, default=0, help="samples per unit; 0: 1000, or 128 for coco")
    made.add_argument("--ask", default="", help=argparse.SUPPRESS)
    options = parse(made, TINY)
    if options.ask:
        return answer(options.ask)
    for name, value in SIZES[options.layout].items():
        setattr(options, name, getattr(options, name) or value)
    report = Report("scaling", options)
    report.settings.pop("ask")
    with scratch_folder(options) as folder:
        config = write_everything(options, folder, report)
        measure(options, config, folder, report)
    report.finish(options.output)
    return 0


def write_everything(options: argparse.Namespace, folder: Path, report: Report) -> Config:
    """The data set and its finished cache."""
    started = time.monotonic()
    detection = options.layout == "coco"
    images = (write_coco if detection else write_tars)(folder / "images", options.samples, options.shard_size)
    weights = folder / "teacher.safetensors"
    name = TEACHERS[options.layout]
    made = detection_data.random_detector if detection else data.random_weights
    views: dict[str, object] = {"count": str(options.views)}
    views |= {"recipe": "vidt", "scales": [64], "crop_scales": [], "max_size_px": 64} if detection else {"size_px": 32}
    config = load_config(
        None,
        {
            "source": {"train": images, "shard_size": options.shard_size, "local_dir": str(folder / "copies")},
            "views": views,
            "teacher": {"name": name, "weights": made(name, weights, seed=options.seed)},
            "cache": {"url": str(folder / "cache"), "dtype": "float16"} | ({"tokens": 0.1} if detection else {}),
            "extract": {"batch_size": 64, "workers": 0, "device": "cpu"},
            "student": {"name": STUDENTS[options.layout]},
            "loss": {} if detection else {"logit_weight": 0.0},  # a head of 1,000 classes for pictures of 8
            "train": {
                "batch_size": 32, "workers": 0, "device": "cpu", "epochs": options.views, "open_shards": OPEN_SHARDS,
                "output": str(folder / "run"),
            },
        },
    )  # fmt: skip
    source = open_source(images, split="train", shard_size=options.shard_size)
    count = sum(len(shard.keys) for shard in source.shards)
    require(count == options.samples, f"scaling: found {count} samples of {options.samples}")
    write_cache(config, source, options.views)
    _open_source(config)  # from now on its index is kept
    report.facts |= {
        "samples": count, "shards": len(source.shards), "views": options.views,
        "records": len(source.shards) * options.views, "seconds to make all this": time.monotonic() - started,
    }  # fmt: skip
    return config


def write_tars(folder: Path, samples: int, shard_size: int) -> str:
    """Tar shards of one small picture under many keys; returns their pattern."""
    folder.mkdir(parents=True)
    content = _picture()
    keys = data.imagenet_keys(samples)
    for number, start in enumerate(range(0, samples, shard_size)):
        rows = range(start, min(start + shard_size, samples))
        named = ((keys[row].replace("/", "-"), content, row % data.NUM_CLASSES) for row in rows)
        pack_samples(folder / f"train-{number:06d}.tar", named)
    return str(folder / "train-*.tar")


def write_coco(folder: Path, samples: int, shard_size: int) -> str:
    """COCO's layout with one small picture under many names, and as many boxes as COCO has; returns its root."""
    photos = folder / "train2017"
    photos.mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, boxes = [], []
    for number in range(1, samples + 1):
        name = f"{number:012d}.jpg"
        first = photos / f"{1 + (number - 1) // LINKS * LINKS:012d}.jpg"
        if first.exists():
            (photos / name).hardlink_to(first)
        else:
            first.write_bytes(_picture())
        images.append({"id": number, "file_name": name, "width": PICTURE_PX, "height": PICTURE_PX})
        boxes += [
            {"id": 8 * number + at, "image_id": number, "iscrowd": 0, "category_id": 1 + (number + at) % 90,
             "bbox": [at, at, 8 + at, 9 + at], "area": (8 + at) * (9 + at)}
            for at in range(detection_data.MEAN_BOXES)
        ]  # fmt: skip
    categories = [{"id": number, "name": f"category {number}"} for number in range(1, 91)]
    document = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(document), encoding="utf-8")
    return str(folder)


def _picture() -> bytes:
    return jpeg(Image.radial_gradient("L").resize((PICTURE_PX, PICTURE_PX)).convert("RGB"), 75)


def write_cache(config: Config, source: Source, views: int) -> None:
    """The manifest that extraction writes, real units for the first batches of training, and all other records."""
    recipe = make_recipe(config.views)
    teacher = load_teacher(
        config.teacher, nodes=nodes_to_store(config.cache, source), num_classes=source.num_classes,
        view_px=recipe.size_px,
    )  # fmt: skip
    run = start_teacher(teacher, config.extract, torch.device("cpu"))
    plan = ExtractPlan(config=config, source=source, recipe=recipe, run=run)
    writer = create_cache(config.cache.url, plan.manifest(None), teacher.head_tensors())
    first = _first_shards(config, source)
    ExtractJob(config, source, recipe, run, writer).do([UnitId(shard, 0) for shard in first])
    _write_records(writer, source, views)


def _first_shards(config: Config, source: Source) -> list[int]:
    """The shards whose units training reads before its first batch."""
    counts = [math.ceil(len(shard.keys) / 2) for shard in source.shards]
    order = EpochOrder(
        slot_counts=counts, seed=config.train.seed, epoch=0, slots_per_step=config.train.batch_size // 2,
        open_shards=config.train.open_shards,
    )  # fmt: skip
    return sorted(int(shard) for shards in order.windows()[:3] for shard in shards)


def _write_records(writer: CacheWriter, source: Source, views: int) -> None:
    """Records of units whose files nobody will read; not synced, because nobody will pull the plug."""
    cache, root = writer.cache, Path(writer.cache.url)
    published = cache.published()
    for view in range(views):
        for shard, held in enumerate(source.shards):
            if shard in published.get(view, ()):
                continue
            unit, digest = UnitId(shard, view), f"{(view << 32) + shard:032x}"
            record = UnitRecord(
                shard=shard, view=view, num_samples=len(held.keys), broken=(),
                files=((unit_path(unit, cache.manifest.backend, digest), 1, digest),), fingerprint=cache.fingerprint,
            )  # fmt: skip
            place = root / record_path(unit)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(record.to_bytes())


def answer(question: str) -> int:
    """In a process of its own: do what is asked, and say what it took."""
    request = json.loads(question)
    config = load_config(None, request["config"])
    before = peak_memory_bytes()
    started = time.perf_counter()
    counted = QUESTIONS[request["ask"]](config)
    seconds = time.perf_counter() - started
    found = {"seconds": seconds, "mib": (peak_memory_bytes() - before) / 2**20, "counted": counted}
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def _index_source(config: Config) -> int:
    return _num_samples(open_source(config.source.train, split="train", shard_size=config.source.shard_size))


def _open_source(config: Config) -> int:
    source, copies = config.source, copies_of(config.source)
    return _num_samples(open_source(source.train, split="train", shard_size=source.shard_size, copies=copies))


def _num_samples(source: Source) -> int:
    return sum(len(shard.keys) for shard in source.shards)


def _open_cache(config: Config) -> int:
    cache = open_cache(config.cache.url)
    return len(complete_views(cache, cache.manifest.num_shards))


def _missing_units(config: Config) -> int:
    cache = open_cache(config.cache.url)
    units = units_of_worker(cache.manifest.num_shards, range(int(config.views.count)), 0, 1)
    require(not unpublished(cache, units), "scaling: a finished cache has missing units")
    return len(units)


def _epoch_order(config: Config) -> int:
    run = prepare_run(config, JobSplit())
    with run.feed(run.supply(live=False)) as feed:
        return sum(1 for _ in zip(feed.order(1).steps(), range(1), strict=False))


def _first_batch(config: Config) -> int:
    run = prepare_run(config, JobSplit())
    with run.feed(run.supply(live=False)) as feed:
        return len(next(feed.batches(epoch=0, step=0, workers=0)))


QUESTIONS: dict[str, Callable[[Config], int]] = {
    "open the source for the first time": _index_source,
    "open the source": _open_source,
    "open the cache, find complete views": _open_cache,
    "find missing units": _missing_units,
    "open all, order of an epoch": _epoch_order,
    "open all, first batch": _first_batch,
}


def measure(options: argparse.Namespace, config: Config, folder: Path, report: Report) -> None:
    """Seconds and memory of every question, and of the whole command on a finished job."""
    memory: dict[str, list[float]] = {name: [] for name in QUESTIONS}
    sections = config_to_json(config)

    def ask(name: str) -> Callable[[], float]:
        def call() -> float:
            found = _asked({"ask": name, "config": sections}, options.threads)
            memory[name].append(max(found["mib"], 0.0))
            report.facts[f"counted: {name}"] = found["counted"]
            return float(found["seconds"])

        return call

    kinds = {name: ask(name) for name in QUESTIONS}
    kinds["extract, nothing to do (whole command)"] = lambda: _finished(config, folder, options.threads)
    report.measure("s", interleave("scaling", kinds, options.repetitions))
    report.measure("MiB", {f"memory: {name}": values for name, values in memory.items()})
    for name in kinds:
        report.ratio_of(f"{name} / 1 s", report.measurements[name]["values"], SECONDS)


def _asked(request: dict[str, Any], threads: int) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--ask", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment(threads))
    require(done.returncode == 0, f"scaling: {request['ask']}: {done.stderr[-2000:]}")
    answered: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answered


def _finished(config: Config, folder: Path, threads: int) -> float:
    """Wall-clock seconds of `vkd-cache extract` where all is there already, start of Python included."""
    file = folder / "job.toml"
    lines = []
    for section, fields in config_to_json(config).items():
        given = {name: value for name, value in fields.items() if value is not None}
        lines += [f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in given.items())]
    file.write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "vkd_cache", "extract", str(file)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment(threads))
    seconds = time.perf_counter() - started
    idle = done.returncode == 0 and "0 units published" in done.stdout + done.stderr
    require(idle, f"scaling: extract: {done.stderr[-2000:]}")
    return seconds


def _environment(threads: int) -> dict[str, str]:
    return dict(os.environ) | {"PYTHONPATH": str(ROOT)} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


if __name__ == "__main__":
    sys.exit(guarded(main))
