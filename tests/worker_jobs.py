"""What the tests of data workers share with the processes that they start; light to import."""

import itertools
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.stages.shared_blocks import Empty
from vkd_cache.stages.worker_pool import WorkerPool

LEFT_OPEN: list[Any] = []


def answer(size: int, empty: Empty) -> tuple[bytes, torch.Tensor]:
    """A message of about `size` bytes, with a tensor in a block of its own where it is a large one."""
    pixels = empty((size,))
    pixels.fill(size % 256)
    return bytes(size), torch.from_numpy(pixels)


def arrays_of(task: tuple[int, int], empty: Empty) -> dict[str, npt.NDArray[np.int64] | torch.Tensor]:
    """Arrays and tensors of (number, items), made here, there, and views of each other."""
    number, count = task
    made = empty((count, 3))
    made.fill(number % 256)
    plain = np.full((2, count), number, np.int64)
    return {
        "made": torch.from_numpy(made), "half": torch.from_numpy(made[: count // 2]), "plain": plain,
        "turned": plain.T, "column": torch.from_numpy(plain)[:, ::2], "number": torch.tensor(number),
    }  # fmt: skip


def total(task: npt.NDArray[np.uint8], _: Empty) -> int:
    """Sums what it is sent, when others may have been sent meanwhile."""
    time.sleep(0.001)
    return int(task.sum(dtype=np.int64))


def unlike_the_others(task: int, _: Empty) -> int:
    time.sleep(0.02 if task % 3 == 0 else 0)
    return -task


class Odd(Exception):
    """Cannot be rebuilt from what it is pickled as."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def failing(task: int, _: Empty) -> int:
    if task == 3:
        raise KeyError("three")
    if task == 5:
        raise Odd(5, 6)
    return task


def failing_with_a_block(task: int, empty: Empty) -> int:
    empty((2**20,)).fill(task)
    raise ValueError(f"number {task}")


def kept(result: Any) -> Any:
    """Stands in for pinning memory, which needs a GPU; the thread that does it is the real one."""
    return result


def pool_of(work: Callable[[Any, Empty], Any], workers: int, *, beside: bool = False) -> WorkerPool[Any, Any]:
    return WorkerPool(work, workers, name="digits", finish=kept if beside else None)


def processes(pool: WorkerPool[Any, Any]) -> list[int]:
    return [int(worker.process.pid or 0) for worker in pool._workers]


def leave_open(line: Connection, *, wait: bool) -> None:
    """A main process that starts workers and ends without closing them."""
    pool = pool_of(answer, 2)
    pool.__enter__()
    LEFT_OPEN.extend((pool, pool.results(itertools.repeat(10))))
    next(LEFT_OPEN[1])
    line.send(processes(pool))
    if wait:
        time.sleep(1000)
