"""Stopped at any step, by any signal, and continued: the same run to the last bit. And what is refused."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from train_runs import assert_same_run, log, pipeline, run, same_value, weights

from vkd_cache.config import Config
from vkd_cache.errors import CheckpointError, ConfigError, IncompleteCacheError
from vkd_cache.stages.checkpoints import read_checkpoint
from vkd_cache.stages.journal import read_log
from vkd_cache.students import Student

Build = Callable[..., Config]
# everything that has a state: average, clipping, dropout-like noise, a scaler that grows, accumulation
TRAIN = {"batch_size": 32, "epochs": 2, "ema_decay": 0.9, "clip_grad": 1.0, "checkpoint_every": 2, "accumulate": 2}
SECTIONS: dict[str, dict[str, Any]] = {"student": {"name": "test_vit", "drop_path": 0.3}}
STEPS = 6  # 102 slots: 6 batches, so 3 optimizer steps an epoch


@contextlib.contextmanager
def signal_when(condition: Callable[[nn.Module], bool], number: int) -> Iterator[None]:
    """Send this process a real signal before the first forward pass of a module that meets `condition`."""
    sent = False

    def before(module: nn.Module, _: object) -> None:
        nonlocal sent
        if not sent and condition(module):
            sent = True
            os.kill(os.getpid(), number)

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
    assert sent


def is_student(module: nn.Module) -> bool:
    return isinstance(module, Student) and module.training


def config_of(build: Build, cache: Path, output: Path, **train: Any) -> Config:
    return build(cache={"url": str(cache)}, train=TRAIN | {"output": str(output)} | train, **SECTIONS)


@pytest.fixture(scope="module")
def whole(tiny_config: Build, small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupts."""
    output = tmp_path_factory.mktemp("whole") / "run"
    summary = run(config_of(tiny_config, small_cache, output))
    assert (summary.steps, summary.interrupted) == (STEPS, False)
    assert len(read_log(output / "log.jsonl")) == STEPS + 2
    return output


@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(forward=st.integers(1, 11), number=st.sampled_from([signal.SIGTERM, signal.SIGINT]))
def test_a_signal_at_any_batch(
    tiny_config: Build,
    small_cache: Path,
    whole: Path,
    tmp_path_factory: pytest.TempPathFactory,
    forward: int,
    number: signal.Signals,
) -> None:
    output = tmp_path_factory.mktemp("stopped") / "run"
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    forwards = itertools.count(1)
    with signal_when(lambda module: is_student(module) and next(forwards) == forward, number):
        summary = run(config_of(tiny_config, small_cache, output))
    assert summary.interrupted
    assert summary.steps == (forward + 1) // 2  # the step that was under way is finished
    assert {n: signal.getsignal(n) for n in before} == before
    resumed = run(config_of(tiny_config, small_cache, output, resume="auto"))
    assert (resumed.steps, resumed.interrupted) == (STEPS, False)
    assert_same_run(whole, output)


@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_a_signal_during_evaluation(
    tiny_config: Build, small_cache: Path, whole: Path, tmp_path: Path, evaluation: int
) -> None:
    """Evaluations 1 and 2 are of student and average after the first epoch, 3 comes after the last."""
    output, seen = tmp_path / "run", set()

    def evaluated(module: nn.Module) -> bool:
        if not module.training and isinstance(module, VisionTransformer):
            seen.add((id(module), len(read_log(output / "log.jsonl"))))
        return len(seen) == evaluation

    with signal_when(evaluated, signal.SIGTERM):
        summary = run(config_of(tiny_config, small_cache, output))
    assert summary.interrupted and len(seen) == evaluation
    standing = read_checkpoint(output / "last.pt")["standing"]
    assert standing["eval_due"] and standing["step"] == summary.steps
    run(config_of(tiny_config, small_cache, output, resume="auto"))
    assert_same_run(whole, output)


KILLING = """
import os, signal, sys
from torch import nn
from vkd_cache import cli, students
seen = 0
def hear(module, _):
    global seen
    seen += isinstance(module, students.Student) and module.training
    if seen == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
nn.modules.module.register_module_forward_pre_hook(hear)
cli.main(sys.argv[2:])
"""


