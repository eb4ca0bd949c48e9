"""COCO AP: perfect detections give 100, none give 0, and nothing depends on batches, ranks or workers."""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from vkd_cache.cache import Manifest, NodeSpec, create_cache
from vkd_cache.cli import cli
from vkd_cache.config import (
    CacheConfig,
    Config,
    EvalConfig,
    SourceConfig,
    StudentConfig,
    TeacherConfig,
    ViewsConfig,
    config_to_json,
)
from vkd_cache.detection.canvas import CanvasBatch, DetectorOutput
from vkd_cache.detection.vidt import create_vidt
from vkd_cache.errors import CheckpointError, ConfigError, SourceError
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import CocoSource, open_source
from vkd_cache.stages.coco_accuracy import ap_of, check_same_categories, eval_recipe
from vkd_cache.stages.coco_scores import METRICS, DetectionResult, coco_scores, score_table
from vkd_cache.stages.contact_sheet import write_contact_sheet
from vkd_cache.stages.evaluate import EvalRequest, evaluate, write_detections
from vkd_cache.students import create_student
from vkd_cache.weights import CHECKPOINT_FORMAT

CPU = torch.device("cpu")
ONE = JobSplit()
NUM_CLASSES = 11
NUM_IMAGES = 10
THUMBNAIL = 8


class Nearest(nn.Module):
    """A detector that knows every image by heart: it answers with the boxes of the nearest one it has seen.

    `noise` moves its boxes, and `wrong` is the share of boxes that it gives another class.
    """

    def __init__(
        self, source: CocoSource, *, noise: float = 0.0, wrong: float = 0.0, classes: int = NUM_CLASSES
    ) -> None:
        super().__init__()
        rng = np.random.default_rng(5)
        pictures, self.answers = [], []
        document = json.loads(source.annotation_file.read_text())
        boxes: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for entry in document["annotations"]:
            if not entry["iscrowd"]:
                boxes[entry["image_id"]].append(entry)
        for record in document["images"]:
            path = source.annotation_file.parent.parent / "val2017" / record["file_name"]
            small = Image.open(path).convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
            pictures.append(torch.from_numpy(np.asarray(small).astype(np.float32) / 255).permute(2, 0, 1))
            side = np.array([record["width"], record["height"]])
            answer = []
            for entry in boxes[record["id"]]:
                place = np.array(entry["bbox"]).reshape(2, 2) / side
                centre = place[0] + place[1] / 2
                moved = np.concatenate([centre, place[1]]) + noise * rng.normal(size=4)
                label = int(rng.integers(1, NUM_CLASSES)) if rng.random() < wrong else entry["category_id"]
                answer.append((label, float(rng.uniform(1, 6)), moved.astype(np.float32)))
            self.answers.append(answer)
        self.register_buffer("pictures", torch.stack(pictures))
        self.classes = classes

    def detect(self, batch: CanvasBatch) -> DetectorOutput:
        """An exact answer in the last layer, and nonsense in the one before."""
        logits = torch.full((2, len(batch), 4, self.classes), -20.0)
        boxes = torch.full((2, len(batch), 4, 4), 0.5)
        for image, (height, width) in enumerate(batch.view_size):
            content = batch.images[image : image + 1, :, :height, :width]
            assert batch.images[image, :, height:].abs().sum() == 0
            small = nn.functional.interpolate(content, (THUMBNAIL, THUMBNAIL), mode="area")
            nearest = int((self.pictures - small).square().sum((1, 2, 3)).argmin())
            for query, (label, logit, box) in enumerate(self.answers[nearest]):
                logits[-1, image, query, label % self.classes] = logit
                boxes[-1, image, query] = torch.from_numpy(box)
        logits[0] = 9.0
        return DetectorOutput(logits=logits, boxes=boxes, nodes={}, grids={})


def config_for(root: Path, **fields: Any) -> Config:
    arguments: dict[str, Any] = {"batch_size": 4, "workers": 0, "device": "cpu", "size_px": 64, "max_size_px": 96}
    return Config(
        source=SourceConfig(train=str(root), shard_size=4),
        views=ViewsConfig(recipe="vidt", canvas_multiple_px=32),
        eval=EvalConfig(**(arguments | fields)),
    )


@pytest.fixture(scope="module")
def source(coco_tree: Path) -> CocoSource:
    found = open_source(str(coco_tree), split="val", shard_size=4)
    assert isinstance(found, CocoSource)
    return found


