"""Time and peak memory of a training step: from the cache, without distillation, and with a teacher in memory.

    python benchmarks/step.py --output benchmarks/results/step.json

The same student on the same batches in all kinds; what differs is where teacher outputs come from: nowhere, from a
cache of 8-bit or of half-precision features, from the live teacher, or from timm's own online feature distillation
task, with its loss and projector. Each kind runs in a process of its own, so that its peak memory is its own; the
processes take turns, repetition by repetition. Batches are rendered beforehand (what feeding costs is `read.py`'s
business), but joining and decoding the cached features is timed. With `--cache-samples` the features are joined from a
made cache of that many samples, in the order of training, its units read on the way.
"""

import argparse
import sys
from pathlib import Path

import data
from harness import Report, Target, parse, parser, require, scratch_folder
from kinds import Kind, measure_kinds, without_distillation
from made_cache import make_cache
from packing import pack_samples

from vkd_cache.cache.reader import open_cache
from vkd_cache.cli import guarded
from vkd_cache.config import load_config
from vkd_cache.runtime import JobSplit, resolve_device
from vkd_cache.stages.extract import extract

TINY = {
    "student": "test_vit", "teacher": "test_resnet", "batch_size": 4, "batches": 2, "steps": 2, "size_px": 32,
    "repetitions": 2, "workers": 0, "cache_samples": 2000, "kinds": "plain,cache,live,timm",
}  # fmt: skip
IMAGENET_CLASSES = 1000
AMP_OF_TEACHER = {"off": "off", "fp16": "float16", "bf16": "bfloat16"}
KINDS = ("plain", "cache", "cache float16", "live", "timm")

Config = dict[str, dict[str, object]]


def main() -> int:
    """Run the benchmark."""
    made = parser("A training step from the cache, without distillation, and with a live teacher.", repetitions=4)
    made.add_argument("--student", default="deit_ti_distilled", help="student")
    made.add_argument("--teacher", default="regnety_160", help="timm model, at random weights")
    made.add_argument("--kinds", default=",".join(KINDS), help="which to compare; plain is always one of them")
    made.add_argument("--batch-size", type=int, default=8, help="samples per step")
    made.add_argument("--batches", type=int, default=2, help="different batches, taken in turn")
    made.add_argument("--steps", type=int, default=2, help="timed steps per repetition")
    made.add_argument("--size-px", type=int, default=224, help="side of a view")
    made.add_argument("--dtype", default="uint8", choices=sorted(data.CODECS), help="stored type of the kind `cache`")
    made.add_argument("--cache-samples", type=int, default=0, help="more than 0: another kind, from a cache of so many")
    made.add_argument("--amp", default="auto", choices=("auto", *AMP_OF_TEACHER), help="auto: bf16 on a GPU, else off")
    made.add_argument("--compile", action="store_true", help="the student, where our own learner takes the steps")
    made.add_argument("--channels-last", action="store_true", help="memory format of the teacher")
    made.add_argument("--workers", type=int, default=2, help="processes that render, beforehand")
    made.add_argument("--device", default="auto", help="of student and teacher")
    options = parse(made, TINY)
    device = resolve_device(options.device)
    options.amp = ("bf16" if device.startswith("cuda") else "off") if options.amp == "auto" else options.amp
    report = Report("step", options)
    report.facts["device"] = device.partition(":")[0]
    with scratch_folder(options) as folder:
        measure(options, make_kinds(options, folder), report)
    report.finish(options.output)
    return 0


def make_kinds(options: argparse.Namespace, folder: Path) -> dict[str, Kind]:
    """What is to be compared, with the caches that it takes."""
    wanted = ["plain", *(name for name in options.kinds.split(",") if name != "plain")]
    unknown = sorted(set(wanted) - set(KINDS))
    require(not unknown, f"--kinds: found {', '.join(unknown)}, expected some of {', '.join(KINDS)}")
    config = prepare(options, folder)
    plain = without_distillation(config)
    kinds = {"plain": plain, "live": Kind(config=config, live=True), "timm": Kind(config=plain.config, timm=True)}
    stored = {"cache": options.dtype, "cache float16": "float16"}
    for name in (name for name in wanted if name in stored):
        cache = {"url": str(folder / f"cache-{stored[name]}"), "dtype": stored[name]}
        kinds[name] = Kind(config=config | {"cache": cache})
        if not Path(cache["url"]).exists():
            extract(load_config(None, kinds[name].config), JobSplit())
    found = {name: kinds[name] for name in wanted}
    if options.cache_samples:
        require("cache" in found, "--cache-samples: needs the kind cache")
        width = open_cache(str(folder / f"cache-{options.dtype}")).manifest.node("pooled").shape[0]
        url = str(folder / "large")
        make_cache(url, options.cache_samples, width=width, dtype=options.dtype, seed=options.seed)
        found["large cache"] = Kind(config=found["cache"].config, joined_from=url)
    return found


def prepare(options: argparse.Namespace, folder: Path) -> Config:
    """Make images and the teacher's weights; returns the configuration's overrides."""
    count = options.batch_size * options.batches
    labels = [(IMAGENET_CLASSES - 1 - 37 * number) % IMAGENET_CLASSES for number in range(count)]
    keys = [f"photo_{number:06d}" for number in range(count)]
    photos = data.photos(count, seed=options.seed)
    pack_samples(folder / "photos.tar", zip(keys, photos, labels, strict=True))
    weights = data.random_weights(options.teacher, folder / "teacher.safetensors", seed=options.seed)
    return {
        "source": {"train": str(folder / "photos.tar")},
        "views": {"recipe": "vkd", "count": "1", "size_px": options.size_px},
        "teacher": {"name": options.teacher, "weights": weights},
        "extract": {
            "batch_size": options.batch_size, "workers": options.workers, "device": options.device,
            "autocast": AMP_OF_TEACHER[options.amp], "channels_last": options.channels_last,
        },
        "student": {"name": options.student},
        "train": {
            "batch_size": options.batch_size, "workers": 0, "device": options.device, "amp": options.amp, "epochs": 1,
            "output": str(folder / "unused"), "digest_check": 1.0, "compile": options.compile,
        },
    }  # fmt: skip


def measure(options: argparse.Namespace, kinds: dict[str, Kind], report: Report) -> None:
    """Time and memory of the kinds, related."""
    flops = measure_kinds(kinds, options, report)
    for name in (name for name in kinds if "cache" in name):
        report.ratio(f"{name} / plain", f"step, {name}", "step, plain", Target(bound=1.03))
    for name in ("live", "timm"):
        if name in kinds and "cache" in kinds:
            report.ratio(f"{name} / cache", f"step, {name}", "step, cache")
            for memory in ("peak memory", "peak GPU memory"):
                if f"{memory}, {name}" in report.measurements:
                    report.ratio(f"{memory}, {name} / cache", f"{memory}, {name}", f"{memory}, cache")
            report.facts[f"{name} / cache by FLOPs alone"] = flops[name] / flops["cache"]


if __name__ == "__main__":
    sys.exit(guarded(main))
