"""The processes of `scaling_workers.py`: each loads its rank's share, when it is told to."""

import contextlib
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

import torch
from harness import require
from loaders import OTHERS, Job, Loader, Share, ours, photos, recipe_of

from vkd_cache.cache.reader import open_cache

PATIENCE_S = 600.0  # with a rank that has died, which has said why
KINDS = ("vkd", "fast", "fast with cache", "torchvision, PIL")


def loaders(job: Job, shard_size: int) -> Mapping[str, Loader]:
    """The loader of every kind."""
    source = photos(job, shard_size)
    vkd, fast = recipe_of(job, "vkd"), recipe_of(job, "fast")
    with_cache = ours(source, fast, open_cache(str(job.folder / "cache-fast")))
    found = {"vkd": ours(source, vkd, None), "fast": ours(source, fast, None), "fast with cache": with_cache}
    return found | {"torchvision, PIL": OTHERS["torchvision, PIL"]}


def serve(line: Connection, barrier: Barrier, job: Job, images: int, shard_size: int, threads: int) -> None:
    """Answer each (kind, share) with images and seconds, until the line ends."""
    torch.set_num_threads(threads)
    found: Mapping[str, Loader] = {}
    with contextlib.suppress(EOFError):
        while True:
            kind, share = line.recv()
            found = found or loaders(job, shard_size)  # the files are there by now
            line.send(timed(found[kind], job, share, images, barrier))


def timed(loader: Loader, job: Job, share: Share, images: int, barrier: Barrier) -> tuple[int, float]:
    """Images and seconds of the batches in the middle of a rank's share; all ranks begin together."""
    edge = 2 * share.workers
    count = images * job.epochs // (job.batch_size * share.world) - 2 * edge
    require(count > 0, "scaling_workers: nothing is left between the first and the last batches; use more --images")
    batches = loader(job, share)
    with contextlib.closing(batches):  # type: ignore[type-var]
        for _ in range(edge):
            next(batches)
        if share.world > 1:
            barrier.wait(PATIENCE_S)
        begun = time.perf_counter()
        taken = sum(len(next(batches)) for _ in range(count))
        seconds = time.perf_counter() - begun
        if share.world > 1:
            barrier.wait(PATIENCE_S)  # the work of a rank that has ended early would be missing
    return taken, seconds
