"""The proof: at the same weights, the loss from the cache is the loss with the live teacher."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import pipeline, run_cli

from vkd_cache.config import Config
from vkd_cache.errors import CacheMismatchError, ConfigError, CorruptCacheError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.compare import BOUNDS, CompareReport, compare
from vkd_cache.stages.extract import extract

Build = Callable[..., Config]


def compared(build: Build, cache: Path, output: Path, steps: int, **sections: Any) -> CompareReport:
    settings = {"batch_size": 8, "output": str(output)} | sections.pop("train", {})
    return compare(build(cache={"url": str(cache)}, train=settings, **sections), steps=steps)


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 1e-3), ("uint8", 5e-3)])
def test_a_hundred_steps_in_lockstep(tiny_config: Build, tmp_path: Path, dtype: str, bound: float) -> None:
    extract(tiny_config(cache={"url": str(tmp_path / "cache"), "dtype": dtype}, views={"count": "2"}), JobSplit())
    report = compared(tiny_config, tmp_path / "cache", tmp_path / "out", 100)
    assert report.bound == bound and report.within_bound and report.exit_code == 0
    assert report.lockstep.keys() == {"task", "feature", "logit", "total"}
    for name, gaps in report.lockstep.items():
        assert len(gaps) == 100 and max(gaps) <= bound, name
    assert report.lockstep["task"] == [0.0] * 100
    assert max(report.lockstep["feature"]) > 0
    assert len(report.gradient) == 100 and 0 < max(report.gradient) < 20 * bound
    assert min(report.gradient_cosine) > 0.999
    # free-running: equal at first, and side by side afterwards
    assert report.cached["total"][0] == pytest.approx(report.live["total"][0], rel=bound)
    assert report.cached["total"] == pytest.approx(report.live["total"], rel=0.05)
    document = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert document["curves"]["lockstep"] == report.lockstep
    assert document["config"]["train"]["epochs"] == 2 and len(document["cache_fingerprint"]) == 64
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000


def test_the_program_says_when_it_is_not_so(
    tiny_config: Build, digits_tree: Path, teacher_file: Path, tmp_path: Path
) -> None:
    """Features made under another autocast than the live teacher's are outside the bound of their type."""
    config = tiny_config(
        cache={"url": str(tmp_path / "cache"), "dtype": "float32"}, extract={"autocast": "bfloat16"}
    )
    extract(config, JobSplit())
    file = pipeline(
        tmp_path,
        source={"train": str(digits_tree)},
        teacher={"name": "test_resnet", "weights": str(teacher_file)},
        cache={"url": str(tmp_path / "cache")},
        student={"name": "test_vit"},
        extract={"batch_size": 16},
        train={"batch_size": 16, "device": "cpu", "workers": 0, "output": str(tmp_path / "out")},
    )
    done = run_cli(["compare", file, "--steps", "3", "--json"])
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert not document["within_bound"] and document["bound"] == BOUNDS["float32"]
    assert "NOT within" in done.stderr
    assert "autocast 'bfloat16' there, 'off' here" in done.stderr


def test_any_precision_and_term(tiny_config: Build, small_cache: Path, tmp_path: Path) -> None:
    for number, change in enumerate(
        (
            {"train": {"amp": "bf16"}},
            {"train": {"amp": "fp16", "clip_grad": 1.0, "ema_decay": 0.9}},
            {"loss": {"logit_weight": 0.0, "normalisation": "whiten"}},
            {"loss": {"feature_weight": 0.0}, "student": {"name": "test_resnet"}},
        )
    ):
        report = compared(tiny_config, small_cache, tmp_path / str(number), 3, **change)
        assert report.within_bound, change
        assert 2 <= len(report.gradient) <= 3 and max(report.gradient) < 0.02


def test_what_cannot_be_compared(
    tiny_config: Build, small_cache: Path, digits_tree: Path, teacher_file: Path, tmp_path: Path
) -> None:
    def refused(match: str, kind: type[Exception] = ConfigError, cache: Path = small_cache, **sections: Any) -> None:
        with pytest.raises(kind, match=match):
            compared(tiny_config, cache, tmp_path / "out", 2, **sections)

    refused("needs both teachers", teacher={"name": ""})
    refused("no teacher to compare", loss={"feature_weight": 0.0, "logit_weight": 0.0})
    refused("has fewer usable samples", train={"batch_size": 206})
    other = tmp_path / "other.pt"
    torch.save({name: value * 1.5 for name, value in torch.load(teacher_file, weights_only=True).items()}, other)
    refused("was made with teacher 'test_resnet'", CacheMismatchError, teacher={"weights": str(other)})
    refused("input_px 32 there, 48 here", CacheMismatchError, teacher={"input_px": 48})
    root = tmp_path / "digits"
    shutil.copytree(digits_tree, root)
    first, second = sorted((root / "train").glob("*/*.jpg"))[:2]
    shutil.copy(first, second)
    refused("the teacher saw", CorruptCacheError, source={"train": str(root)}, train={"batch_size": 200})
