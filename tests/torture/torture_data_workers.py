"""Data workers, killed for as long as you like, each in a pool of one to three at a random moment.

    python tests/torture/torture_data_workers.py --minutes 5

After each kill there is one clear error; the slowest of them is printed. Five to fifteen kills a second.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_data_workers import killed

from vkd_cache.errors import SourceError


def main() -> int:
    """Kill until the time is up."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=5.0, help="how long; default: 5")
    until = time.monotonic() + 60 * options.parse_args().minutes
    vars(sys.modules["__main__"]).pop("__file__")  # or each worker would import this script, and pytest with it
    slowest = 0.0
    for seed in itertools.count():
        error, seconds = killed(seed)
        if not isinstance(error, SourceError) or "a data worker process died (SIGKILL)" not in str(error):
            print(f"kill {seed}: {error!r}")
            return 1
        slowest = max(slowest, seconds)
        if time.monotonic() > until:
            print(f"{seed + 1} kills, each one clear error, the slowest after {slowest:.2f} s")
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
