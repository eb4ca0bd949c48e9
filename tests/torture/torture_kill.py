"""Extractions that are killed for as long as you like; prints what was killed where, and what was left and found.

    python tests/torture/torture_kill.py --minutes 10

Rounds of campaigns as in test_kill_extract.py, with other seeds each time: one job and three at once, both backends, at
random moments and within writes; then once, for each backend, a death before every single step on a file; data workers
now and then. Ends with exit code 1 at the first round that finds a fault.
"""

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from kill_campaigns import Campaign, Report
from kill_runs import Ground

COLUMNS = ("what", "kills", "moments", "leftovers", "caches", "reads", "redone or wrong")


def show(what: str, report: Report) -> None:
    moments = ", ".join(f"{count} {moment}" for moment, count in sorted(report.moments.items()))
    cells = (what, report.kills, moments, report.leftovers, report.caches, report.reads, len(report.faults))
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    for fault in report.faults:
        print(fault, file=sys.stderr)
    if report.faults:
        sys.exit(1)


def add(total: Report, report: Report) -> None:
    for name in ("kills", "leftovers", "caches", "reads"):
        setattr(total, name, getattr(total, name) + getattr(report, name))
    for moment, count in report.moments.items():
        total.moments[moment] = total.moments.get(moment, 0) + count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=60, help="of a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()
    total = Report()
    until = time.monotonic() + 60 * options.minutes
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    number = 0
    while number == 0 or time.monotonic() < until:
        for backend in ("zarr", "webdataset"):
            rounds = [(1, 0, options.kills), (3, 0, options.kills), *([(1, 2, 3)] if number % 4 == 0 else [])]
            for jobs, workers, kills in rounds:
                with tempfile.TemporaryDirectory() as folder:
                    campaign = Campaign(
                        Ground(Path(folder)), backend=backend, jobs=jobs, workers=workers, seed=options.seed + number
                    )
                    report = campaign.at_random(kills)
                with_workers = f", {workers} data workers" if workers else ""
                show(f"{backend}, {jobs} at once{with_workers}", report)
                add(total, report)
            if number == 0:
                with tempfile.TemporaryDirectory() as folder:
                    ground = Ground(Path(folder), num_images=10, views=1)
                    report = Campaign(ground, backend=backend).at_every_file_step()
                show(f"{backend}, before every step on a file", report)
                add(total, report)
            number += backend == "webdataset"
    show("all", total)


if __name__ == "__main__":
    main()
