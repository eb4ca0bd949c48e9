"""Conversion to other shards: what extraction with that size writes; mixed pairs stay together."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_samples import make_manifest
from convert_jobs import NUM_IMAGES, MakeConfig, assert_sound, content, do, few_digits
from detection_jobs import detection_config, write_detector

from vkd_cache.cache.reader import open_cache
from vkd_cache.cache.units import UnitId, record_path
from vkd_cache.cache.writer import create_cache
from vkd_cache.config import Config
from vkd_cache.errors import CacheMismatchError, ConfigError, SourceError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract
from vkd_cache.stages.train import train
from vkd_cache.stages.verify import VerifyRequest, verify
from vkd_cache.views.recipe import Recipe

UNMIXED = {"mix_probability": 0.0}


@pytest.fixture(scope="module")
def make(tiny_config: MakeConfig, digits_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    return few_digits(tiny_config, digits_tree, tmp_path_factory.mktemp("few") / "digits")


@pytest.fixture(scope="module")
def images(make: MakeConfig) -> str:
    return make().source.train


@pytest.fixture(scope="module")
def unmixed(make: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("unmixed") / "cache"
    extract(make(cache={"url": str(url)}, views=UNMIXED), JobSplit())
    return url


@pytest.fixture(scope="module")
def mixed(make: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("mixed") / "cache"
    extract(make(cache={"url": str(url)}), JobSplit())
    return url


@pytest.mark.parametrize(
    ("size", "dtype", "backend"),
    [(5, "auto", "zarr"), (20, "int8", "webdataset"), (26, "bfloat16", "zarr"), (99, "uint8", "zarr")],
)
def test_without_mixing_any_size_is_what_extraction_writes(
    make: MakeConfig, unmixed: Path, images: str, tmp_path: Path, size: int, dtype: str, backend: str
) -> None:
    block = 7 if backend == "webdataset" else None
    cache = {"url": str(tmp_path / "direct"), "dtype": dtype, "backend": backend}
    extract(make(cache=cache, views=UNMIXED, source={"shard_size": size}), JobSplit())
    summary = do(
        unmixed, tmp_path / "cut", shard_size=size, images=images, dtype=dtype, backend=backend, block_samples=block
    )
    assert summary.units_converted == 2 * -(-NUM_IMAGES // size)
    assert content(tmp_path / "cut") == content(tmp_path / "direct")
    for unit in open_cache(str(tmp_path / "direct")).units:
        one, other = (open_cache(str(tmp_path / name)).record(*unit) for name in ("direct", "cut"))
        assert dataclasses.replace(other, origin=None) == one
        assert other.origin is not None and "planned_in" not in other.origin


def test_there_and_back_is_the_first_cache(unmixed: Path, images: str, tmp_path: Path) -> None:
    do(unmixed, tmp_path / "half", dtype="float16")
    do(tmp_path / "half", tmp_path / "there", shard_size=7, images=images)
    assert do(tmp_path / "there", tmp_path / "back", shard_size=13, images=images).codecs["pooled"] == "float16"
    assert content(tmp_path / "back") == content(tmp_path / "half")
    shares = [
        do(tmp_path / "there", tmp_path / "shared", shard_size=13, images=images, worker=(i, 3)) for i in range(3)
    ]
    assert sum(summary.units_converted for summary in shares) == 10
    assert content(tmp_path / "shared") == content(tmp_path / "half")
    origin = open_cache(str(tmp_path / "there")).record(1, 0).origin
    assert origin is not None
    assert [(entry["shard"], entry.get("rows")) for entry in origin["units"]] == [(0, [7, 13]), (1, [0, 1])]


def test_scales_of_a_unit_do_not_survive_another_cut(
    make: MakeConfig, unmixed: Path, images: str, tmp_path: Path
) -> None:
    do(unmixed, tmp_path / "eight", dtype="uint8")
    with pytest.raises(ConfigError, match="node 'pooled': sqrt_uint8 to sqrt_uint8 in other shards"):
        do(tmp_path / "eight", tmp_path / "cut", shard_size=20, images=images)
    do(tmp_path / "eight", tmp_path / "cut", shard_size=20, images=images, force=True)
    nodes = {spec.name: spec for spec in open_cache(str(tmp_path / "cut")).manifest.nodes}
    assert nodes["pooled"].passed == ("sqrt_uint8",) and nodes["logits"].passed == ()
    with pytest.raises(CacheMismatchError, match=r"pooled\.passed"):
        cache = {"url": str(tmp_path / "cut"), "dtype": "uint8"}
        extract(make(cache=cache, views=UNMIXED, source={"shard_size": 20}), JobSplit())
    assert_sound(make(), tmp_path / "cut")


def test_mixed_shards_are_joined_with_their_pairs(make: MakeConfig, mixed: Path, images: str, tmp_path: Path) -> None:
    joined = tmp_path / "joined"
    do(mixed, joined, shard_size=26, images=images, backend="webdataset", block_samples=7)
    for url, view in ((joined, 0), (joined, 1)):
        cache, old = open_cache(str(url)), open_cache(str(mixed))
        for shard in range(3):
            unit, parts = cache.read(shard, view), [old.read(s, view) for s in range(2 * shard, min(5, 2 * shard + 2))]
            assert unit.keys == [key for part in parts for key in part.keys]
            assert torch.equal(unit.node("pooled"), torch.cat([part.node("pooled") for part in parts]))
            partners = {part.keys[i]: dict(zip(part.rows.tolist(), part.keys, strict=True))[int(p)]
                        for part in parts for i, p in enumerate(part.columns["partner"])}  # fmt: skip
            by_row = dict(zip(unit.rows.tolist(), unit.keys, strict=True))
            assert {unit.keys[i]: by_row[int(p)] for i, p in enumerate(unit.columns["partner"])} == partners
            assert (unit.columns["mix_kind"] > 0).any()
    # further views are planned over the new shards; both kinds are what verify expects, and train on
    config = make(cache={"url": str(joined), "backend": "webdataset"}, views={"count": "3"}, source={"shard_size": 26})
    assert extract(config, JobSplit()).units_published == 3
    cache = open_cache(str(joined))
    assert [cache.record(0, view).planned_in for view in range(3)] == [(13, 13), (13, 13), ()]
    assert cache.record(2, 0).planned_in == ()
    assert_sound(config, joined, teacher=True)
    again = tmp_path / "again"  # what is known of the pairs goes along
    do(joined, again, dtype="int8", backend="zarr")
    do(again, tmp_path / "all", shard_size=78, images=images)
    assert open_cache(str(again)).record(0, 1).planned_in == (13, 13)
    assert open_cache(str(tmp_path / "all")).record(0, 1).planned_in == (13, 13, 13, 13, 9)
    assert open_cache(str(tmp_path / "all")).record(0, 2).planned_in == (26, 26, 9)
    assert_sound(config, tmp_path / "all")
    train(make(cache={"url": str(tmp_path / "all")}, train={"output": str(tmp_path / "run"), "epochs": 3}), JobSplit())


def test_what_is_said_of_pairs_is_checked(make: MakeConfig, mixed: Path, images: str, tmp_path: Path) -> None:
    do(mixed, tmp_path / "joined", shard_size=26, images=images)
    path = tmp_path / "joined" / record_path(UnitId(0, 0))
    record = open_cache(str(tmp_path / "joined")).record(0, 0)
    for groups, message in (((26,), "partner of key"), ((13, 12), "found 25 samples in all"), ((13, -1), "planned_in")):
        path.write_bytes(
            dataclasses.replace(record, origin={**(record.origin or {}), "planned_in": list(groups)}).to_bytes()
        )
        report = verify(make(), VerifyRequest(url=str(tmp_path / "joined"), source=images, pixels=True, sample=0))
        assert message in " ".join(finding.message for level in report.levels for finding in level.findings)
        assert report.exit_code == 3


def test_pairs_are_never_parted(mixed: Path, images: str, tmp_path: Path) -> None:
    for size in (5, 20, 27):
        with pytest.raises(ConfigError, match=f"found {size}, but the recipe .* Give a multiple of 13"):
            do(mixed, tmp_path / "cut", shard_size=size, images=images)
    assert do(mixed, tmp_path / "same", shard_size=13).units_converted == 10  # nothing to cut: no images needed


def test_a_cut_needs_the_data_set_it_is_of(
    unmixed: Path, images: str, digits_tree: Path, digits_tars: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="Give --source"):
        do(unmixed, tmp_path / "cut", shard_size=5)
    with pytest.raises(CacheMismatchError, match=r"another data set than .*: shard_counts, shard_hashes differ"):
        do(unmixed, tmp_path / "cut", shard_size=5, images=str(digits_tree))
    with pytest.raises(SourceError):
        do(unmixed, tmp_path / "cut", shard_size=5, images=str(tmp_path / "nowhere"))
    recipe = Recipe(name="own", mix_probability=0.0).to_json()
    create_cache(str(tmp_path / "tars"), make_manifest(recipe=recipe))  # of kind tar
    with pytest.raises(ConfigError, match="shards are as they were packed"):
        do(tmp_path / "tars", tmp_path / "cut", shard_size=5, images=str(digits_tars))
    assert not (tmp_path / "cut").exists()


@pytest.fixture(scope="module")
def tokens(coco_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """Configurations of extractions of ragged nodes, of patch tokens a sample."""
    weights = write_detector(tmp_path_factory.mktemp("detector") / "teacher.pth")

    def config(url: Path, *, shard_size: int = 8, **cache: Any) -> Config:
        stored = {"nodes": ("patch_3", "neck_det"), "tokens": 0.3, "url": str(url), "dtype": "float32"} | cache
        return detection_config(coco_tree, weights, url, cache=stored, source={"shard_size": shard_size})

    return config


@pytest.fixture(scope="module")
def exact_tokens(tokens: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("exact") / "cache"
    extract(tokens(url), JobSplit())
    return url


@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.3), ("bfloat16", 0.3), ("auto", 1.0)])
def test_tokens_are_what_extraction_writes(
    tokens: Callable[..., Config],
    exact_tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    share: float,
) -> None:
    exact = exact_tokens
    if dtype == "auto":  # measured on all tokens of a few batches
        monkeypatch.setattr("vkd_cache.cache.codecs._MEASURED_TOKENS", 300)
        exact = tmp_path / "exact"
        extract(tokens(exact, tokens=share), JobSplit())
    do(exact, tmp_path / "converted", dtype=dtype)
    extract(tokens(tmp_path / "direct", dtype=dtype, tokens=share), JobSplit())
    assert content(tmp_path / "converted") == content(tmp_path / "direct")


def test_tokens_in_other_shards(
    tokens: Callable[..., Config], exact_tokens: Path, coco_tree: Path, tmp_path: Path
) -> None:
    """The values are those of the batches that the teacher saw, which are others where shards are others."""
    do(exact_tokens, tmp_path / "cut", shard_size=5, images=str(coco_tree))
    extract(tokens(tmp_path / "direct", shard_size=5), JobSplit())
    cut, direct = open_cache(str(tmp_path / "cut")), open_cache(str(tmp_path / "direct"))
    assert cut.fingerprint == direct.fingerprint
    for unit in direct.units:
        one, other = cut.read(unit), direct.read(unit)
        assert all(np.array_equal(one.columns[name], other.columns[name]) for name in other.columns)
        for node in ("patch_3", "neck_det"):
            assert np.array_equal(one.tokens(node).places(), other.tokens(node).places())
            assert torch.allclose(one.tokens(node).values, other.tokens(node).values, atol=1e-3)
            assert torch.allclose(one.tokens(node).total, other.tokens(node).total, rtol=1e-3, atol=1e-2)
    assert_sound(tokens(tmp_path / "cut", shard_size=5), tmp_path / "cut", teacher=True)
    do(tmp_path / "cut", tmp_path / "back", shard_size=8, images=str(coco_tree))
    assert content(tmp_path / "back") == content(exact_tokens)
    do(exact_tokens, tmp_path / "eight", dtype="int8")  # the scale of a token goes with it
    do(tmp_path / "eight", tmp_path / "eight-cut", shard_size=24, images=str(coco_tree))
    do(tmp_path / "eight-cut", tmp_path / "eight-back", shard_size=8, images=str(coco_tree))
    assert content(tmp_path / "eight-back") == content(tmp_path / "eight")
