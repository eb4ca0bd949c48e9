"""Watches a job from outside: memory and open files of its main process and of its data workers, as it goes on.

A newcomer's trap: resident memory counts pages that processes share, as those do that are forked from one server, and
the pages of batches that pass from a worker to the main process. What a process can leak is what it alone has written:
Private_Dirty in /proc/PID/smaps_rollup. (Not the whole USS: the pages of a library become "private" when the last other
program that uses it ends, whoever started that.)
"""

import contextlib
import dataclasses
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROC = Path("/proc")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at one process.

    Attributes:
        done: units or steps that the job had behind it.
        seconds: since the job began.
        private_mib: memory that it has written and no other process has.
        resident_mib: memory that it has in all, shared pages included.
        files: open file descriptors.
    """

    done: int
    seconds: float
    private_mib: float
    resident_mib: float
    files: int


def look(pid: int, done: int, seconds: float) -> Sample | None:
    """A sample of process `pid`; None where it has ended, or has not got its own memory yet."""
    try:
        files = len(list((PROC / str(pid) / "fd").iterdir()))
        lines = (PROC / str(pid) / "smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    except OSError:
        return None
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return Sample(
        done=done,
        seconds=round(seconds, 3),
        private_mib=(kib["Private_Dirty"] + kib.get("Private_Hugetlb", 0)) / 1024,
        resident_mib=kib["Rss"] / 1024,
        files=files,
    )


def parents() -> dict[int, int]:
    """The parent of every process."""
    found = {}
    for stat in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found[int(stat.parent.name)] = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    return found


def tree(main: int) -> list[int]:
    """Process `main` and everything that it has started, directly or not."""
    below: dict[int, list[int]] = {}
    for pid, parent in parents().items():
        below.setdefault(parent, []).append(pid)
    found = [main]
    for pid in found:
        found.extend(below.get(pid, ()))
    return found


def cpu_times(main: int) -> dict[int, float]:
    """CPU seconds that each living process of `tree` has taken, to the nanosecond."""
    found = {}
    for pid in tree(main):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found[pid] = time.clock_gettime((~pid << 3) | 2)  # Linux' clock of another process: CPUCLOCK_SCHED
    return found


def cpu_seconds_since(main: int, before: dict[int, float]) -> float:
    """CPU seconds of `tree` since `before`; of a process that has ended since, nothing is known, or counted."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in cpu_times(main).items())


def data_workers(main: int) -> list[int]:
    """Processes that a child of `main` has forked, the oldest first: a server starts all data workers."""
    above = parents()
    servers = {pid for pid, parent in above.items() if parent == main}
    return sorted(pid for pid, parent in above.items() if parent in servers)


def watch(
    job: "subprocess.Popen[str]", progress: Callable[[], int], workers: int, every_s: float
) -> dict[str, list[Sample]]:
    """Samples of a job's main process and of its first `workers` data workers, until it ends; by name."""
    started = time.monotonic()
    found: dict[str, list[Sample]] = {"main process": []}
    names = {job.pid: "main process"}
    while job.poll() is None:
        done = progress()
        if done > 0 and len(names) <= workers:
            for pid in data_workers(job.pid)[:workers]:
                names.setdefault(pid, f"data worker {len(names)}")
        for pid, name in names.items():
            sample = look(pid, done, time.monotonic() - started)
            if sample is not None and done > 0:
                found.setdefault(name, []).append(sample)
        time.sleep(every_s)
    return found
