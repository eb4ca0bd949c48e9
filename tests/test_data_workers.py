"""Data workers that are killed: one clear error within seconds, whatever they were doing, and never a hang."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PRELOAD
from extract_jobs import contents
from train_runs import pipeline
from worker_jobs import answer, failing, leave_open, pool_of, processes, total, unlike_the_others

from vkd_cache import cli
from vkd_cache.config import Config
from vkd_cache.errors import SourceError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract
from vkd_cache.stages.worker_pool import TASKS_AHEAD

Build = Callable[..., Config]
BOUND_S = 60.0  # of a busy machine; an idle one needs less than a second
KILLS = 36
SIZES = (10, 70_000, 2_000_000)  # bytes: at once, like a batch's columns, and more than fits into a line
CONTEXT = multiprocessing.get_context("forkserver")


def gone(pid: int) -> bool:
    """Ended, or a zombie that a killed server cannot reap any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.001)


def bounded(action: Callable[[], Any]) -> Any:
    """What `action` returns, or the error that it raises; a hang is a failure instead of a hung test."""
    found: list[Any] = []

    def act() -> None:
        try:
            found.append(action())
        except Exception as error:  # noqa: BLE001 - looked at by the caller
            found.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(BOUND_S)
    assert not thread.is_alive(), "hangs"
    return found[0]


# --- the pool --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True])
def test_results_come_in_order_and_tasks_are_read_a_few_ahead(beside: bool) -> None:
    read: list[int] = []

    def tasks() -> Iterator[int]:
        for task in range(20):
            read.append(task)
            yield task

    with pool_of(unlike_the_others, 2, beside=beside) as pool:
        pids = processes(pool)
        for number, result in enumerate(pool.results(tasks())):
            assert result == -number
            assert len(read) <= number + 1 + 2 * TASKS_AHEAD
    assert read == list(range(20))
    assert all(map(gone, pids))


def test_no_tasks_and_fewer_tasks_than_workers() -> None:
    with pool_of(unlike_the_others, 3) as pool:
        assert list(pool.results([])) == []
    with pool_of(unlike_the_others, 3) as pool:
        assert list(pool.results([7])) == [-7]


@pytest.mark.parametrize("beside", [False, True])
def test_what_a_worker_raises_is_raised_here(beside: bool) -> None:
    for task, kind, message in ((3, KeyError, "three"), (5, RuntimeError, "Odd: 5 and 6")):
        with pytest.raises(kind, match=message) as caught, pool_of(failing, 2, beside=beside) as pool:
            list(pool.results([1, task, 2]))
        (note,) = caught.value.__notes__
        assert note.startswith("In a data worker process:\nTraceback") and "in failing" in note


def killed(seed: int) -> tuple[object, float]:
    """What comes of a pool when one of its workers is killed at a random moment, and seconds until it does."""
    rng = np.random.default_rng(seed)
    size, workers, taken = SIZES[seed % 3], int(rng.integers(1, 4)), int(rng.integers(0, 5))
    before_s, after_s = rng.uniform(0, 0.03, 2)
    killed_at: list[float] = []

    def take_for_ever() -> None:
        with pool_of(answer, workers, beside=seed % 2 == 1) as pool:
            for number, (message, tensor) in enumerate(pool.results(itertools.repeat(size))):
                assert len(message) == len(tensor) == size and int(tensor[-1]) == size % 256
                if number == taken:
                    time.sleep(before_s)
                    os.kill(processes(pool)[taken % workers], signal.SIGKILL)
                    killed_at.append(time.monotonic())
                    time.sleep(after_s)

    return bounded(take_for_ever), time.monotonic() - killed_at[0]


def test_killed_at_any_moment(capfd: pytest.CaptureFixture[str]) -> None:
    """While it computes, in the middle of a message, and before a block has reached the main process."""
    for seed in range(KILLS):
        error, seconds = killed(seed)
        assert isinstance(error, SourceError), repr(error)
        assert str(error).startswith("digits: a data worker process died (SIGKILL). The usual cause is memory")
        assert seconds < BOUND_S / 2
    assert capfd.readouterr().err == ""


