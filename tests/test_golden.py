"""Caches of format versions 1 and 2 open for ever, and what a later release may add to one hurts nobody."""

import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from cache_samples import replace_unit, unit_file
from webdataset.tariterators import group_by_keys, tar_file_expander

from vkd_cache.cache.documents import seal, unseal
from vkd_cache.cache.reader import Unit, open_cache
from vkd_cache.cache.schema import Manifest
from vkd_cache.cache.units import UnitId, record_path
from vkd_cache.cli import main
from vkd_cache.config import Config, load_config
from vkd_cache.errors import CacheFormatError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.train import train

V1 = Path(__file__).parent / "golden" / "v1"
CACHES = ("zarr", "webdataset", "tokens")
SOURCES = {"zarr": "digits", "webdataset": "digits", "tokens": "coco"}
FINGERPRINTS = {
    "zarr": "0fca458778d56d196c0799b1826ae64562a4c0854102344eb482aa5433a5c5b7",
    "webdataset": "0fc51ee604d6eed49dd29bdd324354d3d60613389d37f45f5e733117647c5fb6",
    "tokens": "f889e41693bfd68923eb77d04799219855c06ef13e29051cce9e4caf787cd8bf",
}
TREE = "913e4b0f9d6aa4ef3a0a88bd02021d0df7790b1e698ab25bc47b8c1fb6421bdc"
V2 = V1.parent / "v2"
FINGERPRINTS_V2 = {
    "zarr": "7165294381c0132db30e370caaa3bfc43cd1f336a785e844c9b3863d4eabecbe",
    "webdataset": "20a50b77d6acaaee22c81b4c7eca35c38380f4365c7b9b7e360fe2ae8e1ef5b2",
    "tokens": "dff5f4f95da9326a185869661178165ed81a5bef650e649fbd7928eb424c89a3",
    "uint4": "18751c52952376213bc76216efa7b8a4193c6590f858e446b767ff56cb8e7058",
}
TREE_V2 = "7d316c071a4b19de2503436c8d6bc7fa55f0dceab9063befaad0ee1f24cb1915"
UINT4_VALUES = "f5a59e5de4939e6498d678a741cc8e5542e0c56962f99ffef378cf060d52c81c"
cache_names = pytest.mark.parametrize("name", CACHES)


