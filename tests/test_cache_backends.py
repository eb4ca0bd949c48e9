"""One conformance suite for both containers, on a local directory and behind an fsspec URL."""

import fcntl
import pickle
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_samples import SHARD_COUNT, make_columns, make_manifest, make_node, make_values, packs_exactly
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd_cache.cache.check import check_structure
from vkd_cache.cache.codecs import decode_node, encode_node
from vkd_cache.cache.reader import find_cache, open_cache
from vkd_cache.cache.schema import CODECS
from vkd_cache.cache.storage import TEMPORARY, open_storage
from vkd_cache.cache.units import UnitId, keys_from_columns, keys_to_columns
from vkd_cache.cache.writer import create_cache
from vkd_cache.errors import (
    CacheError,
    CacheFormatError,
    CacheMismatchError,
    ConfigError,
    CorruptCacheError,
    IncompleteCacheError,
)

BACKENDS = ("zarr", "webdataset")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=("local", "memory"))
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "cache") if request.param == "local" else f"memory://{uuid.uuid4().hex}/cache"


def test_what_is_published_is_read_back(url: str, backend: str) -> None:
    nodes = (
        make_node("float16"),
        make_node("float32", "logits", (10,)),
        make_node("bfloat16", "feature_map", (4, 2, 2)),
    )
    writer = create_cache(url, make_manifest(backend=backend, nodes=nodes))
    columns = make_columns(6)
    values = {
        "pooled": make_values(6).half(),
        "logits": make_values(6, (10,)) - 1,
        "feature_map": make_values(6, (4, 2, 2)).bfloat16(),
    }
    record = writer.publish(1, 2, columns, values, [("broken/é", 6, "truncated")])

    cache = open_cache(url)
    assert cache.record(1, 2) == record
    assert record.num_samples == 6
    assert record.broken == (("broken/é", 6, "truncated"),)
    unit = cache.read(1, 2)
    assert len(unit) == 6
    assert unit.id == UnitId(1, 2)
    assert unit.keys == keys_from_columns(columns)
    assert unit.rows.tolist() == list(range(6))
    assert unit.columns.keys() == columns.keys()
    assert cache.columns.keys() == columns.keys() - {"key_bytes", "key_offsets"}
    for name, column in columns.items():
        assert unit.columns[name].dtype == column.dtype
        np.testing.assert_array_equal(unit.columns[name], column)
    for name, expected in values.items():
        assert unit.node(name).dtype == expected.dtype
        assert torch.equal(unit.node(name), expected)
        assert torch.equal(unit.node(name, np.array([4, 0])), expected[[4, 0]])
        assert torch.equal(unit.node(name, slice(1, 3)), expected[1:3])
    assert [finding.message for finding in check_structure(cache)] == []
    assert record.num_bytes == open_storage(url).size(record.files[0][0])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_rows", [0, 1, 3, 7])
def test_any_number_of_rows_in_any_codec(tmp_path: Path, backend: str, codec: str, num_rows: int) -> None:
    nodes = (make_node(codec), make_node(codec, "feature_map", (3, 2, 4)))
    writer = create_cache(str(tmp_path), make_manifest(backend=backend, nodes=nodes))
    values = {"pooled": make_values(num_rows), "feature_map": make_values(num_rows, (3, 2, 4))}
    broken = [(f"broken{row}", row, "empty file") for row in range(num_rows, SHARD_COUNT)]
    writer.publish(0, 0, make_columns(num_rows, num_ops=0), values, broken)
    unit = writer.cache.read(0, 0)
    assert len(unit) == len(unit.keys) == num_rows
    assert unit.columns["op_id"].shape == (num_rows, 0)
    for spec in nodes:
        stored = decode_node(spec, encode_node(values[spec.name], codec))
        assert torch.equal(unit.node(spec.name), stored)
        assert unit.node(spec.name).shape == values[spec.name].shape
    assert [finding.message for finding in check_structure(writer.cache)] == []


@settings(deadline=None, max_examples=40)
@given(
    keys=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=12),
    num_ops=st.integers(0, 4),
    block=st.integers(1, 6),
    backend=st.sampled_from(BACKENDS),
    codec=st.sampled_from(CODECS),
)
def test_packing_is_exact_and_a_function_of_the_columns(
    keys: list[str], num_ops: int, block: int, backend: str, codec: str
) -> None:
    n = len(keys)
    manifest = make_manifest(backend=backend, nodes=(make_node(codec),), block_samples=block)
    arrays = {f"node.pooled{suffix}": array for suffix, array in encode_node(make_values(n), codec).items()}
    columns = {**make_columns(n, num_ops=num_ops), **keys_to_columns(keys), **arrays}
    found = packs_exactly(columns, manifest)
    assert keys_from_columns(found) == keys


