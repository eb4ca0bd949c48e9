"""Ragged tokens in a cache: exact round trips in both containers, statistics of samples, and every kind of damage."""

import dataclasses
import io
import json
import re
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from cache_samples import (
    make_columns,
    make_detection_columns,
    make_manifest,
    make_node,
    make_token_node,
    make_tokens,
    packs_exactly,
    replace_unit,
    unit_file,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs.zstd import Zstd

from vkd_cache.cache import zarr_backend
from vkd_cache.cache.check import check_structure
from vkd_cache.cache.codecs import resolve_codec, stored_arrays
from vkd_cache.cache.frames import frame_bytes
from vkd_cache.cache.reader import Unit, open_cache
from vkd_cache.cache.rounding import token_int8
from vkd_cache.cache.schema import Manifest, NodeSpec
from vkd_cache.cache.token_codecs import choose_token_codec, decode_tokens, encode_tokens, tokens_rounding_bound
from vkd_cache.cache.units import UnitId, check_columns, pack_unit, unpack_unit
from vkd_cache.cache.writer import CacheWriter, create_cache
from vkd_cache.errors import CacheError, CacheFormatError
from vkd_cache.tokens import Tokens, join_tokens

BACKENDS = ("zarr", "webdataset")
CODECS = ("float32", "float16", "bfloat16", "token_int8")
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
GRIDS = [(1, 1), (3, 4), (2, 7), (1, 9), (5, 5), (1, 1), (6, 2)]
FORMAT_PAGE = Path(__file__).parent.parent / "docs" / "format.md"


def detection_manifest(backend: str = "zarr", **changes: Any) -> Manifest:
    dataset = {"kind": "coco", "num_classes": 91, "shard_counts": [7] * 3, "shard_hashes": ["a", "b", "c"]}
    recipe = {"name": "vidt", "geometry": "detection", "size_px": 800}
    return make_manifest(**{"backend": backend, "dataset": dataset, "recipe": recipe, **changes})


def packed(tokens: Tokens, spec: NodeSpec) -> dict[str, np.ndarray]:
    arrays = {f"node.{spec.name}{suffix}": array for suffix, array in encode_tokens(tokens, spec).items()}
    return {**make_detection_columns(len(tokens)), **arrays}


def assert_same(found: Tokens, expected: Tokens) -> None:
    assert found.values.dtype == expected.values.dtype
    assert torch.equal(found.values, expected.values)
    assert (found.scale is None) == (expected.scale is None)
    assert found.scale is None or torch.equal(found.scale, expected.scale)
    for name in ("grid", "offsets"):
        assert getattr(found, name).dtype == np.int64
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (found.index is None) == (expected.index is None)
    np.testing.assert_array_equal(found.places(), expected.places())
    assert torch.equal(found.total, expected.total)
    assert torch.equal(found.squares, expected.squares)


@settings(deadline=None, max_examples=60)
@given(
    grid=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=7),
    codec=st.sampled_from(CODECS),
    share=st.sampled_from([1.0, 0.5, 0.1]),
    block=st.integers(1, 4),
    backend=st.sampled_from(BACKENDS),
    chosen=st.lists(st.integers(0, 6), max_size=5),
)
def test_tokens_come_back_through_any_container(
    grid: list[tuple[int, int]], codec: str, share: float, block: int, backend: str, chosen: list[int]
) -> None:
    spec = make_token_node(codec, tokens=share)
    manifest = detection_manifest(backend, nodes=(spec,), block_samples=block if backend == "webdataset" else 0)
    tokens = make_tokens(grid, share=share)
    columns = packed(tokens, spec)
    found = packs_exactly(columns, manifest)
    assert check_columns(found, manifest, "unit") == len(grid)

    unit = Unit(UnitId(0, 0), manifest, found)
    whole = unit.tokens("patch_1")
    if codec == "token_int8":
        stored, scale = token_int8(tokens.values)
        expected = dataclasses.replace(tokens, values=stored, scale=scale)
    else:
        expected = dataclasses.replace(tokens, values=tokens.values.to(HALF.get(codec, torch.float32)))
    assert_same(whole, expected)
    bound = unit.rounding("patch_1")
    assert bound.dtype == torch.float32
    assert bool(((whole.dense().float() - tokens.values).abs() <= bound * (1 + 1e-6)).all())
    rows = np.array([row for row in chosen if row < len(grid)], np.int64)
    assert_same(unit.tokens("patch_1", rows), expected.select(rows))
    assert_same(unit.tokens("patch_1", slice(1, 4)), expected.select(np.arange(len(grid))[1:4]))
    assert unit.rounding("patch_1", rows).shape == (int(expected.select(rows).kept.sum()), 5)


