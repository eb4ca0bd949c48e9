"""The wish to stop a training run: SIGTERM or SIGINT, heard between steps, agreed on by all ranks."""

import signal
import threading
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

from vkd_cache.runtime import JobSplit

_Handler = Callable[[int, FrameType | None], object] | int | None


class Stopped(Exception):
    """Ends an evaluation that a signal came into; the loop that started it saves and leaves."""


class StopSignals:
    """Listens while it is entered; a second SIGINT stops at once, as ever.

    Nothing is printed from the handler: it may run in the middle of somebody else's print.
    """

    def __init__(self, split: JobSplit, device: torch.device, gpu_interval: int) -> None:
        """`gpu_interval`: steps between questions to the other ranks on GPUs, where each one makes the host wait."""
        self._split = split
        self._device = device
        self._interval = gpu_interval if device.type == "cuda" else 1
        self._before: dict[int, _Handler] = {}
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, step: int) -> bool:
        """Whether any rank was asked to stop; all ranks call this after the same steps, and leave after the same."""
        if self._split.count == 1:
            return self.received is not None
        if step % self._interval:
            return False
        asked = torch.tensor(int(self.received is not None), device=self._device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def check(self) -> None:
        """Leave an evaluation that only this process takes part in.

        Raises:
            Stopped: a signal came.
        """
        if self._split.count == 1 and self.received is not None:
            raise Stopped
