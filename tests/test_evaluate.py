"""Evaluation: exact counts, however many ranks; broken images; every kind of checkpoint; the teacher in a cache."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms.functional import to_tensor

from vkd_cache.cache import Manifest, NodeSpec, create_cache
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
from vkd_cache.errors import CacheFormatError, CheckpointError, ConfigError, IncompleteCacheError, SourceError
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import open_source
from vkd_cache.stages.evaluate import EvalRequest, EvalResult, accuracy_of, evaluate
from vkd_cache.students import Student, create_student
from vkd_cache.views.params import ViewParams, params_to_columns

CLASSES = 7
SIDE_PX = 32
STUDENT = "test_resnet"
CPU = torch.device("cpu")
BROKEN = "class3/broken"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with 29 images of odd sizes, one broken in val."""
    folder = tmp_path_factory.mktemp("images")
    numbers = np.random.default_rng(3)
    for index in range(29):
        height, width = (int(v) for v in numbers.integers(20, 70, 2))
        blotches = numbers.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(blotches).resize((width, height), Image.Resampling.BICUBIC)
        for split in ("train", "val"):
            path = folder / split / f"class{index % CLASSES}" / f"image{index:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    (folder / "val" / f"{BROKEN}.jpg").write_bytes(b"\xff\xd8\xff not an image")
    return folder


def config_for(root: Path, **sections: Any) -> Config:
    defaults: dict[str, Any] = {
        "source": SourceConfig(train=str(root), shard_size=8),
        "views": ViewsConfig(size_px=SIDE_PX),
        "eval": EvalConfig(batch_size=4, workers=0, device="cpu"),
    }
    return Config(**(defaults | sections))


def make_student(name: str = STUDENT, seed: int = 0, **arguments: Any) -> Student:
    torch.manual_seed(seed)
    student = create_student(name, CLASSES, input_px=SIDE_PX, **arguments)
    with torch.no_grad():  # an untrained head gives every image the same class
        for parameter, value in student.named_parameters():
            if parameter.endswith(("fc.weight", "head.weight", "head_dist.weight")):
                value.normal_(std=2.0)
    return student.eval()


@torch.no_grad()
def expected_counts(student: nn.Module, root: Path, crop_fraction: float = 0.875) -> tuple[int, int, int]:
    """(samples, top-1, top-5) by torchvision's own evaluation transforms, one image at a time."""
    resize = Resize(round(SIDE_PX / crop_fraction), InterpolationMode.BICUBIC)
    crop = CenterCrop(SIDE_PX)
    counts = np.zeros(3, int)
    for path in sorted((root / "val").glob("*/*.png")):
        pixels = to_tensor(crop(resize(Image.open(path).convert("RGB"))))
        normalised = (pixels - torch.tensor(student.mean).view(3, 1, 1)) / torch.tensor(student.std).view(3, 1, 1)
        order = student.net(normalised[None])[0].argsort(descending=True).tolist()
        rank = order.index(int(path.parent.name.removeprefix("class")))
        counts += [1, rank < 1, rank < 5]
    return int(counts[0]), int(counts[1]), int(counts[2])


def counts_of(result: EvalResult) -> tuple[int, int, int]:
    count = result.num_samples
    return count, round(result.top1 * count / 100), round(result.top5 * count / 100)


def save_ours(student: Student, path: Path, **more: Any) -> str:
    config = dataclasses.replace(
        config_for(path.parent), student=StudentConfig(name=STUDENT), views=ViewsConfig(size_px=SIDE_PX)
    )
    state = {
        "format": "vkd-cache checkpoint",
        "version": 1,
        "student": student.state_dict(),
        "ema": None,
        "config": json.loads(json.dumps(config_to_json(config))),
        "num_classes": CLASSES,
        "teacher_width": None,
    }
    torch.save(state | more, path)
    return str(path)


# --- counting ----------------------------------------------------------------------------------------------------


