"""Training detectors through the stage that trains classifiers: from a cache, from a live teacher, from boxes alone."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detection_jobs import write_detector
from detection_runs import CLASSES, PLAIN, VIEWS, Build, config_builder, still
from torch import nn
from train_runs import assert_same_run, log, pipeline, run, weights

from vkd_cache.cache.reader import open_cache
from vkd_cache.config import Config
from vkd_cache.detection.canvas import NODES
from vkd_cache.detection.vidt import create_vidt
from vkd_cache.errors import CacheMismatchError, CheckpointError, ConfigError
from vkd_cache.optim import parameter_groups
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.coco_accuracy import ap_of
from vkd_cache.stages.compare import CompareReport, compare
from vkd_cache.stages.extract import extract
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.learner import Learner
from vkd_cache.stages.run import Run, prepare_run
from vkd_cache.stages.saved_student import load_student
from vkd_cache.students.detector import DetectionStudent, create_detector
from vkd_cache.tokens import Tokens


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("detector") / "teacher.pt", "test_vidt2", CLASSES)


@pytest.fixture(scope="module")
def build(coco_tree: Path, teacher: Path) -> Build:
    return config_builder(coco_tree, teacher)


def extracted(build: Build, folder: Path, **cache: Any) -> Path:
    url = folder / "cache"
    assert extract(build(cache={"url": str(url), **cache}), JobSplit()).exit_code == 0
    return url


@pytest.fixture(scope="module")
def whole_cache(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extracted(build, tmp_path_factory.mktemp("whole"), dtype="float16")


@pytest.fixture(scope="module")
def sampled_cache(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of each image's patch tokens, in eight bits."""
    return extracted(build, tmp_path_factory.mktemp("sampled"), dtype="int8", tokens=0.25)


def prepared(build: Build, cache: Path | str = "", **sections: dict[str, Any]) -> Run:
    train = {"output": "unused"} | sections.pop("train", {})
    return prepare_run(build(cache={"url": str(cache)}, train=train, **sections), JobSplit())


def fed(run: Run) -> list[FedBatch]:
    with run.feed(run.supply(live=False)) as feed:
        return list(feed.batches(epoch=0, step=0, workers=0))


def losses(learner: Learner, batch: FedBatch, teacher: Any, pixels: torch.Tensor | None = None) -> dict[str, float]:
    images = learner.task.images(batch, batch.pixels if pixels is None else pixels)
    learner.student.apply(still)
    terms = learner.task.losses(learner.outputs(images), batch, teacher)
    return {name: float(value.detach()) for name, value in terms.items()}


# --- from a cache, live, and from boxes alone ---------------------------------------------------------------------


def test_without_a_teacher(build: Build, tmp_path: Path) -> None:
    """Boxes alone, with every optional head; the AP of the log is what the checkpoint has."""
    heads = {"name": "test_vidt", "cross_scale_fusion": True, "iou_aware": True, "token_label": True, "drop_path": 0.1}
    train = {"batch_size": 8, "ema_decay": 0.5, "amp": "bf16", "output": str(tmp_path)}
    config = build(student=heads, loss=PLAIN, train=train)
    summary = run(config)
    assert (summary.steps, summary.metric, summary.broken) == (3, "ap", 0)
    assert summary.score is not None and summary.best_score is not None
    for line in log(tmp_path):
        terms = [line[name] for name in ("class", "box", "giou", "iou", "token_label")]
        assert all(math.isfinite(term) and term > 0 for term in terms) and "feature" not in line
        assert line["total"] == pytest.approx(sum(terms), rel=1e-3)
    *_, last = log(tmp_path, "eval")
    assert {"ap", "ap50", "ap75", "ema_ap", "ema_ap50", "ema_ap75"} < last.keys() and last["ap"] == summary.score
    assert (tmp_path / "curves.png").stat().st_size > 1000
    val = prepare_run(config, JobSplit()).val_source
    for ema in (False, True):
        name, student = load_student(str(tmp_path / "last.pt"), build(), 0, ema=ema)
        assert name == "student test_vidt" + " (EMA)" * ema and isinstance(student, DetectionStudent)
        assert student.net.config.iou_aware and student.projectors is None
        result, _ = ap_of(student, val, config, torch.device("cpu"), JobSplit())  # type: ignore[arg-type]
        assert result.ap == last["ema_ap" if ema else "ap"]


