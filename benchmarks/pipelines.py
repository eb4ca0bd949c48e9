"""Images per second and CPU time per image of our training feed, with and without a cache, and of other loaders.

    python benchmarks/pipelines.py --output benchmarks/results/pipelines.json

Same files, crops, colours, product and number of workers; each kind alone, turn by turn. What is timed begins when all
workers are at work and ends before the first of them has nothing left to do. The product are normalised floats in main
memory, or with --bytes the 8-bit pixels that a GPU would be given.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness import Report, Stopwatch, Target, interleave, parse, parser, require, scratch_folder
from loaders import OTHERS, RECIPES, Batches, Job, Loader, Share, make_files, ours, photos, recipe_of
from processes import cpu_seconds_since, cpu_times

from vkd_cache.cache.reader import open_cache
from vkd_cache.cli import guarded

TINY = {
    "images": 48, "shard_size": 12, "size_px": 32, "batch_size": 4, "workers": 1, "repetitions": 2, "epochs": 1,
    "width": 96,
}  # fmt: skip
FASTER = Target(bound=1.0, at_most=False)


def main() -> int:
    """Run the benchmark."""
    made = parser("Our training feed against other loaders: images per second, CPU time per image.", repetitions=3)
    made.add_argument("--images", type=int, default=768, help="JPEG files of 500x375")
    made.add_argument("--shard-size", type=int, default=128, help="images per unit of our caches")
    made.add_argument("--size-px", type=int, default=224, help="side of a view")
    made.add_argument("--batch-size", type=int, default=32, help="images of a batch")
    made.add_argument("--workers", type=int, default=2, help="processes that load, of every kind")
    made.add_argument("--epochs", type=int, default=1, help="passes over the images per measurement")
    made.add_argument("--width", type=int, default=3024, help="channels of the cached node")
    made.add_argument("--dtype", default="uint8", help="stored type of the cached node")
    made.add_argument("--bytes", action="store_true", help="end with 8-bit pixels instead of normalised floats")
    options = parse(made, TINY)
    torch.set_num_threads(options.threads or 1)  # the workers have the cores
    report = Report("pipelines", options)
    timed_batches(options)
    with scratch_folder(options) as folder:
        job = Job(
            folder=folder, size_px=options.size_px, batch_size=options.batch_size, epochs=options.epochs,
            floats=not options.bytes, seed=options.seed, width=options.width, dtype=options.dtype,
        )  # fmt: skip
        facts = make_files(job, images=options.images, shard_size=options.shard_size, tars=2 * options.workers)
        report.facts |= {"product": "8-bit pixels" if options.bytes else "normalised float32"} | facts
        compare(options, job, report)
    report.finish(options.output)
    return 0


def all_kinds(options: argparse.Namespace, job: Job) -> dict[str, Loader]:
    """Every loader that is installed, ours first."""
    source = photos(job, options.shard_size)
    kinds: dict[str, Loader] = {}
    for name in RECIPES:
        cache = open_cache(str(job.folder / f"cache-{name}"))
        kinds[name] = ours(source, recipe_of(job, name), None)
        kinds[f"{name} with cache"] = ours(source, recipe_of(job, name), cache)
    made = (job.folder / "chunks").is_dir()
    return kinds | {name: loader for name, loader in OTHERS.items() if name != "litdata" or made}


def compare(options: argparse.Namespace, job: Job, report: Report) -> None:
    """Rate and CPU time of every kind, and ours over theirs."""
    share = Share(workers=options.workers)
    cpu_us: dict[str, list[float]] = {}
    kinds = all_kinds(options, job)

    def rate(name: str) -> float:
        with taken(kinds[name](job, share), options) as (count, watch, cpu_s):
            cpu_us.setdefault(name, []).append(1e6 * cpu_s / count)
            return count / watch.wall_s

    calls: dict[str, Callable[[], float]] = {name: partial(rate, name) for name in kinds}
    report.measure("images/s", interleave("pipelines", calls, options.repetitions))
    report.measure("us/image", {f"CPU, {name}": values for name, values in cpu_us.items()})
    for mine in kinds:
        if mine not in OTHERS:
            for other in (name for name in OTHERS if name in kinds):
                report.ratio(f"{mine} / {other}", mine, other, FASTER if mine.startswith("fast") else None)
    for name in RECIPES:
        target = Target(bound=0.97, at_most=False)
        report.ratio(f"{name} with cache / {name}", f"{name} with cache", name, target)


def timed_batches(options: argparse.Namespace) -> tuple[int, int]:
    """Batches at the beginning that are not timed, and those that are."""
    edge = 2 * max(options.workers, 1)
    total = options.images * options.epochs // options.batch_size
    # the last batches find workers without work, and with webdataset each worker may leave one out
    timed = total - 2 * edge - options.workers
    require(timed > 0, "pipelines: nothing is left between the first and the last batches; use more --images")
    return edge, timed


@contextlib.contextmanager
def taken(batches: Batches, options: argparse.Namespace) -> Iterator[tuple[int, Stopwatch, float]]:
    """Take the batches in the middle: (images, time, CPU seconds of all processes); the loader is closed afterwards."""
    edge, timed = timed_batches(options)
    with contextlib.closing(batches):  # type: ignore[type-var]
        for _ in range(edge):
            require(next(batches, None) is not None, "pipelines: a loader ended at once")
        with Stopwatch() as watch:
            before = cpu_times(os.getpid())
            count = 0
            for _ in range(timed):
                batch = next(batches, None)
                require(batch is not None and batch.shape[1] == 3, "pipelines: a loader ended early")
                count += len(batch)  # type: ignore[arg-type]
            cpu_s = cpu_seconds_since(os.getpid(), before)
        yield count, watch, cpu_s


if __name__ == "__main__":
    sys.exit(guarded(main))
