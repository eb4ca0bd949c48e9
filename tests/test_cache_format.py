"""The format: its documents, its versions, hostile manifests, and docs/format.md as a program."""

import contextlib
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_samples import make_columns, make_manifest, make_node, make_values
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd_cache.cache import zarr_backend
from vkd_cache.cache.codecs import encode_node
from vkd_cache.cache.differences import manifest_differences
from vkd_cache.cache.documents import canonical, seal, unseal
from vkd_cache.cache.reader import open_cache
from vkd_cache.cache.schema import Manifest, UnitRecord
from vkd_cache.cache.units import pack_unit, unpack_unit
from vkd_cache.cache.writer import create_cache
from vkd_cache.errors import CacheError, CacheFormatError, CorruptCacheError

FORMAT_PAGE = Path(__file__).parent.parent / "docs" / "format.md"
BACKENDS = ("zarr", "webdataset")


def code_block(heading: str) -> str:
    """The program of a section; it may use the function of the section on packed columns."""
    section = FORMAT_PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(block) if heading == "Packed columns" else f"{code_block('Packed columns')}\n{block}"


# webdataset leaves closing its file to the garbage collector
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("codec", ["float32", "float16", "sqrt_uint8", "sqrt_uint4"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("version", [1, 2])
def test_the_page_reads_a_cache_without_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, codec: str, version: int
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = make_manifest(backend=backend, nodes=(make_node(codec),), format_version=version)
    writer = create_cache("my-cache", manifest)
    writer.publish(0, 0, make_columns(7), {"pooled": make_values(7)})
    theirs: dict[str, Any] = {}
    exec(code_block(f"Read it without us: {backend}"), theirs)
    assert "vkd_cache" not in code_block(f"Read it without us: {backend}")
    ours: dict[str, Any] = {}
    exec(code_block("Read it with us"), ours)
    assert theirs["keys"] == ours["keys"] == writer.cache.read(0, 0).keys
    assert theirs["values"].shape == (7, 5)
    np.testing.assert_array_equal(theirs["values"], ours["values"].numpy())


@pytest.mark.parametrize("version", [1, 2])
def test_plain_zarr_sees_every_column(tmp_path: Path, version: int) -> None:
    import zarr

    nodes = (make_node("bfloat16"), make_node("float16", "feature_map", (3, 2, 2)), make_node("token_int8", "logits"))
    writer = create_cache(str(tmp_path), make_manifest(nodes=nodes, format_version=version))
    page: dict[str, Any] = {}
    exec(code_block("Packed columns"), page)
    for shard, rows in enumerate((6, 0)):
        values = {"pooled": make_values(rows), "feature_map": make_values(rows, (3, 2, 2)), "logits": make_values(rows)}
        record = writer.publish(shard, 0, make_columns(rows, num_ops=0), values)
        unit = unpack_unit((tmp_path / record.files[0][0]).read_bytes(), writer.manifest)
        with zarr.storage.ZipStore(tmp_path / record.files[0][0], mode="r") as store:
            arrays = dict(zarr.open_group(store, mode="r").arrays())
            assert all(isinstance(array, zarr.Array) and array.metadata.zarr_format == 3 for array in arrays.values())
            seen = {name: np.asarray(array[...]) for name, array in arrays.items()}
        seen |= page["unpacked"](seen.pop("columns")) if version == 2 else {}
        assert seen.keys() == unit.keys()
        for name, array in seen.items():
            assert array.dtype == unit[name].dtype
            np.testing.assert_array_equal(array, unit[name])


def test_metadata_is_what_zarr_itself_would_write() -> None:
    import zarr

    columns = {"row": np.arange(4, dtype=np.uint32), "node.pooled": np.ones((4, 5), np.float16)}
    entries = zarr_backend._zip_entries(zarr_backend.pack(columns, make_manifest()))
    for name, column in columns.items():
        store = zarr.storage.MemoryStore()
        zarr.create_array(
            store,
            shape=column.shape,
            dtype=column.dtype,
            chunks=column.shape,
            filters=None,
            compressors=zarr.codecs.ZstdCodec(level=1),
        )
        assert json.loads(bytes(entries[f"{name}/zarr.json"])) == json.loads(store._store_dict["zarr.json"].to_bytes())


def test_the_manifest_comes_back(tmp_path: Path) -> None:
    manifest = make_manifest()
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert Manifest.from_json(unseal(seal(manifest.to_json()), "x")) == manifest
    create_cache(str(tmp_path), manifest)
    stored = json.loads((tmp_path / "manifest.json").read_bytes())
    assert stored["format_version"] == 2
    assert (tmp_path / "manifest.json").read_bytes() == (json.dumps(stored, sort_keys=True, indent=1) + "\n").encode()


def test_the_fingerprint_is_the_one_that_the_page_describes() -> None:
    manifest = make_manifest()
    body = manifest.to_json()
    assert body.pop("nodes")[0]["name"] == "pooled"
    body["nodes"] = {"pooled": {"codec": "float16", "dtype": "float16", "layout": "pooled", "shape": [5]}}
    body["node_order"] = ["pooled"]
    body["numerics"] = {"device": "cpu", "autocast": "off"}
    body["versions"] = {"torch": "2.5.0", "timm": "1.0.15", "pillow": "11.0", "libjpeg": "3.0"}
    text = json.dumps(body, sort_keys=True, indent=1) + "\n"
    assert manifest.fingerprint() == hashlib.sha256(text.encode()).hexdigest()


def test_what_does_not_change_a_number_does_not_change_the_fingerprint() -> None:
    manifest = make_manifest()
    for changes in (
        {"numerics": {**manifest.numerics, "batch_size": 1}},
        {"versions": {**manifest.versions, "numpy": "3", "python": "3.14"}},
        {"nodes": (make_node("float16").__class__(**{**vars(make_node("float16")), "measured": {"x": 0.5}}),)},
    ):
        assert make_manifest(**changes).fingerprint() == manifest.fingerprint()
        assert manifest_differences(make_manifest(**changes), manifest) == []


CHANGES: dict[str, Any] = {
    "dataset": {"kind": "tar", "num_classes": 10, "shard_counts": [7, 7, 7], "shard_hashes": ["a1", "b2", "c4"]},
    "recipe": {"name": "vkd", "size_px": 224, "scale": [0.08, 0.9]},
    "seed": 18,
    "nodes": (make_node("float16"), make_node("float16", "logits")),
    "teacher": {"name": "regnety_160", "weights_sha256": "3f2b", "mean": [0.5, 0.5, 0.5]},
    "head": {"file": "head-" + "0" * 16 + ".safetensors", "sha256": "0" * 64},
    "numerics": {"device": "cuda", "autocast": "off", "batch_size": 64},
    "versions": {"torch": "2.5.1", "timm": "1.0.15", "pillow": "11.0", "libjpeg": "3.0", "numpy": "2.0"},
    "backend": "webdataset",
    "block_samples": 5,
}


@pytest.mark.parametrize("field", CHANGES)
def test_what_changes_a_number_changes_the_fingerprint(field: str) -> None:
    manifest, other = make_manifest(), make_manifest(**{field: CHANGES[field]})
    assert manifest.fingerprint() != other.fingerprint()
    paths = [path for path, _, _ in manifest_differences(manifest, other)]
    assert paths
    assert all(re.split(r"[.\[]", path)[0] in (field, "node_order", "block_samples") for path in paths)
    assert manifest_differences(manifest, manifest) == []


def test_differences_name_the_field_and_both_values() -> None:
    other = make_manifest(**{name: CHANGES[name] for name in ("dataset", "recipe", "versions")})
    assert manifest_differences(make_manifest(), other) == [
        ("dataset.shard_hashes[2]", "c3", "c4"),
        ("recipe.scale[1]", 1.0, 0.9),
        ("versions.torch", "2.5.0", "2.5.1"),
    ]
    typed = manifest_differences(make_manifest(recipe={"flip": 1}), make_manifest(recipe={"flip": True}))
    assert typed == [("recipe.flip", 1, True)]


@pytest.mark.parametrize("version", [3, 10**9])
def test_a_newer_format_is_refused_with_advice(tmp_path: Path, version: int) -> None:
    # whatever else has changed in it, its seal too
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": version, "nodes": "something new"}))
    with pytest.raises(CacheFormatError, match=f"found format version {version}.*reads up to 2. Upgrade vkd-cache"):
        open_cache(str(tmp_path))


def test_unknown_fields_are_tolerated(tmp_path: Path) -> None:
    writer = create_cache(str(tmp_path), make_manifest())
    record = writer.publish(0, 0, make_columns(7), {"pooled": make_values(7)})
    body = unseal((tmp_path / "manifest.json").read_bytes(), "x") | {"licence": "CC0"}
    body["nodes"][0]["note"] = body["dataset"]["note"] = body["versions"]["zlib"] = "new"
    (tmp_path / "manifest.json").write_bytes(seal(body))
    path = tmp_path / "records/view-0000/shard-000000.json"
    path.write_bytes(seal(unseal(path.read_bytes(), "x") | {"seconds": 3}))
    cache = open_cache(str(tmp_path))
    assert cache.manifest.nodes == writer.manifest.nodes
    assert UnitRecord.from_bytes(path.read_bytes(), "x") == record
    columns = {**make_columns(2), "weather": np.zeros(2, np.uint8), "node.pooled": np.zeros((2, 5), np.float16)}
    for manifest in (make_manifest(), make_manifest(format_version=1)):
        assert "weather" in unpack_unit(pack_unit(columns, manifest), manifest)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLACES = [
    (field,) for field in make_manifest().to_json()
] + [
    ("dataset", "kind"), ("dataset", "num_classes"), ("dataset", "shard_counts"), ("dataset", "shard_hashes"),
    ("dataset", "shard_counts", 0), ("dataset", "shard_hashes", 0), ("nodes", 0), ("nodes", 0, "name"),
    ("nodes", 0, "layout"), ("nodes", 0, "shape"), ("nodes", 0, "shape", 0), ("nodes", 0, "dtype"),
    ("nodes", 0, "codec"), ("nodes", 0, "measured"), ("head", "file"), ("head", "sha256"), ("versions", "torch"),
]  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(place=st.sampled_from(PLACES), value=JSON, remove=st.booleans())
def test_a_hostile_manifest_is_a_format_error_or_harmless(place: tuple[Any, ...], value: Any, remove: bool) -> None:
    body = json.loads(json.dumps(make_manifest(head=CHANGES["head"]).to_json()))
    inner = body
    for step in place[:-1]:
        inner = inner[step]
    if remove:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    try:
        manifest = Manifest.from_json(body)
    except CacheFormatError as error:
        assert "manifest.json" in str(error)
        assert len(str(error)) < 500
    else:
        assert manifest.num_shards >= 0
        assert all(1 <= size <= 2**28 for size in manifest.nodes[0].shape)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("nodes", 0, "shape"), [2**27, 2**27], "shape"),
        (("nodes", 0, "shape"), [2**62], "shape"),
        (("nodes", 0, "shape"), [0], "shape"),
        (("nodes", 0, "shape"), [True], "shape"),
        (("nodes", 0, "name"), "../../etc", "name"),
        (("nodes", 0, "codec"), "pickle", "codec.*expected one of float32"),
        (("head",), {"file": "/etc/passwd", "sha256": "0" * 64}, "head.file"),
        (("seed",), -1, "seed"),
        (("backend",), "hdf5", "backend.*zarr, webdataset"),
        (("dataset", "shard_counts"), [7, 7], "shard_hashes"),
        (("nodes",), [], "at least one node"),
    ],
)
def test_absurd_values_are_named(place: tuple[Any, ...], value: Any, message: str) -> None:
    body = json.loads(json.dumps(make_manifest().to_json()))
    inner = body
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(CacheFormatError, match=message):
        Manifest.from_json(body)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xfe", b"[]", b"null", b'{"format_version": NaN}', b"[" * 100_000, b"1" * 5000, b"{}", b'{"a": 1}'],
    ids=lambda data: repr(data[:10]),
)
def test_what_is_not_a_manifest_is_a_format_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(CacheFormatError, match=r"manifest\.json"):
        open_cache(str(tmp_path))


