"""Extractions that are killed, or that meet: real processes of the real stage, started by the hundred.

A process that has imported everything once (`serve`, or a torture run) forks the jobs, kills them, and looks at what
they leave. It runs no thread of its own, so that a fork of it is as good as a new process; what would start one
(reading a unit, extracting) is done in forks. Not collected by pytest: test_kill_extract.py and test_two_jobs.py ask it
for short campaigns, torture/torture_kill.py for long ones.
"""

import contextlib
import dataclasses
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from extract_jobs import Colours
from PIL import Image
from torch import Tensor, nn

from vkd_cache.cache.check import check_structure
from vkd_cache.cache.reader import Cache, find_cache, open_cache
from vkd_cache.cache.storage import TEMPORARY
from vkd_cache.cache.units import UnitId, unit_of_record
from vkd_cache.config import Config, load_config
from vkd_cache.guard import guarded
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract

BATCH_SIZE = 8
PATIENCE_S = 120.0  # of a busy machine
_seen_fd = -1  # where this process says which batches its teacher has seen


class Watched(Colours):
    """A teacher that says what it sees: eight bytes for each full batch, into a pipe that outlives a kill."""

    def forward_features(self, pixels: Tensor) -> Tensor:
        if len(pixels) == BATCH_SIZE and _seen_fd >= 0:
            os.write(_seen_fd, xxhash.xxh3_64_digest(pixels.contiguous().numpy().tobytes()))
        return super().forward_features(pixels)


class Uneven(Watched):
    """Last bits of its features are those of its process: as on another GPU."""

    def forward_features(self, pixels: Tensor) -> Tensor:
        return super().forward_features(pixels) * (1 + 1e-6 * (os.getpid() % 89))


def watched(num_classes: int) -> nn.Module:
    return Watched(num_classes)


def uneven(num_classes: int) -> nn.Module:
    return Uneven(num_classes)


# ------------------------------------------------------------------------------------------------------------ one job


@dataclasses.dataclass(frozen=True)
class Job:
    """A running extraction. `seen`: the read end of its teacher's pipe."""

    pid: int
    seen: int

    def is_over(self) -> bool:
        """Whether its main process has ended; `ended` can still be called."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def ended(self) -> int:
        """Its exit code once it is over, negative for the signal that killed it; none of its processes is left."""
        _, status = os.waitpid(self.pid, 0)
        until = time.monotonic() + PATIENCE_S
        while _group_lives(self.pid):
            if time.monotonic() > until:
                raise TimeoutError(f"processes of job {self.pid} outlive it")
            time.sleep(0.001)
        return os.waitstatus_to_exitcode(status)

    def batches(self) -> list[bytes]:
        """What its teacher has seen, once it has ended."""
        found = b""
        while data := os.read(self.seen, 2**16):
            found += data
        os.close(self.seen)
        return [found[start : start + 8] for start in range(0, len(found) - 7, 8)]


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def start_job(config: Config, split: JobSplit, said: Path, prepare: Callable[[], None] | None = None) -> Job:
    """Fork an extraction, in a process group of its own; what it says is added to the file `said`."""
    read, write = os.pipe()

    def work() -> int:
        global _seen_fd
        os.setpgid(0, 0)
        os.close(read)
        _seen_fd = write
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        if prepare is not None:
            prepare()
        return guarded(lambda: extract(config, split).exit_code)

    pid = fork(work)
    with contextlib.suppress(PermissionError):  # it has done so itself, and has gone on
        os.setpgid(pid, pid)
    os.close(write)
    return Job(pid, read)


def fork(work: Callable[[], int]) -> int:
    """Run `work` in a fork, which ends with what it returns; its process id."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = work()
        except BaseException:  # noqa: BLE001 - nothing may get out of a fork
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def die_at_file_step(number: int, folder: Path) -> Callable[[], None]:
    """Let a job kill itself just before its `number`-th step on a file below `folder`: open, link, rename, remove..."""
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in _FILE_STEPS and arguments and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


_FILE_STEPS = frozenset(
    {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.scandir", "tempfile.mkstemp", "os.chmod"}
)


def die_in_write(num_bytes: int) -> Callable[[], None]:
    """Let the kernel kill a job in the middle of writing a file, when it is `num_bytes` long."""

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    return prepare


# --------------------------------------------------------------------------------------------------------- the ground


class State(NamedTuple):
    """A cache at rest: by published unit, what identifies its files (inode, time, size); temporary files; run logs."""

    published: dict[UnitId, tuple[tuple[int, int, int], ...]]
    leftovers: frozenset[str]
    orphans: int
    logs: frozenset[str]


def state_of(url: Path) -> State:
    """Look at the files of a cache while nobody writes it; nothing is read but the records."""
    published = {}
    named = set()
    for path in url.glob("records/*/*.json"):
        unit = unit_of_record(path.relative_to(url).as_posix())
        assert unit is not None, path
        file = url / json.loads(path.read_bytes())["files"][0]["path"]
        named.add(file)
        stats = (path.stat(), file.stat())
        published[unit] = tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)
    leftovers = frozenset(path.relative_to(url).as_posix() for path in url.glob(f"{TEMPORARY}/*"))
    orphans = sum(path not in named for path in url.glob("units/*/*"))
    return State(published, leftovers, orphans, frozenset(path.name for path in url.glob("runs/*")))


