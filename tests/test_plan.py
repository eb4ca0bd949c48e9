"""`vkd-cache plan`: the arithmetic, what is planned from what, and that nothing is left behind.

Nothing here looks at how fast anything was; `benchmarks/planning.py` compares plans with what then happens.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PRELOAD
from detection_jobs import write_detector
from detection_runs import config_builder
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_jobs import answers, dies, fails, leaves
from train_runs import pipeline, run_cli

from vkd_cache.cache.reader import open_cache
from vkd_cache.cache.units import UnitId, unpack_unit
from vkd_cache.config import Config
from vkd_cache.errors import (
    CacheError,
    CacheMismatchError,
    ConfigError,
    TeacherError,
    TeacherMemoryError,
    VkdCacheError,
)
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import is_detection, open_source
from vkd_cache.stages import planning_process
from vkd_cache.stages.extract import extract
from vkd_cache.stages.planning import plan
from vkd_cache.stages.planning_break_even import Costs, break_even_epochs, break_even_students
from vkd_cache.stages.planning_extract import ExtractFound, ExtractRequest, _rate, measure_extraction
from vkd_cache.stages.planning_process import ended_as_by_ctrl_c, in_own_process
from vkd_cache.stages.planning_report import CACHED, EXTRACT, LIVE, PLAIN, PlanReport, StagePlan, break_even
from vkd_cache.stages.planning_sample import first_places, part_of, sampled_places
from vkd_cache.stages.planning_sizes import cache_size, line_through, size_model
from vkd_cache.views.recipe import make_recipe

Build = Callable[..., Config]
SECONDS = 0.2


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements in forks of the tests' server, which has the libraries: a start is not what is tested here."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()  # before `temporary`, whose path is too long for the server's socket
    monkeypatch.setattr(planning_process, "START_METHOD", "forkserver")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, in which nothing of a plan may be left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.glob("vkd-cache-plan-*"))


# --- break-even -----------------------------------------------------------------------------------------------------

seconds = st.integers(0, 60).map(float)


def costs_of(extract: float, starts: tuple[float, float], epochs: tuple[float, float]) -> Costs:
    return Costs(
        extract_s=extract,
        cached_start_s=starts[0],
        live_start_s=starts[1],
        cached_epoch_s=epochs[0],
        live_epoch_s=epochs[1],
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 400).map(float), st.tuples(seconds, seconds), st.tuples(seconds, seconds))
def test_break_even_epochs_are_those_of_a_simulation(
    extract_s: float, starts: tuple[float, float], epochs: tuple[float, float]
) -> None:
    costs = costs_of(extract_s, starts, epochs)
    horizon = 600  # beyond every crossing of such numbers
    cached, live = extract_s + starts[0], starts[1]
    pays = []
    for _ in range(horizon):
        cached, live = cached + epochs[0], live + epochs[1]
        pays.append(cached <= live)
    expected = None
    if pays[-1] and epochs[1] >= epochs[0]:  # and so for ever
        expected = max((count for count, good in enumerate(pays, start=1) if not good), default=0) + 1
    assert break_even_epochs(costs) == expected


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 400).map(float), st.tuples(seconds, seconds), st.tuples(seconds, seconds), st.integers(1, 20)
)
def test_break_even_students_are_those_of_a_simulation(
    extract_s: float, starts: tuple[float, float], epochs: tuple[float, float], count: int
) -> None:
    costs = costs_of(extract_s, starts, epochs)
    cached = live = 0.0
    pays = []
    for _ in range(500):
        cached, live = cached + starts[0] + count * epochs[0], live + starts[1] + count * epochs[1]
        pays.append(extract_s + cached <= live)
    expected = pays.index(True) + 1 if pays[-1] else None
    assert break_even_students(costs, count) == expected


@settings(deadline=None)
@given(*[st.floats(1e-9, 1e9)] * 5)
def test_break_even_is_where_it_pays_and_not_before(
    extract_s: float, cached: float, live: float, cached_epoch: float, live_epoch: float
) -> None:
    costs = costs_of(extract_s, (cached, live), (cached_epoch, live_epoch))
    epochs = break_even_epochs(costs)
    if epochs is not None and epochs < 2**50:  # beyond, sums of floats do not notice another epoch
        assert costs.cached_s(epochs) <= costs.live_s(epochs)
        assert epochs == 1 or costs.cached_s(epochs - 1) > costs.live_s(epochs - 1)


@pytest.mark.parametrize(
    ("extract_s", "epochs", "said"),
    [
        (100.0, (10.0, 10.0), "never pays"),
        (100.0, (10.0, 5.0), "never pays"),
        (100.0, (10.0, 30.0), "from 2 students on"),
        (100.0, (10.0, 60.0), "from the first student on"),
        (0.0, (10.0, 30.0), "from the first student on"),
    ],
)
def test_the_verdict_says_it_plainly(extract_s: float, epochs: tuple[float, float], said: str) -> None:
    assert said in break_even(costs_of(extract_s, (1.0, 1.0), epochs), 4).verdict()


# --- rates and sizes ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(2, 40), st.integers(0, 10), st.floats(0.01, 10.0), st.integers(1, 64), st.floats(0.0, 100.0)
)
def test_the_rate_of_an_even_job_is_its_rate(units: int, tail: int, unit_s: float, views: int, start_s: float) -> None:
    """However long the start, and however much is left out at the end."""
    clock = [(0.0, 0)] + [(start_s + unit_s * number, views) for number in range(1, units + 1)]
    view_s, spread, count = _rate(clock, tail)
    assert view_s == pytest.approx(unit_s / views, rel=1e-6)
    assert 0 < count < units * views
    assert math.isnan(spread) or spread < 1e-3


@settings(deadline=None)
@given(st.integers(0, 10**5), st.integers(0, 10**4), st.lists(st.integers(1, 2000), min_size=2, max_size=6))
def test_a_line_is_found_again(constant: int, slope: int, places: list[int]) -> None:
    line = line_through([(x, constant + slope * x) for x in places])
    for x in places:
        assert line.at(x) == pytest.approx(constant + slope * x, rel=1e-6, abs=1e-6)
    if len(set(places)) > 1:
        assert line.at(5000) == pytest.approx(constant + slope * 5000, rel=1e-6, abs=1e-6)


def measured(config: Config, folder: Path) -> ExtractFound:
    """Extraction's measurement, in this process."""
    source = open_source(config.source.train, shard_size=config.source.shard_size)
    request = ExtractRequest(config=config, source=source, known=True, folder=str(folder), seconds=SECONDS)
    return measure_extraction(request, 0.0)


