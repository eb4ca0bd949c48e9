"""A folder of local copies, used by jobs that are killed at random moments, for as long as you like.

    python tests/torture/torture_copies.py --minutes 10

Four processes of three threads each, with three different bounds, open, drop and keep ten objects in one folder; every
fetch is written piece by piece, and some fail in the middle. Every second or so one process is killed and started
again. Whatever is opened has its bytes; the folder never holds more than the largest bound; nobody ever waits in vain;
and what is left at the end is copies, documents and nothing else.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_local_copies import content, original, read, total_bytes

from vkd_cache.errors import SourceError
from vkd_cache.local_copies import LocalCopies, Original

BOUNDS = (20_000, 20_000, 12_000, 9_000)
CONTEXT = multiprocessing.get_context("spawn")


def use(folder: Path, bound: int, seed: int, until: float) -> None:
    """One thread's life."""
    copies, rng = LocalCopies(folder, bound), np.random.default_rng(seed)
    while time.time() < until:
        number, kind = int(rng.integers(10)), rng.random()
        wanted = original(number, 3000 + 500 * number)
        if kind < 0.05:
            copies.drop(wanted)
        elif kind < 0.15:
            copies.keep(wanted, "notes", content(wanted)[:500])
        elif kind < 0.25:
            assert copies.kept(wanted, "notes") in (None, content(wanted)[:500])
        else:
            open_slowly(copies, wanted, fails=rng.random() < 0.05)


def open_slowly(copies: LocalCopies, wanted: Original, *, fails: bool) -> None:
    """Open a copy and look at it; a fetch is made of many small writes."""

    def fetch(target: Path) -> None:
        with target.open("wb") as file:
            for start in range(0, wanted.num_bytes, 700):
                file.write(content(wanted)[start : start + 700])
                file.flush()
        if fails:
            raise SourceError("gone")

    try:
        handle = copies.open(wanted, fetch)
    except SourceError:
        return
    assert os.pread(handle, 10**6, 0) == content(wanted)
    os.close(handle)


def live(folder: Path, bound: int, seed: int, until: float) -> None:
    """One process: it ends with 9 as soon as a thread meets what it should not."""

    def end(what: threading.ExceptHookArgs) -> None:
        threading.__excepthook__(what)
        os._exit(9)

    threading.excepthook = end
    threads = [threading.Thread(target=use, args=(folder, bound, 3 * seed + number, until)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def torture(folder: Path, minutes: float) -> None:
    """Kill until the time is up."""
    until, rng, started = time.time() + 60 * minutes, np.random.default_rng(0), 0

    def start(bound: int) -> BaseProcess:
        nonlocal started
        started += 1
        process = CONTEXT.Process(target=live, args=(folder, bound, started, until))
        process.start()
        return process

    processes, most = [start(bound) for bound in BOUNDS], 0
    while time.time() < until - 2:
        pause = time.time() + rng.uniform(0.2, 1.5)
        while time.time() < pause:
            most = max(most, total_bytes(folder))
        chosen = int(rng.integers(len(BOUNDS)))
        processes[chosen].kill()
        processes[chosen].join()
        processes[chosen] = start(BOUNDS[chosen])
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(BOUNDS), "a job failed, or waits in vain"
    assert most <= max(BOUNDS), f"{most} bytes were there at one moment"
    read(LocalCopies(folder, max(BOUNDS)), original(11, 9_000))
    assert not any((folder / "fetching").iterdir())
    print(f"{started - len(BOUNDS)} kills, at most {most} of {max(BOUNDS)} bytes, nothing was left behind")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    with tempfile.TemporaryDirectory() as scratch:
        torture(Path(scratch), parser.parse_args().minutes)