def test_cached_and_live_teacher(build: Build, whole_cache: Path, tmp_path: Path) -> None:
    """The same plan: three runs that differ in where the teacher's tokens come from, and in their last digits only."""
    urls = {"cached": str(whole_cache), "live": str(whole_cache), "planned": ""}
    found = {}
    for name, url in urls.items():
        train = {"output": str(tmp_path / name), "live_teacher": name != "cached", "batch_size": 8}
        run(build(cache={"url": url}, views={**VIEWS, "count": "1"}, train=train))
        found[name] = [line["feature"] for line in log(tmp_path / name)]
    assert found["live"] == found["planned"] != found["cached"]
    assert found["cached"] == pytest.approx(found["live"], rel=5e-3)
    state = weights(tmp_path / "cached")
    assert sum(name.endswith("projector.directions") for name in state) == len(NODES)
    assert found["cached"][-1] < found["cached"][0]


@pytest.mark.parametrize(("cache", "bound"), [("whole_cache", 1e-3), ("sampled_cache", 5e-3)])
def test_lockstep(build: Build, tmp_path: Path, cache: str, bound: float, request: pytest.FixtureRequest) -> None:
    """The loss from the cache is the loss with the live teacher; of a sample, that of the same sample."""
    report = compared(build, request.getfixturevalue(cache), tmp_path / "out", 3)
    assert report.bound == bound and report.within_bound
    assert report.lockstep.keys() == {"total", "class", "box", "giou", "feature"}
    assert all(report.lockstep[name] == [0.0] * 3 for name in ("class", "box", "giou"))
    assert max(report.lockstep["feature"]) > 0
    assert 0 < max(report.gradient) < 20 * bound and min(report.gradient_cosine) > 0.999
    assert report.cached["total"] == pytest.approx(report.live["total"], rel=0.05)
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["within_bound"]


def compared(build: Build, url: Path, output: Path, steps: int, **sections: Any) -> CompareReport:
    return compare(build(cache={"url": str(url)}, train={"output": str(output)}, **sections), steps=steps)


def test_another_teacher_is_not_compared(build: Build, whole_cache: Path, tmp_path: Path) -> None:
    other = write_detector(tmp_path / "other.pt", "test_vidt", CLASSES)
    teacher = {"name": "test_vidt", "weights": str(other)}
    with pytest.raises(CacheMismatchError, match="was made with teacher 'test_vidt2'"):
        compared(build, whole_cache, tmp_path / "out", 1, teacher=teacher)
    with pytest.raises(ConfigError, match="no teacher to compare"):
        compared(build, whole_cache, tmp_path / "out", 1, loss=PLAIN)


NO_TEACHER = """
import atexit, json, sys
def report():
    print(json.dumps(sorted(m for m in sys.modules if m.startswith("vkd_cache"))))
atexit.register(report)
from vkd_cache import cli
cli.main(sys.argv[1:])
"""