@settings(deadline=None, max_examples=100)
@given(body=st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_any_sealed_object_is_a_cache_error_or_read(body: dict[str, Any]) -> None:
    try:
        data = seal({**body, "format_version": 1})
    except (ValueError, RecursionError):
        return  # nan and inf are not JSON
    for parse in (lambda: UnitRecord.from_bytes(data, "r"), lambda: Manifest.from_json(unseal(data, "m"))):
        with pytest.raises(CacheError):
            parse()


def test_a_document_edited_by_hand_is_noticed() -> None:
    data = seal(make_manifest().to_json())
    for edited in (data.replace(b'"seed": 17', b'"seed": 18'), data.replace(b"\n", b"\r\n"), data + b" "):
        with pytest.raises(CorruptCacheError, match="changed since it was written"):
            unseal(edited, "manifest.json")


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_canonical_bytes_are_a_function_of_the_object(body: dict[str, Any]) -> None:
    try:
        data = canonical(body)
    except ValueError:
        return
    assert canonical(dict(reversed(body.items()))) == data
    assert canonical(json.loads(data)) == data


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=150)
@given(draw=st.data())
def test_a_hostile_unit_file_is_a_format_error(backend: str, draw: st.DataObject) -> None:
    """Past the checksum, as when a record was made for a file that is not a unit."""
    manifest = make_manifest(backend=backend, format_version=draw.draw(st.sampled_from([1, 2])))
    columns = {**make_columns(2, num_ops=1), "node.pooled": encode_node(make_values(2), "float16")[""]}
    data = bytearray(pack_unit(columns, manifest))
    for _ in range(draw.draw(st.integers(1, 8))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    start, end = sorted(draw.draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    for hostile in (bytes(data), bytes(data[start:end])):
        with contextlib.suppress(CacheFormatError):
            unpack_unit(hostile, manifest)


def test_neither_zarr_nor_webdataset_is_needed_to_read_or_write(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "import vkd_cache.cache.reader, vkd_cache.cache.writer, vkd_cache.cache.check\n"
        "print(sorted({'zarr', 'webdataset', 'timm', 'torchvision'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