FEW_FILES = """
import os, resource
from worker_jobs import answer, pool_of
from vkd_cache.cli import guarded

def take(more: int) -> None:
    with pool_of(answer, 2) as pool:
        free = os.dup(0)
        os.close(free)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, most))
        try:
            for _ in pool.results([2_000_000] * 4):
                pass
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

print(*(guarded(lambda: take(more)) for more in range(0, 20, 3)))
"""


def test_too_many_open_files_are_a_message() -> None:
    program = [sys.executable, "-c", FEW_FILES]
    done = subprocess.run(program, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=BOUND_S)
    codes = [int(code) for code in done.stdout.split()]
    assert (codes[0], codes[-1]) == (1, 0) and set(codes) == {0, 1}, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == sum(codes) and all(line.startswith("Error: ") and "oo many " in line for line in said)


@pytest.mark.parametrize(("beside", "delay_s"), [(False, 0.0), (True, 0.001), (False, 0.005)])
def test_killed_while_it_is_sent_large_tasks(beside: bool, delay_s: float) -> None:
    def take_for_ever() -> None:
        with pool_of(total, 2, beside=beside) as pool:
            for number, _ in enumerate(pool.results(np.zeros(10**6, np.uint8) for _ in itertools.count())):
                if number == 3:
                    threading.Timer(delay_s, os.kill, (processes(pool)[1], signal.SIGKILL)).start()

    error = bounded(take_for_ever)
    assert str(error).startswith("digits: a data worker process died (SIGKILL)"), repr(error)


def test_killed_while_it_starts() -> None:
    """The server is stopped, so that the start is half done when it is killed; the next one starts another server."""
    with pool_of(answer, 1) as pool:
        list(pool.results([1]))
    server = server_pid()
    os.kill(server, signal.SIGSTOP)

    def start() -> None:
        with pool_of(answer, 2):
            pass

    killer = threading.Timer(0.2, os.kill, (server, signal.SIGKILL))
    killer.start()
    error = bounded(start)
    killer.join()
    wait_until(lambda: gone(server))
    assert "digits: a data worker process died while it was started" in str(error)
    with pool_of(answer, 2) as pool:
        assert [len(message) for message, _ in pool.results([5, 6, 7])] == [5, 6, 7]


@pytest.mark.parametrize("beside", [False, True])
def test_a_killed_server_is_no_loss(beside: bool) -> None:
    """Workers go on without the process that forked them; and one that dies then is noticed all the same."""
    with pool_of(answer, 2, beside=beside) as pool:
        results = pool.results(itertools.repeat(SIZES[1]))
        next(results)
        pids = processes(pool)
        server = server_pid()
        os.kill(server, signal.SIGKILL)
        for _ in range(6):
            next(results)
        wait_until(lambda: gone(server))
        os.kill(pids[0], signal.SIGKILL)
        error = bounded(lambda: list(results))
    assert str(error).startswith("digits: a data worker process died (cause unknown). If it happens again: use fewer")
    wait_until(lambda: all(map(gone, pids)))
    CONTEXT.set_forkserver_preload(PRELOAD)  # for the tests that follow
    forkserver.ensure_running()


def server_pid() -> int:
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    assert pid is not None
    return int(pid)


@pytest.mark.parametrize("by_a_kill", [True, False])
def test_workers_end_with_the_main_process(by_a_kill: bool) -> None:
    ours, theirs = CONTEXT.Pipe()
    main_process = CONTEXT.Process(target=leave_open, args=(theirs,), kwargs={"wait": by_a_kill})
    main_process.start()
    assert ours.poll(BOUND_S)
    pids = ours.recv()
    if by_a_kill:
        main_process.kill()
    main_process.join(BOUND_S)
    assert main_process.exitcode == (-signal.SIGKILL if by_a_kill else 0)
    wait_until(lambda: all(map(gone, pids)))