def by_hand(annotation_file: Path, results: Path) -> list[float]:
    """What anybody would do with the written file."""
    truth = COCO(str(annotation_file))
    counts = COCOeval(truth, truth.loadRes(str(results)), "bbox")
    counts.evaluate()
    counts.accumulate()
    counts.summarize()
    return [100 * value if value >= 0 else -1.0 for value in counts.stats.tolist()]


def twelve(result: DetectionResult) -> list[float]:
    return [getattr(result, metric.name) for metric in METRICS]


# --- the numbers -------------------------------------------------------------------------------------------------


def test_perfect_detections_give_100(coco_tree: Path, source: CocoSource) -> None:
    model = Nearest(source).train()
    result, found = ap_of(model, source, config_for(coco_tree), CPU, ONE)
    assert model.training  # as it was
    assert (result.num_images, result.num_broken) == (NUM_IMAGES, 0)
    assert result.ap == result.ap50 == result.ap75 == result.ap_small == result.ar100 == pytest.approx(100.0)
    assert result.ap_large == result.ar_large == -1.0  # there are none
    assert 0 < result.ar1 < 100  # several boxes of one class in an image
    assert [entry["image_id"] for entry in found] == sorted(entry["image_id"] for entry in found)
    without = 807  # the image without annotations is looked at, too
    assert {entry["image_id"] for entry in found} == {800 + 7 * number for number in range(NUM_IMAGES)}
    assert max(entry["score"] for entry in found if entry["image_id"] == without) < 1e-6


