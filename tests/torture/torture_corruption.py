"""Caches that are damaged at random and repaired, for as long as you like.

    python tests/torture/torture_corruption.py --minutes 10

A round takes a cache of either backend and does damage of eight kinds to up to twenty of its files: bits and bytes
flipped, pages zeroed, ends cut off or appended, files deleted, replaced by another, or left by a dead writer. Whatever
can still be read then is what it was; after `verify --repair` nothing is wrong but that a head may be missing; and the
same extraction makes the cache what it was, to the byte. Every third round two processes extract it first, and damage
and repairs go on while they publish.
"""

import contextlib
import itertools
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import for_minutes
from extract_jobs import contents, extract_alone
from repair_jobs import repair

from vkd_cache.cache.reader import Cache, open_cache
from vkd_cache.config import Config
from vkd_cache.errors import CacheError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract

MakeConfig = Callable[..., Config]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["vkd_cache.stages.extract"])
PAGE = 4096


def test_corruption_for_minutes(tiny_config: MakeConfig, tmp_path: Path, until: float) -> None:
    """Rounds until the time is up."""
    wholes = []
    for backend in ("zarr", "webdataset"):
        wholes.append(tmp_path / backend)
        extract(config_of(tiny_config, wholes[-1], backend), JobSplit())
    damages = dropped = 0
    for number in itertools.count():
        if time.monotonic() > until:
            print(f"{number} rounds, {damages} damages, {dropped} units and heads dropped, nothing else lost")
            return
        rng, whole, url = np.random.default_rng(number), wholes[number % 2], tmp_path / "cache"
        shutil.copytree(whole, url)
        config = config_of(tiny_config, url, whole.name)
        if number % 3 == 2:
            dropped += repaired_meanwhile(config, url, rng)
        damages += sum(damage(url, rng) for _ in range(int(rng.integers(1, 20))))
        assert_nothing_wrong_is_read(open_cache(str(url)), open_cache(str(whole)))
        dropped += len(repair(url).repaired)
        errors = [finding for finding in repair(url).levels[0].findings if finding.is_error]
        assert all("head is missing" in finding.message for finding in errors)
        assert extract(config, JobSplit()).exit_code == 0
        assert repair(url).exit_code == 0
        assert contents(url) == contents(whole)
        shutil.rmtree(url)


def config_of(build: MakeConfig, url: Path, backend: str) -> Config:
    return build(cache={"url": str(url), "backend": backend, "block_samples": 20}, views={"count": "2"})


def damage(url: Path, rng: np.random.Generator) -> bool:
    """One random damage to one random file, the manifest excepted; whether there was a file."""
    files = sorted(path for path in url.rglob("*") if path.is_file() and path.name != "manifest.json")
    files = [path for path in files if not {"runs", ".incomplete"} & set(path.parts)]
    if not files:  # everything has been dropped
        return False
    path, other = (files[int(rng.integers(len(files)))] for _ in range(2))
    kind = int(rng.integers(8))
    with contextlib.suppress(FileNotFoundError):  # a repair may be faster
        data = bytearray(path.read_bytes())
        if kind == 7:
            (url / ".incomplete").mkdir(exist_ok=True)
            (url / ".incomplete" / f"{rng.integers(2**32)}.tmp").write_bytes(data)
        elif kind == 0:
            path.unlink()
        elif kind == 1:
            path.write_bytes(other.read_bytes())
        else:
            spoil(data, kind, rng)
            path.write_bytes(data)
        return True
    return False


def spoil(data: bytearray, kind: int, rng: np.random.Generator) -> None:
    """Damage of five kinds to the content of a file."""
    place = int(rng.integers(len(data))) if data else 0
    if kind == 2:
        del data[place:]
    elif kind == 3:
        data += rng.bytes(int(rng.integers(1, 100)))
    elif kind == 4:
        for at in rng.integers(0, max(1, len(data)), int(rng.integers(1, 50))).tolist():
            data[at : at + 1] = rng.bytes(1)
    elif kind == 5:
        start = place - place % PAGE
        data[start : start + PAGE] = bytes(len(data[start : start + PAGE]))
    elif data:
        data[place] ^= 1 << int(rng.integers(8))


def assert_nothing_wrong_is_read(damaged: Cache, whole: Cache) -> None:
    """Every number that comes out is the right one."""
    for unit in whole.units:
        with contextlib.suppress(CacheError):
            found, wanted = damaged.read(unit), whole.read(unit)
            assert found.keys == wanted.keys
            assert torch.equal(found.node("pooled"), wanted.node("pooled"))
            assert all(np.array_equal(found.columns[name], column) for name, column in wanted.columns.items())
    with contextlib.suppress(CacheError):
        assert all(map(torch.equal, damaged.head() or (), whole.head() or ()))


def repaired_meanwhile(config: Config, url: Path, rng: np.random.Generator) -> int:
    """Two workers extract what was dropped, while damage and repairs go on beside them."""
    for record in sorted((url / "records").rglob("*.json"))[:: int(rng.integers(1, 4))]:
        record.unlink()
    workers = [
        CONTEXT.Process(target=extract_alone, args=(config, JobSplit(index=index, count=2), url.parent / "said"))
        for index in range(2)
    ]
    for worker in workers:
        worker.start()
    dropped = 0
    while any(worker.is_alive() for worker in workers):
        damage(url, rng)
        dropped += len(repair(url).repaired)
        time.sleep(float(rng.uniform(0, 0.05)))
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0, (url.parent / "said").read_text(encoding="utf-8")
    return dropped


if __name__ == "__main__":
    for_minutes.main(__file__, __doc__)
