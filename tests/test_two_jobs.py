"""Jobs that take the same units at the same time: one cache, no lost unit, bounded waste, and both are told."""

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extract_jobs import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from kill_campaigns import Server

from vkd_cache import console
from vkd_cache.cache.reader import open_cache
from vkd_cache.cache.units import UnitId
from vkd_cache.cache.writer import CacheWriter
from vkd_cache.config import Config
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract
from vkd_cache.stages.extract_job import MAX_UNITS_WAITING
from vkd_cache.stages.unit_order import UnitOrder

MakeConfig = Callable[..., Config]
SHARDS, VIEWS = 4, 8
GROUND = {"num_images": 12 * SHARDS, "views": VIEWS}  # of one size, so that each unit is two batches
BATCHES_OF_A_UNIT = 2
UNITS_IN_FLIGHT = MAX_UNITS_WAITING + 1  # of a job without data workers
WORST_MEETINGS = 8  # times the units in flight of one job, for each further job; see the law below


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture(scope="module")
def alone(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The cache that one job makes."""
    answer = server.ask(tmp_path_factory.mktemp("alone"), ground=GROUND, splits=[(0, 1)])
    (summary,) = answer["summaries"]
    assert (summary["units_published"], summary["units_overtaken"]) == (SHARDS * VIEWS, 0)
    assert "another job" not in answer["said"]
    return contents(Path(answer["url"]))


def check_bookkeeping(answer: dict[str, Any], splits: Sequence[tuple[int, int]]) -> int:
    """No unit is lost, every one is somebody's, and what was computed for nothing is said; the number of such units."""
    units = [[shard, view] for view in range(VIEWS) for shard in range(SHARDS)]
    wanted = sorted({tuple(unit) for index, count in splits for unit in units[index::count]})
    assert answer["codes"] == [0] * len(splits), answer["said"]
    assert answer["verified"]
    assert [tuple(unit) for unit in answer["units"]] == wanted
    for summary, (index, count) in zip(answer["summaries"], splits_of(answer, splits), strict=True):
        done = summary["units_published"] + summary["units_overtaken"] + summary["units_skipped"]
        assert done == len(units[index::count])
        assert summary["units_wasted"] <= summary["units_overtaken"]
        if summary["units_overtaken"]:
            assert f"({summary['units_wasted']} of them computed twice)" in answer["said"]
    assert sum(summary["units_published"] for summary in answer["summaries"]) == len(wanted)
    wasted = sum(summary["units_wasted"] for summary in answer["summaries"])
    batches = sum(map(len, answer["batches"]))
    assert batches == BATCHES_OF_A_UNIT * (len(wanted) + wasted)  # what they say is what their teachers saw
    assert wasted <= WORST_MEETINGS * UNITS_IN_FLIGHT * (len(splits) - 1)
    return wasted


def splits_of(answer: dict[str, Any], splits: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The shares in the order of the summaries, which is that of the names of the logs."""
    names = sorted(path.name for path in Path(answer["url"]).glob("runs/*"))
    found = [tuple(map(int, name.rpartition("-")[2].removesuffix(".json").split("of"))) for name in names]
    assert sorted(found) == sorted(splits)
    return [(index, count) for index, count in found]


@pytest.mark.parametrize("jobs", [2, 3])
def test_the_same_job_at_once(server: Server, tmp_path: Path, alone: dict[str, bytes], jobs: int) -> None:
    splits = [(0, 1)] * jobs
    answer = server.ask(tmp_path, ground=GROUND, splits=splits)
    check_bookkeeping(answer, splits)
    assert contents(Path(answer["url"])) == alone


@pytest.mark.parametrize(
    "splits", [[(0, 2), (0, 2)], [(0, 2), (0, 3)], [(0, 2), (1, 2), (0, 1)]], ids=["twice", "interleaved", "all"]
)
def test_shares_that_overlap(
    server: Server, tmp_path: Path, alone: dict[str, bytes], splits: list[tuple[int, int]]
) -> None:
    answer = server.ask(tmp_path, ground=GROUND, splits=splits)
    check_bookkeeping(answer, splits)
    assert contents(Path(answer["url"])).items() <= alone.items()


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_teachers_that_differ_in_the_last_bits(server: Server, tmp_path: Path, backend: str) -> None:
    """Two GPUs: each unit is one's or the other's, whole; a file that lost the race is never named by a record."""
    splits = [(0, 1), (0, 1)]
    ground = GROUND | {"teacher": "uneven"}
    answer = server.ask(tmp_path, ground=ground, splits=splits, backend=backend, dtype="float32")
    check_bookkeeping(answer, splits)
    assert answer["reads"] >= 1
    cache = open_cache(answer["url"])
    assert all(np.isfinite(cache.read(unit).node("pooled").numpy()).all() for unit in cache.units)


def test_a_unit_that_appears_meanwhile_is_left_alone(
    tiny_config: MakeConfig, small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a job's ten units, another has published one before its turn, and one while it was computed."""
    url = tmp_path / "cache"
    bars: list[console.Progress] = []
    advance = console.Progress.advance
    monkeypatch.setattr(console.Progress, "advance", lambda bar, n=1: (bars.append(bar), advance(bar, n)))
    publish = CacheWriter.publish
    published: list[UnitId] = []

    def others_first(writer: CacheWriter, shard: int, view: int, *rest: Any, **options: Any) -> Any:
        theirs = open_cache(str(small_cache))
        for unit in (UnitId(1, 0), UnitId(2, 1)) if (shard, view) == (1, 0) else ():
            for path in (theirs.record(*unit).files[0][0], f"records/view-{unit.view:04d}/shard-{unit.shard:06d}.json"):
                writer.cache.storage.put(path, theirs.storage.get(path))
        published.append(UnitId(shard, view))
        return publish(writer, shard, view, *rest, **options)

    monkeypatch.setattr(CacheWriter, "publish", others_first)
    summary = extract(tiny_config(cache={"url": str(url)}, views={"count": "2"}), JobSplit())
    assert (summary.units_published, summary.units_overtaken, summary.units_wasted) == (8, 2, 1)
    assert summary.exit_code == 0
    assert UnitId(2, 1) not in published
    assert contents(url) == contents(small_cache)
    assert bars[-1].done == bars[-1]._total  # what another job did is off the total


# ------------------------------------------------------------------------------------------------- the order, as a law


class Published:
    """What jobs have published, in a world of a clock and nothing else."""

    def __init__(self) -> None:
        self.by: dict[UnitId, int] = {}

    def published(self) -> dict[int, frozenset[int]]:
        views = {unit.view for unit in self.by}
        return {view: frozenset(unit.shard for unit in self.by if unit.view == view) for view in views}

    def is_published(self, unit: UnitId) -> bool:
        return unit in self.by


def simulated(shares: list[list[UnitId]], speeds: list[float], starts: list[float], in_flight: int, seed: int) -> int:
    """Let jobs of these speeds work through their shares, `in_flight` units at a time; how many were made in vain."""
    world, wasted = Published(), 0
    orders: list[UnitOrder | None] = [None for _ in shares]
    coming: list[Iterator[UnitId]] = [iter(()) for _ in shares]
    flight: list[deque[UnitId]] = [deque() for _ in shares]
    rng = np.random.default_rng(seed)
    events = [(start, job) for job, start in enumerate(starts)]
    heapq.heapify(events)
    while events:
        now, job = heapq.heappop(events)
        order = orders[job]
        if order is None:
            missing = [unit for unit in shares[job] if unit not in world.by]
            order = UnitOrder(missing, world, np.random.default_rng([seed, job]), lambda unit: None)
            orders[job], coming[job] = order, iter(order)
        else:
            unit = flight[job].popleft()
            if world.by.setdefault(unit, job) != job:
                wasted += 1
                order.lost(unit)
        while len(flight[job]) < in_flight and (unit := next(coming[job], None)) is not None:
            flight[job].append(unit)
        if flight[job]:
            heapq.heappush(events, (now + speeds[job] * (1 + 0.2 * rng.random()), job))
    assert world.by.keys() == {unit for share in shares for unit in share}
    return wasted


SPLITS = [[(0, 1)] * 2, [(0, 1)] * 3, [(0, 1)] * 5, [(1, 2)] * 2, [(0, 2), (0, 3)], [(0, 1), (0, 3), (1, 3), (2, 3)]]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_waste_does_not_grow_with_the_work(data: st.DataObject) -> None:
    """All is made, whoever meets whom and when; a few units for each further job are made in vain, of few or many."""
    splits = data.draw(st.sampled_from(SPLITS))
    num_units = data.draw(st.sampled_from([10, 100, 500]))
    in_flight = data.draw(st.integers(1, 8))
    speeds = data.draw(st.lists(st.sampled_from([1.0, 1.01, 1.5, 7.0]), min_size=len(splits), max_size=len(splits)))
    starts = data.draw(st.lists(st.sampled_from([0.0, 0.5, 20.0]), min_size=len(splits), max_size=len(splits)))
    units = [UnitId(number % 10, number // 10) for number in range(num_units)]
    shares = [units[index::count] for index, count in splits]
    wasted = simulated(shares, speeds, starts, in_flight, data.draw(st.integers(0, 1000)))
    assert wasted <= WORST_MEETINGS * in_flight * (len(splits) - 1)


def test_a_job_alone_keeps_the_order() -> None:
    units = [UnitId(shard, view) for view in range(3) for shard in range(5)]
    order = UnitOrder(units, Published(), np.random.default_rng(0), lambda unit: None)
    assert list(order) == units