def publish(root: Path | str, backend: str = "zarr", share: float = 1.0, codec: str = "float16") -> CacheWriter:
    nodes = (make_token_node(codec, tokens=share), make_token_node("float32", "neck_det", 3), make_node("float16"))
    writer = create_cache(str(root), detection_manifest(backend, nodes=nodes))
    values = {
        "patch_1": make_tokens(GRIDS, share=share),
        "neck_det": make_tokens([(2, 3)] * 7, 3),
        "pooled": torch.ones(7, 5),
    }
    writer.publish(0, 1, make_detection_columns(7), values)
    return writer


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", ["local", "memory"])
def test_what_is_published_is_read_back_and_sound(tmp_path: Path, place: str, backend: str, share: float) -> None:
    url = str(tmp_path) if place == "local" else f"memory://{uuid.uuid4().hex}/cache"
    publish(url, backend, share)
    cache = open_cache(url)
    assert cache.manifest.node("patch_1").tokens == share
    unit = cache.read(0, 1)
    halves = [unit.tokens("patch_1", rows) for rows in (slice(0, 3), slice(3, 7))]
    assert_same(join_tokens(halves), unit.tokens("patch_1"))
    assert_same(unit.tokens("neck_det"), make_tokens([(2, 3)] * 7, 3))
    assert unit.layout("patch_1") == "tokens"
    np.testing.assert_array_equal(unit.columns["view_size"], make_detection_columns(7)["view_size"])
    assert cache.columns["view_size"] == ("<u2", (2,))
    assert [finding.message for finding in check_structure(cache)] == []
    with pytest.raises(CacheFormatError, match=r"'patch_1': has layout tokens. Read it with tokens\('patch_1'\)"):
        unit.node("patch_1")
    with pytest.raises(CacheFormatError, match=r"'pooled': has layout pooled. Read it with node\('pooled'\)"):
        unit.tokens("pooled")
    with pytest.raises(CacheFormatError, match="'patch_9' is not in this cache: found patch_1, neck_det, pooled"):
        unit.tokens("patch_9")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_unit_without_rows(tmp_path: Path, backend: str, share: float) -> None:
    node = make_token_node("token_int8", tokens=share)
    writer = create_cache(str(tmp_path), detection_manifest(backend, nodes=(node,)))
    broken = [(f"broken{row}", row, "empty file") for row in range(7)]
    writer.publish(0, 0, make_detection_columns(0), {"patch_1": make_tokens([], share=share)}, broken)
    tokens = writer.cache.read(0, 0).tokens("patch_1")
    assert len(tokens) == 0
    assert tokens.dense().shape == (0, 5)
    assert [finding.message for finding in check_structure(writer.cache)] == []


def test_the_sample_s_statistics_are_those_of_all_tokens(tmp_path: Path) -> None:
    publish(tmp_path, share=0.25)
    sample, whole = open_cache(str(tmp_path)).read(0, 1).tokens("patch_1"), make_tokens(GRIDS)
    assert torch.equal(sample.total, whole.total)
    assert torch.equal(sample.squares, whole.squares)
    assert len(sample.values) < len(whole.values)
    assert torch.equal(sample.values, whole.values[sample.places()].half())


def test_only_what_is_small_is_compressed() -> None:
    spec = make_token_node("token_int8", tokens=0.5)
    data = zarr_backend.pack(packed(make_tokens(GRIDS, share=0.5), spec), detection_manifest(nodes=(spec,)))
    entries = zarr_backend._zip_entries(data)
    compressed = {
        suffix: zarr_backend._array_layout("x", entries[f"node.patch_1{suffix}/zarr.json"])[2]
        for suffix in stored_arrays(spec)
    }
    assert {suffix for suffix, is_so in compressed.items() if is_so} == {".offsets", ".grid", ".index"}


