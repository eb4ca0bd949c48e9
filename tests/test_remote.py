"""Objects behind a URL: what a lossy network does to requests changes no object; what stays wrong is one message."""

import itertools
import multiprocessing
import os
import pickle
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fault_proxy import FAULTS, FaultProxy
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import NOBODY, SECRET, S3Server, environment, free_port

from vkd_cache import remote
from vkd_cache.errors import ConfigError, StorageError
from vkd_cache.remote import Patience, RemoteFiles, check_url, is_remote, open_remote

QUICK = Patience(first_attempts=12, attempts=12, wait_s=0.001, longest_wait_s=0.01)
IMPATIENT = Patience(first_attempts=2, attempts=3, wait_s=0.001)
BUCKETS = (f"objects-{number}" for number in itertools.count())


@pytest.fixture
def proxy(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A lossy network, without losses yet, between this process and the store."""
    monkeypatch.setattr(remote, "PATIENCE", QUICK)
    with FaultProxy(s3_environment.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def files(proxy: FaultProxy, s3_environment: S3Server) -> RemoteFiles:
    return open_remote(s3_environment.make_bucket(next(BUCKETS)) + "/some/folder/")


def test_each_operation_is_one_request(files: RemoteFiles, proxy: FaultProxy, tmp_path: Path) -> None:
    data = os.urandom(1000)
    files.put("a/b", data)
    files.put("a/c", data, exclusive=True)
    assert not files.exists("a")  # a folder; and from here on the bucket is known to exist
    proxy.forget()
    for ask, kinds in (
        (lambda: files.put("a/d", b""), ["PUT"]),
        (lambda: files.read("a/b") == data, ["GET"]),
        (lambda: files.read("a/d") == b"", ["GET"]),
        (lambda: files.read("a/b", 10, 20) == data[10:20], ["GET"]),
        (lambda: files.read("a/b", 10) == data[10:], ["GET"]),
        (lambda: files.read("a/b", 1000) == b"", ["GET"]),
        (lambda: files.read("a/b", 990, 2000) == data[990:], ["GET"]),
        (lambda: files.read("a/b", 20, 20) == b"", []),
        (lambda: files.info("a/b").num_bytes == 1000, ["HEAD"]),
        (lambda: files.info("a/b").version == files.info("a/c").version, ["HEAD", "HEAD"]),
        (lambda: files.exists("a/b") and not files.exists("a/z"), ["HEAD", "HEAD"]),
        (lambda: files.paths("") == ["a/b", "a/c", "a/d"], ["LIST"]),
        (lambda: files.download("a/b", tmp_path / "copy") == files.info("a/b"), ["HEAD", "GET", "HEAD", "HEAD"]),
        (lambda: files.delete("a/d"), ["DELETE"]),
    ):
        assert ask() in (True, None)
        assert [kind for kind, _ in proxy.asked] == kinds
        proxy.forget()
    assert (tmp_path / "copy").read_bytes() == data
    assert files.paths("a") == ["a/b", "a/c"]  # listings are never from before
    assert files.paths("nothing/there") == files.paths("a/b") == []
    with pytest.raises(FileExistsError, match=r"some/folder/a/b: exists already"):
        files.put("a/b", b"other", exclusive=True)
    assert files.read("a/b") == data
    for ask in (lambda: files.read("z"), lambda: files.info("z"), lambda: files.download("z", tmp_path / "z")):
        with pytest.raises(FileNotFoundError, match=r"s3://objects-\d+/some/folder/z: there is no such object"):
            ask()
    files.delete("z")
    assert not (tmp_path / "z").exists()


@pytest.fixture(scope="module")
def lossy(s3_server: S3Server) -> Iterator[tuple[RemoteFiles, FaultProxy]]:
    """Objects behind a network that a law may make lossy: one client for all examples."""
    with pytest.MonkeyPatch.context() as patch, FaultProxy(s3_server.port) as proxy:
        for name, value in environment(proxy.endpoint).items():
            patch.setenv(name, value)
        patch.setattr(remote, "PATIENCE", QUICK)
        files = open_remote(s3_server.make_bucket(next(BUCKETS)))
        files.put("first", b"")
        yield files, proxy


STEPS = st.tuples(
    st.sampled_from(("put", "create", "read", "part", "delete", "paths", "exists", "download")),
    st.sampled_from(("a", "b/c")),
    st.binary(max_size=60),
)


@given(
    steps=st.lists(STEPS, max_size=25),
    rates=st.fixed_dictionaries({name: st.sampled_from((0.0, 0.04, 0.08)) for name in FAULTS if name != "silence"}),
    folder=st.uuids(),
)
@settings(max_examples=15, deadline=None)
def test_with_any_faults_it_is_a_dictionary(
    lossy: tuple[RemoteFiles, FaultProxy],
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, str, bytes]],
    rates: dict[str, float],
    folder: uuid.UUID,
) -> None:
    """A law: whatever a schedule of faults does, every operation does what it does to a dictionary, and once."""
    files, proxy = lossy
    proxy.rates = rates
    target = tmp_path_factory.getbasetemp() / "copy"
    model: dict[str, bytes] = {}
    for kind, path, content in steps:
        assert outcome(files, str(folder), kind, path, content, target) == expected(model, kind, path, content), kind


def outcome(files: RemoteFiles, folder: str, kind: str, name: str, content: bytes, target: Path) -> object:
    path = f"{folder}/{name}"
    try:
        if kind in ("put", "create"):
            return files.put(path, content, exclusive=kind == "create")
        if kind == "read":
            return files.read(path)
        if kind == "part":
            return files.read(path, 3, 20)
        if kind == "delete":
            return files.delete(path)
        if kind == "paths":
            return [found.removeprefix(f"{folder}/") for found in files.paths(folder)]
        if kind == "exists":
            return files.exists(path)
        files.download(path, target)
        return target.read_bytes()
    except OSError as error:
        return type(error)


def expected(model: dict[str, bytes], kind: str, path: str, content: bytes) -> object:
    if kind == "create" and model.get(path, content) != content:
        return FileExistsError
    if kind in ("put", "create"):
        model[path] = content
        return None
    if kind == "delete":
        model.pop(path, None)
        return None
    if kind == "paths":
        return sorted(model)
    if kind == "exists":
        return path in model
    if path not in model:
        return FileNotFoundError
    return model[path][3:20] if kind == "part" else model[path]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_one_bounded_error(
    files: RemoteFiles, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 0.5}})  # as a user configures it
    files.put("there", b"0123456789" * 100)
    monkeypatch.setattr(remote, "PATIENCE", IMPATIENT)
    proxy.rates = {fault: 1.0}
    proxy.forget()
    for ask in (lambda: files.read("there"), lambda: files.download("there", tmp_path / "copy")):
        with pytest.raises(StorageError, match=rf"^{files.url}.*, 3 times\. Check AWS_ENDPOINT_URL"):
            ask()
    assert proxy.injected[fault] <= 12  # aiohttp asks once more by itself where a connection turns out dead
    assert not (tmp_path / "copy").exists()
    if fault not in ("short", "cut"):  # those break answers that have a body
        proxy.forget()
        with pytest.raises(StorageError, match="3 times"):
            files.put("new", b"x" * 1000, exclusive=True)
        proxy.rates = {}
        assert files.exists("new") == (fault == "lost")


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_large_object_is_put_in_parts_and_whole_or_not_at_all(
    files: RemoteFiles, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, exclusive: bool
) -> None:
    monkeypatch.setattr(remote, "_PART_BYTES", 5 * 2**20)  # S3 takes no smaller ones
    data = np.random.default_rng(0).bytes(11 * 2**20)
    proxy.script = {"POST": ["", "lost"], "PUT": ["", "cut_request"]}
    files.put("large", data, exclusive=exclusive)
    assert proxy.counts["POST"] > 2
    assert files.paths("") == ["large"]
    assert files.read("large") == data
    with pytest.raises(FileExistsError):
        files.put("large", data[1:], exclusive=True)
    assert files.read("large") == data


def test_the_wait_is_bounded_and_grows() -> None:
    patience = Patience()
    for attempts in (patience.first_attempts, patience.attempts):
        waits = [min(patience.wait_s * 2**n, patience.longest_wait_s) for n in range(attempts - 1)]
        assert waits == sorted(waits)
        assert sum(waits) < (60 if attempts == patience.first_attempts else 240)  # docs/storage.md promises it


def test_a_store_that_is_not_there_is_given_up_sooner(
    s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:hidden@127.0.0.1:{free_port()}")
    monkeypatch.setattr(remote, "PATIENCE", Patience(first_attempts=2, attempts=10**6, wait_s=0.001))
    with pytest.raises(StorageError, match="2 times") as caught:
        open_remote("s3://anything/x").read("y")
    assert "hidden" not in str(caught.value)


def test_no_bucket_no_right_and_no_credentials_are_told_apart(
    s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    nowhere = open_remote("s3://no-such-bucket-here/x")
    for ask in (nowhere.paths, nowhere.read, nowhere.exists, nowhere.info, nowhere.delete):
        with pytest.raises(StorageError, match=r"^s3://no-such-bucket-here/x: there is no such bucket\. Create it"):
            ask("")
    for exclusive in (False, True):
        with pytest.raises(StorageError, match="there is no such bucket"):
            nowhere.put("a", b"", exclusive=exclusive)
    bucket = next(BUCKETS)
    url = s3_environment.make_bucket(bucket)
    open_remote(url).put("a", b"1")
    with s3_environment.require_credentials(bucket) as reader:
        for name, value in NOBODY.items():
            monkeypatch.setenv(name, value)
        for ask in (open_remote(url).paths, open_remote(url).read, open_remote(url).exists):
            with pytest.raises(PermissionError, match=r"the store refuses: .* Check the credentials") as caught:
                ask("a")
            assert not any(secret in repr(caught.value) for secret in NOBODY.values())
        for name, value in reader.items():
            monkeypatch.setenv(name, value)
        assert open_remote(url).paths("") == ["a"]
        with pytest.raises(PermissionError, match=r"/b: the store refuses: Access Denied\. Check"):
            open_remote(url).put("b", b"2")
        for name in NOBODY:
            monkeypatch.delenv(name)
        with pytest.raises(PermissionError, match="Unable to locate credentials"):
            open_remote(url).read("a")
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("settings", "configured", "message"),
    [
        ({"AWS_ENDPOINT_URL": "no-url"}, {}, "Invalid endpoint: no-url"),
        ({"AWS_PROFILE": "nobodys"}, {}, "nobodys"),
        ({}, {"no_such_option": 1}, "no_such_option"),
        ({}, {"config_kwargs": {"no_such_option": 1}}, "no_such_option"),
        ({}, {"key": "a", "username": "b"}, "Supply either key or username"),
    ],
)
def test_settings_that_make_no_sense_are_one_message(
    s3_environment: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    configured: dict[str, object],
    message: str,
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", configured)
    with pytest.raises((StorageError, PermissionError), match=f"^s3://bucket/x/y: .*{message}.*Check"):
        open_remote("s3://bucket/x").read("y")


def test_files_travel_to_other_processes(files: RemoteFiles) -> None:
    files.put("a", b"1")
    assert SECRET.encode() not in pickle.dumps(files)
    assert pickle.loads(pickle.dumps(files)).read("a") == b"1"
    process = multiprocessing.get_context("fork").Process(target=put_from_a_fork, args=(files,))
    process.start()  # with a client whose thread only the parent has
    process.join(60)
    assert process.exitcode == 0
    assert files.read("b") == b"2"


def put_from_a_fork(files: RemoteFiles) -> None:
    files.put("b", files.read("a").replace(b"1", b"2"))


def test_a_download_of_what_changes_is_one_version(
    files: RemoteFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote, "_DOWNLOAD_BYTES", 10)
    files.put("a", b"old" * 10)
    read, changes = files.read, iter((b"new" * 10,))

    def read_and_change(path: str, start: int = 0, end: int | None = None) -> bytes:
        data = read(path, start, end)
        for change in changes:
            files.put("a", change)
        return data

    monkeypatch.setattr(files, "read", read_and_change)
    assert files.download("a", tmp_path / "copy") == files.info("a")
    assert (tmp_path / "copy").read_bytes() == b"new" * 10
    changes = (bytes([number]) * 30 for number in itertools.cycle((1, 2)))
    monkeypatch.setattr(files, "read", lambda *a: read(*a) if files.put("a", next(changes)) is None else b"")
    with pytest.raises(StorageError, match="it changed while it was copied, three times"):
        files.download("a", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_what_is_a_url() -> None:
    assert [is_remote(spec) for spec in ("s3://b/x", "https://h/x", "file:///x", "/x", "x:y")] == [True, True] + [
        False
    ] * 3
    with pytest.raises(ConfigError, match="no bucket"):
        open_remote("s3:///x")
    with pytest.raises(ConfigError, match="nonsense"):
        open_remote("nonsense://x")
    with pytest.raises(ConfigError, match="chained URL"):
        open_remote("simplecache::s3://b/x")


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIA:{SECRET}@bucket/x",
        f"s3://AKIA:{SECRET}@bucket",
        f"s3://{SECRET.replace('/', '')}@bucket/x",
        f"ftp://user:{SECRET}@host/x",
        f"https://host/x?X-Amz-Signature={SECRET}",
        f"https://account.blob/x?sv=1&sig={SECRET}",
        f"https://host/x.tar?access_token={SECRET}",
        f"s3://bucket/x::s3://AKIA:{SECRET}@bucket/y",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^cache: the \w+:// URL carries a .*docs/storage\.md") as caught:
        check_url(url, "cache")
    assert "Secret" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        open_remote(url)
    assert "Secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a:b@c",
        "s3://bucket/train-{0000..0009}.tar",
        "s3://arn:aws:s3:us-east-1:1:accesspoint/x/a@b",
        "http://localhost:8080/a@b/x.tar?download=true",
        "abfs://container@account.dfs.core.windows.net/x",
        "/home/a:b@c",
    ],
)
def test_urls_without_credentials_pass(url: str) -> None:
    check_url(url, "cache")