@pytest.mark.parametrize(
    ("backend", "dtype", "nodes"),
    [("zarr", "float16", ("pooled",)), ("zarr", "uint8", ("pooled", "logits")), ("webdataset", "float32", ("pooled",))],
)
def test_bytes_are_those_that_an_extraction_writes(
    tiny_config: Build, tmp_path: Path, backend: str, dtype: str, nodes: tuple[str, ...]
) -> None:
    config = tiny_config(
        cache={"url": str(tmp_path / "cache"), "backend": backend, "dtype": dtype, "nodes": nodes},
        views={"count": "2"},
    )
    found = measured(config, tmp_path / "sample")
    source = open_source(config.source.train, shard_size=config.source.shard_size)
    units = [UnitId(shard, view) for view in range(2) for shard in range(len(source.shards))]
    size = cache_size(size_model(found.units, found.tokens_per_view), source, units)
    extract(config, JobSplit())
    cache = open_cache(config.cache.url)
    plain = [
        sum(array.nbytes for array in unpack_unit(cache.storage.get(path), cache.manifest).values())
        for unit in units
        for path, _, _ in cache.record(*unit).files
    ]
    assert size.plain_bytes == sum(plain)
    stored = [path.stat().st_size for part in ("units", "records") for path in (tmp_path / "cache" / part).rglob("*.*")]
    assert size.stored_bytes == pytest.approx(sum(stored), rel=0.04)


