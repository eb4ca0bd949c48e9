"""The machine: shares of a job, devices, versions, and writes that are whole or not there."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import vkd_cache
from vkd_cache.errors import ConfigError
from vkd_cache.runtime import (
    JobSplit,
    hardware,
    job_split,
    library_versions,
    rank_split,
    resolve_device,
    write_atomic,
)

ARRAY = tuple(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "COUNT"))
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_LOCALID", *ARRAY)


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def array(task: int, tasks: list[int]) -> dict[str, str]:
    """What SLURM sets for task `task` of --array=<tasks>."""
    return {
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_MIN": str(min(tasks)),
        "SLURM_ARRAY_TASK_MAX": str(max(tasks)),
        "SLURM_ARRAY_TASK_COUNT": str(len(tasks)),
    }


def test_alone_is_the_whole_job() -> None:
    assert job_split() == rank_split() == JobSplit(index=0, count=1, local_index=0)


@given(count=st.integers(1, 1000), data=st.data())
def test_worker_option(count: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, count - 1))
    assert job_split(f"{index}/{count}") == JobSplit(index=index, count=count)


@pytest.mark.parametrize("text", ["", "1", "/", "1/", "/2", "2/2", "-1/2", "0/0", "a/b", "1/2/3", "0.5/2"])
def test_worker_options_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--worker: found .*, expected I/N with 0 <= I < N"):
        job_split(text)


def test_torchrun_is_heard_by_both_and_overruled_by_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **array(3, [3, 4])}.items():
        monkeypatch.setenv(name, value)
    assert job_split() == rank_split() == JobSplit(index=5, count=8, local_index=1)
    assert job_split("0/2") == JobSplit(index=0, count=2)
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(ConfigError, match="RANK/WORLD_SIZE: found '8/8'"):
        rank_split()


@given(first=st.integers(0, 50), stride=st.integers(1, 9), count=st.integers(1, 20))
def test_a_regular_slurm_array_is_shared_out_completely(first: int, stride: int, count: int) -> None:
    tasks = list(range(first, first + stride * count, stride))
    with pytest.MonkeyPatch.context() as patch:
        shares = []
        for task in tasks:
            for name, value in array(task, tasks).items():
                patch.setenv(name, value)
            shares.append(job_split())
            assert rank_split() == JobSplit(), "tasks of an array train models of their own"
    assert shares == [JobSplit(index=index, count=count) for index in range(count)]


@given(tasks=st.lists(st.integers(0, 30), min_size=2, max_size=6, unique=True))
def test_an_irregular_slurm_array_never_loses_a_share_in_silence(tasks: list[int]) -> None:
    tasks = sorted(tasks)
    assume(len({after - before for before, after in itertools.pairwise(tasks)}) > 1)
    shares, refused = [], 0
    with pytest.MonkeyPatch.context() as patch:
        for task in tasks:
            for name, value in array(task, tasks).items():
                patch.setenv(name, value)
            try:
                shares.append(job_split().index)
            except ConfigError:
                refused += 1
    assert refused > 0 or sorted(shares) == list(range(len(tasks)))


def test_a_broken_slurm_environment_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(ConfigError, match=r"found ID='3' MIN='' .*Give --worker I/N instead"):
        job_split()


def test_devices() -> None:
    assert resolve_device("cpu") == "cpu"
    for name in ("gpu", "meta", "cuda:99", ""):
        with pytest.raises(ConfigError, match=f"device: found '{name}'"):
            resolve_device(name)


def test_versions_and_hardware_are_known() -> None:
    versions = library_versions()
    assert versions["vkd_cache"] == vkd_cache.__version__
    assert "unknown" not in versions.values()
    assert {"pillow", "libjpeg", "torch", "torchvision", "timm", "numpy", "zarr"} <= set(versions)
    assert hardware()["cores"]


def test_write_atomic_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for data in (b"first", b"second, longer", b""):
        write_atomic(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # whoever may read the files around it may read this one


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    """A process is killed while it rewrites a file again and again; what is left is one of its versions, whole."""
    path = tmp_path / "state"
    script = (
        "import sys; from pathlib import Path; from vkd_cache.runtime import write_atomic\n"
        "number = 0\n"
        "while True:\n"
        "    write_atomic(Path(sys.argv[1]), bytes([number % 256]) * 100_000)\n"
        "    number += 1\n"
        "    print(number, flush=True)\n"
    )
    for rounds in (1, 3, 7):
        with subprocess.Popen(
            [sys.executable, "-c", script, os.fspath(path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for _ in range(rounds):
                process.stdout.readline()
            process.kill()
        data = path.read_bytes()
        assert len(data) == 100_000
        assert len(set(data)) == 1


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    missing = tmp_path / "no such folder" / "file"
    with pytest.raises(FileNotFoundError):
        write_atomic(missing, b"x")
    occupied = tmp_path / "folder"
    (occupied / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_atomic(occupied, b"x")
    assert list(tmp_path.iterdir()) == [occupied]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs the /proc of Linux")
def test_peak_memory_is_not_that_of_the_process_that_started_it() -> None:
    child = "from vkd_cache.runtime import peak_memory_bytes; print(peak_memory_bytes())"
    parent = (
        "import subprocess, sys\n"
        "ballast = b'x' * 2_000_000_000\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    result = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 1_000_000 < int(result.stdout) < 1_900_000_000


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="limits on file sizes are set for Linux here")
def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    script = (
        "import errno, pathlib, resource, signal, sys\n"
        "from vkd_cache.runtime import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "try:\n"
        "    write_atomic(path, bytes(1000))\n"
        "except OSError as error:\n"
        "    sys.exit(0 if error.errno == errno.EFBIG and error.filename == str(path) else 1)\n"
        "sys.exit(2)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], check=True)
    assert not list(tmp_path.iterdir())