# --- the commands ----------------------------------------------------------------------------------------------------


def children(parents: Iterable[int]) -> set[int]:
    wanted, found = set(parents), set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) in wanted:
                found.add(int(stat.parent.name))
    return found


@contextlib.contextmanager
def killing(delay_s: float, others: set[int]) -> Iterator[None]:
    """Kill a data worker of this process, `delay_s` after it is first seen; `others` were there before."""
    killed: list[int] = []
    stop = threading.Event()

    def look() -> None:
        while not killed and not stop.is_set():
            servers = children([os.getpid()])
            for pid in sorted(children(servers) - others):
                time.sleep(delay_s)
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert killed


def fails_by_a_kill(arguments: list[str], delay_s: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command in this process while one of its data workers is killed."""
    before = children(children([os.getpid()]))
    with killing(delay_s, before), pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert caught.value.code == 1, said
    assert said.count("Error: ") == 1 and "Traceback" not in said
    assert ": a data worker process died " in said.partition("Error: ")[2]
    assert "run the same command again to continue" in said
    wait_until(lambda: all(map(gone, children(children([os.getpid()])) - before)))


@pytest.fixture(scope="module")
def job(tiny_config: Build, digits_tree: Path, teacher_file: Path, small_cache: Path, tmp_path_factory: Any) -> str:
    """A pipeline file for all commands: two workers, and hours to go for training."""
    folder = tmp_path_factory.mktemp("job")
    return pipeline(
        folder,
        source={"train": str(digits_tree), "shard_size": 48},
        views={"size_px": 32, "seed": 5, "count": "2"},
        teacher={"name": "test_resnet", "weights": str(teacher_file)},
        cache={"url": str(small_cache), "dtype": "float16"},
        extract={"batch_size": 16, "workers": 2, "device": "cpu"},
        student={"name": "test_vit"},
        train={
            "epochs": 4000, "batch_size": 8, "workers": 2, "device": "cpu", "open_shards": 2, "eval_every": 0,
            "output": str(folder / "run"), "checkpoint_every": 1, "resume": "auto",
        },
        eval={"batch_size": 2, "workers": 2, "device": "cpu"},
    )  # fmt: skip


@pytest.mark.parametrize("delay_s", [0.0, 0.06])
def test_extract_goes_on_to_the_same_cache(
    job: str, tiny_config: Build, small_cache: Path, tmp_path: Path, delay_s: float, capsys: pytest.CaptureFixture[str]
) -> None:
    url = tmp_path / "cache"
    fails_by_a_kill(["extract", job, "--cache", str(url)], delay_s, capsys)
    assert 0 <= len(list(url.glob("records/*/*.json"))) < 10
    summary = extract(tiny_config(cache={"url": str(url)}, views={"count": "2"}), JobSplit())
    assert summary.units_published + summary.units_skipped == 10
    assert contents(url) == contents(small_cache)
    assert not list((url / ".incomplete").iterdir())


@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_train(job: str, delay_s: float, capsys: pytest.CaptureFixture[str]) -> None:
    fails_by_a_kill(["train", job], delay_s, capsys)


def test_eval(job: str, digits_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "run")
    short = ["--epochs", "1", "--workers", "0", "--batch-size", "64"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", job, "--output", output, *short])
    assert caught.value.code == 0, capsys.readouterr().err
    arguments = ["eval", job, "--checkpoint", f"{output}/last.pt", "--source", str(digits_tree / "train")]
    fails_by_a_kill(arguments, 0.0, capsys)


def test_verify_pixels(
    job: str, tiny_config: Build, digits_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three views, which are enough for the check to start workers."""
    url = tmp_path / "cache"
    extract(tiny_config(cache={"url": str(url)}, views={"count": "3"}), JobSplit())
    arguments = ["verify", str(url), "--source", str(digits_tree), "--pixels", "--sample", "0", "--workers", "2"]
    fails_by_a_kill(arguments, 0.0, capsys)
