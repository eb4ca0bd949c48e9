"""The detection demo from the command line, once, in its short form; and its data."""

import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_runs import Finished, Page, own_process, refuses, run_short_demo
from PIL import Image

from vkd_cache.cache.reader import open_cache
from vkd_cache.config import Config, load_config
from vkd_cache.errors import ConfigError
from vkd_cache.sources import CocoSource, open_source
from vkd_cache.stages import demo_scenes
from vkd_cache.stages.demo_detection_report import STORES, DetectionReport
from vkd_cache.stages.demo_jobs import ExtractResult, Processes, TrainResult
from vkd_cache.stages.demo_scenes import first_scenes, write_scenes
from vkd_cache.stages.journal import read_log

PIPELINES = ("demo_detection", "demo_detection_teacher")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run_short_demo(tmp_path_factory.mktemp("demo") / "out", "--task", "detection")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", num_train=40, num_val=20)


# --- one short run -------------------------------------------------------------------------------------------------


def test_every_stage_ran_and_all_caches_are_sound(finished: Finished) -> None:
    output, document, _ = finished
    assert set(document["checks"]) == set(document["extractions"]) == set(STORES)
    for name, report in document["checks"].items():
        assert report["verdict"] == "sound"
        assert set(report["levels"]) == {"files", "pixels", "teacher"}
        assert all(level["checked"] > 0 and level["errors"] == 0 for level in report["levels"].values())
        cache, made = open_cache(str(output / "cache" / name)), document["extractions"][name]
        assert cache.fingerprint == made["fingerprint"]
        assert made["views"] == document["num_views"] * document["num_learnt"]
        nodes = {node.name: node for node in cache.manifest.nodes}
        assert len(nodes) == 6
        assert {node.tokens for node in nodes.values() if node.name.startswith("patch")} == {STORES[name].tokens}
        assert all(STORES[name].dtype in node.codec for node in nodes.values())
    assert set(document["students"]) == {"plain", *STORES} == set(DetectionReport.kinds)
    assert document["teacher"]["scores"]["ap"] == pytest.approx(document["teacher_scores"]["ap"])
    report = json.loads((output / "report.json").read_text())
    assert report["config"]["student"]["name"] and report["versions"]["torch"]
    assert document == {name: value for name, value in report.items() if name not in ("config", "versions")}


def test_fewer_bits_and_fewer_tokens_are_fewer_bytes(finished: Finished) -> None:
    sizes = {name: made["bytes"] for name, made in finished.document["extractions"].items()}
    assert sizes["float16_10"] < sizes["float16_25"] < sizes["int8"] < sizes["float16"]


def test_the_ways_to_train_differ_in_the_cache_only(finished: Finished) -> None:
    output, document, _ = finished
    runs = {kind: json.loads((output / f"students/{kind}-0/run.json").read_text()) for kind in document["students"]}
    for section in ("source", "student", "eval"):
        assert len({json.dumps(run["config"][section], sort_keys=True) for run in runs.values()}) == 1
    assert all(run["views"] == list(range(document["num_views"])) for run in runs.values())
    prints = {kind: run["cache_fingerprint"] for kind, run in runs.items()}
    assert prints.pop("plain") is None and len(set(prints.values())) == len(STORES)
    assert not any(run["config"]["train"]["live_teacher"] for run in runs.values())
    steps = {kind: [line for line in read_log(output / f"students/{kind}-0/log.jsonl") if line["kind"] == "step"]
             for kind in runs}
    assert "feature" not in steps["plain"][0] and all(steps[kind][0]["feature"] > 0 for kind in STORES)
    first = {kind: {name: lines[0][name] for name in ("class", "box", "giou")} for kind, lines in steps.items()}
    for kind in STORES:  # the same weights and the same views; the projectors are drawn after the detector
        assert first[kind] == pytest.approx(first["plain"], rel=1e-5)
    assert steps["int8"][0]["feature"] == pytest.approx(steps["float16"][0]["feature"], rel=0.01)
    assert steps["float16_25"][0]["feature"] == pytest.approx(steps["float16"][0]["feature"], rel=0.2)


def test_numbers_are_measured(finished: Finished) -> None:
    _, document, _ = finished
    runs = [document["teacher"], *document["extractions"].values()]
    runs += [run for results in document["students"].values() for run in results]
    for run in runs:
        assert run["seconds"] > 0 and run["cpu_seconds"] > 0
        assert 100 * 2**20 < run["peak_bytes"] < 4 * 2**30


def test_page_shows_curves_and_detections_and_needs_nothing_else(finished: Finished) -> None:
    output, _, said = finished
    page = (output / "index.html").read_text()
    parser = Page(page)
    assert parser.links == [] and len(parser.pictures) == 2
    assert all(picture.startswith("data:image/png;base64,") for picture in parser.pictures)
    assert all(f"<th>{name}</th>" in page for name in DetectionReport.columns)
    for name in ("curves.png", "detections.png"):
        with Image.open(output / name) as picture:
            assert picture.format == "PNG" and picture.width > 400
    assert (output / "notes.txt").read_text() == "mine"
    assert "Traceback" not in said and "Warning" not in said
    assert all(f"{label}, seed 0: AP " in said for label in DetectionReport.kinds.values())


def test_the_pipelines_name_what_the_demo_leaves(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.output, tmp_path / "vkd-cache-demo-detection")
    monkeypatch.chdir(tmp_path)
    student, teacher = (load_config(name) for name in PIPELINES)
    counts = [len_of(open_source(config.source.train)) for config in (student, teacher)]
    assert counts == [finished.document["num_learnt"], finished.document["num_taught"]]
    assert len_of(open_source(student.source.val, split="val")) == finished.document["num_val"]
    assert Path(student.teacher.weights).is_file()
    assert open_cache(student.cache.url).fingerprint == finished.document["extractions"]["float16"]["fingerprint"]


