"""Extraction as processes that are interrupted or starved: what is published stays, what is missing comes."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from conftest import NUM_TRAIN, PRELOAD
from extract_jobs import contents, extract_alone

from vkd_cache.cache.reader import open_cache
from vkd_cache.config import Config
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract

MakeConfig = Callable[..., Config]
PATIENCE_S = 240.0  # of a busy machine; an idle one needs seconds
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOAD)


def start(config: Config, said: Path, split: JobSplit | None = None, max_file_bytes: int = 0) -> BaseProcess:
    process = CONTEXT.Process(target=extract_alone, args=(config, split or JobSplit(), said, max_file_bytes))
    process.start()
    return process


def num_records(url: Path) -> int:
    return sum(1 for _ in url.glob("records/*/*.json"))


def wait_until(condition: Callable[[], bool]) -> None:
    """Look again and again: nothing here depends on how fast the machine is."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "waited in vain"


def descendants(pid: int) -> dict[int, int]:
    """Parents of all processes below `pid`."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        parents[int(stat.parent.name)] = int(fields[1])
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return {child: parents[child] for child in below - {pid}}


def test_workers_at_once_make_one_cache(tiny_config: MakeConfig, small_cache: Path, tmp_path: Path) -> None:
    config = tiny_config(cache={"url": str(tmp_path / "cache")}, views={"count": "2"})
    said = tmp_path / "said"
    processes = [start(config, said, JobSplit(index=index, count=3)) for index in range(3)]
    processes.append(start(config, said))  # and one that does what the others do
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0] * 4, said.read_text()
    assert contents(tmp_path / "cache") == contents(small_cache)


def test_a_full_disk_is_one_clear_error(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the manifest fits, a unit does not."""
    config = tiny_config(cache={"url": str(tmp_path / "cache"), "dtype": "float32"}, views={"count": "20"})
    process = start(config, tmp_path / "said", max_file_bytes=6000)
    process.join(PATIENCE_S)
    assert process.exitcode == 1
    *_, message = (tmp_path / "said").read_text().splitlines()
    assert message.startswith("Error: ")
    assert "shard 0 of view 0 cannot be written (File too large)" in message
    assert "run the same command again" in message
    assert num_records(tmp_path / "cache") == 0
    assert extract(tiny_config(cache={"url": str(tmp_path / "cache"), "dtype": "float32"}), JobSplit()).exit_code == 0


@pytest.fixture
def long_job(digits_tree: Path, teacher_file: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command with two data workers, and hours to go."""
    pipeline = tmp_path / "job.toml"
    pipeline.write_text('[views]\nsize_px = 32\nseed = 5\ncount = "400"\n[source]\nshard_size = 48\n')
    command = ["extract", str(pipeline), "--source", str(digits_tree), "--cache", str(tmp_path / "cache")]
    command += ["--teacher", "test_resnet", "--teacher-weights", str(teacher_file), "--dtype", "float16"]
    command += ["--batch-size", "16", "--workers", "2", "--device", "cpu"]
    job = subprocess.Popen(
        [sys.executable, "-m", "vkd_cache", *command], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield job
    finally:
        if job.poll() is None:
            job.kill()
        job.communicate()


def wait_for_units(job: subprocess.Popen[str], url: Path) -> None:
    wait_until(lambda: num_records(url) >= 2 or job.poll() is not None)
    assert job.poll() is None, job.communicate()[1]


def test_a_killed_data_worker_is_a_clear_error_and_no_hang(
    long_job: subprocess.Popen[str], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    wait_for_units(long_job, tmp_path / "cache")
    below = descendants(long_job.pid)
    data_workers = [child for child, parent in below.items() if parent in below]  # children of the fork server
    assert len(data_workers) == 2
    os.kill(data_workers[0], signal.SIGKILL)
    _, said = long_job.communicate(timeout=PATIENCE_S)
    assert long_job.returncode == 1
    assert re.search(r"^Error: .*a data worker process died .*fewer --workers", said, re.MULTILINE)
    assert "Traceback" not in said
    assert not {pid for pid in data_workers if Path(f"/proc/{pid}/exe").exists()}
    check_what_is_there(tmp_path / "cache", tiny_config)


def test_ctrl_c_ends_at_once_with_whole_units(
    long_job: subprocess.Popen[str], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    wait_for_units(long_job, tmp_path / "cache")
    interrupt(long_job)
    check_what_is_there(tmp_path / "cache", tiny_config)


def test_ctrl_c_while_workers_start_is_as_quiet(long_job: subprocess.Popen[str], tmp_path: Path) -> None:
    wait_until(lambda: bool(descendants(long_job.pid)) or long_job.poll() is not None)
    interrupt(long_job)
    assert num_records(tmp_path / "cache") <= 1


def interrupt(job: subprocess.Popen[str]) -> None:
    """Ctrl-C as a terminal sends it: to every process of the job."""
    below = descendants(job.pid)
    os.killpg(job.pid, signal.SIGINT)
    _, said = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 130
    assert said.splitlines()[-1] == "Error: interrupted."
    assert "Traceback" not in said
    assert not {pid for pid in below if Path(f"/proc/{pid}/exe").exists()}


def check_what_is_there(url: Path, tiny_config: MakeConfig) -> None:
    """What is published is whole, and the same job continues from it."""
    cache = open_cache(str(url))
    units = cache.units
    assert 2 <= len(units) < 2000
    for unit in units:
        cache.read(*unit)
    assert not list((url / ".incomplete").iterdir())
    view = max(unit.view for unit in units)
    summary = extract(tiny_config(cache={"url": str(url)}, views={"count": f"{view}:{view + 2}"}), JobSplit())
    assert summary.units_skipped == sum(unit.view >= view for unit in units)
    assert sum(len(cache.read(shard, view)) for shard in range(5)) == NUM_TRAIN


def test_torchrun_shares_the_units(digits_tree: Path, teacher_file: Path, small_cache: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "job.toml"
    pipeline.write_text('[views]\nsize_px = 32\nseed = 5\ncount = "2"\n[source]\nshard_size = 48\n')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vkd_cache", "extract", str(pipeline), "--source", str(digits_tree)]
    command += ["--cache", str(tmp_path / "cache"), "--teacher", "test_resnet", "--teacher-weights", str(teacher_file)]
    command += ["--dtype", "float16", "--batch-size", "16", "--workers", "0", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "cache") == contents(small_cache)
    logs = sorted(path.name.rpartition("-")[2] for path in (tmp_path / "cache" / "runs").iterdir())
    assert logs == ["0of2.json", "1of2.json"]
