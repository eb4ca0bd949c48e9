"""What several test files start from: real digits as a folder and as tar shards, a teacher's file, a small cache.

All of it is written once a session, through the same code that a user runs.
"""

import io
import os
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from s3_server import S3Server, environment, running_server

from vkd_cache.config import Config, load_config

# The same examples in every run, so that a commit passes or fails everywhere alike; to look for new ones:
# pytest --hypothesis-profile=explore
settings.register_profile("explore")
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

# Processes that tests start are forks of one server, which belongs to whoever starts it first: it has all they need.
PRELOAD = [f"vkd_cache.stages.{name}" for name in ("convert", "extract", "planning", "rendering")]

SIDE_PX = 32
CLASSES = 10
NUM_TRAIN, NUM_VAL = 203, 60
SHARD_SIZE = 48  # five shards of the training split, the last one smaller and odd
TEACHER = "test_resnet"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Processes that tests start take one thread each: the machine is shared, and sums keep their order."""
    import torch

    torch.set_num_threads(1)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    if before is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    else:
        os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Processes that tests start and interrupt can be: a shell's background job hands down that SIGINT is ignored."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def digits() -> dict[str, list[tuple[bytes, int]]]:
    """Encoded images and labels by split: scikit-learn's handwritten digits, as JPEGs of 24 to 32 pixels."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    splits: dict[str, list[tuple[bytes, int]]] = {"train": [], "val": []}
    for index in range(NUM_TRAIN + NUM_VAL):
        side = 24 + index % 9
        image = Image.fromarray((data.images[index] * 15.9).astype(np.uint8))
        buffer = io.BytesIO()
        image.resize((side, side + index % 3), Image.Resampling.BICUBIC).convert("RGB").save(buffer, "JPEG", quality=90)
        splits["train" if index < NUM_TRAIN else "val"].append((buffer.getvalue(), int(data.target[index])))
    return splits


@pytest.fixture(scope="session")
def digits_tree(digits: dict[str, list[tuple[bytes, int]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with train/ and val/, one folder a class. Shared by the session: copy it before changing a file."""
    root = tmp_path_factory.mktemp("digits")
    for split, samples in digits.items():
        for index, (data, label) in enumerate(samples):
            path = root / split / f"digit{label}" / f"image{index:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


@pytest.fixture(scope="session")
def digits_tars(digits: dict[str, list[tuple[bytes, int]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as WebDataset shards: train-00000.tar to train-00004.tar and val-00000.tar in one folder."""
    root = tmp_path_factory.mktemp("digit-tars")
    for split, samples in digits.items():
        size = SHARD_SIZE if split == "train" else len(samples)
        for number, start in enumerate(range(0, len(samples), size)):
            with tarfile.open(root / f"{split}-{number:05d}.tar", "w") as archive:
                for index, (data, label) in enumerate(samples[start : start + size], start=start):
                    for suffix, content in (("jpg", data), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{split}{index:04d}.{suffix}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    return root


@pytest.fixture(scope="session")
def coco_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small COCO layout of digits on photographs; see `coco_samples.write_coco`. Copy it before changing a file."""
    from coco_samples import write_coco

    return write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="session")
def teacher_file(digits: dict[str, list[tuple[bytes, int]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of `TEACHER` with ten classes, at seeded weights whose features differ from image to image."""
    import timm
    import torch
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    torch.manual_seed(11)
    model = timm.create_model(TEACHER, num_classes=CLASSES)
    images = [Image.open(io.BytesIO(data)).resize((SIDE_PX, SIDE_PX)) for data, _ in digits["train"]]
    with torch.no_grad():
        model.get_classifier().weight.normal_(std=0.5)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(1.0)
                module.momentum = None  # batch-norm statistics of the digits themselves
        model.train()(torch.stack([pil_to_tensor(image) for image in images]) / 128 - 1)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tiny_config(digits_tree: Path, teacher_file: Path) -> Callable[..., Config]:
    """Build a small `Config`: `tiny_config(train={"epochs": 1}, cache={"url": ...})`, sections as dictionaries."""

    def build(**sections: dict[str, Any]) -> Config:
        defaults: dict[str, dict[str, Any]] = {
            "source": {"train": str(digits_tree), "shard_size": SHARD_SIZE},
            "views": {"size_px": SIDE_PX, "seed": 5},
            "teacher": {"name": TEACHER, "weights": str(teacher_file)},
            "cache": {"dtype": "float16"},
            "extract": {"batch_size": 16, "workers": 0, "device": "cpu"},
            "student": {"name": "test_vit"},
            "train": {
                "epochs": 2,
                "batch_size": 16,
                "lr": 1e-3,
                "workers": 0,
                "device": "cpu",
                "open_shards": 2,
                "log_every": 1,
                "digest_check": 1.0,
            },
            "eval": {"batch_size": 30, "workers": 0, "device": "cpu"},
        }
        merged = {name: defaults.get(name, {}) | sections.get(name, {}) for name in {**defaults, **sections}}
        return load_config(overrides=merged)

    return build


@pytest.fixture(scope="session")
def small_cache(tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two views of the training digits, extracted by the real stage as float16. Copy it before changing a file."""
    from vkd_cache.runtime import JobSplit
    from vkd_cache.stages.extract import extract

    url = tmp_path_factory.mktemp("cache") / "cache"
    summary = extract(tiny_config(cache={"url": str(url)}, views={"count": "2"}), JobSplit())
    assert summary.exit_code == 0
    return url


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 protocol server in a process of its own on loopback; one a session, so take buckets of your own."""
    with running_server(tmp_path_factory.mktemp("s3") / "server.log") as server:
        yield server


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    """The server, with the environment that a user sets to reach it, for this process and those it starts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))  # local copies are the test's own
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    for name, value in environment(s3_server.endpoint).items():
        monkeypatch.setenv(name, value)
    return s3_server
