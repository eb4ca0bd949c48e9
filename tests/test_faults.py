"""File systems that fail: full, read-only, of somebody else, with files that vanish, or as some networks have them.

Each time: one clear error, what was published is intact, and the same command goes on once it is mended.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cache_samples import unit_file
from conftest import SHARD_SIZE, TEACHER
from extract_jobs import contents

from vkd_cache.cache.reader import open_cache
from vkd_cache.config import Config
from vkd_cache.errors import CorruptCacheError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract

MakeConfig = Callable[..., Config]


class FaultServer:
    """`fault_jobs`, asked from here."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process, self._said = process, folder / "said.json"
        self.can_mount = self._answer()["can_mount"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def do(self, *steps: list[Any]) -> list[tuple[int, str]]:
        """Exit code and output of each command among the steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"steps": steps, "said": str(self._said)}) + "\n")
        self._process.stdin.flush()
        assert self._answer()["status"] == 0
        return [(code, said) for code, said in json.loads(self._said.read_text())]


@pytest.fixture(scope="module")
def place(
    digits_tree: Path, teacher_file: Path, small_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A folder that every user may enter: the data, the teacher, a pipeline, and a finished cache of two views."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(digits_tree, folder / "data")
        shutil.copy(teacher_file, folder / "teacher.pt")
        shutil.copytree(small_cache, folder / "whole")
        (folder / "pipeline.toml").write_text(
            f'[source]\ntrain = "{folder}/data"\nshard_size = {SHARD_SIZE}\n'
            "[views]\nsize_px = 32\nseed = 5\n"
            f'[teacher]\nname = "{TEACHER}"\nweights = "{folder}/teacher.pt"\n'
            '[cache]\ndtype = "float16"\n'
            '[extract]\nbatch_size = 16\nworkers = 0\ndevice = "cpu"\n'
            '[student]\nname = "test_vit"\n'
            "[train]\nepochs = 2\nbatch_size = 16\nlr = 0.001\nworkers = 0\nopen_shards = 2\n"
            'log_every = 1\ndigest_check = 1.0\ndevice = "cpu"\n[eval]\nworkers = 0\ndevice = "cpu"\n'
        )
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield folder


@pytest.fixture(scope="module")
def server(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    program = Path(__file__).with_name("fault_jobs.py")
    folder = tmp_path_factory.mktemp("faults")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield FaultServer(process, folder)
        assert process.stdin is not None
        process.stdin.close()


def one_error(said: str) -> str:
    """The only error in what a command said, to its end; there is no traceback."""
    assert "Traceback" not in said
    before, error, message = said.partition("Error: ")
    assert error, before
    assert "Error: " not in message
    return message


def full_disk(server: FaultServer, folder: Path, kilobytes: int, file_kilobytes: int) -> list[list[Any]]:
    """Steps to a disk with little room; where nothing can be mounted, to files that may not grow."""
    folder.mkdir()
    return [["small_disk", str(folder), kilobytes]] if server.can_mount else [["small_files", file_kilobytes]]


def more_room(server: FaultServer, folder: Path) -> list[Any]:
    return ["resize", str(folder), 200_000] if server.can_mount else ["small_files", 0]


def test_a_full_disk_stops_an_extraction_which_goes_on_with_more_room(server: FaultServer, place: Path) -> None:
    disk, pipeline = place / "disk", str(place / "pipeline.toml")
    cache, copy = str(disk / "cache"), str(place / "copy")
    make = ["extract", pipeline, "--cache", cache, "--views", "2"]
    full, verified, done, _ = server.do(
        *full_disk(server, disk, 120, 6),
        make,
        ["verify", cache],
        more_room(server, disk),
        make,
        ["convert", cache, copy, "--backend", "zarr"],  # out of the mount, to be looked at
    )
    error = one_error(full[1])
    assert full[0] == 1
    assert f"{cache}: " in error
    assert "No space left on device" in error or "File too large" in error
    assert "run the same command again" in error
    assert (verified[0], done[0]) == (0, 0), verified[1] + done[1]
    copied, whole = open_cache(copy), open_cache(str(place / "whole"))
    assert copied.fingerprint == whole.fingerprint
    files = [{unit: cache.record(*unit).files for unit in cache.units} for cache in (copied, whole)]
    assert files[0] == files[1]


def test_a_full_disk_stops_a_conversion_which_goes_on_with_more_room(server: FaultServer, place: Path) -> None:
    disk, target = place / "disk2", str(place / "disk2" / "cache")
    change = ["convert", str(place / "whole"), target, "--backend", "webdataset"]
    full, done, verified = server.do(
        *full_disk(server, disk, 100, 20), change, more_room(server, disk), change, ["verify", target]
    )
    assert (full[0], done[0], verified[0]) == (1, 0, 0), full[1] + done[1] + verified[1]
    assert f"{target}: " in one_error(full[1])


def test_a_full_disk_stops_training_which_goes_on_with_more_room(server: FaultServer, place: Path) -> None:
    disk, pipeline, whole = place / "disk3", str(place / "pipeline.toml"), str(place / "whole")
    output, undisturbed = disk / "run", place / "undisturbed"
    run = ["train", pipeline, "--cache", whole, "--output"]
    full, done, whole_run = server.do(
        *full_disk(server, disk, 2000, 1000),
        [*run, str(output), "--resume", "auto"],
        more_room(server, disk),
        [*run, str(output), "--resume", "auto"],
        [*run, str(undisturbed)],
    )
    error = one_error(full[1])
    assert full[0] == 1
    assert str(output) in error
    assert "No space left on device" in error or "File too large" in error
    assert (done[0], whole_run[0]) == (0, 0), done[1] + whole_run[1]
    ends = [[line for line in said.splitlines() if line.startswith("epoch 2: ")] for _, said in (done, whole_run)]
    assert ends[0] == ends[1] != []  # what it ends with is what a run ends with that nothing stopped
    assert json.loads((undisturbed / "log.jsonl").read_text().splitlines()[-1])["epoch"] == 2


def test_a_cache_that_cannot_be_written_serves_all_the_same(server: FaultServer, place: Path) -> None:
    """Read-only, or without permission: read by all, and one error for who would write."""
    pipeline, cache = str(place / "pipeline.toml"), str(shutil.copytree(place / "whole", place / "closed"))
    before = contents(Path(cache))
    if not server.can_mount:
        for path in (Path(cache), *Path(cache).rglob("*")):
            path.chmod(0o555)
    lock = ["read_only", cache] if server.can_mount else ["unprivileged"]
    grown, sound, trained = server.do(
        lock,
        ["extract", pipeline, "--cache", cache, "--views", "3"],
        ["verify", cache, "--source", str(place / "data"), "--pixels", "--sample", "4"],
        ["train", pipeline, "--cache", cache, "--epochs", "1", "--output", tempfile.mkdtemp()],
    )
    assert (grown[0], sound[0], trained[0]) == (1, 0, 0), grown[1] + sound[1] + trained[1]
    error = one_error(grown[1])
    assert f"{cache}: " in error
    assert "Read-only file system" in error or "Permission denied" in error
    assert contents(Path(cache)) == before


def test_without_permission_there_is_one_error(server: FaultServer, place: Path) -> None:
    pipeline, cache = str(place / "pipeline.toml"), place / "locked"
    shutil.copytree(place / "whole", cache)
    victim = unit_file(cache, 1)
    victim.chmod(0)
    output = place / "nowhere"
    output.mkdir(mode=0o555)
    secret = place / "secret.pt"
    shutil.copy(place / "teacher.pt", secret)
    secret.chmod(0)
    new, found, trained, written, teacher = server.do(
        ["unprivileged"],
        ["extract", pipeline, "--cache", str(output / "new")],
        ["verify", str(cache)],
        ["train", pipeline, "--cache", str(cache), "--output", tempfile.mkdtemp()],
        ["train", pipeline, "--cache", str(place / "whole"), "--output", str(output / "run")],
        ["extract", pipeline, "--cache", str(place / "new"), "--teacher-weights", str(secret)],
    )
    assert [new[0], found[0], trained[0], written[0], teacher[0]] == [1, 3, 1, 1, 1]
    assert "Permission denied" in found[1]
    assert f"{output / 'new'}: " in one_error(new[1])
    assert victim.name in one_error(trained[1])
    assert str(output / "run") in one_error(written[1])
    assert str(secret) in one_error(teacher[1])


def test_a_file_system_that_lacks_links_locks_and_renaming_gives_the_same_cache(
    server: FaultServer, place: Path
) -> None:
    pipeline, cache, output = str(place / "pipeline.toml"), place / "networked", place / "networked-run"
    made, again, trained, resumed = server.do(
        ["lacking"],
        ["extract", pipeline, "--cache", str(cache), "--views", "1"],
        ["extract", pipeline, "--cache", str(cache), "--views", "2"],
        ["train", pipeline, "--cache", str(cache), "--epochs", "1", "--output", str(output)],
        ["train", pipeline, "--cache", str(cache), "--epochs", "1", "--output", str(output), "--resume", "auto"],
    )
    assert [made[0], again[0], trained[0], resumed[0]] == [0] * 4, made[1] + again[1] + trained[1] + resumed[1]
    assert contents(cache) == contents(place / "whole")
    other = ["extract", pipeline, "--cache", str(cache), "--seed", "6"]
    ((code, said),) = server.do(["lacking"], other)
    assert code == 1
    assert "seed: 5 in the cache, 6 asked for" in one_error(said)


def test_a_unit_that_shows_late_is_waited_for(small_cache: Path, tmp_path: Path) -> None:
    shutil.copytree(small_cache, tmp_path / "cache")
    cache = open_cache(str(tmp_path / "cache"))
    path = unit_file(tmp_path / "cache", 2)
    hidden = path.rename(tmp_path / "hidden")
    late = threading.Timer(0.4, lambda: hidden.rename(path))
    late.start()
    try:
        assert len(cache.read(2, 0)) == SHARD_SIZE
    finally:
        late.join()
    path.unlink()
    started = time.monotonic()
    for _ in range(20):  # it is given up, and soon at once
        with pytest.raises(CorruptCacheError, match="missing, but its record says it was published"):
            cache.read(2, 0)
    assert time.monotonic() - started < 30


def test_files_of_the_source_that_vanish(server: FaultServer, place: Path) -> None:
    """Before extraction, and between extraction and training: named, and nothing is lost."""
    data, cache = place / "moving", place / "moving-cache"
    shutil.copytree(place / "data", data)
    pipeline = place / "moving.toml"
    pipeline.write_text((place / "pipeline.toml").read_text().replace(str(place / "data"), str(data)))
    ((code, said),) = server.do(["extract", str(pipeline), "--cache", str(cache), "--views", "2"])
    assert code == 0, said
    before = contents(cache)
    run = ["train", str(pipeline), "--cache", str(cache), "--epochs", "1", "--output"]
    victim = sorted((data / "train").rglob("*.jpg"))[7]
    kept = victim.rename(place / "kept.jpg")
    grown, trained = server.do(
        ["extract", str(pipeline), "--cache", str(cache), "--views", "3"], [*run, str(place / "moving-run")]
    )
    for code, said in (grown, trained):
        assert code == 1
        assert "shard_counts" in one_error(said)
    kept.rename(victim)
    data.rename(place / "gone")
    grown, trained = server.do(
        ["extract", str(pipeline), "--cache", str(cache), "--views", "3"], [*run, str(place / "moving-run")]
    )
    for code, said in (grown, trained):
        assert code == 1
        assert str(data) in one_error(said)
    (place / "gone").rename(data)
    assert contents(cache) == before
    ((code, said),) = server.do([*run, str(place / "moving-run")])
    assert code == 0, said


def test_a_tar_that_vanishes_while_it_is_extracted_fails_its_units_only(
    digits_tars: Path, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    import extract_jobs

    folder = shutil.copytree(digits_tars, tmp_path / "tars")
    config = tiny_config(
        source={"train": str(folder / "train-{00000..00004}.tar")},
        teacher={"name": "extract_jobs:colours", "weights": ""},
        cache={"url": str(tmp_path / "cache")},
    )
    kept = tmp_path / "kept.tar"
    shutil.copy(folder / "train-00002.tar", kept)
    extract_jobs.VANISHING.append(folder / "train-00002.tar")
    try:
        summary = extract(config, JobSplit())
    finally:
        extract_jobs.VANISHING.clear()
    assert summary.exit_code == 3
    assert summary.units_published == 4
    assert "train-00002.tar" in summary.units_failed[0]
    shutil.copy(kept, folder / "train-00002.tar")
    assert extract(config, JobSplit()).units_published == 1