def test_kill_9(small_cache: Path, digits_tree: Path, whole: Path, tmp_path: Path) -> None:
    """Killed in the middle of an epoch, with a worker, between two checkpoints; temporary files are cleared away."""
    output = tmp_path / "run"
    sections: dict[str, dict[str, Any]] = SECTIONS | {
        "source": {"train": str(digits_tree)},
        "cache": {"url": str(small_cache)},
        "teacher": {"name": "test_resnet"},
        "train": TRAIN
        | {"output": str(output), "lr": 1e-3, "open_shards": 2, "log_every": 1, "device": "cpu", "digest_check": 1.0},
        "eval": {"batch_size": 30, "workers": 0, "device": "cpu"},
    }
    file = pipeline(tmp_path, **sections)
    command = [sys.executable, "-c", KILLING]
    killed = subprocess.run(
        [*command, "11", "train", file, "--workers", "1"], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert read_checkpoint(output / "last.pt")["standing"]["step"] == 4
    (output / ".last.pt.0123456789abcdef.tmp").write_bytes(b"half a checkpoint")
    with (output / "log.jsonl").open("a") as file_of_log:
        file_of_log.write('{"kind": "step", "st')
    again = [*command, "-1", "train", file, "--workers", "0", "--resume", "auto"]
    done = subprocess.run(again, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "continuing at step 5" in done.stderr
    assert not list(output.glob(".*"))
    for name in ("last.pt", "best.pt"):
        assert same_value(weights(output, name), weights(whole, name))
    assert [log(output, kind) for kind in ("step", "eval")] == [log(whole, kind) for kind in ("step", "eval")]


def test_the_program_stops_on_sigterm(small_cache: Path, digits_tree: Path, tmp_path: Path) -> None:
    """The real program with a data worker; the signal goes to the whole process group, as batch systems send it."""
    output = tmp_path / "run"
    train = {"epochs": 400, "batch_size": 32, "checkpoint_every": 0, "output": str(output), "device": "cpu"}
    file = pipeline(
        tmp_path,
        source={"train": str(digits_tree)},
        cache={"url": str(small_cache)},
        student={"name": "test_vit"},
        train=train | {"workers": 1},
        eval={"workers": 0},
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "vkd_cache", "train", file], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    heard: list[str] = []
    for line in lines:
        heard.append(line)
        if line.startswith("epoch 2:"):
            os.killpg(process.pid, signal.SIGTERM)
            break
    heard += list(lines)
    process.stderr.close()
    assert process.wait(60) == 0, "".join(heard)
    assert "stopped and saved at step" in "".join(heard)
    standing = read_checkpoint(output / "last.pt")["standing"]
    assert standing["step"] >= 12


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_second_run_into_the_same_output(tiny_config: Build, small_cache: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds a training run\. Continue it with --resume auto, or give another"):
        run(config_of(tiny_config, small_cache, whole))
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(whole / "last.pt", other)
    with pytest.raises(ConfigError, match="holds a training run"):
        run(config_of(tiny_config, small_cache, whole, resume=str(other / "last.pt")))
    with pytest.raises(CheckpointError, match=r"nothing\.pt: no such checkpoint"):
        run(config_of(tiny_config, small_cache, tmp_path / "new", resume=str(tmp_path / "nothing.pt")))


def test_a_finished_run_has_nothing_to_do(tiny_config: Build, small_cache: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    summary = run(config_of(tiny_config, small_cache, output, resume="auto"))
    assert (summary.steps, summary.interrupted) == (STEPS, False)
    assert summary.score is not None
    assert_same_run(whole, output)


def test_a_run_that_continues_elsewhere_brings_its_best_along(
    tiny_config: Build, small_cache: Path, whole: Path, tmp_path: Path
) -> None:
    run(config_of(tiny_config, small_cache, tmp_path / "moved", resume=str(whole / "last.pt")))
    assert (tmp_path / "moved" / "best.pt").read_bytes() == (whole / "best.pt").read_bytes()


def test_changes_are_refused_with_both_values(
    tiny_config: Build, small_cache: Path, digits_tars: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    with pytest.raises(CheckpointError) as caught:
        run(config_of(tiny_config, small_cache, output, resume="auto", lr=0.5, beta2=0.9))
    message = str(caught.value)
    assert "[train] lr: 0.001 in the checkpoint, 0.5 now" in message
    assert "[train] beta2: 0.999 in the checkpoint, 0.9 now" in message
    # where things are, how many workers there are, and what is written may change
    free = {"workers": 1, "log_every": 3, "checkpoint_every": 0, "digest_check": 0.0}
    assert run(config_of(tiny_config, small_cache, output, resume="auto", **free)).steps == STEPS
    # so may the first stage, of which the cache's fingerprint tells all that matters
    settings = TRAIN | {"output": str(output), "resume": "auto"}
    first_stage = {"teacher": {"name": "gone", "weights": "gone.pt"}, "extract": {"batch_size": 2}}
    cache = {"url": str(small_cache), "dtype": "float32", "nodes": ["logits"]}
    assert run(tiny_config(cache=cache, train=settings, **first_stage, **SECTIONS)).steps == STEPS
    # other data under the same configuration
    plain = {"feature_weight": 0.0, "logit_weight": 0.0}
    short = {"epochs": 1, "batch_size": 64, "resume": "auto", "output": str(tmp_path / "plain")}
    run(tiny_config(train=short, loss=plain))
    with pytest.raises(CheckpointError, match=r"source: '\w{64}' in the checkpoint, '\w{64}' now"):
        run(tiny_config(source={"train": str(digits_tars / "train-*.tar")}, train=short, loss=plain))


def test_another_cache_is_refused(
    tiny_config: Build, small_cache: Path, whole: Path, tmp_path: Path, digits_tree: Path
) -> None:
    from vkd_cache.runtime import JobSplit
    from vkd_cache.stages.extract import extract

    output, cache = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(whole, output)
    extract(tiny_config(cache={"url": str(cache), "dtype": "float32"}, views={"count": "2"}), JobSplit())
    with pytest.raises(CheckpointError, match=r"cache fingerprint: '\w{64}' in the checkpoint, '\w{64}' now"):
        run(config_of(tiny_config, cache, output, resume="auto"))


def test_a_cache_that_grew_or_shrank(
    tiny_config: Build, small_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run goes on with the views it began with."""
    cache = tmp_path / "cache"
    shutil.copytree(small_cache, cache)
    hidden = cache / "records/view-0001"
    hidden.rename(tmp_path / "view-0001")
    alone = tmp_path / "alone"
    train = {"epochs": 4, "batch_size": 100}
    run(config_of(tiny_config, cache, alone, **train))
    for number, count in enumerate((1, 4)):
        output = tmp_path / f"run{number}"
        forwards = itertools.count(1)
        with signal_when(lambda m, c=forwards, n=count: is_student(m) and next(c) == n, signal.SIGTERM):
            run(config_of(tiny_config, cache, output, **train))
        if number == 0:
            (tmp_path / "view-0001").rename(hidden)
            run(config_of(tiny_config, cache, output, resume="auto", **train))
            assert_same_run(alone, output)
    (cache / "records/view-0000/shard-000000.json").unlink()
    with pytest.raises(IncompleteCacheError, match=re.escape("was made with views 0, 1; of these 0 are not complete")):
        run(config_of(tiny_config, cache, output, resume="auto", **train))


def test_whitening_stays_that_of_the_first_view_it_began_with(
    tiny_config: Build, small_cache: Path, tmp_path: Path
) -> None:
    cache, output = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(small_cache, cache)
    (cache / "records/view-0000").rename(tmp_path / "view-0000")

    def config(output: Path) -> Config:
        settings = {"epochs": 2, "batch_size": 100, "output": str(output), "resume": "auto"}
        return tiny_config(cache={"url": str(cache)}, loss={"normalisation": "whiten"}, train=settings)

    run(config(tmp_path / "alone"))
    with signal_when(is_student, signal.SIGTERM):
        run(config(output))
    (tmp_path / "view-0000").rename(cache / "records/view-0000")
    run(config(output))
    assert_same_run(tmp_path / "alone", output)


def test_the_home_folder_is_found(
    tiny_config: Build, small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline file, and `--output=~/runs`, reach us as they are."""
    monkeypatch.setenv("HOME", str(tmp_path))
    first = run(config_of(tiny_config, small_cache, Path("~/run"), epochs=1))
    assert {path.name for path in (tmp_path / "run").glob("*.pt")} == {"last.pt", "best.pt"}
    for resume in ("auto", "~/run/last.pt"):
        assert run(config_of(tiny_config, small_cache, Path("~/run"), epochs=1, resume=resume)).steps == first.steps


def test_files_that_are_not_checkpoints_of_ours(
    tiny_config: Build, small_cache: Path, teacher_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="not a training checkpoint of vkd-cache"):
        run(config_of(tiny_config, small_cache, tmp_path / "run", resume=str(teacher_file)))