def test_a_part_of_a_source_is_a_source(tiny_config: Build, coco_tree: Path) -> None:
    """Its samples are the whole's, whatever the source; so are a detector's boxes."""
    config = tiny_config()
    for whole, recipe in (
        (open_source(config.source.train, shard_size=48), make_recipe(config.views)),
        (open_source(str(coco_tree), shard_size=8), make_recipe(dataclasses.replace(config.views, recipe="vidt"))),
    ):
        places = sampled_places(whole, recipe, 5, batch_size=4, batches=2, shards=4)
        part = part_of(whole, places)
        assert len(part.shards) == len(places) == 5 and is_detection(part) == is_detection(whole)
        for number, place in enumerate(places):
            there = whole.shards[place.shard]
            assert part.shards[number].keys == tuple(there.keys[row] for row in place.rows)
            for row, at in enumerate(place.rows.tolist()):
                assert part.shards[number].labels[row] == there.labels[at]
                assert part.read(number, row) == whole.read(place.shard, at)
                if is_detection(part) and is_detection(whole):
                    assert part.image_size(number, row) == whole.image_size(place.shard, at)
                    found, expected = part.boxes(number, row), whole.boxes(place.shard, at)
                    assert np.array_equal(found.boxes, expected.boxes) and found.image_id == expected.image_id
        seen = [(place.shard, row) for place in places[:-1] for row in place.rows.tolist()]
        assert len(set(seen)) == len(seen)
        assert sum(len(place.rows) for place in first_places(whole, 9)) == 9


# --- whole plans ----------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def check_report(report: PlanReport) -> None:
    """What holds of every plan with a student."""
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert list(document) == [
        "source", "teacher", "student", "epochs", "steps_per_epoch", "evaluations", "cache", "stages",
        "extraction_waits_for", "break_even", "assumptions", "measured_s",
    ]  # fmt: skip
    assert [stage["stage"] for stage in document["stages"]] == [EXTRACT, CACHED, PLAIN, LIVE]
    for stage in document["stages"]:
        assert list(stage) == [*(field.name for field in dataclasses.fields(StagePlan)), "hours"]
        assert stage["images_per_s"] > 0 and stage["start_s"] > 0 and stage["device"] == "cpu"
        assert stage["host_bytes"] > 2**20 and stage["gpu_bytes"] is None and not stage["problem"]
    assert list(document["break_even"]) == ["least_epochs", "least_students", "verdict", "costs"]
    cached, live = report.stage(CACHED), report.stage(LIVE)
    assert report.break_even is not None and cached is not None and live is not None
    costs, extraction = report.break_even.costs, report.stage(EXTRACT)
    assert extraction is not None
    assert costs.cached_s(report.epochs) == pytest.approx(extraction.seconds + cached.seconds)
    assert costs.live_s(report.epochs) == pytest.approx(live.seconds)


