"""Two real processes train one detector: the losses, the statistics and the weights of one process."""

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detection_jobs import write_detector
from detection_runs import CLASSES, VIEWS, config_builder, still
from torch import nn
from train_runs import log, pipeline

from vkd_cache.runtime import JobSplit
from vkd_cache.stages.checkpoints import read_checkpoint
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.learner import step_seed
from vkd_cache.stages.run import Run, prepare_run
from vkd_cache.stages.supply import NoTeacher
from vkd_cache.tokens import join_tokens

STILL = """
import sys
from torch import nn
from vkd_cache import cli
def still(module, _):
    if isinstance(module, nn.Dropout):
        module.p = 0.0
    if isinstance(module, nn.MultiheadAttention):
        module.dropout = 0.0
nn.modules.module.register_module_forward_pre_hook(still)
cli.main(sys.argv[1:])
"""
DDP = {"batch_size": 2, "accumulate": 2, "epochs": 1, "clip_grad": 0.1, "eps": 1e-3, "lr": 2e-3, "live_teacher": True}


def test_two_processes_are_one(coco_tree: Path, tmp_path: Path) -> None:
    """Live teacher, two ranks: statistics, boxes and gradients are those of one process with all images.

    Some images are broken, so that a rank has one image where the other has two, and once none at all.
    """
    teacher = write_detector(tmp_path / "teacher.pt", "test_vidt2", CLASSES)
    root = tmp_path / "coco"
    shutil.copytree(coco_tree, root)
    sections: dict[str, dict[str, Any]] = {
        "source": {"train": str(root), "shard_size": 8},
        "views": {name: list(value) if isinstance(value, tuple) else value for name, value in VIEWS.items()},
        "teacher": {"name": "test_vidt2", "weights": str(teacher)},
        "student": {"name": "test_vidt"},
        "loss": {"feature_weight": 4.0},
        "extract": {"batch_size": 4, "workers": 0, "device": "cpu"},
        "train": DDP | {"workers": 0, "device": "cpu", "log_every": 1, "open_shards": 2}
        | {"output": str(tmp_path / "run")},
        "eval": {"workers": 0, "device": "cpu"},
    }
    config = config_builder(root, teacher)(**sections)
    ranks = [prepare_run(config, JobSplit(index=rank, count=2)) for rank in range(2)]
    whole = [planned(rank) for rank in ranks]
    for rank, number, positions in ((0, 1, (0, 1)), (1, 3, (0,))):
        batch = whole[rank][number]
        for position in positions:
            key = ranks[rank].source.shards[int(batch.rendered.shard[position])].keys[int(batch.rendered.row[position])]
            (root / "train2017" / f"{int(key):012d}.jpg").write_bytes(b"no image")
    batches = [planned(rank) for rank in ranks]
    assert [[len(batch) for batch in each] for each in batches] == [[2, 0, 2, 2, 2, 2], [2, 2, 2, 1, 2, 2]]

    script = tmp_path / "still.py"
    script.write_text(STILL)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(script), "train", pipeline(tmp_path, **sections)),
        ],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("train: 3 steps, ") == 1 and "3 broken images were left out" in done.stderr

    alone = prepare_run(config, JobSplit())
    supply = alone.supply(live=True)
    learner = alone.learner(supply)
    learner.student.apply(still)
    both = [joined(pair) for pair in zip(*batches, strict=True)]
    for step, line in enumerate(lines := log(tmp_path / "run")):
        group = [(batch, batch.pixels) for batch in both[2 * step : 2 * step + 2]]
        terms = learner.step(group, supply, line["lr"], step_seed(0, step, 0))
        found = {name: float(value) for name, value in terms.items()}
        assert found == pytest.approx({name: line[name] for name in found}, rel=1e-4), step
    assert len(lines) == 3
    state = read_checkpoint(tmp_path / "run" / "last.pt")["student"]
    for name, value in learner.student.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert log(tmp_path / "run", "eval")[0]["ap"] >= 0


def planned(run: Run) -> list[FedBatch]:
    """The batches of a rank, without the teacher's numbers."""
    with run.feed(NoTeacher()) as feed:
        return list(feed.batches(epoch=0, step=0, workers=0))


def joined(parts: Sequence[FedBatch]) -> FedBatch:
    """The batches of several ranks as one."""
    rendered = [part.rendered for part in parts]
    frame = np.max([part.pixels.shape[1:3] for part in parts], axis=0).tolist()
    pixels = [
        nn.functional.pad(part.pixels, (0, 0, 0, frame[1] - part.pixels.shape[2], 0, frame[0] - part.pixels.shape[1]))
        for part in parts
    ]
    one = dataclasses.replace(
        rendered[0],
        pixels=torch.cat(pixels),
        label=torch.cat([each.label for each in rendered]),
        shard=np.concatenate([each.shard for each in rendered]),
        row=np.concatenate([each.row for each in rendered]),
        mix=None,
        view_size=np.concatenate([each.view_size for each in rendered if each.view_size is not None]),
        canvas=np.concatenate([each.canvas for each in rendered if each.canvas is not None]),
        boxes=[view for each in rendered for view in each.boxes or ()],
    )
    nodes = {name: join_tokens([part.nodes[name] for part in parts]) for name in parts[0].nodes}  # type: ignore[misc]
    return dataclasses.replace(parts[0], rendered=one, nodes=nodes)
