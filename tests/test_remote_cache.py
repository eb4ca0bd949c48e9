"""A cache on S3, against a real protocol server: the same objects and the same numbers as in a folder."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import SHARD_SIZE, SIDE_PX
from extract_jobs import contents
from fault_proxy import FAULTS, FaultProxy
from remote_jobs import remote_contents, start_extract
from s3_server import ACCESS_KEY, NOBODY, SECRET, S3Server, environment, free_port
from train_runs import log, pipeline, run_cli, same_value

from vkd_cache import remote
from vkd_cache.cache.reader import open_cache
from vkd_cache.config import Config
from vkd_cache.errors import ConfigError, StorageError
from vkd_cache.remote import Patience
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.checkpoints import read_checkpoint
from vkd_cache.stages.convert import ConvertRequest, convert
from vkd_cache.stages.convert_plan import Wish
from vkd_cache.stages.extract import extract
from vkd_cache.stages.train import train
from vkd_cache.stages.verify import VerifyRequest, verify

MakeConfig = Callable[..., Config]
PATIENCE_S = 240.0  # of a busy machine; an idle one needs seconds
NUM_UNITS = 10  # five shards, two views
QUICK = Patience(first_attempts=12, attempts=12, wait_s=0.01, longest_wait_s=0.1)
A_FEW_OF_EACH = dict.fromkeys(FAULTS, 0.03) | {"silence": 0.01}
BUCKETS = (f"caches-{number}" for number in itertools.count())


@pytest.fixture
def url(s3_environment: S3Server) -> str:
    return s3_environment.make_bucket(next(BUCKETS)) + "/some/cache"


@pytest.fixture
def proxy(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Between the store and every process of the test; a user's own time-out of a second, so that silence is short."""
    monkeypatch.setenv("FSSPEC_S3", json.dumps({"config_kwargs": {"read_timeout": 1}}))
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 1}})
    monkeypatch.setattr(remote, "PATIENCE", QUICK)
    with FaultProxy(s3_environment.port, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def copied(server: S3Server, folder: Path, url: str) -> None:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    server.upload(folder, bucket, prefix)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def test_workers_at_once_behind_a_lossy_network_make_the_cache_that_a_folder_holds(
    tiny_config: MakeConfig, small_cache: Path, s3_environment: S3Server, proxy: FaultProxy, url: str, tmp_path: Path
) -> None:
    proxy.rates = A_FEW_OF_EACH
    config = tiny_config(cache={"url": url}, views={"count": "2"})
    processes = [start_extract(config, tmp_path / "said", JobSplit(index=n, count=3)) for n in range(3)]
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0] * 3, (tmp_path / "said").read_text()
    assert remote_contents(s3_environment, url) == contents(small_cache)
    assert len(proxy.injected) > 2
    everything = s3_environment.objects(url.removeprefix("s3://").partition("/")[0])
    assert sum("/runs/" in path for path in everything) == 3
    written = [*everything.values(), (tmp_path / "said").read_bytes()]
    assert not [data for data in written if SECRET.encode() in data or ACCESS_KEY.encode() in data]


def test_killed_and_resumed_it_is_the_same_cache(
    tiny_config: MakeConfig, small_cache: Path, s3_environment: S3Server, proxy: FaultProxy, url: str, tmp_path: Path
) -> None:
    config = tiny_config(cache={"url": url}, views={"count": "2"})
    records: list[tuple[str, str]] = []
    for reached in (1, 4):
        process = start_extract(config, tmp_path / "said")
        wait_until(lambda least=reached: len(set(put(proxy, "records"))) >= least)  # type: ignore[misc]
        process.kill()
        process.join()
        records = put(proxy, "records")
        for unit in open_cache(url).units:
            open_cache(url).read(unit)  # whatever is published is whole
    proxy.forget()
    summary = extract(config, JobSplit())
    assert summary.units_skipped + summary.units_published == NUM_UNITS
    assert 4 <= len(set(records)) <= summary.units_skipped + 2  # each kill may have come before the store had the last
    assert len(put(proxy, "records")) == len(put(proxy, "units")) == summary.units_published
    assert remote_contents(s3_environment, url) == contents(small_cache)
    assert extract(config, JobSplit()).units_skipped == NUM_UNITS


def put(proxy: FaultProxy, folder: str) -> list[tuple[str, str]]:
    return [(kind, path) for kind, path in list(proxy.asked) if kind == "PUT" and f"/{folder}/" in path]


