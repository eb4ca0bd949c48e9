"""Stored rows: joined, picked and copied as bytes, they are the very numbers that the units decode to."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vkd_cache.cache.codecs import decode_node, encode_node, stored_rows
from vkd_cache.cache.schema import NodeSpec
from vkd_cache.stored_rows import StoredRows, join_rows

CODECS = ("float32", "float16", "bfloat16", "sqrt_uint8", "token_int8")


def unit(codec: str, count: int, shape: tuple[int, ...], seed: int) -> tuple[NodeSpec, dict[str, np.ndarray]]:
    values = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * (1 + seed % 7)
    layout = "pooled" if len(shape) == 1 else "feature_map"
    return NodeSpec(name="pooled", layout=layout, shape=shape, dtype=codec, codec=codec), encode_node(values, codec)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(CODECS),
    st.sampled_from([(5,), (3, 2, 2)]),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(0, 2**31),
)
def test_a_joined_batch_decodes_to_what_its_units_decode_to(
    codec: str, shape: tuple[int, ...], counts: list[int], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    place = draw.permutation(sum(counts))
    starts = np.cumsum([0, *counts])
    parts, expected = [], None
    for number, count in enumerate(counts):
        spec, arrays = unit(codec, 8, shape, seed % 1000 + number)
        rows = draw.integers(0, 8, count)
        where = place[starts[number] : starts[number + 1]]
        parts.append((stored_rows(spec, arrays, rows), where))
        own = decode_node(spec, arrays, rows)
        expected = own.new_empty(sum(counts), *shape) if expected is None else expected
        expected[torch.from_numpy(where)] = own
    joined = join_rows(parts, sum(counts))
    assert expected is not None and same(joined.dense(), expected)
    picked = draw.integers(0, sum(counts), 3)
    assert same(joined.select(picked).dense(), expected[torch.from_numpy(picked)])
    first = np.arange(sum(counts))
    twice = join_rows([(joined, first), (joined.select(first[:1]), first[-1:] + 1)], sum(counts) + 1)
    assert same(twice.dense(), torch.cat([expected, expected[:1]]))


@pytest.mark.parametrize("codec", CODECS)
def test_what_travels_is_what_is_stored(codec: str) -> None:
    """One byte a value where one is stored, plus scales: the device does the rest."""
    spec, arrays = unit(codec, 64, (100,), 1)
    joined = join_rows([(stored_rows(spec, arrays, np.arange(40)), np.arange(40)),
                        (stored_rows(spec, arrays, np.arange(24)), 40 + np.arange(24))], 64)  # fmt: skip
    size = sum(part.numel() * part.element_size() for part in joined.tensors())
    extra = {"sqrt_uint8": 2 * 400 + 64 * 8, "token_int8": 64 * 4}.get(codec, 0)
    assert size == arrays[""].nbytes + extra
    assert [part.data_ptr() for part in joined.to(torch.device("cpu")).tensors()] == [
        part.data_ptr() for part in joined.tensors()
    ]


def test_decoding_leaves_the_stored_values_alone() -> None:
    rows = StoredRows(values=torch.tensor([[3, 4]], dtype=torch.uint8), scale=torch.tensor([[0.5, 2.0]]))
    assert rows.dense().tolist() == rows.dense().tolist() == [[4.5, 32.0]]
