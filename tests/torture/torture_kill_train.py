"""Training runs, killed for as long as you like: every touch of every file in turn, then random moments.

    python tests/torture/torture_kill_train.py --minutes 10

One round lets one run be killed at random moments, with and without a data worker, until it is done; then it kills a
new run at its n-th touch of a file (before a file is begun, in the middle of it, before it takes its name), for every n
of a whole run, and lets it finish. After each kill the checkpoints load; at the end weights, state and log are those of
a run that nobody killed, to the last bit. A round takes minutes; the last one is cut short.
"""

import itertools
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import for_minutes
from kill_server import KillServer
from test_kill_train import KilledRun, assert_same_run, pipeline_file, server, whole

__all__ = ["pipeline_file", "server", "whole"]  # fixtures


def test_kill_for_minutes(
    server: KillServer, pipeline_file: str, whole: tuple[Path, int], tmp_path: Path, until: float
) -> None:
    """Rounds until the time is up."""
    output, events = whole
    kills = 0
    for number in itertools.count():
        run = KilledRun(server, pipeline_file, folder(tmp_path, f"round{number}"))
        rng = np.random.default_rng(number)
        while run.killed_after(1, float(rng.uniform(0, 0.05)), "--workers", str(rng.integers(0, 2))):
            pass
        run.finish()
        assert_same_run(output, run.output)
        kills += run.kills
        for event, half in itertools.product(range(1, events + 1), (False, True)):
            if time.monotonic() > until:
                print(f"{kills} kills, every run came to the same result")
                return
            run = KilledRun(server, pipeline_file, folder(tmp_path, f"round{number}-{event}-{half}"))
            run.killed_at(event, half=half)
            run.finish()
            assert_same_run(output, run.output)
            kills += run.kills
        print(f"round {number + 1}: {kills} kills, {events} touches of files, every run came to the same result")


def folder(parent: Path, name: str) -> Path:
    """A new folder."""
    made = parent / name
    made.mkdir()
    return made


if __name__ == "__main__":
    for_minutes.main(__file__, __doc__)
