"""Two real processes under torchrun: the weights of one process on the joined batches, and one stop for both."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_runs import assert_same_run, log, pipeline, run, run_cli, weights

from vkd_cache.config import Config
from vkd_cache.errors import CheckpointError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.checkpoints import read_checkpoint
from vkd_cache.stages.evaluate import EvalRequest, evaluate
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.learner import step_seed
from vkd_cache.stages.run import prepare_run
from vkd_cache.stored_rows import join_rows
from vkd_cache.views.params import MixPlan

Build = Callable[..., Config]
# eps: Adam divides by the gradient's size, and would blow the last digit of a gradient near zero up to a whole step
TRAIN = {"batch_size": 10, "accumulate": 2, "epochs": 1, "clip_grad": 1.0, "ema_decay": 0.8, "eps": 1e-3, "lr": 2e-3}


def sections(cache: Path, tree: Path, output: Path, **train: Any) -> dict[str, dict[str, Any]]:
    fixed = {"workers": 0, "device": "cpu", "log_every": 1, "open_shards": 2, "output": str(output)}
    return {
        "source": {"train": str(tree), "shard_size": 48},
        "cache": {"url": str(cache)},
        "student": {"name": "test_vit"},
        "train": TRAIN | fixed | train,
        "eval": {"workers": 0, "batch_size": 30, "device": "cpu"},
    }


@pytest.fixture(scope="module")
def two_ranks(small_cache: Path, digits_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    file = pipeline(folder, **sections(small_cache, digits_tree, folder / "run"))
    done = run_cli(["train", file], processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("train: 5 steps, ") == 1  # one rank speaks
    return folder / "run"


def test_two_processes_are_one_on_the_joined_batch(
    tiny_config: Build, small_cache: Path, digits_tree: Path, two_ranks: Path
) -> None:
    config = tiny_config(**sections(small_cache, digits_tree, two_ranks / "unused"))
    ranks = [prepare_run(config, JobSplit(index=rank, count=2)) for rank in range(2)]
    alone = prepare_run(config, JobSplit())
    supply = alone.supply(live=False)
    learner = alone.learner(supply)
    batches = []
    for rank in ranks:
        with rank.feed(supply) as feed:
            batches.append(list(feed.batches(epoch=0, step=0, workers=0)))
    assert len(batches[0]) == len(batches[1]) == 10
    assert {len(one) - len(other) for one, other in zip(*batches, strict=True)} != {0}  # a lone sample somewhere
    both = [joined(one, other) for one, other in zip(*batches, strict=True)]
    lines = log(two_ranks)
    for step, line in enumerate(lines):
        group = [(batch, batch.pixels) for batch in both[2 * step : 2 * step + 2]]
        terms = learner.step(group, supply, line["lr"], step_seed(0, step, 0))
        assert {name: float(value) for name, value in terms.items()} == pytest.approx(
            {name: line[name] for name in terms}, rel=1e-5
        )
    assert len(lines) == 5
    state = read_checkpoint(two_ranks / "last.pt")
    assert learner.ema is not None
    for found, expected in (
        (state["student"], learner.student.state_dict()),
        (state["ema"], learner.ema.module.state_dict()),
    ):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def joined(one: FedBatch, other: FedBatch) -> FedBatch:
    """Both ranks' batches as one."""
    first, second = one.rendered, other.rendered
    assert first.mix is not None and second.mix is not None
    mix = MixPlan(
        partner=np.concatenate([first.mix.partner, second.mix.partner + np.uint32(len(one))]),
        kind=np.concatenate([first.mix.kind, second.mix.kind]),
        lam=np.concatenate([first.mix.lam, second.mix.lam]),
        box=np.concatenate([first.mix.box, second.mix.box]),
    )
    rendered = dataclasses.replace(
        first,
        pixels=torch.cat([first.pixels, second.pixels]),
        label=torch.cat([first.label, second.label]),
        shard=np.concatenate([first.shard, second.shard]),
        row=np.concatenate([first.row, second.row]),
        mix=mix,
    )
    here, there = np.arange(len(one)), np.arange(len(one), len(one) + len(other))
    nodes = {
        name: join_rows([(one.nodes[name], here), (other.nodes[name], there)], len(one) + len(other))
        for name in one.nodes
    }
    return dataclasses.replace(one, rendered=rendered, nodes=nodes)


STOPPING = """
import os, signal, sys
from torch import nn
from vkd_cache import cli, students
seen = 0
def hear(module, _):
    global seen
    seen += isinstance(module, students.Student) and module.training
    if seen == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
nn.modules.module.register_module_forward_pre_hook(hear)
cli.main(sys.argv[1:])
"""


def test_a_signal_to_one_rank_stops_both(
    tiny_config: Build, small_cache: Path, digits_tree: Path, two_ranks: Path, tmp_path: Path
) -> None:
    output, script = tmp_path / "run", tmp_path / "stopping.py"
    script.write_text(STOPPING)
    file = pipeline(tmp_path, **sections(small_cache, digits_tree, output))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(script), "train", file], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "stopped and saved at step 3" in done.stderr
    config = sections(small_cache, digits_tree, output, resume="auto")
    with pytest.raises(CheckpointError, match="processes: 2 in the checkpoint, 1 now"):
        run(tiny_config(**config, teacher={"name": "", "weights": ""}, views={"size_px": 224, "seed": 0}))
    done = run_cli(["train", file, "--resume", "auto"], processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_run(two_ranks, output)


def test_batch_norm_is_evaluated_as_it_is_saved(
    tiny_config: Build, small_cache: Path, digits_tree: Path, tmp_path: Path
) -> None:
    """Each rank has statistics of its own; evaluated, and saved, are the first one's. Without a cache, from labels."""
    config = sections(Path(), digits_tree, tmp_path / "run", batch_size=32, accumulate=1, lr=1e-2)
    config |= {"student": {"name": "test_resnet"}, "views": {"size_px": 32}, "cache": {"url": ""}}
    config["loss"] = {"feature_weight": 0.0, "logit_weight": 0.0}
    done = run_cli(["train", pipeline(tmp_path, **config)], processes=2)
    assert done.returncode == 0, done.stderr
    (line,) = log(tmp_path / "run", "eval")
    for ema in (False, True):
        request = EvalRequest(checkpoint=str(tmp_path / "run" / "last.pt"), ema=ema)
        (result,) = evaluate(tiny_config(**config), request, JobSplit())
        assert result.top1 == pytest.approx(line["ema_top1" if ema else "top1"])
        assert result.top5 == pytest.approx(line["ema_top5" if ema else "top5"])
    assert any("running_mean" in name for name in weights(tmp_path / "run"))
