"""Time and peak memory of a training step: from the cache, without distillation, and with the teacher in memory.

    python benchmarks/step.py --output benchmarks/results/step.json

The same student on the same batches in all three; what differs is where teacher outputs come from. Each kind runs in a
process of its own, so that its peak memory is its own; the processes take turns, repetition by repetition. Batches are
rendered beforehand (what feeding costs is `read.py`'s business), but joining and decoding the cached features is timed.
"""

import argparse
import sys
from pathlib import Path

import data
from harness import Report, Target, parse, parser, scratch_folder
from kinds import Kind, measure_kinds, without_distillation
from packing import pack_samples

from vkd_cache.cli import guarded
from vkd_cache.config import load_config
from vkd_cache.runtime import JobSplit, resolve_device
from vkd_cache.stages.extract import extract

TINY = {
    "student": "test_vit", "teacher": "test_resnet", "batch_size": 4, "batches": 2, "steps": 2, "size_px": 32,
    "repetitions": 2, "workers": 0,
}  # fmt: skip
IMAGENET_CLASSES = 1000
AMP_OF_TEACHER = {"off": "off", "fp16": "float16", "bf16": "bfloat16"}


def main() -> int:
    """Run the benchmark."""
    made = parser("A training step from the cache, without distillation, and with a live teacher.", repetitions=4)
    made.add_argument("--student", default="deit_ti_distilled", help="student")
    made.add_argument("--teacher", default="regnety_160", help="timm model, at random weights")
    made.add_argument("--batch-size", type=int, default=16, help="samples per step")
    made.add_argument("--batches", type=int, default=2, help="different batches, taken in turn")
    made.add_argument("--steps", type=int, default=2, help="timed steps per repetition")
    made.add_argument("--size-px", type=int, default=224, help="side of a view")
    made.add_argument("--dtype", default="uint8", choices=sorted(data.CODECS), help="stored type of the cache")
    made.add_argument("--amp", default="auto", choices=("auto", *AMP_OF_TEACHER), help="auto: fp16 on a GPU, else off")
    made.add_argument("--channels-last", action="store_true", help="memory format of the teacher")
    made.add_argument("--workers", type=int, default=2, help="processes that render, beforehand")
    made.add_argument("--device", default="auto", help="of student and teacher")
    options = parse(made, TINY)
    device = resolve_device(options.device)
    options.amp = ("fp16" if device.startswith("cuda") else "off") if options.amp == "auto" else options.amp
    report = Report("step", options)
    report.facts["device"] = device.partition(":")[0]
    with scratch_folder(options) as folder:
        config = prepare(options, folder)
        measure(options, config, report)
    report.finish(options.output)
    return 0


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, object]]:
    """Make images, the teacher's weights and, with the real stage, the cache; returns the configuration's overrides."""
    count = options.batch_size * options.batches
    labels = [(IMAGENET_CLASSES - 1 - 37 * number) % IMAGENET_CLASSES for number in range(count)]
    keys = [f"photo_{number:06d}" for number in range(count)]
    photos = data.photos(count, seed=options.seed)
    pack_samples(folder / "photos.tar", zip(keys, photos, labels, strict=True))
    weights = data.random_weights(options.teacher, folder / "teacher.safetensors", seed=options.seed)
    autocast = AMP_OF_TEACHER[options.amp]
    config: dict[str, dict[str, object]] = {
        "source": {"train": str(folder / "photos.tar")},
        "views": {"recipe": "vkd", "count": "1", "size_px": options.size_px},
        "teacher": {"name": options.teacher, "weights": weights},
        "cache": {"url": str(folder / "cache"), "dtype": options.dtype},
        "extract": {
            "batch_size": options.batch_size, "workers": options.workers, "device": options.device,
            "autocast": autocast, "channels_last": options.channels_last,
        },
        "student": {"name": options.student},
        "train": {
            "batch_size": options.batch_size, "workers": 0, "device": options.device, "amp": options.amp, "epochs": 1,
            "output": str(folder / "unused"), "digest_check": 1.0,
        },
    }  # fmt: skip
    extract(load_config(None, config), JobSplit())
    return config


def measure(options: argparse.Namespace, config: dict[str, dict[str, object]], report: Report) -> None:
    """Time and memory of the three kinds, related."""
    kinds = {"cache": Kind(config=config), "plain": without_distillation(config)}
    kinds["live"] = Kind(config=config, live=True)
    flops = measure_kinds(kinds, options, report)
    report.ratio("cache / plain", "step, cache", "step, plain", Target(bound=1.03))
    report.ratio("live / cache", "step, live", "step, cache")
    report.ratio("peak memory, live / cache", "peak memory, live", "peak memory, cache")
    report.facts["live / cache by FLOPs alone"] = flops["live"] / flops["cache"]


if __name__ == "__main__":
    sys.exit(guarded(main))