def test_requests_grow_with_units_and_nothing_is_listed_on_the_way(
    tiny_config: MakeConfig, small_cache: Path, s3_environment: S3Server, proxy: FaultProxy, url: str, tmp_path: Path
) -> None:
    config = tiny_config(
        cache={"url": url}, views={"count": "2"}, train={"output": str(tmp_path / "out"), "epochs": 2, "workers": 0}
    )
    extract(config, JobSplit())
    assert remote_contents(s3_environment, url) == contents(small_cache)
    assert proxy.counts["PUT"] == 2 * NUM_UNITS + 4  # a unit and its record; manifest, head, and the run's log twice
    assert proxy.counts["LIST"] <= 8
    assert "LIST" not in kinds_after(proxy, "PUT", "/units/")
    assert proxy.counts["GET"] + proxy.counts["HEAD"] <= 3 * NUM_UNITS + 8
    proxy.forget()
    train(config, JobSplit())
    assert proxy.counts["PUT"] == proxy.counts["DELETE"] == 0
    assert proxy.counts["LIST"] <= 2
    assert "LIST" not in kinds_after(proxy, "GET", "/units/")
    assert proxy.counts["GET"] + proxy.counts["HEAD"] <= 4 * NUM_UNITS + 10  # a view an epoch, so each unit once
    proxy.forget()
    report = verify(config, VerifyRequest(url=url, source=config.source.train, pixels=True, sample=8))
    assert report.exit_code == 0
    assert proxy.counts["LIST"] <= 6


def kinds_after(proxy: FaultProxy, kind: str, part: str) -> list[str]:
    """Kinds of requests from the first one of `kind` for a path with `part`."""
    return [seen for seen, _ in itertools.dropwhile(lambda one: one[0] != kind or part not in one[1], proxy.asked)]


def test_training_behind_a_lossy_network_is_training_from_a_folder(
    digits_tree: Path,
    tiny_config: MakeConfig,
    small_cache: Path,
    s3_environment: S3Server,
    proxy: FaultProxy,
    url: str,
    tmp_path: Path,
) -> None:
    """The command with two data workers against the stage in this process: the same weights and losses, bit for bit."""
    copied(s3_environment, small_cache, url)
    proxy.rates = A_FEW_OF_EACH
    config = tiny_config(
        cache={"url": str(small_cache)}, views={"count": "2"}, train={"output": str(tmp_path / "folder")}
    )
    sections: dict[str, dict[str, Any]] = {
        "source": {"train": str(digits_tree), "shard_size": SHARD_SIZE},
        "views": {"size_px": SIDE_PX, "seed": 5, "count": "2"},
        "cache": {"url": url},
        "student": {"name": "test_vit"},
        "train": {"epochs": 2, "batch_size": 16, "lr": 1e-3, "workers": 2, "device": "cpu", "open_shards": 2}
        | {"log_every": 1, "digest_check": 1.0, "output": str(tmp_path / "s3")},
        "eval": {"batch_size": 30, "workers": 0, "device": "cpu"},
    }
    done = run_cli(["train", pipeline(tmp_path, **sections)])
    assert done.returncode == 0, done.stderr
    assert proxy.injected
    train(config, JobSplit())
    one, other = (read_checkpoint(tmp_path / place / "last.pt") for place in ("s3", "folder"))
    assert one["config"]["cache"]["url"] == url
    for name in ("student", "optimizer", "standing"):
        assert same_value(one[name], other[name]), name
    assert log(tmp_path / "s3") == log(tmp_path / "folder")
    leaks = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not leaks
    assert SECRET not in done.stdout + done.stderr


