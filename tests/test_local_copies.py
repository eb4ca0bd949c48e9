"""Local copies of remote objects: laws of the bound, with real processes, real locks and real signals."""

import contextlib
import fcntl
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd_cache.errors import ConfigError, SourceError, StorageError
from vkd_cache.local_copies import LocalCopies, Original, open_copies
from vkd_cache.runtime import user_cache_folder

CONTEXT = multiprocessing.get_context("forkserver")
KIND = "notes"


def original(number: int, num_bytes: int, version: str = "1") -> Original:
    return Original(f"s3://bucket/{number}.tar", num_bytes, version)


def content(wanted: Original) -> bytes:
    return (wanted.name.encode() * (wanted.num_bytes // 32 + 1))[: wanted.num_bytes]


def read(copies: LocalCopies, wanted: Original, fetched: list[str] | None = None) -> bytes:
    def fetch(target: Path) -> None:
        if fetched is not None:
            fetched.append(wanted.url)
        target.write_bytes(content(wanted))

    handle = copies.open(wanted, fetch)
    try:
        return os.pread(handle, wanted.num_bytes + 1, 0)
    finally:
        os.close(handle)


def total_bytes(folder: Path) -> int:
    """Bytes below `folder` at one moment: with the lock, nothing is removed or begun, only moved from the first list
    to the second."""
    found: dict[int, int] = {}
    with (folder / "space.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in [*folder.glob("fetching/*/data"), *folder.glob("copies/*"), *folder.glob("lasting/*")]:
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                found[stat.st_ino] = stat.st_size
    return sum(found.values())


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@given(st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=30), st.integers(500, 1500))
@settings(deadline=None, max_examples=40)
def test_the_least_recently_used_goes_and_the_bound_holds(steps: list[tuple[int, bool]], bound: int) -> None:
    """Against a model: an ordered dictionary."""
    with tempfile.TemporaryDirectory() as folder:
        copies, model = LocalCopies(Path(folder), bound), OrderedDict[str, int]()
        for number, twice in steps:
            wanted = original(number, 50 * number)
            fetched: list[str] = []
            for _ in range(1 + twice):
                assert read(copies, wanted, fetched) == content(wanted)
            assert fetched == [wanted.url] * (wanted.name not in model)
            if wanted.name not in model:
                while sum(model.values()) + wanted.num_bytes > bound:
                    model.popitem(last=False)
            model[wanted.name] = wanted.num_bytes
            model.move_to_end(wanted.name)
            assert {path.name for path in Path(folder, "copies").iterdir()} == set(model)
            assert total_bytes(Path(folder)) <= bound
            assert not any(Path(folder, "fetching").iterdir())


def test_what_everybody_wants_is_fetched_once(tmp_path: Path) -> None:
    copies, wanted, fetched, found = LocalCopies(tmp_path, 1000), original(1, 900), list[str](), list[bytes]()
    threads = [threading.Thread(target=lambda: found.append(read(copies, wanted, fetched))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [wanted.url]
    assert found == [content(wanted)] * 8


def worker(folder: Path, bound: int, seed: int, log: Path) -> None:
    """Reads forty objects of twelve, each written piece by piece; notes what it fetches."""
    copies, generator = LocalCopies(folder, bound), np.random.default_rng(seed)
    with log.open("a", encoding="utf-8") as notes:
        for number in generator.integers(0, 12, 40).tolist():
            wanted = original(number, 3000 + 500 * number)

            def fetch(target: Path, wanted: Original = wanted) -> None:
                busy = folder.parent / f"busy-{wanted.name}"
                os.close(os.open(busy, os.O_CREAT | os.O_EXCL))  # nobody else fetches it now
                notes.write(f"{wanted.url}\n")
                with target.open("wb") as file:
                    for start in range(0, wanted.num_bytes, 500):
                        file.write(content(wanted)[start : start + 500])
                        file.flush()
                busy.unlink()

            handle = copies.open(wanted, fetch)
            if os.pread(handle, 10**6, 0) != content(wanted):
                os._exit(7)
            os.close(handle)


def test_processes_of_two_jobs_share_a_folder(tmp_path: Path) -> None:
    """Two with a bound of 20 kB, one of 12 kB, one of 9 kB; the largest object has 8.5 kB."""
    folder, bounds = tmp_path / "folder", (20_000, 20_000, 12_000, 9_000)
    folder.mkdir()
    processes = [
        CONTEXT.Process(target=worker, args=(folder, bound, seed, tmp_path / f"log{seed}"))
        for seed, bound in enumerate(bounds)
    ]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        most = max(most, total_bytes(folder))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert 8_500 <= most <= 20_000
    assert read(LocalCopies(folder, 9_000), original(0, 3000)) == content(original(0, 3000))
    assert list((folder / "fetching").iterdir()) == []


def half_way(folder: Path, wanted: Original, there: Connection) -> None:
    """Begins to fetch and never ends."""

    def fetch(target: Path) -> None:
        target.write_bytes(content(wanted)[: wanted.num_bytes // 2])
        there.send("half way")
        signal.pause()

    LocalCopies(folder, 1000).open(wanted, fetch)


@pytest.mark.parametrize("same", [True, False], ids=["the same object", "another object"])
def test_killed_while_fetching(tmp_path: Path, same: bool) -> None:
    """Whoever waits for it goes on, and room that a dead process had reserved is free."""
    wanted = original(1, 900)
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=half_way, args=(tmp_path, wanted, there))
    process.start()
    assert here.recv() == "half way"
    found: list[bytes] = []
    then = wanted if same else original(2, 800)  # both at once do not fit
    waiter = threading.Thread(target=lambda: found.append(read(LocalCopies(tmp_path, 1000), then)))
    waiter.start()
    waiter.join(0.2)
    assert not found
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    waiter.join(60)
    assert found == [content(then)]
    assert files(tmp_path) == [f"copies/{then.name}", "space.lock"]


def test_what_a_dead_process_had_reserved_is_not_inherited(tmp_path: Path) -> None:
    """Or whoever makes room waits for one who waits for room."""
    wanted, lock = original(1, 900), tmp_path / "fetching" / original(1, 900).name / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_bytes(bytes(900))
    (lock.parent / "data").write_bytes(bytes(400))
    with (tmp_path / "space.lock").open("a") as space:
        fcntl.flock(space, fcntl.LOCK_EX)
        waiter = threading.Thread(target=read, args=(LocalCopies(tmp_path, 1000), wanted))
        waiter.start()
        until = time.monotonic() + 60
        while lock.stat().st_size or len(files(tmp_path)) > 2:
            assert time.monotonic() < until
    waiter.join()
    assert files(tmp_path) == [f"copies/{wanted.name}", "space.lock"]


def test_a_copy_that_is_open_stays_readable(tmp_path: Path) -> None:
    copies, first = LocalCopies(tmp_path, 1000), original(1, 900)
    handle = copies.open(first, lambda target: target.write_bytes(content(first)))
    read(copies, original(2, 900))
    assert not (tmp_path / "copies" / first.name).exists()
    assert os.pread(handle, 900, 0) == content(first)
    os.close(handle)


def test_documents_outlive_copies_by_a_month(tmp_path: Path) -> None:
    copies = LocalCopies(tmp_path, 1000)
    one, two = original(1, 500), original(2, 500)
    for wanted in (one, two):
        copies.keep(wanted, KIND, b"d" * 200)
    read(copies, one)
    read(copies, two)
    assert (copies.kept(one, KIND), copies.kept(two, KIND), copies.room_bytes()) == (b"d" * 200, b"d" * 200, 600)
    assert copies.kept(original(1, 500, "changed"), KIND) is None
    assert [path.name for path in (tmp_path / "copies").iterdir()] == [two.name]
    past = time.time() - 31 * 24 * 3600
    os.utime(tmp_path / "lasting" / f"{one.name}.{KIND}", (past, past))
    read(copies, original(3, 101))
    assert copies.kept(one, KIND) is None
    assert {path.name for path in (tmp_path / "copies").iterdir()} == {two.name, original(3, 101).name}
    for data in (b"e" * 100, b"f" * 100):  # in place of the last, whatever that was
        copies.keep(one, KIND, data)
        assert copies.kept(one, KIND) == data
    copies.note(one, KIND, b"n")
    assert copies.kept(one, KIND) == b"n"
    copies.keep(one, KIND, b"d" * 2000)  # no room for it at all
    assert copies.kept(one, KIND) is None


def test_a_document_for_which_nothing_is_removed_and_nobody_waited_for(tmp_path: Path) -> None:
    copies = LocalCopies(tmp_path, 1000)
    copies.keep_if_room(original(1, 0), KIND, b"d" * 100, at_most=2)  # makes the folder
    read(copies, original(9, 500))
    copies.keep(original(1, 0), "other", b"o")
    for number in (2, 3, 3):
        copies.keep_if_room(original(number, 0), KIND, b"%d" % number * 100, at_most=2)
    assert [copies.kept(original(number, 0), KIND) for number in (1, 2, 3)] == [None, b"2" * 100, b"3" * 100]
    assert copies.kept(original(1, 0), "other") == b"o"
    copies.keep_if_room(original(4, 0), KIND, b"4" * 300, at_most=9)  # one byte too many
    assert copies.kept(original(4, 0), KIND) is None

    def meanwhile(target: Path) -> None:
        copies.keep_if_room(original(5, 0), KIND, b"5" * 100, at_most=9)  # 100 are free, and 200 reserved
        target.write_bytes(b"6" * 200)

    os.close(copies.open(original(6, 200), meanwhile))
    assert copies.kept(original(5, 0), KIND) is None
    with (tmp_path / "space.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        copies.keep_if_room(original(7, 0), KIND, b"7", at_most=9)
    assert copies.kept(original(7, 0), KIND) is None
    copies.keep_if_room(original(7, 0), KIND, b"7", at_most=9)
    assert copies.kept(original(7, 0), KIND) == b"7" and (tmp_path / "copies" / original(9, 500).name).exists()


def test_a_copy_that_was_cut_off_or_dropped_is_fetched_again(tmp_path: Path) -> None:
    copies, wanted, fetched = LocalCopies(tmp_path, 1000), original(1, 900), list[str]()
    read(copies, wanted, fetched)
    os.truncate(tmp_path / "copies" / wanted.name, 400)
    assert read(copies, wanted, fetched) == content(wanted)
    copies.drop(wanted)
    assert read(copies, wanted, fetched) == content(wanted)
    assert len(fetched) == 3


def gone(_: Path) -> None:
    raise SourceError("it is gone")


def onto_a_full_disk(target: Path) -> None:
    target.symlink_to("/dev/full")
    target.write_bytes(b"x" * 900)


@pytest.mark.parametrize(
    ("fetch", "error", "message"),
    [
        (gone, SourceError, "^it is gone$"),
        (onto_a_full_disk, StorageError, r": the disk is full \(No space left on device\), .* of 1e-06 GB\. Free"),
        (lambda target: target.write_bytes(b"x" * 899), StorageError, "1.tar: 899 bytes arrived, expected 900"),
    ],
    ids=["gone", "full disk", "too short"],
)
def test_what_cannot_be_fetched_leaves_nothing(
    tmp_path: Path, fetch: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    copies, wanted = LocalCopies(tmp_path, 1000), original(1, 900)
    with pytest.raises(error, match=message):
        copies.open(wanted, fetch)
    assert files(tmp_path) == ["space.lock"]
    assert read(copies, wanted) == content(wanted)


def test_an_object_beyond_the_bound(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"local_gb: found 1e-06, but s3://bucket/1\.tar alone has 1e-06 GB"):
        read(LocalCopies(tmp_path, 1000), original(1, 1001))


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/folder: local copies cannot be kept there .*local_dir\."):
        read(LocalCopies(tmp_path / "file" / "folder", 1000), original(1, 900))


def test_where_copies_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_copies().folder == tmp_path / "vkd-cache" / "copies"
    assert open_copies(local_gb=0.5).max_bytes == 500_000_000
    assert open_copies("~/x").folder == Path.home() / "x"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert user_cache_folder() == Path.home() / ".cache" / "vkd-cache"