def test_the_program_has_no_teacher(build: Build, sampled_cache: Path, coco_tree: Path, tmp_path: Path) -> None:
    """`vkd-cache train pipeline.toml`: no teacher is imported, and its file is gone."""
    file = pipeline(
        tmp_path,
        source={"train": str(coco_tree)},
        teacher={"name": "test_vidt2", "weights": str(tmp_path / "gone.pt")},
        cache={"url": str(sampled_cache)},
        student={"name": "test_vidt"},
        train={"epochs": 1, "batch_size": 8, "workers": 0, "device": "cpu", "output": str(tmp_path / "run")},
        eval={"workers": 0, "device": "cpu"},
    )
    done = subprocess.run(
        [sys.executable, "-c", NO_TEACHER, "train", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout)
    assert "vkd_cache.stages.detection_task" in modules
    assert not [name for name in modules if "teacher" in name or "teaching" in name]
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    views = document["config"]["views"]  # those of the cache, though the file says nothing
    assert views["recipe"] == "vidt" and views["scales"] == [64, 80] and views["seed"] == 5
    assert "train: 3 steps, AP " in done.stderr


# --- what a step sees ----------------------------------------------------------------------------------------------


def test_tokens_are_joined_in_batch_order(build: Build, sampled_cache: Path) -> None:
    """Batches cross shards; each image has the very tokens that its unit holds."""
    run = prepared(build, sampled_cache)
    cache = open_cache(str(sampled_cache))
    seen = 0
    for batch in fed(run):
        rendered = batch.rendered
        for name in ("patch_1", "neck_det"):
            tokens = batch.nodes[name]
            assert isinstance(tokens, Tokens) and len(tokens) == len(batch)
            for position, (shard, row) in enumerate(zip(rendered.shard, rendered.row, strict=True)):
                unit = cache.read(int(shard), rendered.view)
                own = unit.tokens(name, np.searchsorted(unit.rows, [row]))
                assert torch.equal(tokens.select([position]).dense(), own.dense())
                assert np.array_equal(tokens.select([position]).places(), own.places())
        seen += len(batch)
    assert seen == 24


def test_padding_does_not_matter(build: Build, whole_cache: Path) -> None:
    """Whatever lies outside the views: no token of it is in a loss, and no pixel of it reaches the student."""
    run = prepared(build, whole_cache)
    learner = run.learner(supply := run.supply(live=False))
    batch = next(batch for batch in fed(run) if len(np.unique(batch.rendered.canvas, axis=0)) > 1)
    expected = losses(learner, batch, supply(batch, None))
    assert batch.rendered.view_size is not None
    noisy = torch.randint(0, 256, batch.pixels.shape, dtype=torch.uint8)
    for position, (height, width) in enumerate(batch.rendered.view_size.tolist()):
        noisy[position, :height, :width] = batch.pixels[position, :height, :width]
    assert losses(learner, batch, supply(batch, None), noisy) == expected
    wide = nn.functional.pad(batch.pixels, (0, 0, 0, 64, 0, 32))  # a batch mate with a larger canvas
    assert losses(learner, batch, supply(batch, None), wide) == expected


def test_images_without_boxes(build: Build) -> None:
    """All of a batch may be empty: the class loss goes on, and every gradient is finite."""
    run = prepared(build, loss=PLAIN, student={"name": "test_vidt", "iou_aware": True, "token_label": True})
    learner = run.learner(supply := run.supply(live=False))
    batch = fed(run)[0]
    assert batch.rendered.boxes is not None
    nothing = [
        view._replace(boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int64)) for view in batch.rendered.boxes
    ]
    empty = dataclasses.replace(batch, rendered=dataclasses.replace(batch.rendered, boxes=nothing))
    terms = learner.step([(empty, empty.pixels)], supply, 1e-3, seed=1)
    assert float(terms["class"]) > 0 and float(terms["box"]) == float(terms["giou"]) == 0
    assert learner.is_finite()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_accumulation_is_the_mean_of_the_batches(build: Build, whole_cache: Path, accumulate: int) -> None:
    run = prepared(build, whole_cache, train={"clip_grad": 0.1})
    learner = run.learner(supply := run.supply(live=False))
    learner.student.apply(still)
    norms: list[float] = []
    learner.optimizer.register_step_pre_hook(lambda optimizer, *_: norms.append(norm_of(optimizer)))
    batches = fed(run)[:accumulate]
    single = [losses(learner, batch, supply(batch, None)) for batch in batches]
    terms = learner.step([(batch, batch.pixels) for batch in batches], supply, 1e-3, seed=1)
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        {name: sum(each[name] for each in single) / accumulate for name in terms}, rel=1e-5
    )
    assert norms == pytest.approx([0.1], rel=1e-3)


def norm_of(optimizer: torch.optim.Optimizer) -> float:
    gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
    return float(torch.cat(gradients).norm())


@pytest.mark.parametrize("off", ["task_weight", "feature_weight"])
def test_either_term_may_be_off(build: Build, whole_cache: Path, off: str) -> None:
    run = prepared(build, whole_cache, loss={"logit_weight": 0.0, off: 0.0})
    learner = run.learner(supply := run.supply(live=False))
    batch = fed(run)[0]
    terms = learner.step([(batch, batch.pixels)], supply, 1e-3, seed=0)
    assert ("feature" in terms) == (off != "feature_weight") and ("class" in terms) == (off != "task_weight")
    assert (run.cache is None) == (off == "feature_weight")
    assert all(parameter.grad is None for parameter in learner.student.parameters())
    weighted = 4 * terms.get("feature", 0.0) + sum(terms.get(name, 0.0) for name in ("class", "box", "giou"))
    assert float(terms["total"]) == pytest.approx(float(weighted), rel=1e-5)