def expected(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What was in the cache on the day it was made; values of nodes as float32."""
    with np.load(V1 / f"{name}.npz", allow_pickle=False) as arrays:
        values = dict(arrays)
    return json.loads((V1 / f"{name}.json").read_text(encoding="utf-8")), values


@pytest.mark.parametrize(("root", "digest"), [(V1, TREE), (V2, TREE_V2)])
def test_nobody_has_changed_it(root: Path, digest: str) -> None:
    tree = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        tree.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    assert tree.hexdigest() == digest, "a golden cache is never made again: a new format version gets one of its own"


@cache_names
def test_every_value_is_what_it_was(name: str) -> None:
    cache = open_cache(str(V1 / name))
    document, values = expected(name)
    assert cache.fingerprint == document["fingerprint"] == FINGERPRINTS[name]
    assert {(entry["shard"], entry["view"]) for entry in document["units"].values()} == set(cache.units)
    for where, entry in document["units"].items():
        unit = cache.read(entry["shard"], entry["view"])
        record = cache.record(entry["shard"], entry["view"])
        assert unit.keys == entry["keys"]
        assert [list(broken) for broken in record.broken] == entry["broken"]
        assert record.files[0][0] == entry["file"]
        assert record.origin is None
        for column, stored in entry["columns"].items():
            np.testing.assert_array_equal(unit.columns[column].astype(np.float64), np.array(stored, np.float64))
            assert unit.columns[column].tolist() == stored
        for spec in cache.manifest.nodes:
            check_node(unit, spec.name, f"{where} {spec.name}", values)
    head = cache.head()
    if head is not None:
        assert torch.equal(head[0], torch.from_numpy(values["head weight"]))
        assert torch.equal(head[1], torch.from_numpy(values["head bias"]))


def check_node(unit: Unit, node: str, where: str, values: dict[str, np.ndarray]) -> None:
    wanted = torch.from_numpy(values[where])
    if unit.layout(node) != "tokens":
        assert torch.equal(unit.node(node).float(), wanted)
        return
    tokens = unit.tokens(node)
    assert torch.equal(tokens.dense().float(), wanted)
    np.testing.assert_array_equal(tokens.grid, values[f"{where} grid"])
    np.testing.assert_array_equal(tokens.places(), values[f"{where} places"])
    assert torch.equal(tokens.total, torch.from_numpy(values[f"{where} total"]))
    assert torch.equal(tokens.squares, torch.from_numpy(values[f"{where} squares"]))


def plain_blocks(path: Path) -> list[dict[str, np.ndarray]]:
    """A unit's columns as the libraries that others use read them; one block where there are none."""
    if path.suffix == ".tar":
        with path.open("rb") as stream:
            blocks = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
        return [
            {key.removesuffix(".npy"): np.load(io.BytesIO(data)) for key, data in block.items() if key[:2] != "__"}
            for block in blocks
        ]
    with zarr.storage.ZipStore(path, mode="r") as store:
        return [{name: array[...] for name, array in zarr.open_group(store, mode="r").arrays()}]


@cache_names
def test_a_plain_reader_sees_the_same(name: str) -> None:
    """By the format's page alone: no line of ours between the file and the value."""
    document, values = expected(name)
    nodes = json.loads((V1 / name / "manifest.json").read_text(encoding="utf-8"))["nodes"]
    for where, entry in document["units"].items():
        record = json.loads((V1 / name / record_path(UnitId(entry["shard"], entry["view"]))).read_text("utf-8"))
        blocks = plain_blocks(V1 / name / record["files"][0]["path"])
        for column, stored in entry["columns"].items():
            assert np.concatenate([block[column] for block in blocks]).tolist() == stored
        for node in nodes:
            column = "node." + node["name"]
            parts = []
            for block in blocks:
                part = block[column].astype(np.float32)
                if node["codec"] == "sqrt_uint8":
                    part = part**2 * block[f"{column}.scale"]
                if node["codec"] == "token_int8":
                    part = part * block[f"{column}.scale"]
                parts.append(part)
            np.testing.assert_array_equal(np.concatenate(parts), values[f"{where} {node['name']}"])


@pytest.mark.parametrize("name", FINGERPRINTS_V2)
def test_version_2_holds_the_same(name: str) -> None:
    cache = open_cache(str(V2 / name))
    first = open_cache(str(V1 / cache_of_version_1(name)))
    assert (cache.fingerprint, cache.manifest.format_version) == (FINGERPRINTS_V2[name], 2)
    assert cache.units == first.units
    values = hashlib.sha256()
    for unit_id in cache.units:
        unit, old = cache.read(unit_id), first.read(unit_id)
        assert (unit.keys, cache.record(*unit_id).broken) == (old.keys, first.record(*unit_id).broken)
        assert unit.columns.keys() == old.columns.keys()
        for column, stored in old.columns.items():
            assert unit.columns[column].dtype == stored.dtype
            np.testing.assert_array_equal(unit.columns[column], stored)
        for spec in cache.manifest.nodes:
            if spec.layout == "tokens":
                assert torch.equal(unit.tokens(spec.name).dense(), old.tokens(spec.name).dense())
                np.testing.assert_array_equal(unit.tokens(spec.name).places(), old.tokens(spec.name).places())
            elif name != "uint4":
                assert torch.equal(unit.node(spec.name), old.node(spec.name))
            else:
                far = (unit.node(spec.name) - old.node(spec.name)).abs()
                assert (far <= unit.rounding(spec.name) * (1 + 1e-5)).all()
                values.update(unit.node(spec.name).numpy().tobytes())
    assert name != "uint4" or values.hexdigest() == UINT4_VALUES


def cache_of_version_1(name: str) -> str:
    """Which one a cache of version 2 was converted from."""
    return "zarr" if name == "uint4" else name


@pytest.mark.parametrize("url", [*(V1 / name for name in CACHES), *(V2 / name for name in FINGERPRINTS_V2)])
def test_it_is_sound_and_of_its_data(url: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = V1 / SOURCES[cache_of_version_1(url.name)]
    with pytest.raises(SystemExit) as done:
        main(["verify", str(url), "--source", str(source), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (done.value.code, document["verdict"], document["findings"]) == (0, "sound", [])


def config_of(name: str, url: Path, output: Path, **train: object) -> Config:
    """Two epochs of a small student; digests are not compared, for they depend on Pillow's release."""
    settings = {"epochs": 2, "batch_size": 2, "workers": 0, "device": "cpu", "digest_check": 0.0, "output": str(output)}
    return load_config(
        overrides={
            "source": {"train": str(V1 / SOURCES[name])},
            "cache": {"url": str(url)},
            "student": {"name": "test_vidt" if name == "tokens" else "test_vit"},
            "train": settings | train,
        }
    )


@cache_names
def test_a_student_learns_from_it(name: str, tmp_path: Path) -> None:
    summary = train(config_of(name, V1 / name, tmp_path / "run", epochs=1 if name == "tokens" else 2), JobSplit())
    assert summary.steps == {"zarr": 10, "webdataset": 10, "tokens": 1}[name]
    assert (summary.output, summary.interrupted) == (str(tmp_path / "run"), False)


# --------------------------------------------------------------------------------------------- later releases


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    body = unseal(path.read_bytes(), str(path))
    change(body)
    path.write_bytes(seal(body))


@pytest.mark.parametrize("part", ["manifest", "record"])
def test_a_newer_version_is_refused(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = shutil.copytree(V1 / "zarr", tmp_path / "cache")
    path = cache / ("manifest.json" if part == "manifest" else record_path(UnitId(1, 0)))
    reseal(path, lambda body: body.update(format_version=3, surprise=[1, 2]))
    commands = {
        "verify": ["verify", str(cache), "--repair", "--json"],
        "train": ["train", "--source", str(V1 / "digits"), "--cache", str(cache), "--student", "test_vit", "--output",
                  str(tmp_path / "run"), "--batch-size", "2", "--workers", "0", "--device", "cpu"],
    }  # fmt: skip
    for command, arguments in commands.items():
        with pytest.raises(SystemExit) as done:
            main(arguments)
        said = capsys.readouterr()
        text = " ".join((said.out if command == "verify" and part == "record" else said.err).split())
        assert f"{path.name}: found format version 3, this vkd-cache reads up to 2. Upgrade vkd-cache" in text
        assert done.value.code == (3 if command == "verify" and part == "record" else 1)
    assert path.exists()


def add_everywhere(body: Any) -> None:
    """A field that nobody knows in every object of a document, but for those that are hashed as a whole."""
    if isinstance(body, dict):
        for name, value in body.items():
            if name not in ("dataset", "recipe", "teacher", "head", "numerics", "measured"):
                add_everywhere(value)
        body["a_later_field"] = "unheard of"
    elif isinstance(body, list):
        for entry in body:
            add_everywhere(entry)


def with_additions(path: Path) -> bytes:
    """A unit's file with columns, attributes and groups' entries that version 1 did not have."""
    stream = io.BytesIO()
    extra = np.arange(12, dtype=np.float32).reshape(4, 3)
    if path.suffix == ".tar":
        with tarfile.open(path) as old, tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as new:
            blocks = set()
            for member in old:
                new.addfile(member, old.extractfile(member))
                blocks.add(member.name.partition(".")[0])
            for block in sorted(blocks):
                content = io.BytesIO()
                np.save(content, extra)
                member = tarfile.TarInfo(f"{block}.a_later_column.npy")
                member.size = content.tell()
                content.seek(0)
                new.addfile(member, content)
        return stream.getvalue()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(stream, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("zarr.json"):
                body = json.loads(content)
                body["attributes"]["a_later_attribute"] = {"any": ["thing"]}
                content = json.dumps(body).encode()
            new.writestr(entry.filename, content)
        metadata = json.loads(old.read("mix_lambda/zarr.json"))
        metadata["shape"] = metadata["chunk_grid"]["configuration"]["chunk_shape"] = [4, 3]
        metadata["codecs"] = metadata["codecs"][:1]
        new.writestr("a_later_column/zarr.json", json.dumps(metadata))
        new.writestr("a_later_column/c/0/0", extra.tobytes())
        new.writestr("a_later_note.txt", "not an array")
    return stream.getvalue()


@cache_names
def test_what_a_later_release_may_add_is_tolerated(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fields, columns, attributes and files, in every place at once: the same values, sound, and a student learns."""
    cache = shutil.copytree(V1 / name, tmp_path / "cache")
    units = open_cache(str(cache)).units
    for unit in units:
        replace_unit(cache, with_additions(unit_file(cache, *unit)), *unit)
        reseal(cache / record_path(unit), add_everywhere)
    reseal(cache / "manifest.json", add_everywhere)
    for place in ("LICENCE", "index/a.bin", "units/notes.txt", "records/view-0000/summary.json", "records/all.json"):
        (cache / place).parent.mkdir(exist_ok=True)
        (cache / place).write_text("later")
    before, after = open_cache(str(V1 / name)), open_cache(str(cache))
    assert after.fingerprint == before.fingerprint
    assert after.units == units
    _, values = expected(name)
    for unit in units:
        for spec in after.manifest.nodes:
            where = f"view {unit.view} shard {unit.shard} {spec.name}"
            check_node(after.read(unit), spec.name, where, values)
    with pytest.raises(SystemExit) as done:
        main(["verify", str(cache), "--source", str(V1 / SOURCES[name]), "--repair", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (done.value.code, document["verdict"], document["repaired"]) == (0, "sound", [])
    assert train(config_of(name, cache, tmp_path / "run", epochs=1), JobSplit()).steps > 0


def test_additions_that_are_hashed_make_another_cache(tmp_path: Path) -> None:
    """Within data set, teacher and numerics they count, and are tolerated; a recipe's are what a replay has to know."""
    cache = shutil.copytree(V1 / "zarr", tmp_path / "cache")

    def publish_with(*names: str) -> None:
        reseal(cache / "manifest.json", lambda body: [body[name].update(a_later_field=1) for name in names])
        manifest = Manifest.from_json(unseal((cache / "manifest.json").read_bytes(), "manifest"))
        for record in cache.glob("records/*/*.json"):
            reseal(record, lambda body: body.update(fingerprint=manifest.fingerprint()))

    publish_with("dataset", "teacher", "head", "numerics")
    assert open_cache(str(cache)).fingerprint != FINGERPRINTS["zarr"]
    with pytest.raises(SystemExit) as done:
        main(["verify", str(cache), "--source", str(V1 / "digits")])
    assert done.value.code == 0
    assert train(config_of("zarr", cache, tmp_path / "run"), JobSplit()).steps == 10
    publish_with("recipe")
    assert len(open_cache(str(cache)).read(0, 0)) == 4
    with pytest.raises(CacheFormatError, match=r"unknown field 'a_later_field'\. It was written by another version"):
        train(config_of("zarr", cache, tmp_path / "other"), JobSplit())