def test_verify_finds_what_changed_and_extract_redoes_it(
    tiny_config: MakeConfig, small_cache: Path, s3_environment: S3Server, proxy: FaultProxy, url: str
) -> None:
    copied(s3_environment, small_cache, url)
    proxy.rates = A_FEW_OF_EACH
    config = tiny_config(cache={"url": url}, views={"count": "2"})
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    unit = open_cache(url).record(1, 0).files[0][0]
    damaged = bytearray(contents(small_cache)[unit])
    damaged[len(damaged) // 2] ^= 1
    s3_environment.client.put_object(Bucket=bucket, Key=f"{prefix}/{unit}", Body=bytes(damaged))
    report = verify(config, VerifyRequest(url=url))
    assert report.exit_code == 3
    assert f"{url}/{unit}" in json.dumps(report.to_json())
    verify(config, VerifyRequest(url=url, repair=True))
    assert len(open_cache(url).units) == NUM_UNITS - 1
    assert extract(config, JobSplit()).units_published == 1
    assert remote_contents(s3_environment, url) == contents(small_cache)


def test_conversion_goes_from_a_folder_to_a_store_and_back(
    small_cache: Path, s3_environment: S3Server, proxy: FaultProxy, url: str, tmp_path: Path
) -> None:
    proxy.rates = A_FEW_OF_EACH
    wish = Wish(backend="webdataset", dtype="uint8")
    convert(ConvertRequest(source=str(small_cache), target=str(tmp_path / "in-a-folder"), wish=wish), JobSplit())
    convert(ConvertRequest(source=str(small_cache), target=url, wish=wish, views="0:1"), JobSplit())
    summary = convert(ConvertRequest(source=str(small_cache), target=url, wish=wish), JobSplit())
    assert summary.units_skipped == NUM_UNITS // 2
    assert remote_contents(s3_environment, url) == contents(tmp_path / "in-a-folder")
    zarr = Wish(backend="zarr")
    for source, target in ((url, "from-the-store"), (str(tmp_path / "in-a-folder"), "from-the-folder")):
        convert(ConvertRequest(source=source, target=str(tmp_path / target), wish=zarr), JobSplit())
    assert contents(tmp_path / "from-the-store") == contents(tmp_path / "from-the-folder")
    with pytest.raises(ConfigError, match="is the cache that is to be converted"):
        convert(ConvertRequest(source=url, target=url + "/", wish=zarr), JobSplit())
    with pytest.raises(ConfigError, match="carries a user and a password"):
        convert(ConvertRequest(source=url, target=f"s3://AKIA:{SECRET}@bucket/x", wish=zarr), JobSplit())


def test_an_outage_is_one_clear_error_and_the_same_command_goes_on(
    tiny_config: MakeConfig,
    small_cache: Path,
    s3_environment: S3Server,
    proxy: FaultProxy,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(cache={"url": url}, views={"count": "2"})
    monkeypatch.setattr(remote, "PATIENCE", Patience(first_attempts=3, attempts=3, wait_s=0.01))
    proxy.puts_until_outage = 10
    with pytest.raises(
        StorageError,
        match=rf"^{url}/\S+: (injected SlowDown|Service Unavailable), 3 times\. .* the same command goes on",
    ):
        extract(config, JobSplit())
    proxy.puts_until_outage = float("inf")
    assert 0 < extract(config, JobSplit()).units_skipped < NUM_UNITS
    assert remote_contents(s3_environment, url) == contents(small_cache)


@pytest.fixture(scope="module", autouse=True)
def dead_endpoint(
    tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[BaseProcess, Path]]:
    """A job whose endpoint refuses connections, and what it says: started early, since it tries for a while."""
    said = tmp_path_factory.mktemp("dead") / "said"
    settings = environment(f"http://127.0.0.1:{free_port()}")
    job = start_extract(tiny_config(cache={"url": "s3://bucket/cache"}), said, settings=settings)
    yield job, said
    job.kill()
    job.join()


def test_what_is_wrong_with_a_store_is_one_line_without_secrets(
    dead_endpoint: tuple[BaseProcess, Path],
    tiny_config: MakeConfig,
    s3_environment: S3Server,
    url: str,
    tmp_path: Path,
) -> None:
    def extracting(name: str, where: str = url, settings: dict[str, str] | None = None) -> tuple[BaseProcess, Path]:
        said = tmp_path / name
        job = start_extract(tiny_config(cache={"url": where}), said, settings=settings)
        job.join(PATIENCE_S)
        return job, said

    found = {"there is no such bucket": extracting("bucketless", "s3://no-such-bucket-there/x")}
    with s3_environment.require_credentials(url.removeprefix("s3://").partition("/")[0]) as reader:
        found["the store refuses"] = extracting("nobody", settings=NOBODY)
        found["the store refuses: Access Denied"] = extracting("reader", settings=reader)
    dead_endpoint[0].join(PATIENCE_S)
    found["Could not connect to the endpoint"] = dead_endpoint
    for message, (job, path) in found.items():
        said = path.read_text()
        *_, last = said.splitlines()
        assert (job.exitcode, last[:7]) == (1, "Error: "), said
        assert message in last
        assert "Traceback" not in said
        assert not [secret for secret in (SECRET, *NOBODY.values(), *reader.values()) if secret in said]


def test_credentials_in_a_url_never_get_further_than_the_command_line(tmp_path: Path) -> None:
    url = f"s3://AKIA:{SECRET}@bucket/x"
    output = str(tmp_path / "out")
    for arguments in (
        ["train", "--cache", url, "--source", "x", "--student", "y", "--output", output],
        ["verify", url],
    ):
        done = run_cli(arguments)
        assert done.returncode == 2
        assert "carries a user and a password" in done.stderr
        assert SECRET not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
