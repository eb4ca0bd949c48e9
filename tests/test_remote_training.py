"""Extraction and training from tars and caches behind a URL, within a bound: the bytes of a local run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import NUM_TRAIN
from extract_jobs import contents
from fault_proxy import FaultProxy
from s3_server import S3Server
from test_remote_sources import flip_images
from train_runs import assert_same_run, pipeline, run, run_cli

from vkd_cache.cache import open_cache
from vkd_cache.config import Config, config_to_json
from vkd_cache.errors import CorruptCacheError
from vkd_cache.local_copies import LocalCopies
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract

MakeConfig = Callable[..., Config]


def toml(config: Config, folder: Path) -> str:
    sections = config_to_json(config)
    defaults = config_to_json(Config())
    changed = {
        section: {name: value for name, value in fields.items() if value != defaults[section][name]}
        for section, fields in sections.items()
    }
    return pipeline(folder, **{section: fields for section, fields in changed.items() if fields})


def test_extract_and_train_within_a_bound(
    digits_tars: Path, tiny_config: MakeConfig, s3_environment: S3Server, tmp_path: Path
) -> None:
    """Through the program, with workers, copies of no more than four of five tars: the bytes of a local run.

    The cache of the local tars is trained from with those of the store: where tars lie is no part of what they are.
    """
    s3_environment.make_bucket("bounded")
    s3_environment.upload(digits_tars, "bounded")
    copies = tmp_path / "copies"
    largest = max(path.stat().st_size for path in digits_tars.glob("train-*.tar"))
    bound = {"local_dir": str(copies), "local_gb": 4.2 * largest / 1e9}
    here, there = {"train": str(digits_tars / "train-*.tar")}, {"train": "s3://bounded/train-*.tar", **bound}

    def config(source: dict[str, object], name: str, workers: int, cache: str) -> Config:
        return tiny_config(
            source=source,
            cache={"url": str(tmp_path / cache)},
            extract={"workers": workers},
            train={"workers": workers, "epochs": 1, "output": str(tmp_path / name)},
        )

    assert extract(config(here, "", 0, "local"), JobSplit()).exit_code == 0
    run(config(here, "run-local", 0, "local"))
    for command, pipe in (
        ("extract", toml(config(there, "run-s3", 2, "s3"), tmp_path / "a")),
        ("train", toml(config(there, "run-s3", 2, "local"), tmp_path / "b")),
    ):
        result = run_cli([command, pipe])
        assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
        assert sum(path.stat().st_size for path in copies.rglob("*") if path.is_file()) <= bound["local_gb"] * 1e9
        assert len(list(copies.glob("copies/*"))) == 4
    assert contents(tmp_path / "s3") == contents(tmp_path / "local")
    assert_same_run(tmp_path / "run-s3", tmp_path / "run-local", free=("source", "extract"))


def test_extract_from_damaged_copies(
    digits_tars: Path, tiny_config: MakeConfig, s3_environment: S3Server, tmp_path: Path
) -> None:
    """Eight bytes in each image of each copy are turned over: the same cache."""
    s3_environment.make_bucket("rotten")
    s3_environment.upload(digits_tars, "rotten")
    source = {"train": "s3://rotten/train-*.tar", "local_dir": str(tmp_path / "copies")}
    for name in ("before", "after"):
        config = tiny_config(source=source, cache={"url": str(tmp_path / name)})
        assert extract(config, JobSplit()).exit_code == 0
        flip_images(tmp_path / "copies")
    assert contents(tmp_path / "after") == contents(tmp_path / "before")


def test_units_of_a_remote_cache_are_fetched_once(
    small_cache: Path,
    tiny_config: MakeConfig,
    s3_environment: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two epochs, then every unit, of two views of five shards: ten requests, and the run of a local cache."""
    s3_environment.make_bucket("once")
    s3_environment.upload(small_cache, "once", "cache")
    remote = {"url": "s3://once/cache"}
    with FaultProxy(s3_environment.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        for url, folder in ((remote, "remote"), ({"url": str(small_cache)}, "local")):
            train = {"batch_size": 48, "output": str(tmp_path / folder)}
            run(tiny_config(source={"local_dir": str(tmp_path / "copies")}, cache=url, train=train))
        cache = open_cache(remote["url"], copies=LocalCopies(tmp_path / "copies", 10**9))
        assert sum(len(cache.read(unit)) for unit in cache.units) == 2 * NUM_TRAIN
        assert sum(kind == "GET" and "/units/" in path for kind, path in proxy.asked) == 10
    assert_same_run(tmp_path / "remote", tmp_path / "local", free=("cache",))


def test_a_damaged_copy_of_a_unit(small_cache: Path, s3_environment: S3Server, tmp_path: Path) -> None:
    """Is fetched once more; a unit that is damaged in the store is an error, and leaves no copy."""
    s3_environment.make_bucket("damaged")
    s3_environment.upload(small_cache, "damaged")
    cache = open_cache("s3://damaged", copies=LocalCopies(tmp_path, 10**8))
    expected = open_cache(str(small_cache)).read(1, 0).node("pooled")
    assert cache.read(1, 0).node("pooled").equal(expected)
    (copy,) = tmp_path.glob("copies/*")
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    assert cache.read(1, 0).node("pooled").equal(expected)
    (copy,) = tmp_path.glob("copies/*")
    assert copy.read_bytes() != data
    path = cache.record(2, 1).files[0][0]
    s3_environment.client.put_object(Bucket="damaged", Key=path, Body=bytes(data))
    with pytest.raises(CorruptCacheError, match=f"{path}: found"):
        cache.read(2, 1)
    assert list(tmp_path.glob("copies/*")) == [copy]
