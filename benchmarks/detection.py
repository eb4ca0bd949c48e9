"""What distilling a detector costs: a step from the cache against a live teacher, and the store's bytes and rates.

    python benchmarks/detection.py --output benchmarks/results/detection.json

A ViDT student on the same batches in four kinds, each a process of its own: all tokens from the cache, a sample of them
as int8, no distillation, and ViDT-base in memory. Then, for every choice of what to store, bytes per image and per pass
over COCO, and how fast the ragged store is read and joined, against what a student needs.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import cast

import detection_data
from detection_store import (
    PLANNED_VIEWS,
    Choice,
    MadeUnits,
    Stores,
    count_bytes,
    file_bytes,
    measure_reading,
    whole_views,
)
from harness import Report, Target, parse, parser, scratch_folder
from kinds import Kind, measure_kinds, without_distillation

from vkd_cache.cache.reader import open_cache
from vkd_cache.cli import guarded
from vkd_cache.config import load_config
from vkd_cache.detection.vidt import body_config
from vkd_cache.runtime import JobSplit, resolve_device
from vkd_cache.sources import CocoSource, open_source
from vkd_cache.stages.extract import extract
from vkd_cache.views.recipe import make_recipe

TINY = {
    "student": "test_vidt2", "teacher": "test_vidt", "side_px": 64, "canvas_multiple_px": 32, "steps": 1, "batches": 1,
    "repetitions": 2, "store_images": 4, "store_px": 64, "planned": 16, "epochs": 1,
}  # fmt: skip
AMP_OF_TEACHER = {"off": "off", "fp16": "float16", "bf16": "bfloat16"}
SAMPLED = {"dtype": "int8", "tokens": 0.1}

Config = dict[str, dict[str, object]]


def main() -> int:
    """Run the benchmark."""
    made = parser("A detection student's step, and what the store of tokens takes and gives.", repetitions=3)
    made.add_argument("--student", default="vidt_swin_nano", help="student")
    made.add_argument("--teacher", default="vidt_swin_base", help="teacher, at random weights")
    made.add_argument("--batch-size", type=int, default=2, help="images per step")
    made.add_argument("--batches", type=int, default=2, help="different batches, taken in turn")
    made.add_argument("--steps", type=int, default=2, help="timed steps per repetition")
    made.add_argument("--side-px", type=int, default=320, help="short side of the student's views; 800 on a GPU")
    made.add_argument("--canvas-multiple-px", type=int, default=64, help="sides of a canvas are multiples of this")
    made.add_argument("--amp", default="off", choices=tuple(AMP_OF_TEACHER), help="of student and teacher")
    made.add_argument("--device", default="auto", help="of student and teacher")
    made.add_argument("--store-px", type=int, default=800, help="short side of the views whose tokens are stored")
    made.add_argument("--store-images", type=int, default=16, help="images of each store, in two units")
    made.add_argument("--planned", type=int, default=PLANNED_VIEWS, help="training views that are planned, to count")
    made.add_argument("--epochs", type=int, default=2, help="passes over a store per repetition")
    made.add_argument("--backend", default="zarr", choices=("zarr", "webdataset"), help="of the stores")
    made.add_argument("--gpu-images-per-s", type=float, default=40.0, help="assumed need of a student on one GPU")
    options = parse(made, TINY)
    report = Report("detection", options)
    report.facts["device"] = resolve_device(options.device).partition(":")[0]
    with scratch_folder(options) as folder:
        measure_steps(options, folder / "steps", report)
        stores = Stores(options, folder / "stores")
        count_bytes(stores, options, report)
        measure_reading(stores, options, report)
    report.finish(options.output)
    return 0


def measure_steps(options: argparse.Namespace, folder: Path, report: Report) -> None:
    """Time and memory of a step in its four kinds, related."""
    config, sampled = prepare(options, folder)
    compare_made_tokens(options, config, folder, report)
    kinds = {"cache": Kind(config=config), "cache, 10 % int8": Kind(config=sampled)}
    kinds |= {"plain": without_distillation(config), "live": Kind(config=config, live=True)}
    flops = measure_kinds(kinds, options, report)
    for kind in ("cache", "cache, 10 % int8"):
        report.ratio(f"{kind} / plain", f"step, {kind}", "step, plain", Target(bound=1.03))
        report.ratio(f"live / {kind}", "step, live", f"step, {kind}")
        for memory in ("peak memory", "peak GPU memory"):
            if f"{memory}, {kind}" in report.measurements:
                report.ratio(f"{memory}, live / {kind}", f"{memory}, live", f"{memory}, {kind}")
                report.ratio(f"{memory}, {kind} / plain", f"{memory}, {kind}", f"{memory}, plain")
    report.facts["live / cache by FLOPs alone"] = flops["live"] / flops["cache"]


def prepare(options: argparse.Namespace, folder: Path) -> tuple[Config, Config]:
    """Photographs, the teacher's weights and, with the real stage, two caches: all tokens as float16, and a sample.

    Returns:
        The overrides of the configuration for the one and the other.
    """
    count = options.batch_size * options.batches
    root = detection_data.write_coco(folder / "photos", count, seed=options.seed)
    weights = detection_data.random_detector(options.teacher, folder / "teacher.safetensors", seed=options.seed)
    views = whole_views(options.side_px, options.canvas_multiple_px)
    config: Config = {
        "source": {"train": root, "shard_size": count},
        "views": {field.name: getattr(views, field.name) for field in dataclasses.fields(views)},
        "teacher": {"name": options.teacher, "weights": weights},
        "cache": {"url": str(folder / "cache"), "dtype": "float16", "backend": options.backend},
        "extract": {
            "batch_size": options.batch_size, "workers": 0, "device": options.device,
            "autocast": AMP_OF_TEACHER[options.amp],
        },
        "student": {"name": options.student},
        "loss": {"feature_weight": 4.0},
        "train": {
            "batch_size": options.batch_size, "workers": 0, "device": options.device, "amp": options.amp, "epochs": 1,
            "output": str(folder / "unused"), "digest_check": 1.0, "clip_grad": 0.1, "lr": 1e-4,
        },
    }  # fmt: skip
    sampled = config | {"cache": config["cache"] | {"url": str(folder / "sampled")} | SAMPLED}
    for wanted in (config, sampled):
        extract(load_config(None, wanted), JobSplit())
    return config, sampled


def compare_made_tokens(options: argparse.Namespace, config: Config, folder: Path, report: Report) -> None:
    """How the size of a unit of made tokens relates to the real teacher's, of the same views: it should be the same."""
    count = options.batch_size * options.batches
    source = cast(CocoSource, open_source(str(config["source"]["train"]), shard_size=count))
    recipe = make_recipe(whole_views(options.side_px, options.canvas_multiple_px))
    units = MadeUnits(source, recipe, body_config(options.teacher), seed=options.seed)
    made = units.publish(Choice("float16"), folder / "made", options.backend).cache
    real = open_cache(str(config["cache"]["url"]))
    report.ratio_of("bytes, made tokens / the teacher's, same views", [file_bytes(made) / file_bytes(real)])


if __name__ == "__main__":
    sys.exit(guarded(main))
