"""Damage of every kind is noticed, and told apart from the harmless leftovers of an interrupted run."""

import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_samples import (
    make_columns,
    make_detection_columns,
    make_manifest,
    make_token_node,
    make_tokens,
    make_values,
    replace_unit,
    unit_file,
)

from vkd_cache.cache.check import Finding, check_structure
from vkd_cache.cache.reader import Cache, open_cache
from vkd_cache.cache.storage import TEMPORARY
from vkd_cache.cache.units import UnitId, record_path, unpack_unit
from vkd_cache.cache.writer import CacheWriter, create_cache
from vkd_cache.cli import main
from vkd_cache.errors import CacheError, CacheMismatchError, ConfigError, CorruptCacheError

BACKENDS = ("zarr", "webdataset")
RECORD = "records/view-0000/shard-000000.json"
HEAD = {"weight": torch.arange(10.0).reshape(2, 5), "bias": torch.zeros(2)}


def make_cache(root: Path, backend: str = "zarr", num_rows: int = 7) -> Cache:
    writer = create_cache(str(root), make_manifest(backend=backend), HEAD)
    broken = [(f"lost/{row}", row, "truncated") for row in range(num_rows, 7)]
    writer.publish(0, 0, make_columns(num_rows, num_ops=1), {"pooled": make_values(num_rows)}, broken)
    return writer.cache


def make_token_cache(root: Path, backend: str = "zarr") -> Cache:
    node = make_token_node("token_int8", width=2, tokens=0.5)
    manifest = make_manifest(
        backend=backend,
        nodes=(node,),
        dataset={"kind": "coco", "num_classes": 10, "shard_counts": [2], "shard_hashes": ["a1"]},
        recipe={"name": "vidt", "geometry": "detection"},
    )
    writer = create_cache(str(root), manifest)
    writer.publish(0, 0, make_detection_columns(2), {"patch_1": make_tokens([(2, 3), (4, 1)], 2, share=0.5)})
    return writer.cache


def errors(cache: Cache) -> list[Finding]:
    return [finding for finding in check_structure(cache) if finding.is_error]


Use = Callable[[Cache], object]


Use = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file: a cache that has one, where, and what training does with it before and until it has numbers."""

    make: Callable[[Path], Cache]
    file: Callable[[Cache], str]
    first: Callable[[Cache], Use]
    whole: Callable[[Cache], Use]
    step: int = 1  # every how many bytes


def as_published(cache: Cache) -> Use:
    """What reading a unit begins with, before anything in it is looked at."""
    record = cache.record(0, 0)
    return lambda: cache.read_file(record)


def unit_kind(make: Callable[[Path], Cache], step: int = 1) -> Kind:
    file = lambda cache: cache.record(0, 0).files[0][0]  # noqa: E731
    return Kind(make, file, as_published, lambda cache: lambda: cache.read(0, 0), step)


def opened(cache: Cache) -> Use:
    return lambda: open_cache(cache.url)


KINDS = {
    "manifest": Kind(make_cache, lambda _: "manifest.json", opened, opened),
    "record": Kind(
        make_cache, lambda _: RECORD, lambda cache: lambda: cache.record(0, 0), lambda cache: lambda: cache.read(0, 0)
    ),
    "head": Kind(make_cache, lambda cache: cache.manifest.head["file"], *[lambda cache: cache.head] * 2),
    "zip of a unit": unit_kind(lambda root: make_cache(root, "zarr", num_rows=1)),
    "tar of a unit": unit_kind(lambda root: make_cache(root, "webdataset", num_rows=1)),
    "zip of tokens": unit_kind(make_token_cache, step=7),
    "tar of tokens": unit_kind(lambda root: make_token_cache(root, "webdataset"), step=7),
}


def refused(use: Use) -> str:
    try:
        use()
    except CacheError as error:
        return str(error)
    raise AssertionError("damage that nobody noticed")


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_every_flip_and_every_length_is_noticed(tmp_path: Path, kind: Kind) -> None:
    """By training before it has a number, and by `verify`, which names this file and no other."""
    cache = kind.make(tmp_path)
    name, first, whole = kind.file(cache), kind.first(cache), kind.whole(cache)
    path = tmp_path / name
    good = path.read_bytes()
    cases = 0

    def case(*, is_sample: bool) -> None:
        nonlocal cases
        cases += 1
        assert name in refused(first)
        if is_sample:
            assert name in refused(whole)
            if name != "manifest.json":  # without it there is nothing to check
                assert {finding.where for finding in errors(cache)} == {name}

    with path.open("r+b") as file:
        for place in range(0, len(good), kind.step):
            for number, mask in enumerate((0xFF, 1 << place % 8)):
                os.pwrite(file.fileno(), bytes([good[place] ^ mask]), place)
                case(is_sample=place % 211 == number)
            os.pwrite(file.fileno(), good[place : place + 1], place)
        for length in reversed(range(0, len(good), kind.step)):
            file.truncate(length)
            case(is_sample=length % 311 == 0)
    for start in range(0, len(good), 512):
        for hole in (b"\0" * 512, b"\xff" * 512, good[:512]):
            data = (good[:start] + hole + good[start + 512 :])[: len(good)]
            if data != good:
                path.write_bytes(data)
                case(is_sample=start % 4096 == 0)
    for tail in (b"\0", b"\n", good):
        path.write_bytes(good + tail)
        case(is_sample=True)
    assert cases > 3 * len(good) // kind.step
    path.unlink()
    assert str(tmp_path) in refused(whole)
    path.write_bytes(good)
    whole()
    assert errors(cache) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_files_that_changed_places_are_noticed(tmp_path: Path, backend: str) -> None:
    """Two units' files, or records, of one cache, and those of another cache."""
    ours, other = (create_cache(str(tmp_path / name), make_manifest(backend=backend, seed=seed), HEAD).cache
                   for seed, name in enumerate(("ours", "other")))  # fmt: skip
    for cache in (ours, other):
        for shard in range(3):
            values = make_values(7, seed=shard + 10 * cache.manifest.seed)
            CacheWriter(cache.storage, cache.manifest).publish(shard, 0, make_columns(7), {"pooled": values})
    files = [unit_file(tmp_path / "ours", shard) for shard in range(3)]
    records = [tmp_path / "ours" / record_path(UnitId(shard, 0)) for shard in range(3)]
    for pair in (files[:2], records[:2]):
        _swap(*pair)
        wrong = errors(ours)
        assert len(wrong) == 2
        assert {finding.where for finding in wrong} == {str(path.relative_to(tmp_path / "ours")) for path in pair}
        for shard in range(2):
            refused(lambda shard=shard: ours.read(shard, 0))
        ours.read(2, 0)
        _swap(*pair)
    assert errors(ours) == []
    for path in (files[0], records[0]):
        mine = path.read_bytes()
        theirs = tmp_path / "other" / path.relative_to(tmp_path / "ours")
        path.write_bytes((theirs if theirs.exists() else unit_file(tmp_path / "other", 0)).read_bytes())
        (finding,) = errors(ours)
        assert finding.where == str(path.relative_to(tmp_path / "ours"))
        refused(lambda: ours.read(0, 0))
        path.write_bytes(mine)
    (tmp_path / "ours/manifest.json").write_bytes((tmp_path / "other/manifest.json").read_bytes())
    assert len(errors(open_cache(ours.url))) == 3
    refused(lambda: open_cache(ours.url).read(0, 0))