def test_only_the_cached_nodes_are_distilled(build: Build, tmp_path: Path) -> None:
    """Level choice: what a cache does not hold needs no projector, and a live teacher does not give it either."""
    url = extracted(build, tmp_path, nodes=("patch_2", "neck_det"))
    run = prepared(build, url)
    for live in (False, True):
        supply = run.supply(live=live)
        learner = run.learner(supply)
        projectors = {name.split(".")[1] for name in learner.student.state_dict() if name.startswith("projectors")}
        assert projectors == {"patch_projector_2", "neck_det_projector"}
        batch = fed(run)[0]
        assert supply(batch, learner.task.images(batch, batch.pixels)).nodes.keys() == {"patch_2", "neck_det"}
        assert float(learner.step([(batch, batch.pixels)], supply, 1e-3, seed=0)["feature"]) > 0


def test_decay_as_in_the_reference() -> None:
    """Everything outside of the body is decayed, norms and biases too; in it, what has two dimensions and no name."""
    student = create_detector("test_vidt", CLASSES, nodes=NODES, teacher_width=64)
    decayed, others = parameter_groups(student, 1e-4)
    names = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert set(decayed["names"]) | set(others["names"]) == names
    assert {name for name in names if name.startswith("projectors.")} <= set(others["names"])
    outside = {name for name in names if not name.startswith(("net.backbone.", "projectors."))}
    assert outside <= set(decayed["names"]) and any(name.endswith("norm1.bias") for name in outside)
    body = {name for name in decayed["names"] if name.startswith("net.backbone.")}
    assert body and not [name for name in body if name.endswith((".bias", "det_token", "det_pos_embed"))]
    assert "net.backbone.det_token" in others["names"]
    assert {decayed["weight_decay"], others["weight_decay"]} == {1e-4, 0.0}


# --- stopped and continued -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def signal_at(forward: int) -> Iterator[None]:
    """SIGTERM to this process before the student's forward pass of that number."""
    passes = itertools.count(1)

    def before(module: nn.Module, _: object) -> None:
        if isinstance(module, DetectionStudent) and module.training and next(passes) == forward:
            os.kill(os.getpid(), signal.SIGTERM)

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def test_a_run_continues_exactly(build: Build, sampled_cache: Path, tmp_path: Path) -> None:
    """Weights, average, optimizer and log, to the last bit; dropout, stochastic depth, bfloat16 and clipping on."""

    def config(name: str, **train: Any) -> Config:
        fixed = {"batch_size": 6, "epochs": 2, "accumulate": 2, "warmup_epochs": 0.5}
        fixed |= {"ema_decay": 0.9, "clip_grad": 0.1, "amp": "bf16"}
        return build(
            cache={"url": str(sampled_cache)},
            student={"name": "test_vidt", "drop_path": 0.2},
            train=fixed | {"output": str(tmp_path / name)} | train,
        )

    assert run(config("whole")).steps == 4
    with signal_at(5):  # in the second epoch, the first of the two batches of a step
        assert run(config("stopped")).interrupted
    assert run(config("stopped", resume="auto")).steps == 4
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    with pytest.raises(CheckpointError, match=r"\[student\] iou_aware: False in the checkpoint, True now"):
        run(dataclasses.replace(config("whole", resume="auto"), student=build(student={"iou_aware": True}).student))


# --- files and mistakes --------------------------------------------------------------------------------------------


def test_files_of_the_authors(build: Build, tmp_path: Path) -> None:
    """Their VkD files: under `model`, wrapped, with projectors of their own; and another body is one clear message."""
    torch.manual_seed(0)
    net = create_vidt("test_vidt", 7)
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    state["module.patch_projector_1.weight"] = torch.ones(64)
    torch.save({"model": state, "epoch": 1}, tmp_path / "theirs.pth")
    config = build()
    name, student = load_student(str(tmp_path / "theirs.pth"), config, 3)
    assert name == "student test_vidt" and isinstance(student, DetectionStudent) and student.num_classes == 7
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in student.net.state_dict().items())
    with pytest.raises(CheckpointError, match="It fits test_vidt"):
        load_student(str(tmp_path / "theirs.pth"), build(student={"name": "test_vidt2"}), 3)
    with pytest.raises(CheckpointError, match="holds no weight average"):
        load_student(str(tmp_path / "theirs.pth"), config, 3, ema=True)