def test_a_plan_beside_a_cache_that_is_partly_there(
    tiny_config: Build, tmp_path: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is missing is planned, in the stored types of what is there, and nothing is touched."""
    config = tiny_config(
        cache={"url": str(tmp_path / "cache"), "dtype": "auto"}, extract={"workers": 1}, train={"workers": 1}
    )
    extract(config, JobSplit())
    before = files_of(tmp_path / "cache")
    capsys.readouterr()
    config = dataclasses.replace(config, views=dataclasses.replace(config.views, count="3"))
    report = plan(config, seconds=SECONDS)
    assert files_of(tmp_path / "cache") == before
    check_report(report)
    assert (report.cache.units, report.cache.units_there, report.cache.views_to_make) == (15, 5, 2 * 203)
    assert report.cache.bytes_to_write == pytest.approx(report.cache.bytes * 2 / 3, rel=0.01)
    assert report.cache.nodes == {node.name: node.codec for node in open_cache(config.cache.url).manifest.nodes}
    # 24 pairs and the odd one of each shard, eight a step; evaluated after each epoch
    assert report.steps_per_epoch == (4 * 24 + 6) // 8 and report.evaluations == 2
    extraction = report.stage(EXTRACT)
    assert extraction is not None
    to_make = report.cache.views_to_make / extraction.images_per_s
    assert extraction.seconds == pytest.approx(extraction.start_s + to_make)
    report.show()
    shown = capsys.readouterr().out
    for text in ("bytes of the cache", "from the cache", "live teacher", "The cache pays", "rest on"):
        assert text in shown
    mismatched = dataclasses.replace(config, views=dataclasses.replace(config.views, seed=9), student=NO_STUDENT)
    with pytest.raises(CacheMismatchError, match="seed"):
        plan(mismatched, seconds=SECONDS)
    elsewhere = dataclasses.replace(config.teacher, weights=str(tmp_path / "elsewhere.safetensors"))
    with pytest.raises(CacheMismatchError, match="seed"):
        plan(dataclasses.replace(mismatched, teacher=elsewhere), seconds=SECONDS)
    unknown = plan(dataclasses.replace(config, teacher=elsewhere, student=NO_STUDENT), seconds=SECONDS)
    assert unknown.cache.views_to_make == report.cache.views_to_make


NO_STUDENT = dataclasses.replace(Config().student, name="")


def test_a_plan_of_a_detector(coco_tree: Path, tmp_path: Path, temporary: Path) -> None:
    """Of sampled tokens; the real extraction then writes as many bytes."""
    build = config_builder(coco_tree, write_detector(tmp_path / "teacher.pth", "test_vidt2"))
    config = build(cache={"url": str(tmp_path / "cache"), "dtype": "float16", "tokens": 0.5})
    report = plan(config, seconds=SECONDS)
    assert not (tmp_path / "cache").exists()
    check_report(report)
    assert set(report.cache.nodes.values()) == {"float16"} and len(report.cache.nodes) == 6
    extract(config, JobSplit())
    stored = [path.stat().st_size for part in ("units", "records") for path in (tmp_path / "cache" / part).rglob("*.*")]
    assert report.cache.bytes_to_write == pytest.approx(sum(stored), rel=0.05)


@pytest.mark.parametrize("detection", [False, True])
def test_without_weights_random_ones_are_as_fast(
    tiny_config: Build, coco_tree: Path, tmp_path: Path, temporary: Path, detection: bool
) -> None:
    """And without a student, stage one is all that there is to plan. No cache has to be named."""
    build = config_builder(coco_tree, tmp_path / "gone.pth") if detection else tiny_config
    config = build(teacher={"weights": str(tmp_path / "gone.pth")}, cache={"dtype": "auto"}, student={"name": ""})
    report = plan(config, seconds=SECONDS)
    assert [stage.stage for stage in report.stages] == [EXTRACT]
    assert report.break_even is None and report.student == "" and report.steps_per_epoch == 0
    assert any("random" in text and "gone.pth" in text for text in report.assumptions)
    assert any("may differ" in text for text in report.assumptions)
    assert report.cache.bytes > 0 and report.cache.units_there == 0


def test_the_program_plans(digits_tree: Path, tmp_path: Path) -> None:
    """`vkd-cache plan --json`, as a user runs it; no weights are at hand, and no cache is named."""
    file = pipeline(
        tmp_path,
        source={"train": str(digits_tree), "shard_size": 48},
        views={"size_px": 32},
        extract={"batch_size": 16, "workers": 0, "device": "cpu"},
    )
    done = run_cli(
        ["plan", file, "--teacher", "test_resnet", "--views", "2", "--dtype", "float16", "--seconds", "0.2", "--json"]
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["cache"]["views"] == 2 and document["cache"]["views_to_make"] == 2 * 203
    assert document["stages"][0]["hours"] > 0


def test_what_cannot_be_planned(tiny_config: Build, tmp_path: Path, temporary: Path) -> None:
    with pytest.raises(TeacherError, match="test_resnot"):
        plan(tiny_config(teacher={"name": "test_resnot", "weights": ""}), seconds=SECONDS)
    with pytest.raises(ConfigError, match=r"\[extract\] batch_size: found 3(.|\n)*\[train\] batch_size: found 5"):
        plan(tiny_config(extract={"batch_size": 3}, train={"batch_size": 5}), seconds=SECONDS)
    with pytest.raises(ConfigError, match="--seconds: found nan"):
        plan(tiny_config(), seconds=math.nan)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "photo.jpg").write_bytes(b"")
    with pytest.raises(CacheError, match="holds other things"):
        plan(tiny_config(cache={"url": str(tmp_path / "strange")}), seconds=SECONDS)
    with pytest.raises(TeacherError, match="Is a directory"):
        plan(tiny_config(teacher={"weights": str(tmp_path)}, cache={"url": ""}), seconds=SECONDS)
    with pytest.raises(ConfigError, match="all three weights are 0"):
        none = {"task_weight": 0.0, "feature_weight": 0.0, "logit_weight": 0.0}
        plan(tiny_config(loss=none), seconds=SECONDS)
    with pytest.raises(ConfigError, match="one step takes 512 samples"):
        plan(tiny_config(train={"batch_size": 512}), seconds=SECONDS)
    with pytest.raises(ConfigError, match="view recipe"):
        plan(tiny_config(views={"recipe": "vidt"}), seconds=SECONDS)


# --- processes ------------------------------------------------------------------------------------------------------


def test_work_in_its_own_process() -> None:
    said, process = in_own_process(answers, "here", "work")
    assert said == "here" and process != os.getpid()
    with pytest.raises(ConfigError, match="as it was"):
        in_own_process(fails, ConfigError("as it was"), "work")
    with pytest.raises(TeacherMemoryError):
        in_own_process(fails, TeacherMemoryError("too little"), "work")
    with pytest.raises(MemoryError, match="work: DefaultCPUAllocator"):
        in_own_process(fails, RuntimeError("DefaultCPUAllocator: can't allocate memory"), "work")
    with pytest.raises(MemoryError, match="killed"):
        in_own_process(dies, int(signal.SIGKILL), "work")
    with pytest.raises(VkdCacheError, match="exit code 3"):
        in_own_process(leaves, 3, "work")


@pytest.fixture
def hangup() -> Iterator[Callable[[Any], Any]]:
    """Sets what SIGHUP does, which whoever runs the tests may have set to be ignored."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_folder_behind(
    temporary: Path, hangup: Callable[[Any], Any], number: signal.Signals
) -> None:
    hangup(signal.SIG_DFL)
    before = signal.getsignal(number)
    with (
        pytest.raises(KeyboardInterrupt),
        ended_as_by_ctrl_c(),
        tempfile.TemporaryDirectory(prefix="vkd-cache-plan-"),
    ):
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_what_ignores_that_its_terminal_is_closed_goes_on_ignoring_it(hangup: Callable[[Any], Any]) -> None:
    hangup(signal.SIG_IGN)
    with ended_as_by_ctrl_c():
        signal.raise_signal(signal.SIGHUP)


def test_a_plan_that_is_ended_leaves_nothing(tiny_config: Build, digits_tree: Path, tmp_path: Path) -> None:
    """Neither folders nor processes, while data workers are at work in a process of a process."""
    config = tiny_config()
    teacher = {"name": config.teacher.name, "weights": config.teacher.weights}
    file = pipeline(
        tmp_path,
        source={"train": str(digits_tree / "train")},
        views={"size_px": 32},
        teacher=teacher,
        extract={"workers": 1, "batch_size": 8},
    )
    command = [sys.executable, "-m", "vkd_cache", "plan", file, "--seconds", "600"]
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # tmp_path is too long for sockets between processes
        folder, environment = Path(name), os.environ | {"TMPDIR": name}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            while not any(folder.glob("vkd-cache-plan-*/cache/units")):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            process.terminate()
            assert process.stderr.read().strip().endswith("Error: interrupted.")
        assert process.returncode == 130
        left = [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")]
    assert left == []
