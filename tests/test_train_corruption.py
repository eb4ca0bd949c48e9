"""Damage while a run goes on, and damage to what it leaves: noticed, and the last checkpoint still serves."""

import contextlib
import io
import itertools
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_samples import unit_file
from repair_jobs import repair
from torch import nn
from train_runs import log, run, same_value

from vkd_cache.cli import main
from vkd_cache.config import Config
from vkd_cache.errors import CacheError, CheckpointError
from vkd_cache.runtime import JobSplit
from vkd_cache.sealing import seal_problem, sealed
from vkd_cache.stages.checkpoints import read_checkpoint, save_checkpoint
from vkd_cache.stages.extract import extract
from vkd_cache.students import Student
from vkd_cache.students.checkpoint import read_torch_file

Build = Callable[..., Config]
EPOCH_STEPS = 6  # 102 slots of two samples, 32 samples a step


@contextlib.contextmanager
def before_forward(number: int, happens: Callable[[], object]) -> Iterator[None]:
    """Something happens before the student's `number`-th forward pass of a training step, from 1."""
    counter = itertools.count(1)

    def hook(module: nn.Module, _: object) -> None:
        if isinstance(module, Student) and module.training and next(counter) == number:
            happens()

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    assert next(counter) > number


def config_of(build: Build, cache: Path, output: Path, **train: Any) -> Config:
    settings = {"batch_size": 32, "epochs": 3, "open_shards": 1, "checkpoint_every": 1, "output": str(output)}
    return build(cache={"url": str(cache)}, train=settings | train)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


@pytest.fixture(scope="module")
def whole(tiny_config: Build, small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run(config_of(tiny_config, small_cache, output)).steps == 3 * EPOCH_STEPS
    return output


@pytest.mark.parametrize("part", ["unit", "record"])
@pytest.mark.parametrize(("forward", "view"), [(2, 1), (EPOCH_STEPS + 3, 0)])  # views take turns, epoch by epoch
def test_a_unit_that_is_damaged_while_a_run_goes_on(
    tiny_config: Build, small_cache: Path, whole: Path, tmp_path: Path, forward: int, view: int, part: str
) -> None:
    cache, output = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(small_cache, cache)
    victim = unit_file(cache, 3, view) if part == "unit" else cache / f"records/view-{view:04d}/shard-000003.json"
    damage = before_forward(forward, lambda: flip(victim, 700 if part == "unit" else 60))
    with damage, pytest.raises(CacheError, match=rf"{re.escape(victim.name)}: .*`vkd-cache verify --repair`"):
        run(config_of(tiny_config, cache, output))
    step = read_checkpoint(output / "last.pt")["standing"]["step"]
    assert forward <= step < forward + 2 * EPOCH_STEPS
    with pytest.raises(CacheError, match=re.escape(victim.name)):  # not a second time either
        run(config_of(tiny_config, cache, output, resume="auto"))
    assert read_checkpoint(output / "last.pt")["standing"]["step"] >= step

    assert len(repair(cache).repaired) == 1
    extract(tiny_config(cache={"url": str(cache)}, views={"count": "2"}), JobSplit())
    assert run(config_of(tiny_config, cache, output, resume="auto")).steps == 3 * EPOCH_STEPS
    for name in ("last.pt", "best.pt"):
        here, there = read_checkpoint(output / name), read_checkpoint(whole / name)
        assert [entry for entry in there if entry != "config" and not same_value(here.get(entry), there[entry])] == []
    assert log(output) == log(whole)


# --------------------------------------------------------------------------------------------------- checkpoints


def small_checkpoint(path: Path) -> bytes:
    student = {"w": torch.arange(40.0).reshape(8, 5)}
    save_checkpoint(path, {"student": student, "standing": {"step": 3}, "config": {}, "views": [0], "identity": {}})
    return path.read_bytes()


def test_every_flip_and_every_length_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    good = small_checkpoint(path)
    with path.open("r+b") as file:
        for place, byte in enumerate(good):
            for mask in (0xFF, 1 << place % 8):
                os.pwrite(file.fileno(), bytes([byte ^ mask]), place)
                with pytest.raises(CheckpointError, match=r"last\.pt"):
                    read_checkpoint(path)
            os.pwrite(file.fileno(), bytes([byte]), place)
        for length in reversed(range(len(good))):
            file.truncate(length)
            with pytest.raises(CheckpointError, match=r"last\.pt"):
                read_checkpoint(path)
    for tail in (b"\0", good):
        path.write_bytes(good + tail)
        with pytest.raises(CheckpointError, match=r"without the checksum at its end|damaged"):
            read_checkpoint(path)
    path.write_bytes(good)
    assert read_checkpoint(path)["standing"] == {"step": 3}


def test_torch_itself_would_not_notice(tmp_path: Path) -> None:
    """Why there is a checksum; and that it is in nobody's way."""
    path = tmp_path / "last.pt"
    good = small_checkpoint(path)
    weights = torch.load(path, weights_only=True)["student"]["w"]
    place = good.index(weights.numpy().tobytes()) + 5
    flip(path, place)
    assert not torch.equal(torch.load(path, weights_only=True)["student"]["w"], weights)
    with pytest.raises(CheckpointError, match="damaged since it was written: found checksum"):
        read_checkpoint(path)
    path.write_bytes(good)
    assert zipfile.ZipFile(path).testzip() is None
    assert seal_problem(path) == ""
    plain = io.BytesIO()
    torch.save({"w": weights}, plain)
    path.write_bytes(plain.getvalue())
    assert seal_problem(path) is None
    assert torch.equal(read_torch_file(path)["w"], weights)  # anybody else's files stay readable
    path.write_bytes(b"")
    assert seal_problem(path) is None
    with pytest.raises(ValueError, match="expected a zip archive without a comment"):
        sealed(good)


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_real_checkpoint(
    tiny_config: Build, small_cache: Path, whole: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 places of it, and the commands that read it."""
    output = shutil.copytree(whole, tmp_path / "run")
    path = output / name
    good = path.read_bytes()
    for place in range(0, len(good), len(good) // 200):
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), bytes([good[place] ^ 0x10]), place)
            with pytest.raises(CheckpointError, match="damaged"):
                read_checkpoint(path)
            os.pwrite(file.fileno(), good[place : place + 1], place)
    flip(path, len(good) // 2)
    val = tiny_config().source.train
    with pytest.raises(SystemExit) as done:
        main(["eval", "--source", val, "--checkpoint", str(path), "--workers", "0", "--device", "cpu"])
    said = capsys.readouterr().err
    assert done.value.code == 1
    assert f"Error: {path}: damaged since it was written: found checksum" in said
    if name == "last.pt":
        with pytest.raises(CheckpointError, match="damaged since it was written"):
            run(config_of(tiny_config, small_cache, output, resume="auto"))
