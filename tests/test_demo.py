"""The demo from the command line, once, in its short form; and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from demo_runs import Finished, Page, run_short_demo
from PIL import Image

from vkd_cache.cache.reader import open_cache
from vkd_cache.config import find_pipeline, load_config
from vkd_cache.errors import ConfigError
from vkd_cache.sources import open_source, source_identity
from vkd_cache.stages.demo import demo
from vkd_cache.stages.demo_data import NUM_IN_TARS, NUM_TRAIN, write_digits
from vkd_cache.stages.demo_jobs import TrainResult
from vkd_cache.stages.demo_report import DemoReport
from vkd_cache.stages.journal import read_log


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run_short_demo(tmp_path_factory.mktemp("demo") / "out")


def test_every_stage_ran_and_the_cache_is_sound(finished: Finished) -> None:
    output, document, _ = finished
    levels = document["check"]["report"]["levels"]
    assert document["check"]["report"]["verdict"] == "sound"
    assert set(levels) == {"files", "pixels", "teacher"}
    assert all(level["checked"] > 0 and level["errors"] == 0 for level in levels.values())
    assert document["extraction"]["views"] == document["num_views"] * NUM_IN_TARS
    assert set(open_cache(str(output / "cache")).published()) == set(range(document["num_views"]))
    assert document["teacher"]["scores"]["top1"] == document["check"]["teacher_top1"] > 50  # ten classes: chance is 10
    report = json.loads((output / "report.json").read_text())
    assert report["config"]["student"]["name"] and report["versions"]["torch"]
    assert document == {name: value for name, value in report.items() if name not in ("config", "versions")}
    assert report["extraction"]["fingerprint"] == open_cache(str(output / "cache")).fingerprint


def test_the_three_ways_differ_in_the_teacher_only(finished: Finished) -> None:
    output, document, _ = finished
    runs = {kind: json.loads((output / f"students/{kind}-0/run.json").read_text()) for kind in document["students"]}
    assert list(runs) == ["plain", "live", "cached"]
    for section in ("source", "student", "eval"):
        assert len({json.dumps(run["config"][section], sort_keys=True) for run in runs.values()}) == 1
    assert all(run["views"] == list(range(document["num_views"])) for run in runs.values())
    assert [run["cache_fingerprint"] is not None for run in runs.values()] == [False, False, True]
    assert [run["config"]["train"]["live_teacher"] for run in runs.values()] == [False, True, False]
    steps = {kind: [line for line in read_log(output / f"students/{kind}-0/log.jsonl") if line["kind"] == "step"]
             for kind in runs}
    assert not {"feature", "logit"} & set(steps["plain"][0])
    for live, cached in zip(steps["live"][:2], steps["cached"][:2], strict=True):
        for term in ("task", "feature", "logit"):  # the same views, weights and order: only the codec is between them
            assert cached[term] == pytest.approx(live[term], rel=0.02)


def test_numbers_of_the_report_are_measured(finished: Finished) -> None:
    _, document, _ = finished
    runs = [document["teacher"], document["extraction"], *(run for r in document["students"].values() for run in r)]
    for run in runs:
        assert run["seconds"] > 0 and run["cpu_seconds"] > 0
        assert 100 * 2**20 < run["peak_bytes"] < 4 * 2**30
    assert 0 < document["extraction"]["bytes"] < document["extraction"]["views"] * 1000
    assert document["seconds"] > sum(run["seconds"] for run in runs)


def test_page_is_whole_and_needs_nothing_else(finished: Finished) -> None:
    output, _, _ = finished
    page = (output / "index.html").read_text()
    parser = Page(page)
    assert parser.links == [] and len(parser.pictures) == 1
    assert parser.pictures[0].startswith("data:image/png;base64,")
    assert all(f"<th>{name}</th>" in page for name in DemoReport.columns)
    with Image.open(output / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width > 800


def test_it_starts_over_and_leaves_what_is_not_its_own(finished: Finished) -> None:
    output, _, said = finished
    assert (output / "notes.txt").read_text() == "mine"
    assert "Traceback" not in said and "Warning" not in said
    assert "student, from the cache, seed 0: top-1 " in said


def test_the_pipeline_names_what_the_demo_leaves(
    finished: Finished, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "vkd-cache-demo")
    for name in ("demo", "demo_teacher"):
        config = load_config(name)
        train = open_source(str(tmp_path / config.source.train), shard_size=config.source.shard_size)
        assert sum(len(shard.keys) for shard in train.shards) == (NUM_IN_TARS if name == "demo" else NUM_TRAIN)
    assert (tmp_path / load_config("demo").teacher.weights).is_file()
    assert find_pipeline("demo").parent == find_pipeline("demo_teacher").parent


def test_both_forms_of_the_data_are_sources(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data")
    tree, val, tars = open_source(data.tree), open_source(data.tree, split="val"), open_source(data.tars)
    keys = [{key.rpartition("/")[2] for shard in source.shards for key in shard.keys} for source in (tree, val, tars)]
    assert [len(names) for names in keys] == [data.num_train, data.num_val, data.num_in_tars]
    assert keys[2] < keys[0] and not keys[0] & keys[1]
    assert tree.num_classes == val.num_classes == tars.num_classes == 10
    again = write_digits(tmp_path / "again")
    assert source_identity(open_source(again.tars)) == source_identity(tars)
    for first, second in zip(*(sorted((tmp_path / name / "shards").iterdir()) for name in ("data", "again")),
                             strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_it_overwrites_nothing_but_a_demo(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ConfigError, match="holds something that is not an earlier demo"):
        demo(load_config("demo"), tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        demo(load_config("demo"), tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_without_scikit_learn_one_line_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        write_digits(tmp_path / "data")


def test_asking_process_stays_small() -> None:
    script = "import sys; import vkd_cache.stages.demo; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_claim_follows_the_numbers() -> None:
    clear = _report(plain=[76, 78, 77], cached=[81, 82, 81]).conclusion()
    assert "gains +4.3 ± 0.3 points" in clear and "may explain" not in clear
    assert "the spread of the seeds may explain" in _report(plain=[76, 84, 77], cached=[81, 82, 79]).conclusion()
    worse = _report(plain=[81, 82, 81], cached=[76, 78, 77]).conclusion()
    assert "gains -4.3 " in worse and "may explain" in worse


def _report(plain: list[float], cached: list[float]) -> DemoReport:
    def runs(accuracies: list[float]) -> list[TrainResult]:
        return [
            TrainResult(scores={"top1": value}, steps=1, seconds=1.0, cpu_seconds=1.0, peak_bytes=1)
            for value in accuracies
        ]

    students = {"plain": runs(plain), "live": runs(cached), "cached": runs(cached)}
    nothing: Any = None
    return DemoReport(
        short=False, num_val=1, num_taught=1, num_learnt=1, num_views=1, epochs=1, teacher_name="t", student_name="s",
        teacher=nothing, extraction=nothing, check=nothing, students=students, output="o",
    )
