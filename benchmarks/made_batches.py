"""Batches that cost nothing to make, by our pool and by torch's DataLoader; worker processes import this module."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vkd_cache.stages.shared_blocks import Empty, Pixels, private_empty
from vkd_cache.stages.worker_pool import TASKS_AHEAD, WorkerPool

COLUMNS = ("seed", "source_size", "crop", "erase", "op_id", "op_value")


class Work:
    """Makes a batch of images that cost nothing."""

    def __init__(self, batch_size: int, size_px: int) -> None:
        self._shape = (batch_size, size_px, size_px, 3)

    def __call__(self, task: int, empty: Empty = private_empty) -> dict[str, Any]:
        """Pixels, labels and columns of batch number `task`."""
        pixels = empty(self._shape)
        pixels.fill(task % 256)
        count = len(pixels)
        columns = {name: np.zeros((count, 4), np.uint32) for name in COLUMNS}
        return {"pixels": torch.from_numpy(pixels), "label": torch.zeros(count, dtype=torch.int64), "columns": columns}


class Batches(Dataset[dict[str, Any]]):
    """The same as a data set of whole batches, in shared memory from the start, as torch's own collate function makes
    them."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __getitem__(self, task: int) -> dict[str, Any]:
        made: list[torch.Tensor] = []

        def shared_empty(shape: tuple[int, ...]) -> Pixels:
            storage = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]
            made.append(torch.empty(0, dtype=torch.uint8).set_(storage).view(shape))
            return made[0].numpy()

        return self._work(task, shared_empty) | {"pixels": made[0]}


def from_pool(work: Work, tasks: range, workers: int) -> Iterator[dict[str, Any]]:
    """Batches by our pool."""
    with WorkerPool(work, workers, name="benchmark", finish=None) as pool:
        yield from pool.results(tasks)


def from_loader(work: Work, tasks: range, workers: int) -> Iterator[dict[str, Any]]:
    """Batches by torch's DataLoader."""
    yield from DataLoader(
        Batches(work), batch_size=None, sampler=tasks, num_workers=workers, prefetch_factor=TASKS_AHEAD,
        persistent_workers=True,
    )  # fmt: skip
