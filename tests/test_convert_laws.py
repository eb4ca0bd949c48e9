"""Conversion, laws: over small caches of every codec, layout and backend; every cut; every codec on the way."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_samples import (
    make_columns,
    make_detection_columns,
    make_manifest,
    make_node,
    make_token_node,
    make_tokens,
    make_values,
)
from convert_jobs import content, do
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd_cache.cache.check import check_structure
from vkd_cache.cache.codecs import decode_node, encode_node, rounding_bound
from vkd_cache.cache.reader import open_cache
from vkd_cache.cache.schema import CODEC_BYTES, UNIT_SCALED, Manifest
from vkd_cache.cache.units import keys_from_columns, keys_to_columns
from vkd_cache.cache.writer import create_cache
from vkd_cache.stages.convert_cut import _pieces
from vkd_cache.views.recipe import Recipe

RECIPE = Recipe(name="own", size_px=224, mix_probability=1.0).to_json()
STEPS = [
    (one, other)
    for one in CODEC_BYTES
    for other in CODEC_BYTES
    if one == other or one == "float32" or CODEC_BYTES[other] < CODEC_BYTES[one]
]
DTYPE_OF = {"sqrt_uint8": "uint8", "sqrt_uint4": "uint4", "token_int8": "int8"}


def small(url: Path, codec: str, layout: str, backend: str, share: float) -> Manifest:
    """Two units of seven rows, one of them with a broken image between."""
    detection = layout == "tokens"
    node = {
        "pooled": make_node(codec),
        "feature_map": make_node(codec, "feature_map", (5, 2, 3)),
        "tokens": make_token_node(codec, tokens=share),
    }[layout]
    recipe = {**RECIPE, "mix_probability": 0.0, "geometry": "detection"} if detection else RECIPE
    manifest = make_manifest(nodes=(node,), backend=backend, recipe=recipe)
    writer = create_cache(str(url), manifest)
    for shard in range(2):
        columns = make_detection_columns(7, seed=shard) if detection else make_columns(7, seed=shard)
        broken = []
        if shard:
            keep = np.array([0, 1, 2, 4, 5, 6])
            columns = shorter(columns, keep)
            broken = [("lost", 3, "cannot be decoded")]
        sizes = [(1 + row % 3, 2) for row in range(7 - shard)]
        values = (
            make_tokens(sizes, share=share, seed=shard) if detection else make_values(7 - shard, node.shape, seed=shard)
        )
        writer.publish(shard, 0, columns, {node.name: values}, broken)
    return writer.manifest


def shorter(columns: dict[str, np.ndarray], keep: np.ndarray) -> dict[str, np.ndarray]:
    keys = [keys_from_columns(columns)[row] for row in keep]
    kept = {name: values[keep] for name, values in columns.items() if not name.startswith("key_")}
    alone = ~np.isin(kept["partner"], keep)
    kept["partner"][alone] = kept["row"][alone]
    kept["mix_kind"][alone], kept["mix_lambda"][alone], kept["mix_box"][alone] = 0, 1.0, 0
    return kept | keys_to_columns(keys)


@settings(deadline=None, max_examples=30)
@given(
    step=st.sampled_from(STEPS),
    layout=st.sampled_from(("pooled", "feature_map", "tokens")),
    backends=st.tuples(*[st.sampled_from(("zarr", "webdataset"))] * 2),
    share=st.sampled_from((1.0, 0.4)),
)
def test_every_step_keeps_what_it_can(
    tmp_path_factory: pytest.TempPathFactory,
    step: tuple[str, str],
    layout: str,
    backends: tuple[str, str],
    share: float,
) -> None:
    if layout == "tokens":
        step = tuple("token_int8" if codec in UNIT_SCALED else codec for codec in step)
    folder = tmp_path_factory.mktemp("step")
    old = small(folder / "source", step[0], layout, backends[0], share).nodes[0]
    do(folder / "source", folder / "target", dtype=DTYPE_OF.get(step[1], step[1]), backend=backends[1])
    source, target = open_cache(str(folder / "source")), open_cache(str(folder / "target"))
    new = target.manifest.nodes[0]
    assert (new.codec, new.layout, new.shape, new.tokens) == (step[1], old.layout, old.shape, old.tokens)
    assert new.passed == (() if step[0] in ("float32", step[1]) else (step[0],))
    assert [finding for finding in check_structure(target) if finding.is_error] == []
    assert target.manifest.head == source.manifest.head
    for unit in source.units:
        before, after = source.read(unit), target.read(unit)
        assert after.keys == before.keys
        for name, column in before.columns.items():
            np.testing.assert_array_equal(after.columns[name], column)
        if layout == "tokens":
            one, other = before.tokens(old.name), after.tokens(old.name)
            assert torch.equal(one.total, other.total) and torch.equal(one.squares, other.squares)
            np.testing.assert_array_equal(one.places(), other.places())
            one, other = one.dense().float(), other.dense().float()
        else:
            one, other = before.node(old.name).float(), after.node(old.name).float()
        if step[0] == step[1]:
            assert torch.equal(one, other)
        else:
            assert ((one - other).abs() <= after.rounding(old.name) + 1e-6).all()
    if backends[0] == backends[1] and step[0] == step[1]:
        assert content(folder / "target").keys() == content(folder / "source").keys()


@settings(deadline=None, max_examples=200)
@given(counts=st.tuples(st.integers(1, 9), st.integers(0, 6), st.integers(1, 9)), size=st.integers(1, 80))
def test_pieces_are_the_samples_in_order_each_once(counts: tuple[int, int, int], size: int) -> None:
    old, full, last = counts
    shards = [old] * full + [min(last, old)]
    pieces = _pieces(shards, size)
    laid = [(shard, row) for shard, count in enumerate(shards) for row in range(count)]
    found = [[(piece.shard, row) for piece in parts for row in range(piece.first, piece.stop)] for parts in pieces]
    assert [sample for part in found for sample in part] == laid
    assert [len(part) for part in found[:-1]] == [size] * (len(found) - 1) and 0 < len(found[-1]) <= size
    for parts in pieces:
        assert [piece.start for piece in parts] == list(np.cumsum([0, *(p.stop - p.first for p in parts)])[:-1])


@settings(deadline=None, max_examples=100)
@given(
    passed=st.lists(st.sampled_from(("float16", "bfloat16", "token_int8")), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_the_bound_counts_every_codec_that_was_passed(passed: list[str], seed: int) -> None:
    exact = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) * 3
    values = exact
    for codec in passed:
        spec = make_node(codec)
        arrays = encode_node(values, codec)
        values = decode_node(spec, arrays).float()
    spec = dataclasses.replace(make_node(passed[-1]), passed=tuple(passed[:-1]))
    assert ((values - exact).abs() <= rounding_bound(spec, arrays) * (1 + 1e-6) + 1e-9).all()