def test_int8_that_was_made_elsewhere_is_stored_as_it_is() -> None:
    tokens, spec = make_tokens(GRIDS), make_token_node("token_int8")
    stored, scale = token_int8(tokens.values)
    quantised = dataclasses.replace(tokens, values=stored, scale=scale)
    ours, theirs = encode_tokens(tokens, spec), encode_tokens(quantised, spec)
    assert ours.keys() == theirs.keys() == stored_arrays(spec).keys()
    for suffix, array in ours.items():
        assert array.dtype == np.dtype(stored_arrays(spec)[suffix])
        np.testing.assert_array_equal(array, theirs[suffix])
    assert decode_tokens(spec, encode_tokens(quantised, make_token_node("float32"))).dense().dtype == torch.float32


def test_views_of_one_size_have_no_column_for_it() -> None:
    manifest, columns = make_manifest(), {**make_columns(2), "node.pooled": np.zeros((2, 5), np.float16)}
    assert "view_size" not in columns
    assert check_columns(columns, manifest, "unit") == 2
    detection = detection_manifest(nodes=manifest.nodes)
    with pytest.raises(CacheFormatError, match="column 'view_size' is missing"):
        check_columns(columns, detection, "unit")
    columns["view_size"] = np.zeros((2, 2), np.uint32)
    with pytest.raises(CacheFormatError, match=r"'view_size': found uint32 \(2, 2\), expected uint16 \(2, 2\)"):
        check_columns(columns, detection, "unit")


# the same cache as before there were tokens: bytes and fingerprints of what exists may never change
def test_manifests_of_dense_nodes_do_not_know_of_tokens() -> None:
    manifest = make_manifest(format_version=1)
    assert set(manifest.to_json()["nodes"][0]) == {"name", "layout", "shape", "dtype", "codec", "measured"}
    assert manifest.fingerprint() == "bfab40379d4140c5ad7164e05d80be6b49214fa403e93540f680a42705a9b004"


def test_the_share_is_part_of_the_fingerprint() -> None:
    one, other = (detection_manifest(nodes=(make_token_node("float16", tokens=share),)) for share in (1.0, 0.1))
    assert one.fingerprint() != other.fingerprint()
    assert Manifest.from_json(json.loads(json.dumps(other.to_json()))) == other
    assert other.to_json()["nodes"][0]["tokens"] == 0.1


@pytest.mark.parametrize("share", [0, -0.5, 1.5, True, "all", None, [1], float("nan"), float("inf"), 10**400])
def test_an_absurd_share_is_named(share: Any) -> None:
    body = detection_manifest(nodes=(make_token_node("float16", tokens=0.5),)).to_json()
    body["nodes"][0]["tokens"] = share
    with pytest.raises(CacheFormatError, match=r"nodes\[0\].tokens: found .*expected a number above 0 and at most 1"):
        Manifest.from_json(body)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"codec": "sqrt_uint8"}, "codec"), ({"shape": [3, 2, 2]}, "shape"), ({"shape": []}, "shape")],
)
def test_nodes_that_tokens_cannot_be_are_named(change: dict[str, Any], message: str) -> None:
    body = detection_manifest(nodes=(make_token_node("float16"),)).to_json()
    body["nodes"][0].update(change)
    with pytest.raises(CacheFormatError, match=rf"nodes\[0\].{message}"):
        Manifest.from_json(body)


def test_bytes_of_a_node() -> None:
    assert make_token_node("float16", width=256).token_bytes == 512
    assert make_token_node("token_int8", width=256).token_bytes == 260
    assert make_token_node("token_int8", width=256, tokens=0.1).token_bytes == 264
    assert make_token_node("token_int8", width=256).sample_bytes == 8 + 8 * 256
    assert make_node("float16").token_bytes == 0
    for codec in CODECS:
        for share in (1.0, 0.5):
            spec, tokens = make_token_node(codec, tokens=share), make_tokens(GRIDS, share=share)
            found = sum(array.nbytes for array in encode_tokens(tokens, spec).values())
            assert found == 4 + len(tokens) * spec.sample_bytes + len(tokens.values) * spec.token_bytes