def _swap(one: Path, two: Path) -> None:
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


@pytest.mark.parametrize("kind", ["unit", "record", "head", "manifest"])
def test_the_commands_say_so(
    kind: str, small_cache: Path, digits_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = shutil.copytree(small_cache, tmp_path / "cache")
    path = {
        "unit": unit_file(cache, 2, 0),
        "record": cache / "records/view-0000/shard-000002.json",
        "head": next(cache.glob("head-*")),
        "manifest": cache / "manifest.json",
    }[kind]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(SystemExit) as done:
        main(["verify", str(cache)])
    said = capsys.readouterr()
    assert done.value.code == (1 if kind == "manifest" else 3)
    assert path.name in (said.err if kind == "manifest" else said.out)
    output = tmp_path / "run"
    arguments = ["--source", digits_tree, "--cache", cache, "--student", "test_vit", "--output", output]
    options = ["--batch-size", "16", "--epochs", "1", "--workers", "0", "--device", "cpu"]
    with pytest.raises(SystemExit) as done:
        main(["train", *map(str, arguments), *options])
    said = capsys.readouterr()
    assert done.value.code == 1
    (message,) = (line for line in said.err.splitlines() if line.startswith("Error: "))
    assert str(path) in message
    assert "Traceback" not in said.err


def test_units_of_another_cache_are_refused(tmp_path: Path) -> None:
    ours = make_cache(tmp_path / "ours")
    other = create_cache(str(tmp_path / "other"), make_manifest(seed=99))
    other.publish(0, 0, make_columns(7), {"pooled": make_values(7)})
    (tmp_path / "ours" / RECORD).write_bytes((tmp_path / "other" / RECORD).read_bytes())
    with pytest.raises(CacheMismatchError, match="Files of two caches were mixed"):
        ours.read(0, 0)
    moved = tmp_path / "other/records/view-0000/shard-000001.json"
    moved.write_bytes((tmp_path / "other" / RECORD).read_bytes())
    with pytest.raises(CorruptCacheError, match="found the record of shard 0, view 0"):
        other.cache.read(1, 0)
    assert [finding.where for finding in errors(ours)] == [RECORD]


def test_leftovers_are_no_errors(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    (tmp_path / "units/view-0000/shard-000001.zip").write_bytes(b"half a unit")
    (tmp_path / TEMPORARY / "abc.tmp").write_bytes(b"half a file")
    (tmp_path / "notes.txt").write_text("mine")
    with (tmp_path / TEMPORARY / "live.tmp").open("wb") as live:
        fcntl.flock(live, fcntl.LOCK_EX)
        findings = list(check_structure(cache))
        assert not any(finding.is_error for finding in findings)
        assert sorted(finding.where for finding in findings) == [
            f"{TEMPORARY}/abc.tmp",
            "notes.txt",
            "units/view-0000/shard-000001.zip",
        ]
        create_cache(str(tmp_path), cache.manifest, HEAD)  # cleans up what is dead, and only that
        assert [path.name for path in (tmp_path / TEMPORARY).iterdir()] == ["live.tmp"]
    assert cache.published() == {0: frozenset({0})}


def test_another_data_set_is_named(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    assert list(check_structure(cache, cache.manifest.dataset)) == []
    other = {**cache.manifest.dataset, "shard_hashes": ["a1", "b2", "zz"]}
    (finding,) = check_structure(cache, other)
    assert finding.is_error
    assert "dataset.shard_hashes" in finding.message


Columns = dict[str, Any]


def swap_rows(columns: Columns) -> None:
    columns["row"] = columns["row"][::-1].copy()


def repeat_key(columns: Columns) -> None:
    columns["key_bytes"] = columns["key_bytes"].copy()
    first = columns["key_bytes"][: columns["key_offsets"][1]]
    columns["key_bytes"] = np.concatenate([first, first, columns["key_bytes"][columns["key_offsets"][2] :]])


def set_entry(name: str, row: int, value: float) -> Callable[[Columns], None]:
    def change(columns: Columns) -> None:
        columns[name] = columns[name].copy()
        columns[name][row] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_rows, "not in rising order"),
        (repeat_key, "a key occurs twice"),
        (set_entry("row", 6, 9), "not 0 to 6"),
        (set_entry("label", 2, 10), "found label 10, the data set has 10 classes"),
        (set_entry("partner", 0, 2), "not mixed the same way as their partner"),
        (set_entry("partner", 0, 77), "a row that is not in the unit"),
        (set_entry("mix_kind", 0, 3), "mix_kind"),
        (set_entry("mix_kind", 0, 0), "mix_kind"),
        (set_entry("mix_lambda", 1, 0.75), "2 rows are not mixed the same way"),
        (set_entry("mix_lambda", 1, np.nan), "mix_lambda leaves"),
        (set_entry("mix_box", 3, 9), "not mixed the same way"),
    ],
)
def test_columns_that_contradict_each_other_are_found(
    tmp_path: Path, change: Callable[[Columns], None], message: str
) -> None:
    writer = create_cache(str(tmp_path), make_manifest())
    columns: Columns = make_columns(7)
    change(columns)
    writer.publish(0, 0, columns, {"pooled": make_values(7)})
    assert any(message in finding.message for finding in errors(writer.cache)), errors(writer.cache)


