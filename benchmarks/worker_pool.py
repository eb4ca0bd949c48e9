"""What it costs to get a batch from a worker process to the main one: our pool beside torch's DataLoader.

    python benchmarks/worker_pool.py --output benchmarks/results/worker_pool.json

The work is the same and nearly nothing: an array of pixels is filled with one value, and comes with labels and columns
as a rendered batch does. So the time is that of making room for the pixels, and of the way.
"""

import argparse
import contextlib
import os
import sys
from functools import partial

import torch
from harness import Report, Stopwatch, Target, interleave, parse, parser, require
from made_batches import Work, from_loader, from_pool
from processes import cpu_seconds_since, cpu_times

from vkd_cache.cli import guarded
from vkd_cache.stages.worker_pool import TASKS_AHEAD

TINY = {"images": 48, "size_px": 32, "batch_sizes": [4, 8], "workers": [1], "repetitions": 2}


def main() -> int:
    """Run the benchmark."""
    made = parser("A batch's way from a worker process: our pool beside torch's DataLoader.", repetitions=5)
    made.add_argument("--images", type=int, default=8192, help="images per measurement")
    made.add_argument("--size-px", type=int, default=224, help="side of an image")
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128, 512], help="images of a batch")
    made.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    options = parse(made, TINY)
    torch.set_num_threads(options.threads or 1)
    report = Report("worker_pool", options)
    for batch_size in options.batch_sizes:
        for workers in options.workers:
            compare(options, batch_size, workers, report)
    report.finish(options.output)
    return 0


def compare(options: argparse.Namespace, batch_size: int, workers: int, report: Report) -> None:
    """Time and CPU time per batch of both."""
    work = Work(batch_size, options.size_px)
    edge = 2 * TASKS_AHEAD * workers  # until every block that will be there is there
    timed = max(options.images // batch_size, edge)
    cpu_us: dict[str, list[float]] = {}
    main_us: dict[str, list[float]] = {}

    def batch_ms(kind: str) -> float:
        make = from_pool if kind == "pool" else from_loader
        batches = make(work, range(timed + 2 * edge), workers)
        with contextlib.closing(batches):  # type: ignore[type-var]
            for number in range(edge):
                require(int(next(batches)["pixels"][-1, -1, -1, -1]) == number % 256, "worker_pool: a wrong batch")
            before = cpu_times(os.getpid())
            with Stopwatch() as watch:
                for number in range(edge, edge + timed):
                    require(int(next(batches)["pixels"][-1, -1, -1, -1]) == number % 256, "worker_pool: a wrong batch")
            all_s = cpu_seconds_since(os.getpid(), before)
        cpu_us.setdefault(kind, []).append(1e6 * all_s / timed / batch_size)
        main_us.setdefault(kind, []).append(1e6 * watch.cpu_s / timed / batch_size)
        return 1e3 * watch.wall_s / timed

    of = f"{batch_size} images, {workers} workers"
    kinds = {f"{kind}, {of}": partial(batch_ms, kind) for kind in ("pool", "DataLoader")}
    report.measure("ms/batch", interleave(of, kinds, options.repetitions))
    report.measure("us/image", {f"CPU, {kind}, {of}": values for kind, values in cpu_us.items()})
    report.measure("us/image", {f"CPU of the main process, {kind}, {of}": values for kind, values in main_us.items()})
    for what in ("", "CPU, ", "CPU of the main process, "):
        names = (f"{what}{kind}, {of}" for kind in ("pool", "DataLoader"))
        report.ratio(f"{what}pool / DataLoader, {of}", *names, Target(bound=1.0))


if __name__ == "__main__":
    sys.exit(guarded(main))