Columns = dict[str, Any]
NODE = "node.patch_1"


def put(suffix: str, place: Any, value: Any) -> Callable[[Columns], None]:
    def change(columns: Columns) -> None:
        array = columns[NODE + suffix] = columns[NODE + suffix].copy()
        array[place] = value

    return change


def replace(suffix: str, make: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Columns], None]:
    def change(columns: Columns) -> None:
        made = make(columns.pop(NODE + suffix))
        if made is not None:
            columns[NODE + suffix] = made

    return change


DAMAGE: dict[str, tuple[Callable[[Columns], None], str]] = {
    "no offsets": (replace(".offsets", lambda _: None), r"'node.patch_1.offsets' is missing: found .*node.patch_1"),
    "no values": (replace("", lambda _: None), "'node.patch_1' is missing"),
    "no grid": (replace(".grid", lambda _: None), "'node.patch_1.grid' is missing"),
    "no sums": (replace(".sum", lambda _: None), "'node.patch_1.sum' is missing"),
    "no scale": (replace(".scale", lambda _: None), "'node.patch_1.scale' is missing"),
    "no index": (replace(".index", lambda _: None), "'node.patch_1.index' is missing"),
    "offsets of a row less": (replace(".offsets", lambda a: a[:-1]), r"found uint32 \(7,\), expected uint32 \(8\)"),
    "no offsets in it": (replace(".offsets", lambda a: a[:0]), r"found uint32 \(0,\), expected uint32 \(8\)"),
    "one offset": (replace(".offsets", lambda a: a[0]), r"found uint32 \(\), expected uint32 \(8\)"),
    "wide offsets": (replace(".offsets", lambda a: a.astype(np.uint64)), "found uint64"),
    "another start": (put(".offsets", 0, 1), "found 1 to 1 for row 0, expected offsets from 0 that rise"),
    "falling offsets": (put(".offsets", 3, 0), "expected offsets from 0 that rise with every row"),
    "an image without": (put(".offsets", 1, 0), "found 0 to 0 for row 0"),
    "an absurd end": (put(".offsets", 7, 2**32 - 1), r"'node.patch_1.grid': found \[6, 2\] for row 6, which has 42949"),
    "values missing": (replace("", lambda a: a[:-1]), r"'node.patch_1': found int8 \(38, 5\), expected int8 \(39, 5\)"),
    "other width": (replace("", lambda a: a[:, :-1]), r"found int8 \(39, 4\), expected int8 \(39, 5\)"),
    "other dtype": (replace("", lambda a: a.astype(np.uint8)), r"found uint8 \(39, 5\), expected int8"),
    "flat values": (replace("", lambda a: a.reshape(-1)), r"found int8 \(195,\)"),
    "scale of channels": (replace(".scale", lambda a: a[:5, 0]), r"'node.patch_1.scale': found float32 \(5,\)"),
    "a grid too small": (put(".grid", 1, (1, 2)), r"found \[1, 2\] for row 1, which has 6 tokens.* at least as many"),
    "an empty grid": (put(".grid", 1, (0, 65535)), r"found \[0, 65535\] for row 1"),
    "grid of one side": (replace(".grid", lambda a: a[:, :1]), r"'node.patch_1.grid': found uint16 \(7, 1\)"),
    "sums of a row less": (replace(".sumsq", lambda a: a[1:]), r"'node.patch_1.sumsq': found float32 \(6, 5\)"),
    "a place outside": (put(".index", -1, 12), "places of row 6 .* end with 12; expected rising places below 12"),
    "an absurd place": (put(".index", 0, 2**32 - 1), "places of row 0 .* end with 4294967295; expected .* below 1"),
    "a place twice": (replace(".index", lambda a: np.concatenate([a[:2], a[1:2], a[3:]])), "places of row 1 that do"),
    "places short": (replace(".index", lambda a: a[:-1]), r"'node.patch_1.index': found uint32 \(38,\)"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays_are_one_clear_error(damage: str) -> None:
    """What someone else's writer may have published, with a record that fits."""
    spec = make_token_node("token_int8", tokens=0.5)
    manifest = detection_manifest(nodes=(spec,))
    columns = packed(make_tokens(GRIDS, share=0.5), spec)
    assert columns[NODE].shape == (39, 5)
    assert check_columns(columns, manifest, "unit") == 7
    change, message = DAMAGE[damage]
    change(columns)
    with pytest.raises(CacheFormatError, match=message) as caught:
        check_columns(columns, manifest, "cache/unit.zip")
    assert str(caught.value).startswith("cache/unit.zip: column 'node.patch_1")
    assert len(str(caught.value)) < 800


def test_all_tokens_means_all_tokens() -> None:
    spec = make_token_node("float16")
    columns = packed(make_tokens(GRIDS), spec)
    columns["node.patch_1.grid"] = columns["node.patch_1.grid"] + np.uint16(1)
    with pytest.raises(CacheFormatError, match=r"for row 0, which has 1 tokens; .* of exactly as many"):
        check_columns(columns, detection_manifest(nodes=(spec,)), "unit")


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_change_of_what_says_how_tokens_lie_is_an_error_or_harmless(data: st.DataObject) -> None:
    share = data.draw(st.sampled_from([1.0, 0.5]))
    spec = make_token_node("float16", tokens=share)
    manifest = detection_manifest(nodes=(spec,))
    columns: Columns = packed(make_tokens(GRIDS, share=share), spec)
    for _ in range(data.draw(st.integers(1, 3))):
        suffix = data.draw(st.sampled_from([".offsets", ".grid", *([".index"] if share < 1 else [])]))
        array = columns[NODE + suffix].copy()
        limit = int(np.iinfo(array.dtype).max)
        place = data.draw(st.integers(0, array.size - 1))
        array.reshape(-1)[place] = data.draw(st.integers(0, 30) | st.integers(0, limit))
        columns[NODE + suffix] = array
    try:
        check_columns(columns, manifest, "unit")
    except CacheFormatError:
        return
    tokens = Unit(UnitId(0, 0), manifest, columns).tokens("patch_1")
    places = tokens.places()
    assert len(places) == len(tokens.values) == tokens.kept.sum()
    assert (np.diff(places) > 0).all()
    assert places[-1] < tokens.counts.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=100)
@given(draw=st.data())
def test_a_hostile_unit_of_tokens_is_a_format_error(backend: str, draw: st.DataObject) -> None:
    spec = make_token_node("token_int8", tokens=0.5)
    manifest = detection_manifest(backend, nodes=(spec,))
    data = bytearray(pack_unit(packed(make_tokens(GRIDS, share=0.5), spec), manifest))
    for _ in range(draw.draw(st.integers(1, 8))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        check_columns(unpack_unit(bytes(data), manifest), manifest, "unit")
    except CacheFormatError:
        return


def test_blocks_of_a_tar_whose_offsets_do_not_start_are_named() -> None:
    spec = make_token_node("float16")
    manifest = detection_manifest("webdataset", nodes=(spec,))
    columns = packed(make_tokens(GRIDS), spec)
    data = pack_unit(columns, manifest)
    start = data.index(b"000001.node.patch_1.offsets.npy") + 512 + 128
    assert data[start : start + 4] == bytes(4)
    with pytest.raises(CacheFormatError, match=r"column 'node.patch_1.offsets': found blocks that do not start at 0"):
        unpack_unit(data[:start] + b"\1" + data[start + 1 :], manifest)


def bomb(columns: Columns, name: str, shape: list[int], frame: bytes) -> bytes:
    """A zarr unit in which one array is replaced by metadata and bytes of our choice."""
    data = zarr_backend.pack(columns, detection_manifest(nodes=(make_token_node("float16", tokens=0.5),)))
    entries = {path: bytes(content) for path, content in zarr_backend._zip_entries(data).items()}
    metadata = json.loads(entries[f"{name}/zarr.json"])
    metadata["shape"] = metadata["chunk_grid"]["configuration"]["chunk_shape"] = shape
    entries[f"{name}/zarr.json"] = json.dumps(metadata).encode()
    entries[f"{name}/c/0"] = frame
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path, content in entries.items():
            archive.writestr(path, content)
    return stream.getvalue()


def test_a_small_file_does_not_unfold_into_absurd_memory() -> None:
    spec = make_token_node("float16", tokens=0.5)
    manifest = detection_manifest(nodes=(spec,), format_version=1)
    columns = packed(make_tokens(GRIDS, share=0.5), spec)
    zeros = bytes(Zstd(level=1).encode(bytes(2**20)))
    absurd = zeros[:4] + bytes([0xE0]) + (2**40).to_bytes(8, "little") + zeros[9:]
    cases = [
        ([2**18], zeros, None),
        ([2**39], absurd, "found arrays of .* bytes in a file of"),
        ([2**40], absurd, "metadata of another layout"),
        ([2**20], absurd, "of 1099511627776 bytes, expected 4194304"),
        ([22], zeros, "of 1048576 bytes, expected 88"),
        ([22], zeros[:5], "no content size"),
        ([22], b"", "no zstd magic number"),
        ([22], b"\0" * 88, "no zstd magic number"),
    ]
    for shape, frame, message in cases:
        data = bomb(columns, "node.patch_1.index", shape, frame)
        if message is None:
            assert unpack_unit(data, manifest)["node.patch_1.index"].shape == (2**18,)
            continue
        with pytest.raises(CacheFormatError, match=message):
            unpack_unit(data, manifest)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 65_535, 65_536, 70_000, 1_000_000])
