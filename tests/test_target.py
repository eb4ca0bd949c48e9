"""Where a cache may be made: at no mistyped URL, not in its own source, not among somebody's files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from convert_jobs import do
from train_runs import run_cli

from vkd_cache.config import Config, load_config
from vkd_cache.errors import CacheError, ConfigError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract
from vkd_cache.stages.target import refuse_foreign_folder, refuse_overlap
from vkd_cache.urls import check_place

Build = Callable[..., Config]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3:/x/y", "found s3:/x/y, expected s3://bucket/..., as in s3://x/y"),
        ("s3:x", "expected s3://bucket"),
        ("GS:/x", "expected gs://bucket"),
        ("S3://x/y", "expected s3://x/y, in small letters"),
        ("file:/x", "expected the path alone"),
        ("memory://x", "ends with this process"),
    ],
)
def test_what_was_meant_to_be_a_url(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(None, {"cache": {"url": text}})
    assert "[cache] url" in str(error.value)


@pytest.mark.parametrize("text", ["c:/x", "C:x", "s3://x", "nobody:x", "a/s3:x", "./s3:x", "/s3:/x", "file:///x", "x"])
def test_other_paths_and_urls_pass(text: str) -> None:
    check_place(text, "cache")


def test_a_path_that_exists_is_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data:train").mkdir()
    check_place("data:train", "cache")


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("/a/b", "/a/b/", "is the cache"),
        ("/a/b", "file:///a/c/../b", "is the cache"),
        ("/a/b", "/a/b/sub", "is inside"),
        ("/a/b/sub", "/a/b", "holds the cache"),
        ("s3://b/x", "s3://b/x/sub", "is inside"),
        ("s3://b/x/sub/", "s3://b/x", "holds the cache"),
    ],
)
def test_a_conversion_into_its_own_source(source: str, target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_overlap(source, target)


def test_a_conversion_beside_its_source() -> None:
    for source, target in (("/a/b", "/a/bb"), ("/a/bb", "/a/b"), ("s3://b/x", "s3://b/x2"), ("/a/b", "s3://a/b")):
        refuse_overlap(source, target)


def test_a_folder_with_other_things(tiny_config: Build, small_cache: Path, tmp_path: Path) -> None:
    for name in "dcba":
        (tmp_path / name).touch()
    what = r"holds other things \(a, b, c, \.\.\.\), expected an empty folder or a cache"
    with pytest.raises(CacheError, match=what + r"\. Give another TARGET"):
        do(small_cache, tmp_path)
    with pytest.raises(CacheError, match=what + r"\. Give another --cache"):
        extract(tiny_config(cache={"url": str(tmp_path)}), JobSplit())
    assert sorted(path.name for path in tmp_path.iterdir()) == list("abcd")


def test_what_a_cache_consists_of_is_no_other_thing(small_cache: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(small_cache, tmp_path / "cache")
    (cache / "mine").touch()
    refuse_foreign_folder(str(cache), "--cache")
    (cache / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"\(mine\)"):
        refuse_foreign_folder(str(cache), "--cache")
    (cache / "mine").unlink()
    (cache / ".DS_Store").touch()
    (cache / "lost+found").mkdir()
    for url in (str(cache), f"file://{cache}", str(tmp_path / "new"), "s3://bucket/x"):
        refuse_foreign_folder(url, "--cache")


def test_a_dry_run_as_json_is_the_plan(small_cache: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "new")
    result = run_cli(["convert", str(small_cache), target, "--views", "3", "--dry-run", "--json"])
    assert result.returncode == 0
    plan = json.loads(result.stdout)
    wanted = {"dry_run": True, "target_exists": False, "shards": 5, "units_to_convert": 10, "units_waiting": 5}
    assert {name: plan[name] for name in wanted} == wanted and plan["units_converted"] == 0


def test_wrong_requests(small_cache: Path, tmp_path: Path) -> None:
    cache, new = str(small_cache), str(tmp_path / "new")
    for arguments, message in (
        ([cache, new, "--source", "nope"], "only a new --shard-size needs"),
        ([cache, ""], "TARGET is empty"),
        (["", new], "CACHE is empty"),
        ([cache, "memory://q"], "TARGET: found memory://q, which ends with this process"),
        ([cache, "s3:/x"], "TARGET: found s3:/x, expected s3://"),
        (["demo_without_url.toml", new], "no such cache directory"),
    ):
        result = run_cli(["convert", *arguments])
        assert result.returncode == 2 and message in result.stderr, result
    assert not Path(new).exists()