def test_the_numbers_are_those_of_the_written_file(coco_tree: Path, source: CocoSource, tmp_path: Path) -> None:
    result, found = ap_of(Nearest(source, noise=0.02, wrong=0.2), source, config_for(coco_tree), CPU, ONE)
    write_detections(tmp_path, source, found, "nearest")
    assert twelve(result) == by_hand(source.annotation_file, tmp_path / "detections.json")
    assert 20 < result.ap < 95
    entries = json.loads((tmp_path / "detections.json").read_text())
    assert set(entries[0]) == {"image_id", "category_id", "bbox", "score"}
    sizes = {record["id"]: record for record in json.loads(source.annotation_file.read_text())["images"]}
    best = max(entries, key=lambda entry: float(entry["score"]))
    assert 0 <= best["bbox"][0] + best["bbox"][2] / 2 <= sizes[best["image_id"]]["width"]
    with Image.open(tmp_path / "detections.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 800 and sheet.height > 800


@settings(deadline=None, max_examples=6)
@given(batch_size=st.integers(1, 12), shard_size=st.integers(2, 12), multiple=st.sampled_from([16, 32, 128]))
def test_numbers_do_not_depend_on_batches_shards_or_canvases(
    coco_tree: Path, source: CocoSource, batch_size: int, shard_size: int, multiple: int
) -> None:
    model = Nearest(source, noise=0.02, wrong=0.2)
    expected, _ = ap_of(model, source, config_for(coco_tree), CPU, ONE)
    other = open_source(str(coco_tree), split="val", shard_size=shard_size)
    assert isinstance(other, CocoSource)
    config = config_for(coco_tree, batch_size=batch_size)
    config = Config(source=config.source, views=ViewsConfig(canvas_multiple_px=multiple), eval=config.eval)
    result, _ = ap_of(model, other, config, CPU, ONE)
    assert twelve(result) == twelve(expected)


def test_worker_processes_give_the_same(coco_tree: Path, source: CocoSource) -> None:
    model = Nearest(source, noise=0.02)
    expected, found = ap_of(model, source, config_for(coco_tree), CPU, ONE)
    result, same = ap_of(model, source, config_for(coco_tree, workers=1), CPU, ONE)
    assert twelve(result) == twelve(expected) and same == found


def test_nothing_found_gives_0(source: CocoSource, tmp_path: Path) -> None:
    scores = coco_scores(source.annotation_file, [])
    assert scores["ap"] == scores["ar100"] == 0.0
    assert scores["ap_large"] == -1.0
    write_contact_sheet(tmp_path / "empty.png", source, [], title="nothing")
    assert (tmp_path / "empty.png").stat().st_size > 1000


def test_annotations_without_area_or_crowd_mark(source: CocoSource, tmp_path: Path) -> None:
    document = json.loads(source.annotation_file.read_text())
    found = [
        {"image_id": entry["image_id"], "category_id": entry["category_id"], "bbox": entry["bbox"], "score": 0.5}
        for entry in document["annotations"]
        if not entry["iscrowd"]
    ]
    kept = json.dumps(found)
    expected = coco_scores(source.annotation_file, found)
    assert json.dumps(found) == kept
    for entry in document["annotations"]:
        entry["area"] = None
        if not entry["iscrowd"]:
            del entry["iscrowd"], entry["area"]
    (tmp_path / "bare.json").write_text(json.dumps(document))
    assert coco_scores(tmp_path / "bare.json", found) == expected


def test_the_table_has_a_column_a_detector() -> None:
    numbers = {metric.name: float(position) - 1 for position, metric in enumerate(METRICS)}
    result = DetectionResult(name="student", split="val", num_images=5, num_broken=1, seconds=2.0, **numbers)
    columns, rows = score_table([result, result])
    assert columns[-2:] == ["student", "student"]
    assert [row[0] for row in rows] == [*(metric.label for metric in METRICS), "images", "broken", "seconds"]
    assert rows[0] == ["AP", "0.50:0.95", "all", "100", "-", "-"]  # -1: nothing to find
    assert rows[11][-1] == "10.0" and rows[13][-1] == "1"


# --- what can go wrong -------------------------------------------------------------------------------------------


def test_broken_images_are_counted_and_named(
    coco_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "coco"
    shutil.copytree(coco_tree, root)
    whole = open_source(str(root), split="val", shard_size=4)
    assert isinstance(whole, CocoSource)
    model = Nearest(whole)
    (root / "val2017" / "000000000814.jpg").write_bytes(b"\xff\xd8\xff not an image")
    Image.new("RGB", (33, 44)).save(root / "val2017" / "000000000828.jpg")
    result, found = ap_of(model, whole, config_for(root), CPU, ONE)
    said = capsys.readouterr().err
    assert "2 broken images count as images in which nothing was found" in said
    assert "814 (JPEG" in said and "828 (image of 33x44 pixels" in said
    assert (result.num_images, result.num_broken) == (NUM_IMAGES, 2)
    assert {814, 828}.isdisjoint(entry["image_id"] for entry in found)
    assert 0 < result.ap < 100  # their boxes are missed
    write_detections(tmp_path, whole, found, "nearest")
    assert twelve(result) == by_hand(whole.annotation_file, tmp_path / "detections.json")
    for path in (root / "val2017").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(SourceError, match="none of its 10 images can be decoded"):
        ap_of(model, whole, config_for(root), CPU, ONE)


def test_other_categories_than_the_models(
    coco_tree: Path, source: CocoSource, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"categories up to 10, but student has classes 0 to 3.*other categories"):
        ap_of(Nearest(source, classes=4, wrong=1.0).eval(), source, config_for(coco_tree), CPU, ONE)
    result, _ = ap_of(Nearest(source, classes=91), source, config_for(coco_tree), CPU, ONE)
    assert result.ap == pytest.approx(100.0)
    assert capsys.readouterr().err.count("only if the ids that are in both mean the same") == 1


def test_splits_with_other_categories(coco_tree: Path, source: CocoSource, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    shutil.copytree(coco_tree, root)
    path = root / "annotations" / "instances_val2017.json"
    document = json.loads(path.read_text())
    document["categories"][2]["name"] = "three"
    document["categories"].append({"id": 12, "name": "dozen"})
    path.write_text(json.dumps(document))
    val = open_source(str(root), split="val")
    assert isinstance(val, CocoSource)
    check_same_categories(source, source)
    with pytest.raises(ConfigError, match="3 is 'three', in training 'digit 2', 12 is 'dozen', in training ''"):
        check_same_categories(source, val)


class Broken(Nearest):
    """A detector whose training diverged."""

    def detect(self, batch: CanvasBatch) -> DetectorOutput:
        output = super().detect(batch)
        output.logits[-1, 0, 0, 0] = float("nan")
        return output


def test_predictions_that_are_not_finite(coco_tree: Path, source: CocoSource) -> None:
    with pytest.raises(CheckpointError, match="student: its outputs are not finite"):
        ap_of(Broken(source), source, config_for(coco_tree), CPU, ONE)


def test_what_stops_an_evaluation_is_passed_on(coco_tree: Path, source: CocoSource) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ap_of(Nearest(source), source, config_for(coco_tree), CPU, ONE, between=stop)


def test_sizes_that_are_left_open_are_those_of_the_views(coco_tree: Path) -> None:
    config = Config(views=ViewsConfig(scales=(64, 96), max_size_px=128, canvas_multiple_px=64))
    geometry = eval_recipe(config).detection
    assert geometry is not None
    assert (geometry.scales, geometry.max_size_px, geometry.canvas_multiple_px) == ((96,), 128, 64)
    geometry = eval_recipe(config_for(coco_tree)).detection
    assert geometry is not None
    assert (geometry.scales, geometry.max_size_px) == ((64,), 96)


# --- networks and the command line -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a small detector with boxes of all sizes and scores that differ."""
    torch.manual_seed(2)
    net = create_vidt("test_vidt", NUM_CLASSES)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "class_embed" in name and name.endswith("weight"):
                parameter.normal_(std=0.5)
    path = tmp_path_factory.mktemp("weights") / "detector.pth"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def pipeline(coco_tree: Path, weights: Path, tmp_path: Path) -> Path:
    """A pipeline file for images of at most 96 px."""
    path = tmp_path / "run.toml"
    path.write_text(
        f'[source]\ntrain = "{coco_tree}"\n[views]\ncanvas_multiple_px = 32\n'
        f'[teacher]\nname = "test_vidt"\nweights = "{weights}"\n'
        '[eval]\nsize_px = 64\nmax_size_px = 96\nbatch_size = 3\nworkers = 0\ndevice = "cpu"\n'
    )
    return path


def assert_same_detections(first: Path, second: Path) -> None:
    """The same but for rounding, which is not the same with another number of threads or another place in memory."""
    scores, boxes = [], []
    for path in (first, second):
        entries = json.loads(path.read_text())
        assert [entry["image_id"] for entry in entries] == sorted(entry["image_id"] for entry in entries)
        scores.append([entry["score"] for entry in entries])
        boxes.append(sum(np.array(entry["bbox"]) for entry in entries))
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    np.testing.assert_allclose(boxes[0], boxes[1], rtol=1e-3)


def test_two_ranks_write_what_one_writes(
    pipeline: Path, tmp_path: Path, source: CocoSource, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["eval", str(pipeline), "--teacher", "--output", str(tmp_path / "one")], standalone_mode=False)
    said = capsys.readouterr()
    assert "AP small" in said.out and "teacher test_vidt" in said.out
    assert f"wrote {tmp_path / 'one' / 'detections.json'}" in said.err
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vkd_cache"]
    arguments = ["eval", str(pipeline), "--teacher", "--output", str(tmp_path / "two"), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = subprocess.run(command + arguments, capture_output=True, text=True, env=environment, check=False)
    assert ranks.returncode == 0, ranks.stderr
    (found,) = json.loads(ranks.stdout)["results"]
    one, two = (tmp_path / folder / "detections.json" for folder in ("one", "two"))
    assert_same_detections(one, two)
    assert (two.parent / "detections.png").is_file()
    assert len(json.loads(two.read_text())) == 100 * NUM_IMAGES
    assert (found["num_images"], found["num_broken"]) == (NUM_IMAGES, 0)
    numbers = twelve(DetectionResult(**found))
    assert numbers == by_hand(source.annotation_file, two)
    assert numbers == pytest.approx(by_hand(source.annotation_file, one), abs=1e-3)


def test_a_student_equals_the_teacher_of_the_same_weights(coco_tree: Path, weights: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "student" / "weights.pth"
    checkpoint.parent.mkdir()
    shutil.copy(weights, checkpoint)
    teacher = tmp_path / "teacher" / "weights.pth"
    teacher.parent.mkdir()
    shutil.copy(weights, teacher)
    config = replace(
        config_for(coco_tree),
        student=StudentConfig(name="test_vidt"),
        teacher=TeacherConfig(name="test_vidt", weights=str(teacher)),
    )
    first, second = evaluate(config, EvalRequest(checkpoint=str(checkpoint), teacher=True), ONE)
    assert isinstance(first, DetectionResult) and isinstance(second, DetectionResult)
    assert twelve(first) == pytest.approx(twelve(second), abs=1e-3)
    assert (first.name, second.name) == ("student test_vidt", "teacher test_vidt")
    written = [path.parent / "detections.json" for path in (checkpoint, teacher)]  # each beside its weights
    assert_same_detections(*written)
    together = replace(config, eval=replace(config.eval, output=str(tmp_path / "out")))
    evaluate(together, EvalRequest(checkpoint=str(checkpoint), teacher=True), ONE)
    for folder in ("out", "out/teacher"):
        assert_same_detections(tmp_path / folder / "detections.json", written[0])


def test_kinds_that_do_not_belong_together(coco_tree: Path, weights: Path, tmp_path: Path) -> None:
    classes = tmp_path / "classes"
    for name in ("a", "b"):
        (classes / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(classes / name / "image.png")
    detector = TeacherConfig(name="test_vidt", weights=str(weights))
    of_classes = replace(config_for(classes), source=SourceConfig(val=str(classes)))
    with pytest.raises(ConfigError, match=r"found 'test_vidt', but .* has images with classes: expected a classifier"):
        evaluate(replace(of_classes, teacher=detector), EvalRequest(teacher=True), ONE)
    classifier = TeacherConfig(name="test_resnet", weights=str(weights))
    with pytest.raises(ConfigError, match=r"found 'test_resnet', but .* images with boxes: expected a detector"):
        evaluate(replace(config_for(coco_tree), teacher=classifier), EvalRequest(teacher=True), ONE)
    with pytest.raises(ConfigError, match="is a network that classifies whole images"):
        checkpoint = tmp_path / "classifier.pth"
        torch.save(create_student("test_resnet", NUM_CLASSES, input_px=64).net.state_dict(), checkpoint)
        student = replace(config_for(coco_tree), student=StudentConfig(name="test_resnet"))
        evaluate(student, EvalRequest(checkpoint=str(checkpoint)), ONE)
    with pytest.raises(ConfigError, match="images with one class each, but student test_vidt is a detector"):
        student = replace(of_classes, student=StudentConfig(name="test_vidt"))
        evaluate(student, EvalRequest(checkpoint=str(weights)), ONE)


def test_a_cache_of_tokens_has_no_accuracy(coco_tree: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "cache")
    manifest = Manifest(
        dataset={"kind": "coco", "num_classes": NUM_CLASSES, "shard_counts": [4], "shard_hashes": ["a"]},
        recipe=eval_recipe(config_for(coco_tree)).to_json(),
        seed=0,
        nodes=(NodeSpec(name="body_det", layout="tokens", shape=(64,), dtype="float32", codec="float32"),),
        teacher={"name": "test_vidt"},
        head=None,
        numerics={"batch_size": 2},
        versions={},
    )
    create_cache(url, manifest)
    with pytest.raises(ConfigError, match="holds a detector's tokens, not its detections"):
        evaluate(replace(config_for(coco_tree), cache=CacheConfig(url=url)), EvalRequest(cache=True), ONE)


def test_a_folder_that_cannot_be_written(coco_tree: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = replace(
        config_for(coco_tree, output=str(tmp_path / "file" / "out")),
        teacher=TeacherConfig(name="test_vidt", weights=str(weights)),
    )
    with pytest.raises(NotADirectoryError):  # one message on the command line, before anything is evaluated
        evaluate(config, EvalRequest(teacher=True), ONE)


def test_our_checkpoints_bring_their_sizes(coco_tree: Path, weights: Path, tmp_path: Path) -> None:
    trained = Config(
        student=StudentConfig(name="test_vidt"),
        views=ViewsConfig(recipe="vidt", scales=(48, 64), max_size_px=96, canvas_multiple_px=32),
    )
    state = {
        "format": CHECKPOINT_FORMAT,
        "version": 1,
        "student": {f"net.{name}": value for name, value in torch.load(weights, weights_only=True).items()},
        "ema": None,
        "config": json.loads(json.dumps(config_to_json(trained))),
        "num_classes": NUM_CLASSES,
    }
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
    ours, theirs = tmp_path / "ours" / "last.pt", tmp_path / "theirs" / "weights.pth"
    torch.save(state, ours)
    shutil.copy(weights, theirs)
    open_sizes = replace(config_for(coco_tree, size_px=0, max_size_px=0), views=ViewsConfig())
    (found,) = evaluate(open_sizes, EvalRequest(checkpoint=str(ours)), ONE)
    assert found.name == "student test_vidt"
    named = replace(config_for(coco_tree), student=StudentConfig(name="test_vidt"))
    evaluate(named, EvalRequest(checkpoint=str(theirs)), ONE)
    assert_same_detections(ours.parent / "detections.json", theirs.parent / "detections.json")