def test_a_zstd_frame_says_how_large_it_is(size: int) -> None:
    frame = memoryview(Zstd(level=1).encode(np.arange(size, dtype=np.uint64).view(np.uint8)[:size]))
    assert size == 0 or frame_bytes(frame) == size


def swapped(tokens: Tokens, **changes: Any) -> Tokens:
    return dataclasses.replace(tokens, **changes)


@pytest.mark.parametrize(
    ("share", "change", "message"),
    [
        (1.0, lambda t: swapped(t, values=t.values.index_fill(0, torch.tensor(13), torch.nan)), "inf or nan in row 2,"),
        (1.0, lambda t: swapped(t, values=t.values.index_fill(0, torch.tensor(12), 1e6)), "found 1e.06 in row 1, more"),
        (1.0, lambda t: swapped(t, values=t.values.index_fill(0, torch.tensor(0), -1e6)), "found 1e.06 in row 0, more"),
        (1.0, lambda t: swapped(t, total=t.total * torch.inf), "inf or nan in row 0"),
        (1.0, lambda t: swapped(t, squares=t.squares * torch.nan), "inf or nan in row 0"),
        (1.0, lambda t: swapped(t, index=np.arange(len(t.values))), "found a sample .* expected the share 1 of them"),
        (0.5, lambda t: make_tokens(GRIDS), "found all tokens, expected the share 0.5"),
        (1.0, lambda t: swapped(t, grid=t.grid * 0), "found grids of 0 to 0, expected 1 to 65535"),
        (1.0, lambda t: swapped(t, grid=t.grid * 10_000), "found grids of 10000 to 90000, expected 1 to 65535"),
        (1.0, lambda t: swapped(t, offsets=t.offsets + 2**32), "tokens, a unit holds at most 4294967295"),
        (1.0, lambda t: swapped(t, offsets=t.offsets - 1), "tokens, a unit holds at most"),
        (1.0, lambda t: t.select([0, 1]), r"'node.patch_1.offsets': found uint32 \(3,\), expected uint32 \(8\)"),
        (1.0, lambda t: torch.zeros(7, 5), "found a Tensor, expected values of layout tokens"),
        (0.5, lambda t: swapped(t, index=t.index - 5), "places of row"),
    ],
)
def test_tokens_that_cannot_be_stored_are_refused(
    tmp_path: Path, share: float, change: Callable[[Tokens], Any], message: str
) -> None:
    writer = create_cache(str(tmp_path), detection_manifest(nodes=(make_token_node("float16", tokens=share),)))
    with pytest.raises(CacheError, match=message) as caught:
        writer.publish(0, 0, make_detection_columns(7), {"patch_1": change(make_tokens(GRIDS, share=share))})
    assert "shard 0 of view 0: " in str(caught.value)
    assert writer.published(0) == frozenset()