def test_counts_are_torchvisions_and_broken_images_are_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = make_student()
    student.train()
    source = open_source(str(root), split="val", shard_size=8)
    for crop_fraction in (0.875, 1.0):
        config = config_for(root, eval=EvalConfig(batch_size=4, workers=0, device="cpu", crop_fraction=crop_fraction))
        result = accuracy_of(student, source, config, CPU, JobSplit())
        assert student.training  # as it was
        student.eval()
        assert counts_of(result) == expected_counts(student, root, crop_fraction)
        student.train()
        assert result.num_broken == 1
        assert 0 < result.top5 < 100
    said = capsys.readouterr().err
    assert BROKEN in said
    assert "1 broken images are not counted" in said
    assert set(json.loads(json.dumps(result.to_json()))) == {
        "name", "split", "num_samples", "num_broken", "top1", "top5", "seconds"
    }  # fmt: skip


@settings(deadline=None, max_examples=12)
@given(batch_size=st.integers(1, 40), shard_size=st.integers(2, 40))
def test_counts_do_not_depend_on_batches_or_shards(root: Path, batch_size: int, shard_size: int) -> None:
    config = config_for(root, eval=EvalConfig(batch_size=batch_size, workers=0, device="cpu"))
    source = open_source(str(root), split="val", shard_size=shard_size)
    result = accuracy_of(make_student(), source, config, CPU, JobSplit())
    assert counts_of(result) == expected_counts(make_student(), root)


def test_worker_processes_give_the_same(root: Path) -> None:
    config = config_for(root, eval=EvalConfig(batch_size=4, workers=2, device="cpu"))
    source = open_source(str(root), split="val", shard_size=8)
    assert counts_of(accuracy_of(make_student(), source, config, CPU, JobSplit())) == expected_counts(
        make_student(), root
    )


def test_two_ranks_count_every_image_once(root: Path, tmp_path: Path) -> None:
    checkpoint = save_ours(make_student(), tmp_path / "last.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vkd_cache"]
    arguments = ["eval", "--source", str(root / "val"), "--checkpoint", checkpoint, "--student", STUDENT, "--json"]
    arguments += ["--workers", "0", "--batch-size", "4", "--device", "cpu"]
    ran = subprocess.run(
        command + arguments, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert ran.returncode == 0, ran.stderr
    documents = [json.loads(text) for text in ran.stdout.replace("}\n{", "}\x00{").split("\x00") if text.strip()]
    for document in documents:
        (result,) = document["results"]
        assert counts_of(EvalResult(**result)) == expected_counts(make_student(), root)
        assert result["num_broken"] == 1


def test_labels_the_model_does_not_know(root: Path) -> None:
    source = open_source(str(root), split="val", shard_size=8)
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="the model has 3 classes"):
        accuracy_of(create_student(STUDENT, 3, input_px=SIDE_PX), source, config_for(root), CPU, JobSplit())


