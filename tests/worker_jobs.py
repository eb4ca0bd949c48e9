"""What the tests of data workers share with the processes that they start; light to import."""

import itertools
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from vkd_cache.stages.worker_pool import WorkerPool

LEFT_OPEN: list[Any] = []


def answer(size: int) -> tuple[bytes, torch.Tensor]:
    """A message of about `size` bytes, with a tensor that is fetched from its sender's memory."""
    return bytes(size), torch.full((100,), size)


def unlike_the_others(task: int) -> int:
    time.sleep(0.02 if task % 3 == 0 else 0)
    return -task


class Odd(Exception):
    """Cannot be rebuilt from what it is pickled as."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def failing(task: int) -> int:
    if task == 3:
        raise KeyError("three")
    if task == 5:
        raise Odd(5, 6)
    return task


def kept(result: Any) -> Any:
    """Stands in for pinning memory, which needs a GPU; the thread that does it is the real one."""
    return result


def pool_of(work: Callable[[Any], Any], workers: int, *, beside: bool = False) -> WorkerPool[Any, Any]:
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