def test_tokens_for_a_dense_node_are_refused(tmp_path: Path) -> None:
    writer = create_cache(str(tmp_path), make_manifest())
    with pytest.raises(CacheFormatError, match="node 'pooled': found a Tokens, expected values of layout pooled"):
        writer.publish(0, 0, make_columns(7), {"pooled": make_tokens(GRIDS)})


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".sum", lambda a: a * np.float32(0.9), "a sum or a sum of squares of row 0 that is not that of its tokens"),
        (".sumsq", lambda a: a * 1.5, "a sum or a sum of squares of row 0 that is not that of its tokens"),
        (".sumsq", lambda a: -a, "a sum and a sum of squares of row 0 that no tokens have"),
        (".sum", lambda a: a * 0 + np.float32(1e9), "that no tokens have"),
        (".sum", lambda a: a * np.float32(np.nan), "holds inf or nan, first in row 0"),
        (".scale", lambda a: a * np.float32(np.inf), "holds inf or nan, first in row 0"),
        (".scale", lambda a: a * np.float32(2), "that is not that of its tokens"),
        ("", lambda a: a[::-1].copy(), "that is not that of its tokens"),
    ],
)
def test_statistics_that_are_not_of_the_tokens_are_found(
    tmp_path: Path, suffix: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    spec = make_token_node("token_int8")
    writer = create_cache(str(tmp_path), detection_manifest(nodes=(spec,)))
    writer.publish(0, 0, make_detection_columns(7), {"patch_1": make_tokens(GRIDS)})
    assert not list(check_structure(writer.cache))
    columns = packed(make_tokens(GRIDS), spec)
    columns[NODE + suffix] = change(columns[NODE + suffix])
    data = pack_unit(columns, writer.manifest)
    replace_unit(tmp_path, data)
    findings = [finding.message for finding in check_structure(writer.cache)]
    assert len(findings) == 1
    assert re.search(message, findings[0])


def test_labels_of_a_detection_cache_are_no_classes(tmp_path: Path) -> None:
    writer = create_cache(str(tmp_path), detection_manifest(nodes=(make_token_node("float16"),)))
    columns = make_detection_columns(7)
    assert (columns["label"] > 91).any()
    columns["view_size"][3, 1] = 0
    writer.publish(0, 0, columns, {"patch_1": make_tokens(GRIDS)})
    assert [finding.message for finding in check_structure(writer.cache)] == [
        "view_size: found 0, expected sizes from 1."
    ]


def test_the_same_tokens_give_the_same_bytes_whatever_they_were_cut_from(tmp_path: Path) -> None:
    manifest = detection_manifest(nodes=(make_token_node("float16"),))
    whole = make_tokens(GRIDS)
    parts = join_tokens([whole.select([row]) for row in range(7)])
    for name, tokens in (("a", whole), ("b", parts)):
        create_cache(str(tmp_path / name), manifest).publish(0, 0, make_detection_columns(7), {"patch_1": tokens})
    one, other = (unit_file(tmp_path / name, 0) for name in "ab")
    assert (one.name, one.read_bytes()) == (other.name, other.read_bytes())


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_page_reads_tokens_without_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, codec: str, share: float
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = make_token_node(codec, tokens=share)
    writer = create_cache("my-cache", detection_manifest(backend, nodes=(spec,)))
    tokens = make_tokens(GRIDS, share=share)
    writer.publish(0, 0, make_detection_columns(7), {"patch_1": tokens})
    page = FORMAT_PAGE.read_text(encoding="utf-8").split("## Read tokens without us\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    theirs: dict[str, Any] = {}
    exec(block, theirs)
    ours = writer.cache.read(0, 0).tokens("patch_1")
    found = [theirs["tokens_of"](unit, writer.manifest.to_json()["nodes"][0], i) for unit, i in rows_of(backend)]
    values = np.concatenate([values for values, _, _, _ in found])
    np.testing.assert_array_equal(values, ours.dense().float().numpy())
    widths = np.repeat(ours.grid[:, 1], ours.kept)
    index = np.concatenate([rows for _, rows, _, _ in found]) * widths + np.concatenate([c for _, _, c, _ in found])
    starts = np.repeat(np.cumsum(ours.counts) - ours.counts, ours.kept)
    np.testing.assert_array_equal(index + starts, ours.places())
    means = (ours.total / torch.from_numpy(ours.counts)[:, None]).numpy()
    np.testing.assert_allclose(np.stack([mean for _, _, _, mean in found]), means, rtol=1e-6)


def rows_of(backend: str) -> list[tuple[dict[str, Any], int]]:
    """Every row of the unit as plain zarr or webdataset show it: its arrays, and which row of them it is."""
    if backend == "zarr":
        with zarr.storage.ZipStore(unit_file(Path("my-cache"), 0), mode="r") as store:
            unit = {name: array[...] for name, array in zarr.open_group(store, mode="r").arrays()}
        assert "row" not in unit
        return [(unit, row) for row in range(7)]
    import webdataset

    rows = []
    for block in webdataset.WebDataset(str(unit_file(Path("my-cache"), 0)), shardshuffle=False).decode():
        unit = {name.removesuffix(".npy"): array for name, array in block.items()}
        rows += [(unit, row) for row in range(len(unit["node.patch_1.grid"]))]
    return rows


def test_the_codec_of_tokens_is_chosen_by_measurement() -> None:
    tokens = make_tokens([(20, 20)], 64)
    spec = resolve_codec("patch_1", "auto", tokens, fraction=0.1)
    assert (spec.layout, spec.shape, spec.dtype) == ("tokens", (64,), "auto")
    assert (spec.codec, spec.tokens) == ("token_int8", 0.1)
    assert spec.measured.keys() == {"standardised_error", "feature_loss_change"}
    assert 0 < spec.measured["standardised_error"] <= 0.01
    # one channel a thousand times as large: the others get few of the 127 steps
    loud = tokens.values.clone()
    loud[:, 0] *= 1000
    codec, measured = choose_token_codec(dataclasses.replace(tokens, values=loud))
    assert codec == "float16"
    assert measured["standardised_error"] < 0.001
    assert choose_token_codec(dataclasses.replace(tokens, values=loud * 1e6)) == (
        "float32", dict.fromkeys(measured, 0.0)
    )  # fmt: skip
    assert choose_token_codec(dataclasses.replace(tokens, values=torch.ones(400, 64)))[0] in ("token_int8", "float16")
    with pytest.raises(CacheError, match="inf or nan in row 0"):
        choose_token_codec(dataclasses.replace(tokens, values=tokens.values * torch.inf))


def test_the_codec_is_what_was_asked_for() -> None:
    tokens = make_tokens(GRIDS)
    for dtype in ("float32", "float16", "bfloat16"):
        assert resolve_codec("patch_1", dtype, tokens) == make_token_node(dtype)
    assert resolve_codec("patch_1", "int8", tokens) == make_token_node("token_int8")
    assert resolve_codec("patch_1", "uint8", tokens).codec == "token_int8"
    assert resolve_codec("pooled", "int8", torch.rand(3, 5)).codec == "token_int8"


@pytest.mark.parametrize("codec", CODECS)
def test_no_token_leaves_its_rounding_bound(codec: str) -> None:
    tokens = make_tokens(GRIDS)
    wide = dataclasses.replace(tokens, values=tokens.values * torch.logspace(-9, 4, len(tokens.values))[:, None])
    spec = make_token_node(codec)
    arrays = encode_tokens(wide, spec)
    found, bound = decode_tokens(spec, arrays).dense().double(), tokens_rounding_bound(spec, arrays).double()
    assert bool(((found - wide.values.double()).abs() <= bound * (1 + 1e-6)).all())