def test_a_living_writer_s_temporary_file_is_left_alone(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.prepare()
    temporary = tmp_path / TEMPORARY / "x.tmp"
    with temporary.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert storage.abandoned() == []
        storage.prepare()
        assert temporary.exists()
    assert storage.abandoned() == [f"{TEMPORARY}/x.tmp"]  # closing the file gave the lock up
    storage.prepare()
    assert not temporary.exists()


def test_a_home_folder_is_a_home_folder_without_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    open_storage("~/cache").put("a", b"x")
    assert (tmp_path / "cache" / "a").read_bytes() == b"x"


def test_units_grow_in_any_order(url: str, backend: str) -> None:
    writer = create_cache(url, make_manifest(backend=backend))
    assert find_cache(url) is not None
    assert writer.cache.published() == {}
    assert writer.cache.complete_views() == 0
    for shard, view in [(2, 1), (0, 0), (1, 0), (2, 0), (0, 2), (1, 2), (2, 2)]:
        writer.publish(shard, view, make_columns(7), {"pooled": make_values(7)})
    cache = open_cache(url)
    assert cache.published() == {0: frozenset({0, 1, 2}), 1: frozenset({2}), 2: frozenset({0, 1, 2})}
    assert cache.units == ((0, 0), (1, 0), (2, 0), (2, 1), (0, 2), (1, 2), (2, 2))
    assert writer.published(1) == {2}
    assert writer.published(7) == frozenset()
    assert cache.complete_views(0) == 3
    assert cache.complete_views() == 1  # view 1 has a hole, so view 2 does not count
    assert len(cache.read(cache.units[3])) == len(cache.read(2, 1)) == len(cache.read((2, 1), verify=False)) == 7
    assert cache.read(cache.units[3]).id == cache.read(2, 1).id == (2, 1)
    with pytest.raises(IncompleteCacheError, match="shard 0 of view 1 is not published"):
        cache.read(0, 1)


def test_the_same_inputs_give_the_same_files(tmp_path: Path, backend: str) -> None:
    for name in ("a", "b"):
        writer = create_cache(str(tmp_path / name), make_manifest(backend=backend), {"weight": torch.ones(3, 5)})
        order = [(0, 0), (1, 0)] if name == "a" else [(1, 0), (0, 0), (1, 0)]
        for shard, view in order:
            writer.publish(shard, view, make_columns(7, seed=shard), {"pooled": make_values(7, seed=shard)})
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_joining_a_cache_takes_its_manifest(url: str, backend: str) -> None:
    first = make_manifest(backend=backend)
    create_cache(url, first)
    more = {"numerics": {**first.numerics, "batch_size": 8}, "versions": {**first.versions, "numpy": "9", "zarr": "4"}}
    writer = create_cache(url, make_manifest(backend=backend, **more))
    assert writer.manifest == first == open_cache(url).manifest
    assert writer.cache.fingerprint == first.fingerprint()


def test_a_mismatch_lists_every_field_with_both_values(url: str, backend: str) -> None:
    create_cache(url, make_manifest(backend=backend))
    changes = {
        "seed": 18,
        "teacher": {"name": "resnet50", "weights_sha256": "3f2a", "mean": [0.5, 0.25, 0.5]},
        "versions": {"torch": "2.6.0", "timm": "1.0.15", "pillow": "11.0", "numpy": "2.0"},
        "nodes": (make_node("float32"),),
    }
    with pytest.raises(CacheMismatchError) as caught:
        create_cache(url, make_manifest(backend=backend, **changes))
    message = str(caught.value)
    for line in (
        "seed: 17 in the cache, 18 asked for",
        "teacher.name: 'regnety_160' in the cache, 'resnet50' asked for",
        "teacher.mean[1]: 0.5 in the cache, 0.25 asked for",
        "versions.torch: '2.5.0' in the cache, '2.6.0' asked for",
        "versions.libjpeg: '3.0' in the cache, None asked for",
        "nodes.pooled.codec: 'float16' in the cache, 'float32' asked for",
        "nodes.pooled.dtype: 'float16' in the cache, 'float32' asked for",
    ):
        assert line in message
    assert message.count(" asked for") == 7
    assert url.rsplit("/", 1)[-1] in message


def test_the_head_is_stored_once_and_checked(url: str) -> None:
    head = {"weight": make_values(10), "bias": make_values(1, (10,))[0]}
    writer = create_cache(url, make_manifest(), head)
    assert writer.manifest.head is not None
    weight, bias = open_cache(url).head() or pytest.fail("no head")
    assert torch.equal(weight, head["weight"])
    assert torch.equal(bias, head["bias"])
    with pytest.raises(CacheMismatchError, match=r"head\.sha256"):
        create_cache(url, make_manifest(), {**head, "bias": head["bias"] + 1})
    with pytest.raises(CacheMismatchError, match="head"):
        create_cache(url, make_manifest())
    weight, bias = open_cache(url).head() or pytest.fail("no head")  # the others have not touched it
    assert torch.equal(bias, head["bias"])
    open_storage(url).put(str(writer.manifest.head["file"]), b"something else")
    with pytest.raises(CorruptCacheError, match="SHA-256"):
        writer.cache.head()
    open_storage(url).delete(str(writer.manifest.head["file"]))
    with pytest.raises(CorruptCacheError, match="missing"):
        writer.cache.head()
    assert [finding.is_error for finding in check_structure(writer.cache)] == [True]


def test_wrong_units_are_refused_before_anything_is_written(tmp_path: Path, backend: str) -> None:
    writer = create_cache(str(tmp_path), make_manifest(backend=backend))
    columns, values = make_columns(4), make_values(4)
    wrong: list[tuple[dict[str, np.ndarray], dict[str, torch.Tensor], str]] = [
        ({**columns, "row": columns["row"].astype(np.int64)}, {"pooled": values}, "column 'row': found int64"),
        ({**columns, "crop": columns["crop"][:, :3]}, {"pooled": values}, "column 'crop'"),
        ({**columns, "label": columns["label"][:3]}, {"pooled": values}, "column 'label'"),
        ({**columns, "op_id": columns["op_id"][:, :1]}, {"pooled": values}, "op_value"),
        ({name: columns[name] for name in columns if name != "digest"}, {"pooled": values}, "'digest' is missing"),
        ({**columns, "key_offsets": columns["key_offsets"][::-1].copy()}, {"pooled": values}, "key_offsets"),
        (columns, {"pooled": values[:3]}, "node.pooled"),
        (columns, {"pooled": values[:, :3]}, "node.pooled"),
        (columns, {}, "found values of nodes"),
        (columns, {"pooled": values, "logits": values}, "found values of nodes"),
        (columns, {"pooled": values * torch.nan}, "node 'pooled': found inf or nan in row 0"),
        (columns, {"pooled": values * 1e6}, "more than float16 can hold"),
    ]
    for bad_columns, bad_values, message in wrong:
        with pytest.raises(CacheError, match=message):
            writer.publish(0, 0, bad_columns, bad_values)
    assert open_storage(str(tmp_path)).paths("units") == []


def test_a_run_log_is_kept_beside_the_content(url: str) -> None:
    writer = create_cache(url, make_manifest())
    writer.write_run_log("extract-1.json", b"{}")
    assert open_storage(url).get("runs/extract-1.json") == b"{}"
    assert list(check_structure(writer.cache)) == []


def test_caches_and_writers_travel_to_other_processes(url: str) -> None:
    writer = create_cache(url, make_manifest())
    pickle.loads(pickle.dumps(writer)).publish(0, 0, make_columns(7), {"pooled": make_values(7)})
    assert pickle.loads(pickle.dumps(writer.cache)).units == ((0, 0),)


def test_no_cache_is_an_error_that_says_so(url: str) -> None:
    assert find_cache(url) is None
    with pytest.raises(CacheFormatError, match=r"found no manifest\.json.*vkd-cache extract"):
        open_cache(url)
    with pytest.raises(ConfigError, match="empty URL"):
        open_cache("")
    with pytest.raises(ConfigError, match="nosuchprotocol"):
        open_cache("nosuchprotocol://x")


def test_storage_keeps_its_promises(url: str) -> None:
    storage = open_storage(url)
    storage.prepare()
    assert storage.paths("") == []
    storage.put("a/b/c", b"1")
    storage.put("a/b/c", b"22")
    storage.put("a/d", b"")
    assert storage.get("a/b/c") == b"22"
    assert storage.size("a/b/c") == 2
    assert storage.paths("a") == ["a/b/c", "a/d"]
    assert storage.paths("a/b") == ["a/b/c"]
    assert storage.paths("z") == []
    assert storage.exists("a/d")
    assert not storage.exists("a/b")
    with pytest.raises(FileExistsError):
        storage.put("a/d", b"x", exclusive=True)
    assert storage.get("a/d") == b""
    storage.put("a/e", b"x", exclusive=True)
    storage.delete("a/e")
    storage.delete("a/e")
    for missing in ("a/e", "a/b"):
        assert not storage.exists(missing)
    with pytest.raises(FileNotFoundError):
        storage.get("a/e")


def test_file_urls_are_local_directories(tmp_path: Path) -> None:
    create_cache(f"file://{tmp_path}/cache", make_manifest())
    assert open_cache(str(tmp_path / "cache")).manifest == make_manifest()
