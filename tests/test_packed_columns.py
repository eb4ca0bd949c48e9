"""Packed columns: exact, a function of the columns alone, safe to open; and what a view takes in bytes."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_samples import make_columns, make_manifest, make_node, make_values, unit_file
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numcodecs.zstd import Zstd

from vkd_cache.cache.check import check_structure
from vkd_cache.cache.packed_columns import PACKED, pack_columns, unpack_columns, with_packed, without_packed
from vkd_cache.cache.reader import open_cache
from vkd_cache.cache.units import UnitId, keys_to_columns, record_path, unpack_unit
from vkd_cache.cache.writer import create_cache
from vkd_cache.errors import CacheFormatError, CacheMismatchError
from vkd_cache.views.mixing import plan_mixing
from vkd_cache.views.params import params_to_columns
from vkd_cache.views.plan import plan_view
from vkd_cache.views.recipe import RECIPES

BACKENDS = ("zarr", "webdataset")
ANY_COLUMN = hnp.arrays(
    st.sampled_from(["|u1", "|i1", "<u2", "<u4", "<u8", "<f2", "<f4"]), hnp.array_shapes(min_dims=0, min_side=0)
)


@settings(deadline=None, max_examples=60)
@given(columns=st.dictionaries(st.text(max_size=8), ANY_COLUMN, max_size=5))
def test_packing_is_exact_and_knows_no_order(columns: dict[str, np.ndarray]) -> None:
    packed = pack_columns(columns)
    np.testing.assert_array_equal(packed, pack_columns(dict(reversed(columns.items()))))
    num_bytes = sum(column.nbytes for column in columns.values())
    found = unpack_columns(packed, num_bytes)
    assert found.keys() == columns.keys()
    for name, column in columns.items():
        assert (found[name].dtype, found[name].shape) == (column.dtype, column.shape)
        assert found[name].tobytes() == column.tobytes()  # bit by bit: a NaN is not equal to itself
    if num_bytes:
        with pytest.raises(CacheFormatError, match=f"columns of {num_bytes} bytes, expected at most {num_bytes - 1}"):
            unpack_columns(packed, num_bytes - 1)


@settings(deadline=None, max_examples=200)
@given(draw=st.data())
def test_hostile_bytes_are_a_format_error_or_harmless(draw: st.DataObject) -> None:
    data = bytearray(pack_columns(make_columns(3)).tobytes())
    for _ in range(draw.draw(st.integers(0, 6))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    start, end = sorted(draw.draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    for hostile in (bytes(data), bytes(data[start:end])):
        with contextlib.suppress(CacheFormatError):
            found = unpack_columns(np.frombuffer(hostile, np.uint8), 2**20)
            assert sum(column.nbytes for column in found.values()) <= 2**20


def packed_as(listed: object, frames: bytes = b"") -> np.ndarray:
    return np.frombuffer(json.dumps(listed).encode() + b"\n" + frames, np.uint8)


ZEROS = bytes(Zstd(level=1).encode(bytes(2**20)))


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (np.zeros(0, np.uint8), "no list of columns"),
        (np.zeros((2, 2), np.uint8), r"uint8 \(2, 2\), expected bytes"),
        (packed_as({}), "no list of columns"),
        (packed_as([["row"]]), "not enough values"),
        (packed_as([7]), "cannot unpack"),
        (packed_as([["row", "|O", [1], 0]]), "column 'row' of '|O'"),
        (packed_as([["row", "<u4", [0], 0]] * 2), "column 'row' of '<u4', expected each once"),
        (packed_as([["row", "<u4", [-1], 0]]), "of sizes"),
        (packed_as([["row", "<u4", [True], 0]]), "of sizes"),
        (packed_as([["row", "<u4", [1] * 9, 0]]), "of sizes"),
        (packed_as([["row", "<u4", [2], 9]]), "the list of columns says"),
        (packed_as([["row", "<u4", [2**39], len(ZEROS)]], ZEROS), "columns of 2199023255552 bytes, expected at most"),
        (packed_as([["row", "<u4", [22], len(ZEROS)]], ZEROS), "of 1048576 bytes, expected 88"),
        (packed_as([["row", "<u4", [22], 3]], b"abc"), "not a zstd frame"),
        (packed_as([["row", "<u4", [22], 0]]), "not a zstd frame"),
        (np.frombuffer(b"[" * 2**17 + b"\n", np.uint8), "no list of columns"),
        (np.frombuffer(b"[" * 60_000 + b"\n", np.uint8), "columns: found"),
    ],
)
def test_what_is_no_packed_array_is_named(packed: np.ndarray, message: str) -> None:
    with pytest.raises(CacheFormatError, match=message):
        unpack_columns(packed, 2**22)


def test_a_column_is_inside_or_outside() -> None:
    columns = {"row": np.arange(3, dtype=np.uint32), "other": np.ones(2, np.float32)}
    assert with_packed(columns, set()) == columns
    packed = with_packed(columns, {"row", "not_there"})
    assert packed.keys() == {PACKED, "other"}
    assert without_packed(packed, 100).keys() == columns.keys()
    with pytest.raises(CacheFormatError, match="found row inside and outside of it"):
        without_packed(packed | {"row": columns["row"]}, 100)
    with pytest.raises(CacheFormatError, match="column 'columns' is missing: found other"):
        without_packed({"other": columns["other"]}, 100)


# ------------------------------------------------------------------------------------------ versions of the format


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_of_version_1_stays_one(tmp_path: Path, backend: str) -> None:
    old = make_manifest(backend=backend, format_version=1)
    create_cache(str(tmp_path / "cache"), old).publish(0, 0, make_columns(7), {"pooled": make_values(7)})
    writer = create_cache(str(tmp_path / "cache"), make_manifest(backend=backend))
    assert writer.manifest == old
    writer.publish(1, 0, make_columns(7, seed=1), {"pooled": make_values(7)})
    only_old = create_cache(str(tmp_path / "old"), old)
    only_old.publish(1, 0, make_columns(7, seed=1), {"pooled": make_values(7)})
    assert unit_file(tmp_path / "cache", 1).read_bytes() == unit_file(tmp_path / "old", 1).read_bytes()
    assert [finding.message for finding in check_structure(writer.cache)] == []

    (tmp_path / "cache" / "manifest.json").unlink()  # its units tell the version
    assert create_cache(str(tmp_path / "cache"), make_manifest(backend=backend)).manifest == old
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(CacheMismatchError, match=r"found units without manifest\.json"):
        create_cache(str(tmp_path / "cache"), make_manifest(backend=backend, seed=18))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_cache_holds_the_same_in_fewer_bytes(tmp_path: Path, backend: str) -> None:
    units, sizes = [], []
    for version in (1, 2):
        manifest = make_manifest(backend=backend, format_version=version)
        writer = create_cache(str(tmp_path / str(version)), manifest)
        writer.publish(0, 0, make_columns(7), {"pooled": make_values(7)})
        data = unit_file(tmp_path / str(version), 0).read_bytes()
        units.append(unpack_unit(data, manifest))
        sizes.append(len(data))
    assert units[0].keys() == units[1].keys()
    for name, column in units[0].items():
        np.testing.assert_array_equal(units[1][name], column)
    assert sizes[1] < sizes[0] / 2


# --------------------------------------------------------------------------------------------- what a view takes


def vkd_columns(num_rows: int) -> dict[str, np.ndarray[Any, Any]]:
    """What an extraction of ImageNet writes besides features: recipe vkd, keys by class, images of many sizes."""
    rng, recipe = np.random.default_rng(0), RECIPES["vkd"]
    classes, numbers = rng.integers(1_440_764, 15_075_141, 1000), rng.choice(30_000, num_rows, replace=False)
    of_rows = rng.integers(0, 1000, num_rows)
    keys = [f"n{classes[c]:08d}/n{classes[c]:08d}_{number}" for c, number in zip(of_rows, numbers, strict=True)]
    sizes = [(500, 375) if rng.random() < 0.6 else tuple(rng.integers(200, 900, 2).tolist()) for _ in keys]
    params = [plan_view(recipe, 0, k, 0, width_px=w, height_px=h) for k, (w, h) in zip(keys, sizes, strict=True)]
    mix = plan_mixing(recipe, 0, keys, 0)
    return {
        **keys_to_columns(keys),
        **params_to_columns(params, recipe.max_ops),
        "row": np.arange(num_rows, dtype=np.uint32),
        "label": of_rows.astype(np.uint32),
        "digest": rng.integers(0, 2**64, num_rows, np.uint64),
        "partner": mix.partner,
        "mix_kind": mix.kind,
        "mix_lambda": mix.lam,
        "mix_box": mix.box,
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_of_regnety_160_takes_less_than_3_1_kb(tmp_path: Path, backend: str) -> None:
    """File, record and container, features as they are before zstd: values of all 256 sizes, which do not shrink."""
    num_rows, width = 1024, 3024
    node = make_node("sqrt_uint8", shape=(width,))
    dataset = make_manifest().dataset | {"shard_counts": [num_rows], "shard_hashes": ["a1"], "num_classes": 1000}
    block = {"block_samples": num_rows} if backend == "webdataset" else {}
    manifest = make_manifest(nodes=(node,), dataset=dataset, backend=backend, **block)
    writer = create_cache(str(tmp_path), manifest)
    uniform = torch.rand(num_rows, width, generator=torch.Generator().manual_seed(0)).square_()
    writer.publish(0, 0, vkd_columns(num_rows), {"pooled": uniform})
    files = (unit_file(tmp_path, 0), tmp_path / record_path(UnitId(0, 0)))
    assert sum(path.stat().st_size for path in files) <= 3100 * num_rows
    assert [finding.message for finding in check_structure(open_cache(str(tmp_path)))] == []
    assert dataclasses.replace(manifest, format_version=2) == manifest
