"""One batch at work on the device, one waiting behind it: the GPU never idles, and the host is never far ahead.

A newcomer's trap: the host waits for the batch *before* the one that it has just queued. While it does, and while it
fetches the next one, the GPU has something to go on with.
"""

import contextlib
from collections.abc import Iterator

import torch

from vkd_cache.stages.time_spent import TimeSpent


def blocking_event(*, timing: bool = False) -> torch.cuda.Event:
    """An event that a thread waits for without a core: it leaves it to the data workers instead of spinning on it."""
    made: torch.cuda.Event = torch.cuda.Event(enable_timing=timing, blocking=True)  # type: ignore[no-untyped-call]
    return made


class DeviceQueue:
    """Bounds what is queued on a device, and measures how long the device was at work."""

    def __init__(self, device: torch.device, spent: TimeSpent) -> None:
        """`spent`: where the time of the device goes, as `teacher`."""
        self._device = device
        self._spent = spent
        self._queued: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Around the work of one batch; on a GPU, waits at its end for the batch before it."""
        if self._device.type != "cuda":
            with self._spent.during("teacher"):
                yield
            return
        begun = self._mark()
        yield
        done = self._mark()
        self.finish()
        self._queued = begun, done

    def finish(self) -> None:
        """Wait for what is queued."""
        if self._queued is not None:
            begun, done = self._queued
            done.synchronize()
            self._spent.add("teacher", begun.elapsed_time(done) / 1e3)
            self._queued = None

    def _mark(self) -> torch.cuda.Event:
        event = blocking_event(timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
