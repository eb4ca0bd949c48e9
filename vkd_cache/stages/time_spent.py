"""What a running extraction is limited by: the teacher, the data or the writer, from how long each kept it.

A newcomer's trap: on a GPU the host runs ahead, so that its own waiting says little. Waiting for data does no harm
while the GPU has work queued; only the time in which the GPU was idle is put down to data and writer.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

WINDOW_S = 30.0  # how far back the progress line looks
KEPT_BUSY = 0.95  # a teacher that is at work for this share of the time is the limit
_MARK_S = 0.25  # between the marks that the window is cut at


class Spent(NamedTuple):
    """Seconds of a stretch of time.

    Attributes:
        wall: that passed.
        teacher: in which the teacher's device was at work.
        data: in which the loop waited for rendered batches; on a GPU the teacher may have been at work meanwhile.
        writer: in which the loop waited for the writer to take a finished unit; as for data.
        writing: in which the writer was at work, beside the loop.
    """

    wall: float = 0.0
    teacher: float = 0.0
    data: float = 0.0
    writer: float = 0.0
    writing: float = 0.0

    def minus(self, earlier: "Spent") -> "Spent":
        """What was spent since `earlier`."""
        return Spent(*(now - then for now, then in zip(self, earlier, strict=True)))


def shares(spent: Spent) -> dict[str, float]:
    """Shares of the time in which the `teacher` was at work, or idle for want of `data` or because of the `writer`.

    They add up to at most 1; what is left is this process' own bookkeeping. `writing` is beside them: how busy the
    writer was.
    """
    if spent.wall <= 0:
        return dict.fromkeys(("teacher", "data", "writer", "writing"), 0.0)
    teacher = min(1.0, spent.teacher / spent.wall)
    waited = spent.data + spent.writer
    idle = min(1.0 - teacher, waited / spent.wall) / max(waited, 1e-9)
    return {
        "teacher": teacher,
        "data": idle * spent.data,
        "writer": idle * spent.writer,
        "writing": min(1.0, spent.writing / spent.wall),
    }


def sharing(device_type: str) -> str:
    """What is to be said beside a limit on such a device; empty on a GPU.

    On a CPU nobody can tell what data workers take of a core that the teacher runs on as well.
    """
    return " (data and teacher share the cores)" if device_type == "cpu" else ""


def limit_of(spent: Spent) -> str:
    """`teacher`, `data` or `writer`: what has to become faster for the job to be faster.

    The teacher, unless it was idle for more than 1 - KEPT_BUSY of the time; then what it waited for the longest.
    """
    found = shares(spent)
    longest = "data" if found["data"] >= found["writer"] else "writer"
    return longest if found["data"] + found["writer"] > 1.0 - KEPT_BUSY else "teacher"


class TimeSpent:
    """Adds up where a job's time goes, as a whole and over the last WINDOW_S seconds.

    `writing` may be added by another thread than the rest.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._begun: float | None = None
        self._ended: float | None = None
        self._seconds = {"teacher": 0.0, "data": 0.0, "writer": 0.0, "writing": 0.0}
        self._marks: deque[Spent] = deque()  # what had been spent at some moments of the window

    def begin(self) -> None:
        """Count from now on; the first call counts."""
        if self._begun is None:
            self._begun = self._now()
            self._seconds = dict.fromkeys(self._seconds, 0.0)
            self._marks.append(Spent())

    def end(self) -> None:
        """Stop the clock."""
        self._ended = self._now()

    def add(self, what: str, seconds: float) -> None:
        """Put `seconds` down to `teacher`, `data`, `writer` or `writing`."""
        self._seconds[what] += seconds

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Put the time of the enclosed work down to `what`."""
        started = self._now()
        try:
            yield
        finally:
            self.add(what, self._now() - started)

    def whole(self) -> Spent:
        """What was spent since the beginning."""
        if self._begun is None:
            return Spent()
        wall = (self._now() if self._ended is None else self._ended) - self._begun
        return Spent(wall=wall, **self._seconds)

    def recent(self) -> Spent:
        """What was spent in the last WINDOW_S seconds, or since the beginning where that is later."""
        spent = self.whole()
        if not self._marks:
            return spent
        while len(self._marks) > 1 and spent.wall - self._marks[1].wall >= WINDOW_S:
            self._marks.popleft()
        first = self._marks[0]
        if spent.wall - self._marks[-1].wall >= _MARK_S:
            self._marks.append(spent)
        return spent.minus(first)
