"""Extraction killed at any moment: the cache is the one of an undisturbed run, and nothing published is made again.

Campaigns run in a process that may fork, see kill_campaigns.py. What they look for is in `Campaign._examine`: whatever
was published before a job keeps its inode, time and size; no batch of a published unit reaches the teacher; temporary
files of the dead are removed and counted. A reader polls each cache meanwhile. Long ones: torture/torture_kill.py.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kill_campaigns import Server

from vkd_cache.cache.local_storage import LocalStorage
from vkd_cache.cache.storage import TEMPORARY
from vkd_cache.config import Config
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def check(report: dict[str, Any], *, kills: int) -> None:
    assert report["faults"] == []
    assert report["kills"] >= kills
    assert report["caches"] >= 1
    assert report["reads"] >= 1


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
@pytest.mark.parametrize("jobs", [1, 3])
def test_killed_at_random_moments(server: Server, tmp_path: Path, backend: str, jobs: int) -> None:
    kills = 15 + jobs
    report = server.ask(tmp_path, backend=backend, jobs=jobs, kills=kills, seed=jobs)
    check(report, kills=kills)
    assert report["leftovers"] >= 1  # or the kills were not where it hurts
    assert len(report["moments"]) >= 2


@pytest.mark.parametrize(("backend", "first"), [("zarr", 2), ("webdataset", 5)])
def test_killed_before_a_step_on_a_file(server: Server, tmp_path: Path, backend: str, first: int) -> None:
    """Every sixth; the torture run takes them all."""
    ground = {"num_images": 10, "views": 1}
    report = server.ask(tmp_path, backend=backend, ground=ground, every_file_step={"stride": 6, "first": first})
    check(report, kills=5)


def test_killed_with_data_workers_at_work(server: Server, tmp_path: Path) -> None:
    """The job alone is killed; its data workers and their server end by themselves."""
    check(server.ask(tmp_path, backend="zarr", workers=1, kills=1), kills=1)


def test_leftovers_are_removed_counted_and_said(
    tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = tmp_path / "cache"
    config = tiny_config(cache={"url": str(url)}, views={"count": "1"})
    assert extract(config, JobSplit()).leftovers == 0
    assert "extract: removed" not in capsys.readouterr().err
    for name in ("one.tmp", "two.tmp"):
        (url / TEMPORARY / name).write_bytes(b"half a unit")
    handle, living = LocalStorage(url)._open_temporary()  # as another job holds it while it writes
    summary = extract(config, JobSplit())
    os.close(handle)
    assert list((url / TEMPORARY).iterdir()) == [living]
    assert (summary.leftovers, summary.units_published) == (2, 0)
    assert "extract: removed 2 leftovers of killed writers\n" in capsys.readouterr().err
    *_, log = sorted((url / "runs").iterdir())
    document = json.loads(log.read_text())
    assert document["removed"] == [f"{TEMPORARY}/one.tmp", f"{TEMPORARY}/two.tmp"]
    assert document["summary"]["leftovers"] == 2