class Ground:
    """A small data set, and the caches of it that jobs are killed on."""

    def __init__(self, folder: Path, *, num_images: int = 42, views: int = 3, teacher: str = "watched") -> None:
        self.folder = folder
        self.views = views
        self.teacher = teacher
        self._num_caches = 0
        rng = np.random.default_rng(0)
        for number in range(num_images):
            path = folder / "data" / "train" / f"class{number % 2}" / f"{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path, "JPEG")

    def new_cache(self) -> Path:
        """A place for the next cache; the one with the highest number is the one that readers watch."""
        self._num_caches += 1
        url = self.folder / "caches" / f"{self._num_caches:06d}"
        url.mkdir(parents=True)
        return url

    def config(self, url: Path, *, backend: str = "zarr", workers: int = 0, **cache: Any) -> Config:
        """What a job on the cache `url` is asked for."""
        overrides: dict[str, dict[str, Any]] = {
            "source": {"train": str(self.folder / "data" / "train"), "shard_size": 12},
            "views": {"size_px": 16, "seed": 5, "count": str(self.views)},
            "teacher": {"name": f"kill_runs:{self.teacher}"},
            "cache": {"url": str(url), "backend": backend, "dtype": "float16"} | cache,
            "extract": {"batch_size": BATCH_SIZE, "workers": workers, "device": "cpu"},
        }
        return load_config(overrides=overrides)


def must_pass(pid: int, said: Path) -> None:
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(
            f"ended with {os.waitstatus_to_exitcode(status)}: {said.read_text() if said.exists() else ''}"
        )


# ----------------------------------------------------------------------------------------------------------- a reader


@contextlib.contextmanager
def reader(ground: Ground) -> Iterator[Callable[[], int]]:
    """A process that reads all that is published in the newest cache, all the time; afterwards, how much it read.

    Raises:
        RuntimeError: it has met a unit that is not whole, or one that was published and no longer is.
    """
    report = ground.folder / "reader.json"
    report.unlink(missing_ok=True)
    hang_up, its_end = os.pipe()

    def work() -> int:
        os.close(its_end)
        os.set_blocking(hang_up, False)
        watched: Cache | None = None
        known = frozenset[UnitId]()
        rng = np.random.default_rng(0)
        reads = 0
        while True:
            with contextlib.suppress(BlockingIOError):
                if os.read(hang_up, 1) == b"":
                    report.write_text(json.dumps(reads))
                    return 0
            url = max((ground.folder / "caches").iterdir(), default=Path())
            time.sleep(0.005)
            if watched is None or watched.url != str(url):
                watched, known = find_cache(str(url)), frozenset()
            if watched is None:
                continue
            units = watched.units
            assert known <= set(units), f"published and gone: {known - set(units)}"
            # whatever is new, at once, and again and again one of the others
            for unit in [unit for unit in units if unit not in known or rng.random() < 1 / len(units)]:
                assert len(watched.read(unit)) == watched.record(*unit).num_samples
                reads += 1
            known = frozenset(units)

    said = ground.folder / "reader-said"

    def work_and_tell() -> int:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        return work()

    pid = fork(work_and_tell)
    os.close(hang_up)
    try:
        yield lambda: int(json.loads(report.read_text()))
    finally:
        os.close(its_end)
        must_pass(pid, said)


# ------------------------------------------------------------------------------------------------------ jobs that meet


def together(ground: Ground, splits: Sequence[tuple[int, int]], **cache: Any) -> dict[str, Any]:
    """Run jobs of these shares at once on one cache; what was published, and what each says of itself."""
    url = ground.new_cache()
    said = ground.folder / f"{url.name}-said"
    config = ground.config(url, **cache)
    with reader(ground) as reads:
        go, wait = os.pipe()

        def hold() -> None:
            os.close(wait)
            os.read(go, 1)  # ends when nobody holds the other end any more

        jobs = [start_job(config, JobSplit(index=index, count=count), said, hold) for index, count in splits]
        os.close(wait)
        os.close(go)
        codes = [job.ended() for job in jobs]
    seen = [job.batches() for job in jobs]
    summaries = [json.loads(path.read_bytes())["summary"] for path in sorted(url.glob("runs/*"))]

    def verify() -> int:
        cache = open_cache(str(url))
        for unit in cache.units:
            cache.read(unit)
        return sum(finding.is_error for finding in check_structure(cache))

    _, status = os.waitpid(fork(verify), 0)
    return {
        "url": str(url),
        "codes": codes,
        "verified": status == 0,
        "units": sorted(state_of(url).published),
        "batches": [[batch.hex() for batch in batches] for batches in seen],
        "summaries": summaries,
        "said": said.read_text(),
        "reads": reads(),
    }