def test_nothing_to_count(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.jpg").write_bytes(b"nothing")
    source = open_source(str(tmp_path), split="val", shard_size=8)
    with pytest.raises(SourceError, match="none of its 2 images can be decoded"):
        accuracy_of(make_student(), source, config_for(tmp_path), CPU, JobSplit())


# --- checkpoints and teachers ------------------------------------------------------------------------------------


def test_our_checkpoints_name_their_student(root: Path, tmp_path: Path) -> None:
    student, average = make_student(teacher_width=24), make_student(seed=1)
    path = save_ours(student, tmp_path / "last.pt", ema=average.state_dict(), teacher_width=24)
    config = config_for(root, views=ViewsConfig(size_px=64))  # the checkpoint's own size counts
    state = torch.random.get_rng_state()
    (result,) = evaluate(config, EvalRequest(checkpoint=path), JobSplit())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert counts_of(result) == expected_counts(student, root)
    assert (result.name, result.split) == (f"student {STUDENT}", "val")
    (averaged,) = evaluate(config, EvalRequest(checkpoint=path, ema=True), JobSplit())
    assert counts_of(averaged) == expected_counts(average, root) != counts_of(result)
    assert averaged.name == f"student {STUDENT} (EMA)"


def test_the_authors_checkpoints(root: Path, tmp_path: Path) -> None:
    student = make_student("deit_ti_distilled")
    published = {f"module.{name.removeprefix('net.')}": value for name, value in student.state_dict().items()}
    published["module.projector.parametrizations.weight.original"] = torch.zeros(3, 192)
    published["module.projector.parametrizations.weight.0.base"] = torch.zeros(3, 3)
    path = tmp_path / "authors.pth"
    torch.save({"student": published, "epoch": 3}, path)
    config = config_for(root, student=StudentConfig(name="deit_ti_distilled"))
    (result,) = evaluate(config, EvalRequest(checkpoint=str(path)), JobSplit())
    assert counts_of(result) == expected_counts(student, root)
    with pytest.raises(ConfigError, match="does not say which student it holds"):
        evaluate(config_for(root), EvalRequest(checkpoint=str(path)), JobSplit())


@pytest.mark.parametrize(
    ("change", "request_", "message"),
    [
        ({}, {"ema": True}, "holds no weight average"),
        ({"config": {}}, {}, "says it is a checkpoint of vkd-cache, but lacks 'student'"),
        ({"config": None}, {}, "says it is a checkpoint of vkd-cache, but lacks"),
        ({"num_classes": 9}, {}, r"does not fit the student"),
    ],
)
def test_checkpoints_that_cannot_be_used(
    root: Path, tmp_path: Path, change: dict[str, Any], request_: dict[str, Any], message: str
) -> None:
    path = save_ours(make_student(), tmp_path / "last.pt", **change)
    with pytest.raises(CheckpointError, match=message):
        evaluate(config_for(root), EvalRequest(checkpoint=path, **request_), JobSplit())


def test_another_student_than_asked_for(root: Path, tmp_path: Path) -> None:
    path = save_ours(make_student(), tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=f"holds a '{STUDENT}', this run asks for 'test_vit'"):
        evaluate(config_for(root, student=StudentConfig(name="test_vit")), EvalRequest(checkpoint=path), JobSplit())


def test_a_teacher_equals_the_same_student(root: Path, tmp_path: Path) -> None:
    student = make_student()
    path = str(tmp_path / "teacher.safetensors")
    save_file(dict(student.net.state_dict()), path)
    config = config_for(root, teacher=TeacherConfig(name=STUDENT, weights=path))
    ours = save_ours(student, tmp_path / "last.pt")
    first, second = evaluate(config, EvalRequest(checkpoint=ours, teacher=True), JobSplit())
    assert counts_of(first) == counts_of(second) == expected_counts(student, root)
    assert second.name == f"teacher {STUDENT}"


def test_requests_that_ask_for_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate(config_for(tmp_path), EvalRequest(), JobSplit())
    with pytest.raises(ConfigError, match=r"\[source\] val is empty, and there is no val/"):
        evaluate(config_for(tmp_path), EvalRequest(teacher=True), JobSplit())
    with pytest.raises(ConfigError, match=r"\[cache\] url is empty"):
        evaluate(config_for(tmp_path), EvalRequest(cache=True), JobSplit())


# --- the teacher in a cache --------------------------------------------------------------------------------------


def manifest(nodes: tuple[NodeSpec, ...]) -> Manifest:
    return Manifest(
        dataset={"kind": "folder", "num_classes": 3, "shard_counts": [4, 3], "shard_hashes": ["a", "b"]},
        recipe={},
        seed=0,
        nodes=nodes,
        teacher={"name": "test_resnet"},
        head=None,
        numerics={"batch_size": 2},
        versions={},
    )


def node(name: str, width: int) -> NodeSpec:
    return NodeSpec(name=name, layout=name, shape=(width,), dtype="float32", codec="float32")


def columns(
    rows: list[int], labels: list[int], partners: list[int] | None = None, lam: float = 1.0
) -> dict[str, np.ndarray]:
    count = len(rows)
    params = ViewParams(seed=0, source_size=(4, 4), crop=(0, 0, 4, 4), flip=False, ops=())
    keys = [f"key{row}" for row in rows]
    offsets = np.cumsum([0, *map(len, keys)]).astype(np.uint32)
    mixed = partners is not None
    return params_to_columns([params] * count, 0) | {
        "key_bytes": np.frombuffer("".join(keys).encode(), np.uint8),
        "key_offsets": offsets,
        "row": np.array(rows, np.uint32),
        "label": np.array(labels, np.uint32),
        "digest": np.zeros(count, np.uint64),
        "partner": np.array(partners if mixed else rows, np.uint32),
        "mix_kind": np.full(count, int(mixed), np.uint8),
        "mix_lambda": np.full(count, lam, np.float32),
        "mix_box": np.zeros((count, 4), np.uint16),
    }


def one_hot(classes: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), 3).float()


