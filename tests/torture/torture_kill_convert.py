"""Conversions that are killed, for as long as you like: every step on a file in turn, then random moments.

    python tests/torture/torture_kill_convert.py --minutes 10

One round kills a conversion just before its n-th step on a file (a temporary file is made, gets its name, is removed),
for every n of a whole run, and lets another one finish; then it kills one, two and three workers on one cache at random
moments until they are done. After each kill all that is published can be read; at the end the cache is, to the last
byte, that of a conversion that nobody killed, and no published unit was written again. Rounds go by turns with both
backends and take minutes; the last one is cut short.
"""

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from convert_kills import Ground


def torture(folder: Path, until: float) -> None:
    """Rounds until the time is up."""
    grounds = []
    for backend in ("zarr", "webdataset"):
        (folder / backend).mkdir()
        grounds.append(Ground(folder / backend, backend))
    rng = np.random.default_rng(0)
    for number in itertools.count():
        ground = grounds[number % 2]
        for step in range(1, ground.steps + 1):
            ground.kill_once(folder / "target", step)
            shutil.rmtree(folder / "target")
            if step % 2:
                ground.random_round(folder / "target", rng, int(rng.integers(1, 4)))
                shutil.rmtree(folder / "target")
            if time.monotonic() > until:
                kills, leftovers = (sum(getattr(one, name) for one in grounds) for name in ("kills", "leftovers"))
                print(f"{kills} kills, {leftovers} leftovers removed, every conversion came to the same cache")
                return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        torture(Path(scratch), time.monotonic() + 60 * chosen.minutes)