# --- its parts -----------------------------------------------------------------------------------------------------


def test_pipelines_leave_the_scenes_as_they_are() -> None:
    student, teacher = (load_config(name) for name in PIPELINES)
    for config in (student, teacher):
        assert config.views.scales == (demo_scenes.SIDE_PX,) and config.views.crop_scales == ()
        assert config.views.max_size_px == config.views.canvas_multiple_px == demo_scenes.SIDE_PX
    assert teacher.student.name == student.teacher.name != student.student.name
    assert teacher.views.seed != student.views.seed


def test_boxes_are_whole_and_apart(scenes: Path) -> None:
    train, val = (open_source(str(scenes), split=split) for split in ("train", "val"))
    assert isinstance(train, CocoSource) and isinstance(val, CocoSource)
    assert (len_of(train), len_of(val), train.num_classes, val.num_classes) == (40, 20, 11, 11)
    assert not {key for shard in train.shards for key in shard.keys} & {key for s in val.shards for key in s.keys}
    found = [train.boxes(0, row) for row in range(40)]
    for annotation in found:
        assert annotation.size == (demo_scenes.SIDE_PX,) * 2
        assert 1 <= len(annotation.boxes) <= demo_scenes.MAX_DIGITS
        low, high = annotation.boxes[:, :2], annotation.boxes[:, 2:]
        assert (low >= 0).all() and (high <= demo_scenes.SIDE_PX).all() and (high - low >= 4).all()
        for i, j in itertools.combinations(range(len(low)), 2):
            assert ((high[i] <= low[j]) | (high[j] <= low[i])).any(), "digits overlap"
    assert {int(label) for annotation in found for label in annotation.labels} == set(range(1, 11))


def test_students_get_the_first_of_the_teachers_scenes(scenes: Path, tmp_path: Path) -> None:
    first_scenes(scenes, tmp_path / "learnt", 12)
    whole = json.loads((scenes / "annotations" / "instances_train2017.json").read_text())
    part = json.loads((tmp_path / "learnt" / "annotations" / "instances_train2017.json").read_text())
    assert part["images"] == whole["images"][:12] and part["categories"] == whole["categories"]
    ids = {image["id"] for image in part["images"]}
    assert part["annotations"] == [entry for entry in whole["annotations"] if entry["image_id"] in ids]
    for image in part["images"]:
        copies = [folder / "train2017" / image["file_name"] for folder in (scenes, tmp_path / "learnt")]
        assert copies[0].read_bytes() == copies[1].read_bytes()


def test_scenes_are_the_same_everywhere(scenes: Path, tmp_path: Path) -> None:
    again = write_scenes(tmp_path / "again", num_train=40, num_val=20)
    for path in sorted(path for path in scenes.rglob("*") if path.is_file()):
        other = again / path.relative_to(scenes)
        if path.suffix == ".json":
            assert path.read_bytes() == other.read_bytes()
        else:
            with Image.open(path) as one, Image.open(other) as two:
                assert np.array_equal(np.asarray(one), np.asarray(two))


def test_jobs_have_processes_of_their_own_and_the_first_error_ends_them() -> None:
    processes = Processes(multiprocessing.get_context("forkserver"))
    jobs = [(own_process, Config()) for _ in range(3)]
    found = dict(processes.side_by_side(jobs))
    assert set(found) == {0, 1, 2} and len({*found.values(), os.getpid()}) == 4
    with pytest.raises(ConfigError, match="on purpose"):
        list(processes.side_by_side([(refuses, Config()), *jobs]))


def test_the_claim_follows_the_numbers() -> None:
    clear = _report([20, 22, 21], [30, 32, 30]).conclusion()
    assert "gains +9.7 ± 0.3 points of AP" in clear and "may explain" not in clear
    assert "+9.7 ± 0.3 from int8, all tokens" in clear
    assert "may explain" in _report([20, 28, 21], [24, 25, 26]).conclusion()
    assert _report([20], [30]).rows()[2][3] == "+10.0"
    unsound = _report([20, 22, 21], [30, 32, 30], verdict="2 errors")
    assert unsound.exit_code == 3 and "errors" in unsound.rows()[-1][0]


def test_asking_process_stays_small() -> None:
    script = "import sys; import vkd_cache.stages.demo_detection; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def len_of(source: Any) -> int:
    return sum(len(shard.keys) for shard in source.shards)


def _report(plain: list[float], cached: list[float], verdict: str = "sound") -> DetectionReport:
    def runs(scores: list[float]) -> list[TrainResult]:
        found = [{"ap": value, "ap50": 2 * value, "ap75": value} for value in scores]
        return [TrainResult(scores=each, steps=1, seconds=1.0, cpu_seconds=1.0, peak_bytes=1) for each in found]

    made = ExtractResult(
        views=10, bytes=10**6, codecs={}, fingerprint="f", seconds=1.0, cpu_seconds=1.0, peak_bytes=1
    )
    check = {"verdict": verdict, "levels": {"pixels": {"checked": 1}}}
    return DetectionReport(
        short=False, num_val=1, num_taught=1, num_learnt=1, num_views=1, epochs=1, teacher_name="t", student_name="s",
        teacher=runs([50])[0], teacher_scores={"ap": 50.0, "ap50": 90.0, "ap75": 60.0},
        extractions=dict.fromkeys(STORES, made), checks=dict.fromkeys(STORES, check),
        students={"plain": runs(plain)} | {name: runs(cached) for name in STORES}, output="o",
    )  # fmt: skip
