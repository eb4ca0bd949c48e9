"""The index of local tars is kept between starts, and never used for tars that have changed."""

import io
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd_cache.local_copies import LocalCopies
from vkd_cache.sources import Source, open_source
from vkd_cache.sources.findings import PassedOverWarning
from vkd_cache.sources.local_index import KEPT_KIND, WORTH_KEEPING, _framed, _parsed, _State, _state
from vkd_cache.sources.tar_index import TarIndex

SETTLED_S = 2.1  # a tar that was written to just now may change again at the same time of its clock


def write_tar(path: Path, samples: int, *, first: int = 0, more: tuple[str, ...] = ()) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(first, first + samples):
            for suffix, body in (("jpg", b"\xff"), ("cls", str(number % 7).encode())):
                info = tarfile.TarInfo(f"{number:07d}.{suffix}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
        for name in more:
            tar.addfile(tarfile.TarInfo(name))


def labels_of(source: Source) -> list[int]:
    return np.concatenate([shard.labels for shard in source.shards]).tolist()


def documents(copies: LocalCopies) -> list[Path]:
    return sorted((copies.folder / "lasting").glob(f"*.{KEPT_KIND}"))


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars that have not changed for a while."""
    folder = tmp_path_factory.mktemp("tars")
    for number, first in enumerate((0, 3000)):
        write_tar(folder / f"{number}.tar", 3000, first=first)
    time.sleep(SETTLED_S)
    return folder


@pytest.fixture
def copies(tmp_path: Path) -> LocalCopies:
    return LocalCopies(tmp_path / "copies", 10**9)


def test_a_kept_index_is_used_and_a_damaged_one_made_again(tars: Path, copies: LocalCopies) -> None:
    plain = open_source(str(tars))
    source = open_source(str(tars), copies=copies)
    (document,) = documents(copies)
    kept = document.read_bytes()
    for other in (plain, open_source(str(tars), copies=copies), open_source(f"{tars}/*.tar", copies=copies)):
        assert [shard.keys for shard in other.shards] == [shard.keys for shard in source.shards]
        assert labels_of(other) == labels_of(source) and other.read(1, 2999) == b"\xff"
    assert documents(copies) == [document] and document.read_bytes() == kept
    state = _state([str(path) for path in sorted(tars.iterdir())])
    assert state is not None
    indexes = _parsed(kept, state)
    assert indexes is not None
    other_labels = [index._replace(labels=index.labels + 1) for index in indexes]
    document.write_bytes(state.digest + b"".join(map(_framed, other_labels)))
    assert labels_of(open_source(str(tars), copies=copies)) == [label + 1 for label in labels_of(source)]
    for damaged in (kept[:-1], kept[:20] + bytes([kept[20] ^ 1]) + kept[21:], kept + b"\0", b""):
        document.write_bytes(damaged)
        assert labels_of(open_source(str(tars), copies=copies)) == labels_of(source)
        assert document.read_bytes() == kept


def test_tars_that_change_are_indexed_again(tmp_path: Path, copies: LocalCopies) -> None:
    """Even where size and time of modification are those of before."""
    path = tmp_path / "a.tar"
    write_tar(path, WORTH_KEEPING)
    assert len(open_source(str(path), copies=copies).shards[0].keys) == WORTH_KEEPING
    assert documents(copies) == []  # it has just been written
    time.sleep(SETTLED_S)
    before, labels = path.stat(), labels_of(open_source(str(path), copies=copies))
    assert len(documents(copies)) == 1
    write_tar(tmp_path / "b.tar", WORTH_KEEPING, first=1)
    path.write_bytes((tmp_path / "b.tar").read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    found = open_source(str(path), copies=copies)
    assert labels_of(found) == [(number + 1) % 7 for number in range(WORTH_KEEPING)] != labels
    assert found.shards[0].keys[0] == "0000001"
    time.sleep(SETTLED_S)
    assert labels_of(open_source(str(path), copies=copies)) == labels_of(found)
    assert len(documents(copies)) == 1  # in place of the old one


def test_a_folder_behind_a_link_is_not_the_one_beside_it(tmp_path: Path, copies: LocalCopies) -> None:
    """`link/..` is where the link leads to: an index kept under another name would be another tar's."""
    (tmp_path / "x" / "real").mkdir(parents=True)
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "link").symlink_to("../x/real")
    for name, first in (("x", 0), ("y", 1)):
        write_tar(tmp_path / name / "a.tar", WORTH_KEEPING, first=first)
    time.sleep(SETTLED_S)
    there, here = (open_source(str(tmp_path / "y" / name), copies=copies) for name in ("link/../a.tar", "a.tar"))
    assert there.shards[0].keys[0] == "0000000" and here.shards[0].keys[0] == "0000001"
    assert there.read(0, 0) == here.read(0, 0) and len(documents(copies)) == 2