def test_cached_teacher_through_the_stored_head(tmp_path: Path) -> None:
    url = str(tmp_path / "cache")
    head = {"weight": torch.eye(3).flip(0), "bias": torch.tensor([0.0, 0.25, 0.0])}  # reverses the classes
    writer = create_cache(url, manifest((node("pooled", 3),)), head)
    # view 0, shard 0: row 1 is broken; unmixed; the head turns features 2, 0, 1 into classes 0, 2, 1
    broken = [("key1", 1, "truncated")]
    writer.publish(0, 0, columns([0, 2, 3], [0, 2, 0]), {"pooled": one_hot([2, 0, 1])}, broken)
    writer.publish(1, 0, columns([0, 1, 2], [1, 1, 1]), {"pooled": one_hot([1, 1, 1])})
    # view 1, shard 0: pairs (0, 3) and (2, 2), own share 0.25: the partner's label counts, but for the lone row
    lone = columns([0, 2, 3], [0, 1, 2], [3, 2, 0], 0.25)
    lone["mix_lambda"][1] = 1.0
    writer.publish(0, 1, lone, {"pooled": one_hot([0, 1, 2])}, broken)
    results = evaluate(config_for(tmp_path, cache=CacheConfig(url=url)), EvalRequest(cache=True), JobSplit())
    found = [(r.split, r.num_samples, r.num_broken, round(r.top1 * r.num_samples / 100), r.top5) for r in results]
    assert found == [("view 0", 6, 1, 5, 100.0), ("view 1", 3, 1, 3, 100.0), ("all views", 9, 2, 8, 100.0)]
    assert {r.name for r in results} == {"cached teacher test_resnet"}


def test_cached_teacher_from_stored_logits(tmp_path: Path) -> None:
    url = str(tmp_path / "cache")
    writer = create_cache(url, manifest((node("pooled", 2), node("logits", 3))))
    values = {"pooled": torch.zeros(3, 2), "logits": one_hot([0, 1, 2])}
    writer.publish(1, 0, columns([0, 1, 2], [0, 1, 1], [1, 0, 2], 0.5), values)  # equal shares: the own label
    first, every = evaluate(config_for(tmp_path, cache=CacheConfig(url=url)), EvalRequest(cache=True), JobSplit())
    assert round(first.top1 * 3) == 200
    assert dataclasses.replace(every, split="", seconds=0) == dataclasses.replace(first, split="", seconds=0)


def test_caches_without_an_answer(tmp_path: Path) -> None:
    url = str(tmp_path / "cache")
    writer = create_cache(url, manifest((node("pooled", 3),)))
    config = config_for(tmp_path, cache=CacheConfig(url=url))
    with pytest.raises(IncompleteCacheError, match="nothing is published yet"):
        evaluate(config, EvalRequest(cache=True), JobSplit())
    writer.publish(1, 0, columns([0, 1, 2], [0, 1, 1]), {"pooled": torch.zeros(3, 3)})
    with pytest.raises(CacheFormatError, match="found nodes pooled and no head"):
        evaluate(config, EvalRequest(cache=True), JobSplit())
