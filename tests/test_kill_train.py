"""A training run that is killed again and again, at any moment: what it leaves loads, and its result is the same."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from kill_server import PATIENCE_S, Job, KillServer
from train_runs import assert_same_run, pipeline

from vkd_cache.config import Config
from vkd_cache.stages.checkpoints import BEST, LAST, read_checkpoint

Build = Callable[..., Config]
STEPS = 6
TEMPORARY = ".*.tmp"


class KilledRun:
    """A run, its output, and what must hold of it after every kill."""

    def __init__(self, server: KillServer, pipeline_file: str, folder: Path) -> None:
        self._server = server
        self._file = pipeline_file
        self._folder = folder
        self.output = folder / "run"
        self.said = folder / "said"
        self.kills = self.removed = self.steps = 0

    def job(self, *more: str, kill_at: int = 0, half: bool = False) -> Job:
        """The command that begins and that continues the run."""
        arguments = ("train", self._file, "--output", str(self.output), "--resume", "auto", *more)
        counted = str(self._folder / "counted")
        return Job(
            arguments=arguments, said=str(self.said), output=str(self.output), kill_at=kill_at, half=half,
            counted=counted,
        )  # fmt: skip

    def killed_at(self, event: int, *, half: bool) -> bool:
        """Run until it touches its files for the `event`-th time; False: it was done before."""
        stale = len(list(self.output.glob(TEMPORARY)))
        self._server.start(self.job(kill_at=event, half=half))
        code = self._server.wait()
        self._check(code, stale)
        return code != 0

    def killed_after(self, checkpoints: int, seconds: float, *more: str) -> bool:
        """Run until it has written so many checkpoints, and a little longer; False: it was done before."""
        stale = len(list(self.output.glob(TEMPORARY)))
        pid = self._server.start(self.job(*more))
        seen, last = 0, self._changed()
        until = time.monotonic() + PATIENCE_S
        while seen < checkpoints and not self._is_over(pid):
            assert time.monotonic() < until, "waited in vain"
            if self._changed() != last:
                seen, last = seen + 1, self._changed()
        time.sleep(seconds)
        if not self._is_over(pid):
            os.killpg(pid, signal.SIGKILL)
        code = self._server.wait()
        self._check(code, stale)
        return code != 0

    def _changed(self) -> int:
        last = self.output / LAST
        return last.stat().st_ino if last.exists() else 0

    def _is_over(self, pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True

    def finish(self) -> int:
        """Run to the end; how often it touches its files on the way."""
        stale = len(list(self.output.glob(TEMPORARY)))
        self._server.start(self.job())
        code = self._server.wait()
        assert code == 0, self.said.read_text()
        self._check(code, stale)
        assert not list(self.output.glob(TEMPORARY))
        return int((self._folder / "counted").read_text())

    def _check(self, code: int, stale: int) -> None:
        """Whatever the moment: the checkpoints load, nothing that was saved is lost, leftovers are named."""
        said = self.said.read_text()
        assert code in (0, -signal.SIGKILL, -signal.SIGXFSZ), said
        assert "Traceback" not in said and "Error" not in said, said
        self.kills += code != 0
        for name in (LAST, BEST):
            if (self.output / name).exists():
                read_checkpoint(self.output / name)
        steps = read_checkpoint(self.output / LAST)["standing"]["step"] if (self.output / LAST).exists() else 0
        assert steps >= self.steps
        self.steps = steps
        left = [path.name for path in self.output.glob(TEMPORARY)]
        assert len(left) <= stale + 1, "a killed run leaves the one file that it was at"
        removed = sum(map(int, re.findall(r"removed (\d+) temporary files that a killed run left", said)))
        assert removed - self.removed in (0, stale)  # 0: it was killed again before it looked
        assert removed > self.removed or not stale or code, said
        self.removed = removed


@pytest.fixture(scope="module")
def server() -> Iterator[KillServer]:
    with KillServer() as server:
        yield server


@pytest.fixture(scope="module")
def pipeline_file(digits_tree: Path, small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of six steps with everything that has a state, which saves after each."""
    return pipeline(
        tmp_path_factory.mktemp("pipeline"),
        source={"train": str(digits_tree)},
        cache={"url": str(small_cache)},
        teacher={"name": "test_resnet"},
        student={"name": "test_vit", "drop_path": 0.3},
        train={
            "epochs": 2, "batch_size": 32, "lr": 1e-3, "workers": 0, "device": "cpu", "open_shards": 2, "log_every": 1,
            "ema_decay": 0.9, "clip_grad": 1.0, "accumulate": 2, "checkpoint_every": 1,
        },
        eval={"batch_size": 30, "workers": 0, "device": "cpu"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(server: KillServer, pipeline_file: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The output of a run that nobody kills, and how often it touches its files."""
    run = KilledRun(server, pipeline_file, tmp_path_factory.mktemp("whole"))
    events = run.finish()
    assert (run.steps, run.kills, run.removed) == (STEPS, 0, 0)
    assert events > 2 * STEPS
    return run.output, events


@pytest.mark.parametrize("half", [False, True])
def test_killed_at_its_files(
    server: KillServer, pipeline_file: str, whole: tuple[Path, int], tmp_path: Path, half: bool
) -> None:
    """Before a file is begun, in the middle of it (`half`), before it takes its name; then the next one, and so on."""
    run = KilledRun(server, pipeline_file, tmp_path)
    rng = np.random.default_rng(half)
    for _ in range(6):
        if not run.killed_at(int(rng.integers(3, 13)), half=half):
            break
    run.finish()
    assert run.kills > 3
    assert run.removed > 0
    assert_same_run(whole[0], run.output)


def test_killed_at_any_time(
    server: KillServer, pipeline_file: str, whole: tuple[Path, int], tmp_path: Path
) -> None:
    """Together with its data worker, where it has one: by a signal to the whole group, as batch systems send it."""
    run = KilledRun(server, pipeline_file, tmp_path)
    rng = np.random.default_rng(7)
    for kill in range(4):
        more = ("--workers", "1") if kill == 1 else ()
        if not run.killed_after(1, float(rng.uniform(0, 0.04)), *more):
            break
    run.finish()
    assert run.kills > 1
    assert_same_run(whole[0], run.output)
