"""How the training feed scales: images per second with 1 to N data workers, in one process and in two.

    python benchmarks/scaling_workers.py --output benchmarks/results/scaling_workers.json

The second process is a real one, with a rank, its own share of every epoch and its own workers, as a second GPU's
would be; both begin together, and the slower one counts. An efficiency is the rate over that of one worker in one
process, per worker. The main processes need cores, too, so N workers on N cores can never reach 1.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection

from harness import Report, interleave, parse, parser, require, scratch_folder
from loaders import Job, Share, make_files
from scaling_ranks import KINDS, serve

from vkd_cache.cli import guarded
from vkd_cache.runtime import num_cores
from vkd_cache.stages.worker_pool import PRELOADED

TINY = {
    "images": 48, "shard_size": 12, "size_px": 32, "batch_size": 2, "workers": 1, "repetitions": 1, "epochs": 1,
    "width": 96, "kinds": ["fast with cache"],
}  # fmt: skip
PROCESSES = 2


def main() -> int:
    """Run the benchmark."""
    made = parser("Images per second of the training feed with 1..N data workers and 1..2 processes.", repetitions=3)
    made.add_argument("--images", type=int, default=512, help="JPEG files of 500x375")
    made.add_argument("--shard-size", type=int, default=64, help="images per unit of our caches")
    made.add_argument("--size-px", type=int, default=224, help="side of a view")
    made.add_argument("--batch-size", type=int, default=16, help="images of a batch of one process")
    made.add_argument("--workers", type=int, default=0, help="most data workers of all processes together; 0: as cores")
    made.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="loaders that are measured")
    made.add_argument("--epochs", type=int, default=1, help="passes over the images per measurement")
    made.add_argument("--width", type=int, default=3024, help="channels of the cached node")
    made.add_argument("--dtype", default="uint8", help="stored type of the cached node")
    made.add_argument("--bytes", action="store_true", help="end with 8-bit pixels instead of normalised floats")
    options = parse(made, TINY)
    options.workers = options.workers or num_cores()
    report = Report("scaling_workers", options)
    with scratch_folder(options) as folder:
        job = Job(
            folder=folder, size_px=options.size_px, batch_size=options.batch_size, epochs=options.epochs,
            floats=not options.bytes, seed=options.seed, width=options.width, dtype=options.dtype,
        )  # fmt: skip
        with ranks(job, options) as lines:
            make_files(job, images=options.images, shard_size=options.shard_size, tars=0)
            compare(options, lines, report)
    report.finish(options.output)
    return 0


@contextlib.contextmanager
def ranks(job: Job, options: argparse.Namespace) -> Iterator[list[Connection]]:
    """Lines to the processes, which live as long as the block."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()  # the data workers of this process come from there, too
    barrier = context.Barrier(PROCESSES)
    lines, processes = [], []
    for _ in range(PROCESSES):
        ours, theirs = context.Pipe()
        arguments = (theirs, barrier, job, options.images, options.shard_size, options.threads or 1)
        processes.append(context.Process(target=serve, args=arguments))
        processes[-1].start()
        theirs.close()
        lines.append(ours)
    try:
        yield lines
    finally:
        for line in lines:
            line.close()
        for process in processes:
            process.join()


def steps_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


def compare(options: argparse.Namespace, lines: list[Connection], report: Report) -> None:
    """Rates and efficiencies of every kind."""
    shapes = [(1, workers) for workers in steps_up_to(options.workers)]
    shapes += [(PROCESSES, workers) for workers in steps_up_to(max(options.workers // PROCESSES, 1))]

    def rate(kind: str, processes: int, workers: int) -> float:
        for rank, line in enumerate(lines[:processes]):
            line.send((kind, Share(workers=workers, rank=rank, world=processes)))
        answers = []
        for line in lines[:processes]:
            with contextlib.suppress(EOFError):
                answers.append(line.recv())
        require(len(answers) == processes, "scaling_workers: a process ended early; its message is above")
        return float(sum(count for count, _ in answers) / max(seconds for _, seconds in answers))

    def name(kind: str, processes: int, workers: int) -> str:
        return f"{kind}, {processes} x {workers} workers"

    calls = {name(kind, *shape): partial(rate, kind, *shape) for kind in options.kinds for shape in shapes}
    report.measure("images/s", interleave("scaling", calls, options.repetitions))
    for kind in options.kinds:
        alone = report.measurements[name(kind, 1, 1)]["values"]
        for processes, workers in shapes:
            found = report.measurements[name(kind, processes, workers)]["values"]
            efficiency = [rate / one / (processes * workers) for rate, one in zip(found, alone, strict=True)]
            report.ratio_of(f"efficiency, {name(kind, processes, workers)}", efficiency)


if __name__ == "__main__":
    sys.exit(guarded(main))