READ_ONLY = """
import sys
from pathlib import Path
from vkd_cache.local_copies import LocalCopies
from vkd_cache.sources import local_index, open_source
copies = LocalCopies(Path(sys.argv[2]), 10**9)
if sys.argv[3] == "kept":
    def index_tar(*_): raise SystemExit("read again")
    local_index.index_tar = index_tar
print(len(open_source(sys.argv[1], copies=copies).shards), len(list(copies.folder.glob("lasting/*"))))
"""


@pytest.mark.parametrize(("read_only", "expected"), [("tars", "2 0"), ("copies", "2 1")])
def test_folders_that_are_mounted_read_only(tars: Path, tmp_path: Path, read_only: str, expected: str) -> None:
    """Images of file systems tell of no change, so nothing is kept of tars there; a kept index can be used from one."""
    copies = LocalCopies(tmp_path / "copies", 10**9)
    if read_only == "copies":
        open_source(str(tars), copies=copies)
    folder = tars if read_only == "tars" else copies.folder
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    if subprocess.run(["unshare", "-m", "sh", "-c", mount, folder, "true"], check=False).returncode:
        pytest.skip("this system does not let its user mount")
    program = [sys.executable, "-c", READ_ONLY, tars, copies.folder, "kept" if read_only == "copies" else "made"]
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount, folder, *program], capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


def test_what_is_not_worth_keeping_or_has_something_to_say_is_not_kept(tmp_path: Path, copies: LocalCopies) -> None:
    write_tar(tmp_path / "small.tar", WORTH_KEEPING - 1)
    write_tar(tmp_path / "passed.tar", WORTH_KEEPING, more=("photo.tiff.png",))
    time.sleep(SETTLED_S)
    open_source(str(tmp_path / "small.tar"), copies=copies)
    for _ in range(2):
        with pytest.warns(PassedOverWarning, match="belong to no sample"):
            open_source(str(tmp_path / "passed.tar"), copies=copies)
    assert documents(copies) == []


def test_a_folder_that_cannot_be_written_to_is_no_obstacle(tars: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    source = open_source(str(tars), copies=LocalCopies(tmp_path / "file" / "copies", 10**9))
    assert labels_of(source) == labels_of(open_source(str(tars)))
    assert labels_of(open_source(str(tars), copies=LocalCopies(tmp_path / "no-room", 10))) == labels_of(source)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.binary(min_size=1, max_size=9).filter(lambda key: b"\0" not in key), min_size=1,
                         max_size=4), max_size=4), st.data())  # fmt: skip
def test_what_is_kept_is_read_back_or_refused(keys: list[list[bytes]], data: st.DataObject) -> None:
    indexes = [
        TarIndex(
            keys=tar,
            labels=np.arange(len(tar), dtype=np.uint32),
            offsets=np.arange(len(tar), dtype=np.uint64) * 1024,
            num_bytes=np.full(len(tar), 3, np.uint64),
            tar_bytes=1024 * len(tar),
        )
        for tar in keys
    ]
    state = _State([index.tar_bytes for index in indexes], b"0123456789abcdef", is_settled=True)
    more = state._replace(sizes=[*state.sizes, 1024])
    stored = state.digest + b"".join(map(_framed, indexes))
    found = _parsed(stored, state)
    assert found is not None and [index.keys for index in found] == keys
    assert [index.to_bytes() for index in found] == [index.to_bytes() for index in indexes]
    assert _parsed(None, state) is None and _parsed(stored, more) is None
    assert _parsed(stored, state._replace(digest=b"0123456789abcdeF")) is None
    at = data.draw(st.integers(0, len(stored) - 1))
    assert _parsed(stored[:at], state) is None
    flipped = bytes([stored[at] ^ 1 << data.draw(st.integers(0, 7))])
    assert _parsed(stored[:at] + flipped + stored[at + 1 :], state) is None
