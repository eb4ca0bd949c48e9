"""Several real processes on one cache: one manifest, the same bytes, and nothing lost to a kill."""

import hashlib
import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cache_samples import make_columns, make_manifest, make_values
from conftest import PRELOAD

from vkd_cache.cache.check import check_structure
from vkd_cache.cache.reader import open_cache
from vkd_cache.cache.storage import TEMPORARY
from vkd_cache.cache.writer import create_cache
from vkd_cache.errors import CacheError, CacheMismatchError

BACKENDS = ("zarr", "webdataset")
TESTS = Path(__file__).parent


def publish_units(root: Path, backend: str, units: list[tuple[int, int]]) -> None:
    writer = create_cache(str(root), make_manifest(backend=backend))
    for shard, view in units:
        seed = 10 * view + shard
        writer.publish(shard, view, make_columns(7, seed=seed), {"pooled": make_values(7, seed=seed)})


def tree(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


ALL_UNITS = [(shard, view) for view in range(4) for shard in range(3)]


def child(program: str, *arguments: str) -> subprocess.Popen[str]:
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); from test_cache_processes import *; {program}"
    return subprocess.Popen([sys.executable, "-W", "error", "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_process_writes_the_same_bytes(tmp_path: Path, backend: str) -> None:
    publish_units(tmp_path / "here", backend, ALL_UNITS)
    program = "publish_units(Path(sys.argv[1]), sys.argv[2], ALL_UNITS[::-1])"
    with child(program, str(tmp_path / "there"), backend) as process:
        assert process.wait() == 0
    assert tree(tmp_path / "here") == tree(tmp_path / "there")


def publish_for_ever(root: Path) -> None:
    """Publish all units again and again, saying so after each."""
    while True:
        for unit in ALL_UNITS:
            publish_units(root, "zarr", [unit])
            print("published", flush=True)


def test_kill_at_any_moment_then_resume_gives_the_same_cache(tmp_path: Path) -> None:
    publish_units(tmp_path / "whole", "zarr", ALL_UNITS)
    for after in (1, 4, 6):
        with child("publish_for_ever(Path(sys.argv[1]))", str(tmp_path / "killed")) as process:
            assert process.stdout is not None
            for _ in range(after):
                assert process.stdout.readline() == "published\n"
            process.send_signal(signal.SIGKILL)
        cache = open_cache(str(tmp_path / "killed"))
        assert not [finding for finding in check_structure(cache) if finding.is_error]
        assert len(cache.units) >= after
    missing = [unit for unit in ALL_UNITS if unit not in cache.units]
    publish_units(tmp_path / "killed", "zarr", missing)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_a_crash_between_unit_and_record_publishes_nothing(tmp_path: Path) -> None:
    publish_units(tmp_path / "whole", "zarr", [(0, 0)])
    root = tmp_path / "crashed"
    create_cache(str(root), make_manifest())
    (root / "records").write_bytes(b"")  # no folder can be made there: the record cannot be written
    with pytest.raises(CacheError, match=r"shard 0 of view 0 cannot be written \(Not a directory: .*records"):
        publish_units(root, "zarr", [(0, 0)])
    (root / "records").unlink()
    (left,) = root.glob("units/view-0000/shard-000000-*.zip")
    assert open_cache(str(root)).published() == {}
    assert list((root / TEMPORARY).iterdir()) == []
    left.write_bytes(b"the first half of a un")
    publish_units(root, "zarr", [(0, 0)])
    assert tree(root) == tree(tmp_path / "whole")


def join(root: str, seed: int, start: "multiprocessing.synchronize.Barrier", results: "multiprocessing.Queue") -> None:
    start.wait()
    try:
        writer = create_cache(root, make_manifest(seed=seed))
        writer.publish(seed, 0, make_columns(7), {"pooled": make_values(7)})
        results.put((seed, writer.cache.fingerprint))
    except CacheMismatchError as error:
        results.put((seed, str(error)))


@pytest.mark.parametrize("seeds", [(1,) * 6, (1, 2) * 3], ids=["same", "different"])
def test_processes_that_start_together_agree_on_one_manifest(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    start, results = context.Barrier(len(seeds)), context.Queue()
    processes = [context.Process(target=join, args=(str(tmp_path), seed, start, results)) for seed in seeds]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in seeds]
    for process in processes:
        process.join()
    results.close()
    cache = open_cache(str(tmp_path))
    winner = cache.manifest.seed
    assert winner in seeds
    for seed, outcome in found:
        if seed == winner:
            assert outcome == cache.fingerprint
        else:
            assert f"seed: {winner} in the cache, {seed} asked for" in outcome
    assert cache.published() == {0: frozenset({winner})}
    assert not [finding for finding in check_structure(cache) if finding.is_error]
