"""Campaigns against extraction: jobs that are killed again and again, and what is found wrong afterwards.

Not collected by pytest: test_kill_extract.py and test_two_jobs.py ask a `Server` for short ones, in a process that may
fork; torture/torture_kill.py runs long ones.
"""

import contextlib
import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from extract_jobs import contents
from kill_runs import (
    BATCH_SIZE,
    Ground,
    Job,
    State,
    die_at_file_step,
    die_in_write,
    fork,
    must_pass,
    reader,
    start_job,
    state_of,
    together,
)

from vkd_cache.cache.storage import TEMPORARY
from vkd_cache.cache.units import UnitId
from vkd_cache.guard import guarded
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract

Death = tuple[float, Callable[[], None] | None]  # when to kill a job, seconds from its start; how it kills itself


class Reference(NamedTuple):
    """An undisturbed run: the cache's bytes, which unit each batch is of, and how long it took."""

    contents: dict[str, bytes]
    unit_of: dict[bytes, UnitId]
    seconds: float


def reference_of(ground: Ground, backend: str, said: Path) -> Reference:
    """Make a cache as it should be, and take what a job has imported meanwhile into this process."""
    url = ground.new_cache()
    config = ground.config(url, backend=backend, dtype="auto")
    imported = said.with_suffix(".modules")

    def note_modules() -> int:
        code = guarded(lambda: extract(config, JobSplit()).exit_code)
        imported.write_text("\n".join(sys.modules))
        return code

    must_pass(fork(note_modules), said)
    for name in imported.read_text().splitlines():
        if name not in sys.modules and not name.startswith("multiprocessing"):
            with contextlib.suppress(ImportError):
                __import__(name)
    url = ground.new_cache()
    config = ground.config(url, backend=backend, dtype="auto")
    started = time.monotonic()
    job = start_job(config, JobSplit(), said)
    if code := job.ended():
        raise RuntimeError(f"an undisturbed run ended with {code}: {said.read_text()}")
    seconds = time.monotonic() - started
    units = sorted(state_of(url).published, key=lambda unit: (unit.view, unit.shard))
    shard_sizes = json.loads((url / "manifest.json").read_bytes())["dataset"]["shard_counts"]
    in_order = [unit for unit in units for _ in range(-(-shard_sizes[unit.shard] // BATCH_SIZE))]
    # the first unit is seen twice: codecs are measured on it before there is a cache
    unit_of = dict(zip(dict.fromkeys(job.batches()), in_order, strict=True))
    assert len(unit_of) == len(in_order), "two batches are alike: the teacher's log says nothing"
    return Reference(contents(url), unit_of, seconds)


@dataclasses.dataclass
class Report:
    """What a campaign did and found; every list of faults has to be empty.

    Attributes:
        kills: jobs that were killed.
        moments: where: before the run's log, in a write (a temporary file is left), between a unit and its record (its
            file is left), between writes.
        leftovers: temporary files that were left, and removed by the next run.
        caches: caches that were completed and compared.
        reads: units that the reader read meanwhile.
        faults: what should not be.
    """

    kills: int = 0
    moments: dict[str, int] = dataclasses.field(default_factory=dict)
    leftovers: int = 0
    caches: int = 0
    reads: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)


class Campaign:
    """Jobs of one kind, killed again and again until `Report.kills` are enough."""

    def __init__(self, ground: Ground, *, backend: str, jobs: int = 1, workers: int = 0, seed: int = 0) -> None:
        self.ground = ground
        self.report = Report()
        self._backend = backend
        self._jobs = jobs
        self._workers = workers
        self._rng = np.random.default_rng(seed)
        self._said = ground.folder / "said"
        self._reference = reference_of(ground, backend, self._said)
        self._largest = max(len(data) for name, data in self._reference.contents.items() if name.startswith("units"))
        self._run_s = self._reference.seconds  # how long a run takes on this machine, as busy as it is

    def at_random(self, kills: int) -> Report:
        """Kill at moments drawn uniformly from the time that a run takes; and some within the writing of a file."""
        with reader(self.ground) as reads:
            while self.report.kills < kills:
                self._one_cache(kills)
        self.report.reads = reads()
        return self.report

    def at_every_file_step(self, stride: int = 1, first: int = 1) -> Report:
        """A cache each for the first, second, ... step on a file, until a run gets by without dying."""
        with reader(self.ground) as reads:
            step = first
            while self._one_cache_with_one_death(step):
                step += stride
        self.report.reads = reads()
        return self.report

    def _random_death(self) -> Death:
        if not self._workers and self._rng.random() < 0.15:
            return np.inf, die_in_write(int(self._rng.integers(1, self._largest)))
        return float(self._rng.uniform(0, self._run_s)), None

    def _one_cache(self, kills: int) -> None:
        url = self.ground.new_cache()
        whole = False
        while not whole and self.report.kills < kills:
            published = len(state_of(url).published)
            whole = self._attempt(url, [self._random_death() for _ in range(self._jobs)], self._workers)
            # deaths are to be everywhere in a run, and what is published has to grow all the same
            self._run_s *= 0.8 if whole or len(state_of(url).published) > published else 1.2
        self._finish(url, whole)

    def _one_cache_with_one_death(self, step: int) -> bool:
        url = self.ground.new_cache()
        survived = self._attempt(url, [(np.inf, die_at_file_step(step, url))])
        self._finish(url, survived)
        return not survived

    def _finish(self, url: Path, whole: bool) -> None:
        """Let one job do what is missing, and compare the cache."""
        if not whole and not self._attempt(url, [(np.inf, None)]):
            self.report.faults.append(f"{url}: a job that nobody killed failed: {self._said.read_text()[-500:]}")
        self._compare(url)

    def _attempt(self, url: Path, deaths: Sequence[Death], workers: int = 0) -> bool:
        """Start the jobs, kill each at its time; whether all came to their end."""
        before = state_of(url)
        config = self.ground.config(url, backend=self._backend, workers=workers, dtype="auto")
        splits = [JobSplit(index=index, count=len(deaths)) for index in range(len(deaths))]
        jobs = [start_job(config, split, self._said, death) for split, (_, death) in zip(splits, deaths, strict=True)]
        if workers:
            self._wait_for_a_unit(url, len(before.published), jobs)
        started = time.monotonic()
        for number in np.argsort([moment for moment, _ in deaths]).tolist():
            moment = deaths[number][0]
            if np.isfinite(moment):
                time.sleep(max(0.0, started + moment - time.monotonic()))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(jobs[number].pid, signal.SIGKILL)
        codes = [job.ended() for job in jobs]
        self._examine(url, before, jobs, codes)
        return not any(codes)

    def _wait_for_a_unit(self, url: Path, published: int, jobs: Sequence[Job]) -> None:
        """Data workers take seconds to start: a death before that is one of a job without them."""
        while sum(1 for _ in url.glob("records/*/*.json")) == published and not any(job.is_over() for job in jobs):
            time.sleep(0.001)

    def _examine(self, url: Path, before: State, jobs: Sequence[Job], codes: Sequence[int]) -> None:
        """Compare a cache with what it was before jobs worked on it."""
        after = state_of(url)
        killed = sum(code in (-signal.SIGKILL, -signal.SIGXFSZ) for code in codes)
        self.report.kills += killed
        fault = self.report.faults.append
        if killed + codes.count(0) < len(codes):
            fault(f"{url}: ended with {list(codes)}: {self._said.read_text()[-2000:]}")
        if before.published.items() - after.published.items():
            fault(f"{url}: published again: {before.published.items() - after.published.items()}")
        seen = {self._reference.unit_of[batch] for job in jobs for batch in job.batches()}
        if redone := seen & before.published.keys():
            fault(f"{url}: computed again: {redone}")
        new_logs = sorted(after.logs - before.logs)
        removed = [path for log in new_logs for path in json.loads((url / "runs" / log).read_bytes())["removed"]]
        still = before.leftovers & after.leftovers
        if still and new_logs:  # a job that has begun has cleaned up
            fault(f"{url}: not removed: {still}")
        if len(new_logs) == len(jobs) and not before.leftovers <= set(removed):
            fault(f"{url}: removed and not counted: {sorted(before.leftovers - set(removed))}")
        if len(removed) > len(set(removed)):
            fault(f"{url}: counted twice: {removed}")
        self.report.leftovers += len(removed)
        if killed:
            moment = _moment(before, after, new_logs)
            self.report.moments[moment] = self.report.moments.get(moment, 0) + killed

    def _compare(self, url: Path) -> None:
        self.report.caches += 1
        if contents(url) != self._reference.contents:
            self.report.faults.append(f"{url}: is not the cache that an undisturbed run makes")
        if list((url / TEMPORARY).iterdir()):
            self.report.faults.append(f"{url}: temporary files are left")


def _moment(before: State, after: State, new_logs: Sequence[str]) -> str:
    if len(after.leftovers - before.leftovers):
        return "in a write"
    if after.orphans:
        return "between a unit and its record"
    return "between writes" if new_logs else "before the first unit"


# -------------------------------------------------------------------------------------------------- asked from outside


def serve() -> None:
    """Answer requests of pytest, one JSON line each: a campaign, or jobs that meet."""
    torch.set_num_threads(1)
    gc.freeze()  # forks copy fewer pages
    for line in sys.stdin:
        request = json.loads(line)
        ground = Ground(Path(request.pop("folder")), **request.pop("ground", {}))
        splits = request.pop("splits", None)
        if splits is not None:
            answer = together(ground, splits, **request)
        else:
            kills, every = request.pop("kills", 0), request.pop("every_file_step", {})
            campaign = Campaign(ground, **request)
            report = campaign.at_random(kills) if kills else campaign.at_every_file_step(**every)
            answer = dataclasses.asdict(report)
        print(json.dumps(answer), flush=True)
    os._exit(0)  # no module that forks will need has anything to tidy up here


class Server:
    """The process that pytest asks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", "import kill_campaigns; kill_campaigns.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )

    def ask(self, folder: Path, **request: Any) -> dict[str, Any]:
        """Answer to one request; what goes wrong there is in pytest's captured stderr."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"folder": str(folder), **request}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the server of test jobs has died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()
