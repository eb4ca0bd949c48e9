"""Conversion as processes that are killed, or that meet: what is published stays, and the cache is the same one."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from convert_kills import NUM_UNITS, Ground


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    yield Ground(tmp_path_factory.mktemp("ground"), request.param)


def test_killed_before_any_step_on_a_file_it_is_the_same_cache(ground: Ground, tmp_path: Path) -> None:
    """Every fourth of them; tests/torture has them all."""
    reached = []
    for step in range(1, ground.steps + 1, 4):
        reached.append(ground.kill_once(tmp_path / "target", step) // 2)
        shutil.rmtree(tmp_path / "target", ignore_errors=True)
    assert ground.kills == len(reached) > 3 * NUM_UNITS and ground.leftovers >= 1
    assert set(reached) == set(range(NUM_UNITS + 1)) and reached == sorted(reached)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_killed_at_any_moment_it_is_the_same_cache(ground: Ground, tmp_path: Path, num_workers: int) -> None:
    rng = np.random.default_rng(num_workers)
    before = ground.kills
    for number in range(20):
        ground.random_round(tmp_path / f"target{number}", rng, num_workers)
        if ground.kills >= before + 8:
            return
    pytest.fail("too few conversions were still under way when they were to be killed")


def test_jobs_that_meet_make_one_cache(ground: Ground, tmp_path: Path) -> None:
    """Two that do all of it, three that share it; each unit counts once, and nobody fails."""
    ground.finish(tmp_path / "target", [(0, 1), (0, 1), (0, 3), (1, 3), (2, 3)])
    ground.check_finished(tmp_path / "target", {})
