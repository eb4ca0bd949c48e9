"""Damage of every kind is noticed, and told apart from the harmless leftovers of an interrupted run."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_samples import make_columns, make_manifest, make_values, replace_unit, unit_file

from vkd_cache.cache.check import Finding, check_structure
from vkd_cache.cache.reader import Cache, open_cache
from vkd_cache.cache.storage import TEMPORARY
from vkd_cache.cache.units import unpack_unit
from vkd_cache.cache.writer import create_cache
from vkd_cache.errors import CacheError, CacheMismatchError, ConfigError, CorruptCacheError

BACKENDS = ("zarr", "webdataset")
RECORD = "records/view-0000/shard-000000.json"


def make_cache(root: Path, backend: str = "zarr", num_rows: int = 7) -> Cache:
    writer = create_cache(str(root), make_manifest(backend=backend))
    broken = [(f"lost/{row}", row, "truncated") for row in range(num_rows, 7)]
    writer.publish(0, 0, make_columns(num_rows, num_ops=1), {"pooled": make_values(num_rows)}, broken)
    return writer.cache


def errors(cache: Cache) -> list[Finding]:
    return [finding for finding in check_structure(cache) if finding.is_error]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_flipped_byte_of_a_unit_is_caught(tmp_path: Path, backend: str) -> None:
    cache = make_cache(tmp_path, backend, num_rows=2)
    record = cache.record(0, 0)
    path = tmp_path / record.files[0][0]
    good = path.read_bytes()
    with path.open("r+b") as file:
        for place, byte in enumerate(good):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place)
            with pytest.raises(CorruptCacheError):
                cache.read_file(record)  # what read() begins with
            if place % 100 == 0:
                with pytest.raises(CorruptCacheError, match=r"found checksum .* the record says .* Delete its record"):
                    cache.read(0, 0)
                assert errors(cache)
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert errors(cache) == []
    for bad_size in (good[:-1], good + b"\0", b""):
        path.write_bytes(bad_size)
        with pytest.raises(CorruptCacheError, match="bytes, the record says"):
            cache.read(0, 0, verify=False)
    path.unlink()
    with pytest.raises(CorruptCacheError, match="missing"):
        cache.read(0, 0)
    path.write_bytes(good)
    assert errors(cache) == []


def test_every_flipped_bit_of_a_record_is_caught(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, num_rows=6)
    path = tmp_path / RECORD
    good = path.read_bytes()
    with path.open("r+b") as file:
        for place, byte in enumerate(good):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), place)
                with pytest.raises(CacheError):
                    cache.read(0, 0)
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert errors(cache) == []


def test_every_flipped_byte_of_a_manifest_is_caught(tmp_path: Path) -> None:
    make_cache(tmp_path)
    path = tmp_path / "manifest.json"
    good = path.read_bytes()
    with path.open("r+b") as file:
        for place, byte in enumerate(good):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place)
            with pytest.raises(CacheError):
                open_cache(str(tmp_path))
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert open_cache(str(tmp_path)).units == ((0, 0),)


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
        create_cache(str(tmp_path), cache.manifest)  # cleans up what is dead, and only that
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
