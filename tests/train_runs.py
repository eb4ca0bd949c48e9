"""Shared by the tests of training: runs in this process and in others, and what they leave behind."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vkd_cache.config import Config
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.checkpoints import read_checkpoint
from vkd_cache.stages.journal import read_log
from vkd_cache.stages.train import TrainSummary, train

Build = Callable[..., Config]


def run(config: Config) -> TrainSummary:
    return train(config, JobSplit())


def run_cli(arguments: list[str], *, processes: int = 1, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real program, under torchrun where there are several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *torchrun, "-m", "vkd_cache", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **options)


def pipeline(folder: Path, **sections: dict[str, Any]) -> str:
    """A pipeline file with these sections."""
    lines = []
    for section, fields in sections.items():
        lines += [f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in fields.items())]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pipeline.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def weights(output: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = read_checkpoint(output / name)["student"]
    return state


def log(output: Path, kind: str = "step") -> list[dict[str, Any]]:
    """Log lines without what depends on the clock."""
    lines = [line for line in read_log(output / "log.jsonl") if line["kind"] == kind]
    return [{name: value for name, value in line.items() if name != "samples_per_s"} for line in lines]


def same_value(one: Any, other: Any) -> bool:
    """Equality to the last bit, through dictionaries, lists and tensors."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_value(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_value, one, other))
    return bool(one == other)


def assert_same_run(one: Path, other: Path, *, free: tuple[str, ...] = ()) -> None:
    """Checkpoints and logs of two runs are equal to the last bit, but for where they were written, the times, and the
    sections of the configuration that are `free`."""
    assert {path.name for path in one.glob("*.pt")} == {path.name for path in other.glob("*.pt")}
    for path in one.glob("*.pt"):
        states = [read_checkpoint(folder / path.name) for folder in (one, other)]
        for state in states:
            for name in ("output", "resume", "workers"):
                del state["config"]["train"][name]
            for section in free:
                del state["config"][section]
        differing = [name for name in states[0] if not same_value(states[0][name], states[1].get(name))]
        assert not differing, f"{path.name}: {differing}"
    for kind in ("step", "eval"):
        assert log(one, kind) == log(other, kind)
