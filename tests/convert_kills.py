"""Conversions that are killed: real processes, forked by a server that has imported everything once.

Shared by test_convert_kill.py and torture/torture_kill_convert.py.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from cache_samples import make_columns, make_manifest, make_node, make_values
from conftest import PRELOAD
from extract_jobs import contents

from vkd_cache.cache.reader import find_cache
from vkd_cache.cache.writer import create_cache
from vkd_cache.guard import guarded
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.convert import ConvertRequest, convert
from vkd_cache.stages.convert_plan import Wish

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOAD)
PATIENCE_S = 240.0  # of a busy machine
FILE_STEPS = frozenset({"open", "os.link", "os.rename", "os.remove", "os.mkdir", "tempfile.mkstemp", "os.chmod"})
NUM_UNITS = 4

Published = dict[str, tuple[int, int, int]]  # what identifies the files of published units: inode, time, size


def make_source(url: Path) -> None:
    """Two shards of two views as float32, with a head; a third shard is not there yet."""
    head = {"weight": torch.ones(10, 5), "bias": torch.zeros(10)}
    writer = create_cache(str(url), make_manifest(nodes=(make_node("float32"),)), head)
    for number in range(NUM_UNITS):
        shard, view = number % 2, number // 2
        columns = make_columns(7, seed=number)
        writer.publish(shard, view, columns, {"pooled": make_values(7, seed=number)})


def run(
    source: Path, target: Path, backend: str, worker: tuple[int, int], said: Path, die_at: int, counted: Path
) -> None:
    """In a process of its own, which this ends with the exit code of the conversion.

    Args:
        source, target, backend, worker: of the conversion, to float16.
        said: file that its messages are added to.
        die_at: which of its steps on files of the target it dies just before, from 1 on; 0: of none.
        counted: file that the number of these steps goes to, at the end.
    """
    torch.set_num_threads(1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    steps = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal steps
        if event in FILE_STEPS and str(arguments[0]).startswith(str(target)):
            steps += 1
            if steps == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    request = ConvertRequest(source=str(source), target=str(target), wish=Wish(dtype="float16", backend=backend))
    code = guarded(lambda: convert(request, JobSplit(index=worker[0], count=worker[1])).exit_code)
    sys.stderr.flush()
    counted.write_text(str(steps))
    os._exit(code)


class Ground:
    """Where conversions are killed: one source, and what an undisturbed run makes of it."""

    def __init__(self, folder: Path, backend: str) -> None:
        self._folder = folder
        self._backend = backend
        self.said = folder / "said"
        self.source = folder / "source"
        self.kills = 0
        self.leftovers = 0
        make_source(self.source)
        self._before = contents(self.source)
        whole = folder / "whole"
        self.finish(whole, [(0, 1)])
        self.whole = contents(whole)
        self.steps = int((folder / "counted").read_text())
        started = time.monotonic()
        self.finish(folder / "again", [(0, 1)])
        self.seconds = time.monotonic() - started

    def start(self, target: Path, worker: tuple[int, int] = (0, 1), die_at: int = 0) -> BaseProcess:
        counted = self._folder / "counted"
        arguments = (self.source, target, self._backend, worker, self.said, die_at, counted)
        process = CONTEXT.Process(target=run, args=arguments)
        process.start()
        return process

    def ended(self, processes: Sequence[BaseProcess]) -> list[int]:
        """Exit codes; negative for the signal that killed a process."""
        codes = []
        for process in processes:
            process.join(PATIENCE_S)
            assert process.exitcode is not None, "a conversion hangs"
            assert process.exitcode in (0, -signal.SIGKILL), self.said.read_text()
            codes.append(process.exitcode)
            process.close()
        self.kills += sum(code != 0 for code in codes)
        return codes

    def finish(self, target: Path, workers: Sequence[tuple[int, int]]) -> None:
        """Run to the end, undisturbed."""
        assert self.ended([self.start(target, worker) for worker in workers]) == [0] * len(workers)

    def look(self, target: Path) -> Published:
        """What is published, after reading all of it."""
        cache = find_cache(str(target)) if target.is_dir() else None
        found: Published = {}
        for unit in cache.units if cache is not None else ():
            record = cache.record(*unit)
            assert len(cache.read(unit)) == 7 and record.origin is not None
            for path in (
                target / record.files[0][0],
                target / f"records/view-{unit.view:04d}/shard-{unit.shard:06d}.json",
            ):
                stat = path.stat()
                found[path.name + str(unit)] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        return found

    def check_finished(self, target: Path, published: Published) -> None:
        """The cache is what an undisturbed run makes; what was published stays as it was; nothing is left lying."""
        after = self.look(target)
        assert published.items() <= after.items()
        assert contents(target) == self.whole
        assert list((target / ".incomplete").iterdir()) == []
        assert contents(self.source) == self._before
        logs = [json.loads(path.read_bytes()) for path in (target / "runs").iterdir()]
        removed = [path for log in logs for path in log["removed"]]
        assert len(removed) == len(set(removed))
        self.leftovers += len(removed)
        summaries = [log["summary"] for log in logs if log["summary"] is not None]
        converted = sum(summary["units_converted"] for summary in summaries)
        assert converted <= NUM_UNITS if published else converted == NUM_UNITS

    def kill_once(self, target: Path, step: int) -> int:
        """Kill one job just before a step on a file, let another finish; how many files were published before."""
        assert self.ended([self.start(target, die_at=step)]) == [-signal.SIGKILL]
        published = self.look(target)
        self.finish(target, [(0, 1)])
        self.check_finished(target, published)
        return len(published)

    def random_round(self, target: Path, rng: np.random.Generator, num_workers: int) -> None:
        """Kill workers at random moments until they are done; then compare."""
        published: Published = {}
        span_s = self.seconds * 1.2
        while True:
            processes = [self.start(target, (index, num_workers)) for index in range(num_workers)]
            begun = time.monotonic()
            for number in rng.permutation(num_workers).tolist():
                time.sleep(max(0.0, begun + float(rng.uniform(0, span_s)) - time.monotonic()))
                processes[number].kill()
            codes = self.ended(processes)
            now = self.look(target)
            assert published.items() <= now.items()
            span_s *= 1.3 if len(now) == len(published) else 1.0
            published = now
            if not any(codes):
                break
        self.check_finished(target, published)