def test_a_student_starts_from_a_file(build: Build, tmp_path: Path) -> None:
    """A detector's weights, or those of a Swin classifier for the body alone; a run that continues does without it."""
    detector = write_detector(tmp_path / "detector.pt", "test_vidt", CLASSES)
    expected = create_vidt("test_vidt", CLASSES)
    expected.load_state_dict(torch.load(detector, weights_only=True)["model"])
    of_detectors = ("det_", "layers.3.down", ".expansion.", "downsample.norm2", "_index")
    body = {
        name: value
        for name, value in expected.backbone.state_dict().items()
        if name.startswith(("layers.", "patch_embed.")) and not any(part in name for part in of_detectors)
    }
    classifier = {"head.weight": torch.ones(5, 128), "norm.bias": torch.ones(128)}
    torch.save({"model": body | classifier}, tmp_path / "swin.pt")
    parts = {"detector": expected.state_dict(), "swin": {f"backbone.{name}": value for name, value in body.items()}}
    for name, part in parts.items():
        student = {"name": "test_vidt", "weights": str(tmp_path / f"{name}.pt")}
        run_of = prepared(build, loss=PLAIN, student=student)
        state = run_of.learner(run_of.supply(live=False)).student.state_dict()
        same = {key for key, value in expected.state_dict().items() if torch.equal(state[f"net.{key}"], value)}
        assert set(part) <= same and ("class_embed.0.weight" in same) == (name == "detector")
    config = build(loss=PLAIN, student=student, train={"batch_size": 12, "output": str(tmp_path / "run")})
    run(config)
    (tmp_path / "swin.pt").unlink()
    assert run(dataclasses.replace(config, train=dataclasses.replace(config.train, resume="auto"))).steps == 2
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(dataclasses.replace(config, train=dataclasses.replace(config.train, output=str(tmp_path / "other"))))


def test_what_a_detection_run_cannot_begin_with(
    build: Build, coco_tree: Path, digits_tree: Path, whole_cache: Path, tmp_path: Path
) -> None:
    def refused(match: str, kind: type[Exception] = ConfigError, **sections: Any) -> None:
        train = {"output": str(tmp_path / "run")} | sections.pop("train", {})
        with pytest.raises(kind, match=match):
            run(build(train=train, **sections))
        assert not (tmp_path / "run" / "last.pt").exists()

    refused("expected a detector, because the samples have boxes", student={"name": "test_vit"}, loss=PLAIN)
    refused("Set .views. recipe to one of vidt", views={"recipe": "vkd"}, loss=PLAIN)
    refused("logit_weight: found 0.5, but a detector has no logit loss", loss={"logit_weight": 0.5})
    refused("nothing for a detector to learn", loss=PLAIN | {"task_weight": 0.0})
    refused("ask for a teacher: give --cache, or --live-teacher")
    refused(r"\[teacher\] name is empty", teacher={"name": ""}, train={"live_teacher": True})
    val = {"train": str(coco_tree), "val": str(digits_tree / "val"), "shard_size": 8}
    refused("annotated with classes, those of .* with boxes", source=val, loss=PLAIN)
    folder = {"train": str(digits_tree)}
    crops = {"recipe": "crop_flip", "size_px": 32}
    no_teacher = {**PLAIN, "logit_weight": 0.0}
    refused("'test_vidt' is a detector, and the samples have", source=folder, views=crops, loss=no_teacher)
    other = tmp_path / "coco"
    shutil.copytree(coco_tree, other)
    path = other / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["bbox"][2] += 1
    path.write_text(json.dumps(document))
    refused(
        "was made from another data set.*boxes and categories count.*annotation file", CacheMismatchError,
        source={"train": str(other), "shard_size": 8}, cache={"url": str(whole_cache)},
    )  # fmt: skip