def test_counts_that_contradict_the_data_set_are_found(tmp_path: Path) -> None:
    writer = create_cache(str(tmp_path), make_manifest())
    writer.publish(0, 0, make_columns(6), {"pooled": make_values(6)})
    writer.publish(5, 0, make_columns(7), {"pooled": make_values(7)})
    messages = [finding.message for finding in errors(writer.cache)]
    assert any("found 6 rows and 0 broken images, the data set's shard has 7 samples" in line for line in messages)
    assert any("found shard 5, the data set has 3 shards" in line for line in messages)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_record_that_fits_a_wrong_file_does_not_hide_it(tmp_path: Path, backend: str) -> None:
    """Someone who makes records for damaged files still has to obey the format."""
    cache = make_cache(tmp_path, backend)
    other = "webdataset" if backend == "zarr" else "zarr"
    make_cache(tmp_path / "other", other)
    fewer = create_cache(str(tmp_path / "fewer"), make_manifest(backend=backend))
    fewer.publish(0, 0, make_columns(3), {"pooled": torch.ones(3, 5)})
    files = [unit_file(tmp_path / "other", 0).read_bytes(), unit_file(tmp_path / "fewer", 0).read_bytes()]
    for data in (b"", b"PK", b"\0" * 20000, *files):
        replace_unit(tmp_path, data)
        with pytest.raises(CacheError, match=unit_file(tmp_path, 0).name):
            cache.read(0, 0)
        assert errors(cache)


def test_what_is_read_cannot_change_the_file(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    data = (tmp_path / cache.record(0, 0).files[0][0]).read_bytes()
    before = bytes(data)
    values = cache.read(0, 0).node("pooled")
    values += 1
    assert not torch.equal(values, cache.read(0, 0).node("pooled"))
    for array in unpack_unit(data, cache.manifest).values():
        assert not array.size or not array.flags.writeable
    assert data == before


@pytest.mark.parametrize("below", ["", "/cache"])
def test_a_file_is_no_place_for_a_cache(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file is a file, expected a directory"):
        open_cache(f"{tmp_path}/file{below}")
