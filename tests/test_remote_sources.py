"""Tars behind a URL, against a real S3 protocol server: what is read, how often, and what goes wrong."""

import itertools
import os
import pickle
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import NUM_TRAIN
from fault_proxy import FaultProxy
from s3_server import NOBODY, S3Server

from vkd_cache.errors import ConfigError, SourceError, StorageError
from vkd_cache.local_copies import LocalCopies
from vkd_cache.remote import RemoteFiles, RemoteInfo
from vkd_cache.sources import Source, open_source, read_ahead, source_identity
from vkd_cache.sources.kept_index import CHECKSUM_KIND, KEPT_KIND, file_checksum

BUCKETS = (f"tars-{number}" for number in itertools.count())
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server, digits_tars: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digits' tars at train/ and val/ of a bucket. Not to be changed."""
    folder = tmp_path_factory.mktemp("split")
    for tar in digits_tars.glob("*.tar"):
        place = folder / tar.name.partition("-")[0]
        place.mkdir(exist_ok=True)
        shutil.copy(tar, place)
    name = next(BUCKETS)
    s3_server.make_bucket(name)
    s3_server.upload(folder, name)
    return name


@pytest.fixture
def own_bucket(s3_server: S3Server, digits_tars: Path) -> str:
    """Tars of two shards, to be changed: train-00000.tar and train-00001.tar."""
    name = next(BUCKETS)
    s3_server.make_bucket(name)
    for number in range(2):
        put(s3_server, name, number, digits_tars, number)
    return name


@pytest.fixture
def proxy(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of the server; counts requests."""
    with FaultProxy(s3_environment.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def put(server: S3Server, bucket: str, number: int, tars: Path, content: int) -> None:
    """Store the tar `content` of the digits under the name of the tar `number`."""
    body = (tars / f"train-{content:05d}.tar").read_bytes()
    server.client.put_object(Bucket=bucket, Key=f"train-{number:05d}.tar", Body=body)


def train_tars(bucket: str) -> str:
    return f"s3://{bucket}/train/train-{{00000..00004}}.tar"


def images(source: Source) -> dict[str, bytes]:
    return {
        key: source.read(number, row)
        for number, shard in enumerate(source.shards)
        for row, key in enumerate(shard.keys)
    }


def images_of(source: Source, shard: int) -> list[bytes]:
    return [source.read(shard, row) for row in range(len(source.shards[shard].keys))]


def largest(tars: Path) -> int:
    return max(path.stat().st_size for path in tars.glob("train-*.tar"))


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def num_gets(proxy: FaultProxy) -> int:
    return sum(kind == "GET" for kind, _ in [*proxy.asked])


def num_copies(folder: Path) -> int:
    return sum(1 for _ in folder.glob("copies/*"))


@pytest.mark.parametrize("pattern", ["train-{{00000..00004}}.tar", "*.tar", "train-0000[0-4].tar", ""])
def test_the_same_data_set_as_the_local_tars(
    pattern: str, bucket: str, digits_tars: Path, proxy: FaultProxy, tmp_path: Path
) -> None:
    """Identity, names and every byte; and how many requests that takes, at the first start and at the second."""
    local = open_source(str(digits_tars / "train-*.tar"))
    spec = f"s3://{bucket}/train/{pattern.format()}"
    copies = LocalCopies(tmp_path, 10**8)
    source = open_source(spec, copies=copies)
    assert (source.location, source.kind) == (spec, "tar")
    assert source_identity(source) == source_identity(local)
    assert [shard.name for shard in source.shards] == [shard.name for shard in local.shards]
    assert proxy.counts["GET"] == 5  # each tar once
    assert images(source) == images(local) == images(pickle.loads(pickle.dumps(source)))
    proxy.forget()
    again = open_source(spec, copies=copies)
    num_listings = 0 if "{" in pattern else 1
    assert (proxy.counts["HEAD"], proxy.counts["LIST"], proxy.counts["GET"]) == (5, num_listings, 0)
    assert images(again) == images(local)
    assert proxy.counts["GET"] == 0


def test_a_store_that_fails_now_and_then(bucket: str, digits_tars: Path, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.rates = {"cut": 0.15, "short": 0.1, "error": 0.1, "lost": 0.1}
    source = open_source(train_tars(bucket), copies=LocalCopies(tmp_path, 10**8))
    assert images(source) == images(open_source(str(digits_tars / "train-*.tar")))
    assert sum(proxy.injected.values()) > 3


def test_a_kept_index_that_is_damaged_is_made_again(bucket: str, s3_environment: S3Server, tmp_path: Path) -> None:
    copies = LocalCopies(tmp_path, 10**8)
    before = source_identity(open_source(train_tars(bucket), copies=copies))
    damage = [lambda data: data[:-1], lambda data: data[:30] + b"\xff" + data[31:], lambda _: b""]
    for path, damaged in zip(sorted(tmp_path.glob(f"lasting/*.{KEPT_KIND}")), itertools.cycle(damage)):
        path.write_bytes(damaged(path.read_bytes()))
    assert source_identity(open_source(train_tars(bucket), copies=copies)) == before


def flip(path: Path, at: int, num_bytes: int = 8) -> None:
    """Turn bytes of a file over, without changing its size: in place, as a failing disk does."""
    with path.open("r+b") as file:
        file.seek(at)
        data = bytes(255 - byte for byte in file.read(num_bytes))
        file.seek(at)
        file.write(data)


def flip_images(folder: Path) -> None:
    """Damage every image of every copy; the headers and labels between them stay."""
    for copy in folder.glob("copies/*"):
        with tarfile.open(copy) as tar:
            places = [(m.offset_data, m.size) for m in tar if not m.name.endswith((".cls", ".json"))]
        for offset, num_bytes in places:
            flip(copy, offset + num_bytes // 2)


def test_images_of_damaged_copies_are_fetched_again(
    bucket: str, digits_tars: Path, proxy: FaultProxy, tmp_path: Path
) -> None:
    """Each tar once more, for all who have the damaged copy open."""
    copies, expected = LocalCopies(tmp_path, 10**8), images(open_source(str(digits_tars / "train-*.tar")))
    source = open_source(train_tars(bucket), copies=copies)
    other = pickle.loads(pickle.dumps(source))
    assert source.read(0, 0) == other.read(0, 0)
    flip_images(tmp_path)
    proxy.forget()
    assert images(source) == images(other) == images(open_source(train_tars(bucket), copies=copies)) == expected
    assert (proxy.counts["GET"], num_copies(tmp_path)) == (5, 5)


def test_a_copy_that_is_cut_off_while_it_is_open(own_bucket: str, s3_environment: S3Server, tmp_path: Path) -> None:
    source = open_source(f"s3://{own_bucket}/", copies=LocalCopies(tmp_path, 10**8))
    before = images(source)
    for copy in tmp_path.glob("copies/*"):
        os.truncate(copy, 1000)
    assert images(source) == before


@pytest.mark.parametrize("where", ["images", "a header", "everywhere", "checksum", "no checksum"])
def test_no_index_is_made_of_a_damaged_copy(
    where: str, bucket: str, digits_tars: Path, proxy: FaultProxy, tmp_path: Path
) -> None:
    """A copy and its index are both damaged: each tar is fetched once more, and the next start has all it needs."""
    copies, local = LocalCopies(tmp_path, 10**8), open_source(str(digits_tars / "train-*.tar"))
    open_source(train_tars(bucket), copies=copies)
    for path in tmp_path.glob(f"lasting/*.{KEPT_KIND}"):
        flip(path, 40)
    for path in tmp_path.glob(f"lasting/*.{CHECKSUM_KIND}"):
        if where == "checksum":
            flip(path, 3)
        elif where == "no checksum":  # as an older version has left it
            path.unlink()
    if where == "images":
        flip_images(tmp_path)
    for path in tmp_path.glob("copies/*"):
        if where in ("a header", "everywhere"):
            flip(path, 100, path.stat().st_size if where == "everywhere" else 8)
    proxy.forget()
    source = open_source(train_tars(bucket), copies=copies)
    assert proxy.counts["GET"] == 5
    assert source_identity(source) == source_identity(local)
    assert images(source) == images(open_source(train_tars(bucket), copies=copies)) == images(local)
    assert proxy.counts["GET"] == 5


def test_what_is_no_tar_is_fetched_once_more_by_the_next_job(
    own_bucket: str, proxy: FaultProxy, s3_environment: S3Server, tmp_path: Path
) -> None:
    """The store's tar is blamed for what this job has fetched, not for a copy that was there."""
    s3_environment.client.put_object(Bucket=own_bucket, Key="train-00001.tar", Body=b"<html>" * 2000)
    for num_fetched in (2, 3):
        with pytest.raises(SourceError, match=r"s3://.*/train-00001\.tar: not a tar archive"):
            open_source(f"s3://{own_bucket}/", copies=LocalCopies(tmp_path, 10**8))
        assert proxy.counts["GET"] == num_fetched


def test_who_is_at_fault(
    own_bucket: str, digits_tars: Path, s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged again: the store's tar, if the copy is what was fetched; the disk, if it is not."""
    copies, spec = LocalCopies(tmp_path, 10**8), f"s3://{own_bucket}/"
    source = open_source(spec, copies=copies)
    flip_images(tmp_path)
    download = RemoteFiles.download

    def other_bytes(files: RemoteFiles, path: str, target: Path) -> RemoteInfo:
        info = download(files, path, target)
        with tarfile.open(target) as tar:
            first = next(m for m in tar if not m.name.endswith((".cls", ".json")))
        flip(target, first.offset_data)
        return info

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFiles, "download", other_bytes)
        with pytest.raises(SourceError, match=r"train-00000\.tar: the image of .* the tar itself was changed.*Upload"):
            source.read(0, 0)

    def rotting(path: Path) -> bytes:
        checksum = file_checksum(path)
        flip_images(tmp_path)
        flip(path, 2000)
        return checksum

    monkeypatch.setattr("vkd_cache.sources.remote_tars.file_checksum", rotting)
    with pytest.raises(SourceError, match=r"00001\.tar: its local copy in .* not at fault\. Check that.*local_dir"):
        source.read(1, 0)


def test_read_ahead_leaves_room_for_what_is_in_use(
    bucket: str, digits_tars: Path, proxy: FaultProxy, tmp_path: Path
) -> None:
    open_source(train_tars(bucket), copies=LocalCopies(tmp_path, 10**8))
    documents = sum(path.stat().st_size for path in tmp_path.glob("lasting/*"))
    copies = LocalCopies(tmp_path, 3 * largest(digits_tars) + documents)
    source = open_source(train_tars(bucket), copies=copies)
    shutil.rmtree(tmp_path / "copies")
    proxy.forget()
    read_ahead(source, [3], [3, 1, 2, 0])
    wait_until(lambda: num_copies(tmp_path) == 3)
    for shard in (3, 1, 2):
        source.read(shard, 0)
    assert sorted(path[-5:] for kind, path in proxy.asked if kind == "GET") == ["1.tar", "2.tar", "3.tar"]
    read_ahead(source, [0], [4])  # 3 has been in use until now, though it was copied first
    wait_until(lambda: num_gets(proxy) == 5 and not any((tmp_path / "fetching").iterdir()))
    assert images_of(source, 0) and images_of(source, 3) and images_of(source, 4)
    assert (num_gets(proxy), num_copies(tmp_path)) == (5, 3)
    with pytest.raises(ConfigError, match=r"local_gb: .* shuffled together .* twice"):
        read_ahead(source, [0, 1, 2, 3])


def test_what_read_ahead_meets_is_told_by_the_reader(
    own_bucket: str, digits_tars: Path, s3_environment: S3Server, tmp_path: Path
) -> None:
    copies = LocalCopies(tmp_path, 10**8)
    source = open_source(f"s3://{own_bucket}/", copies=copies)
    shutil.rmtree(tmp_path / "copies")
    s3_environment.client.delete_object(Bucket=own_bucket, Key="train-00001.tar")
    read_ahead(source, [0], [1])
    wait_until(lambda: num_copies(tmp_path) == 1)
    with pytest.raises(SourceError, match=r"train-00001\.tar: the tar is there no more"):
        source.read(1, 0)
    with pytest.raises(SourceError, match=r"1}\.tar: 1 of 2 tars are missing: s3://.*/train-00001\.tar\. Check"):
        open_source(f"s3://{own_bucket}/train-{{00000..00001}}.tar", copies=copies)


def test_a_tar_that_changes(own_bucket: str, digits_tars: Path, s3_environment: S3Server, tmp_path: Path) -> None:
    """A copy is of the version that was indexed; another version is an error in this job, and indexed by the next."""
    copies, spec = LocalCopies(tmp_path, 10**8), f"s3://{own_bucket}/train-*.tar"
    source = open_source(spec, copies=copies)
    before, identity = source.read(1, 3), source_identity(source)
    put(s3_environment, own_bucket, 1, digits_tars, 2)
    assert pickle.loads(pickle.dumps(source)).read(1, 3) == before
    shutil.rmtree(tmp_path / "copies")
    with pytest.raises(SourceError, match=r"train-00001\.tar: has \d+ bytes and version .*changed in between\. Start"):
        pickle.loads(pickle.dumps(source)).read(1, 3)
    changed = source_identity(open_source(spec, copies=copies))
    assert changed.shard_hashes[0] == identity.shard_hashes[0]
    assert changed.shard_hashes[1] != identity.shard_hashes[1]
    put(s3_environment, own_bucket, 1, digits_tars, 1)
    assert source_identity(open_source(spec, copies=copies)) == identity


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("s3://{bucket}/train", SourceError, "found no name of a tar. Behind a URL only tars are read"),
        ("s3://{bucket}/", SourceError, r"found no tar there, but train/train-00000\.tar, .* and \d+ more\. Behind"),
        ("s3://{bucket}/*/train-00000.tar", SourceError, "found a pattern of folders"),
        ("s3://{bucket}/val/*.jpg", SourceError, r"found no tar there, but val-00000\.tar"),
        ("s3://{bucket}/nowhere/", SourceError, "found no tar there, but nothing"),
        ("s3://{bucket}/val/val-{{0..2.tar", SourceError, "braces do not match"),
        ("s3://{bucket}/val/val-0000{{0,0}}.tar", SourceError, "names 1 tars twice"),
        ("s3://{bucket}/val/val-0000{{0,1}}.tar", SourceError, r"1 of 2 tars are missing: s3://.*/val-00001\.tar"),
        ("s3://no-such-bucket/x.tar", StorageError, "no such bucket"),
        ("s3://no-such-bucket/*.tar", StorageError, "no such bucket"),
        ("s3://me:secret-word@{bucket}/x.tar", ConfigError, "user and a password"),
        ("nothing://{bucket}/x.tar", ConfigError, "nothing"),
    ],
)
def test_urls_that_cannot_be_a_source(
    spec: str, error: type[Exception], message: str, bucket: str, s3_environment: S3Server, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        open_source(spec.format(bucket=bucket), copies=LocalCopies(tmp_path, 10**8))
    assert "secret-word" not in str(caught.value)
    assert not list(tmp_path.rglob("*.tar"))


def test_tars_that_may_not_be_read(bucket: str, s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_environment.require_credentials(bucket) as reader:
        for name, value in reader.items():
            monkeypatch.setenv(name, value)
        for name, value in NOBODY.items():
            monkeypatch.setenv(name, value)
        for spec in (train_tars(bucket), f"s3://{bucket}/train/"):
            with pytest.raises(SourceError, match=r"the store refuses.*Check the credentials") as caught:
                open_source(spec)
            assert not [value for value in NOBODY.values() if value in str(caught.value)]


def test_a_bound_below_one_tar(bucket: str, s3_environment: S3Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"local_gb: found 1e-06, but of the tars of s3://.* one has 0\.000"):
        open_source(train_tars(bucket), copies=LocalCopies(tmp_path, 1000))


def test_where_copies_are_kept_by_default(
    bucket: str, s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a folder of its own, a job keeps copies below the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sum(len(shard.keys) for shard in open_source(train_tars(bucket)).shards) == NUM_TRAIN
    assert num_copies(tmp_path / "vkd-cache" / "copies") == 5
    assert [path.name for path in tmp_path.iterdir()] == ["vkd-cache"]
