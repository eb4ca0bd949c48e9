"""Laws of the codecs: exact where they promise it, bounded where they do not, and chosen by measurement."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from cache_samples import make_node, make_values
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vkd_cache.cache.codecs import CODEC_ARRAYS, array_shapes, choose_codec, decode_node, encode_node, resolve_codec
from vkd_cache.cache.rounding import SQRT_STEPS
from vkd_cache.cache.schema import CODECS
from vkd_cache.cache.sqrt_codecs import packed_levels, unpacked_levels
from vkd_cache.errors import CacheError

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    return st.one_of(
        st.tuples(st.integers(0, 5), st.integers(1, 6)),
        st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    )


def arrays(minimum: float, maximum: float) -> st.SearchStrategy[np.ndarray]:
    elements = st.floats(minimum, maximum, width=32, allow_nan=False)
    return shapes().flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements))


def round_trip(values: torch.Tensor, codec: str) -> torch.Tensor:
    spec = make_node(codec, shape=tuple(values.shape[1:]))
    stored = encode_node(values, codec)
    for suffix, array in stored.items():
        assert array.dtype == np.dtype(CODEC_ARRAYS[codec][suffix])
        assert array.shape == array_shapes(spec, len(values))[suffix]
    return decode_node(spec, stored)


@settings(deadline=None, max_examples=60)
@given(values=arrays(-60000, 60000), codec=st.sampled_from(sorted(FLOATS)))
def test_float_codecs_round_once_and_keep_the_bits(values: np.ndarray, codec: str) -> None:
    expected = torch.from_numpy(values).to(FLOATS[codec])
    found = round_trip(torch.from_numpy(values), codec)
    assert found.dtype == FLOATS[codec]
    assert torch.equal(found, expected)
    assert torch.equal(round_trip(found, codec), found)


# steps of q are 1/255, or 1/15, of the root's range, so a value is off by half a step of its square
@settings(deadline=None, max_examples=80)
@given(values=arrays(0, 2.0**100), codec=st.sampled_from(sorted(SQRT_STEPS)))
def test_sqrt_codecs_are_within_half_a_step(values: np.ndarray, codec: str) -> None:
    exact = torch.from_numpy(values)
    found = round_trip(exact, codec)
    if not exact.numel():
        return
    others = [axis for axis in range(exact.ndim) if axis != 1]
    root_step = exact.amax(others, keepdim=True).double().sqrt() / SQRT_STEPS[codec]
    assert (found >= 0).all()
    error = (found.double().sqrt() - exact.double().sqrt()).abs()
    assert (error <= 0.501 * root_step + 1e-18).all()
    again = round_trip(found, codec)
    torch.testing.assert_close(again, found, rtol=3e-7, atol=1e-36)


@settings(deadline=None, max_examples=60)
@given(values=arrays(0, 2.0**100), codec=st.sampled_from(sorted(SQRT_STEPS)))
def test_sqrt_codecs_keep_zeros_and_the_order_within_a_channel(values: np.ndarray, codec: str) -> None:
    exact = torch.from_numpy(values)
    found = round_trip(exact, codec)
    assert (found[exact == 0] == 0).all()
    for before, after in zip(exact.movedim(1, 0), found.movedim(1, 0), strict=True):
        order = before.reshape(-1).argsort()
        assert (after.reshape(-1)[order].diff() >= 0).all()


@settings(deadline=None, max_examples=60)
@given(levels=shapes().flatmap(lambda shape: hnp.arrays(np.uint8, shape, elements=st.integers(0, 15))))
def test_two_levels_fit_into_a_byte(levels: np.ndarray) -> None:
    exact = torch.from_numpy(levels)
    packed = packed_levels(exact)
    assert packed.shape == (len(exact), -(-exact.shape[1] // 2), *exact.shape[2:])
    assert torch.equal(unpacked_levels(packed, exact.shape[1]), exact)
    if exact.shape[1] % 2:
        assert (packed[:, -1] < 16).all()
        packed[:, -1] |= 0xF0  # a half byte that belongs to no channel
        assert torch.equal(unpacked_levels(packed, exact.shape[1]), exact)


@settings(deadline=None, max_examples=60)
@given(values=arrays(-(2.0**100), 2.0**100))
def test_token_int8_is_within_half_a_step(values: np.ndarray) -> None:
    exact = torch.from_numpy(values)
    found = round_trip(exact, "token_int8")
    if not exact.numel():
        return
    step = exact.abs().amax(1, keepdim=True).double() / 127
    assert ((found.double() - exact.double()).abs() <= 0.501 * step + 1e-35).all()
    torch.testing.assert_close(round_trip(found, "token_int8"), found, rtol=3e-7, atol=1e-36)


def layer_norm_error(values: torch.Tensor, codec: str) -> float:
    target = torch.nn.functional.layer_norm(values, values.shape[1:])
    coded = torch.nn.functional.layer_norm(round_trip(values, codec), values.shape[1:])
    return float((coded - target).norm() / target.norm())


def test_eight_bits_cost_less_than_a_percent_after_layer_norm() -> None:
    values = make_values(256, (512,))
    # by theory 2 sqrt(mean * maximum / 12) / 255 / deviation: 0.6 % for half of a normal distribution, less with skew
    assert 0.005 < layer_norm_error(values, "sqrt_uint8") < 0.0065
    skewed = torch.rand(256, 512, generator=torch.Generator().manual_seed(1)) ** 3
    assert layer_norm_error(skewed, "sqrt_uint8") < 0.0045
    signed = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    assert layer_norm_error(signed, "token_int8") < 0.0085
    assert layer_norm_error(values, "float16") < 0.0005
    assert 0.08 < layer_norm_error(values, "sqrt_uint4") < 0.11


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_float_goes_in_and_views_too(codec: str, dtype: torch.dtype) -> None:
    values = make_values(6, (4, 3, 2)).to(dtype)
    expected = encode_node(values.float(), codec)
    found = encode_node(values.to(memory_format=torch.channels_last).requires_grad_(), codec)
    for suffix, array in expected.items():
        np.testing.assert_array_equal(found[suffix], array)
        assert found[suffix].flags.c_contiguous


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_with_its_row(codec: str, bad: float) -> None:
    values = make_values(5)
    values[3, 2] = bad
    with pytest.raises(CacheError, match="found inf or nan in row 3"):
        encode_node(values, codec)


def test_what_a_codec_cannot_hold_is_refused_with_its_row() -> None:
    values = make_values(5)
    values[2, 1] = 70000
    with pytest.raises(CacheError, match=r"float16: found 70000 in row 2.*bfloat16 or float32"):
        encode_node(values, "float16")
    values[4, 0] = -0.5
    for codec in SQRT_STEPS:
        with pytest.raises(CacheError, match=f"{codec}: found a negative value in row 4"):
            encode_node(values, codec)


def test_auto_takes_eight_bits_where_the_loss_does_not_notice() -> None:
    head = {"weight": torch.randn(10, 64, generator=torch.Generator().manual_seed(2)) / 8, "bias": torch.zeros(10)}
    values = make_values(128, (64,))
    codec, measured = choose_codec("pooled", values, head)
    assert codec == "sqrt_uint8"
    assert set(measured) == {"layer_norm_error", "feature_loss_change", "logit_loss_change"}
    assert 0 < measured["layer_norm_error"] < 0.01
    assert (codec, measured) == choose_codec("pooled", values, head)
    assert choose_codec("pooled", values - 0.5)[0] == "token_int8"
    assert choose_codec("feature_map", make_values(8, (64, 3, 3)))[0] == "sqrt_uint8"
    assert set(choose_codec("logits", values)[1]) == {"logit_loss_change"}


def test_auto_keeps_more_bits_where_eight_are_too_few() -> None:
    values = make_values(64, (32,))
    values[0] *= 5000  # one sample that sets every channel's scale
    codec, measured = choose_codec("pooled", values)
    assert codec == "float16"
    assert measured["layer_norm_error"] < 0.01
    values[0] *= 5000  # and now beyond float16
    assert choose_codec("pooled", values)[0] == "float32"
    assert choose_codec("pooled", torch.zeros(4, 8))[0] == "sqrt_uint8"
    with pytest.raises(CacheError, match="found inf or nan in row 0"):
        choose_codec("pooled", values * torch.inf)


def test_auto_stops_at_a_percent_of_the_normalised_features() -> None:
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    assert choose_codec("pooled", values)[0] == "token_int8"
    values[:, 0] = 8.0  # each row's step is twice as wide: about 1.8 %, and hardly more feature loss
    codec, measured = choose_codec("pooled", values)
    assert codec == "float16"
    assert measured["layer_norm_error"] < 0.001


def test_auto_stops_where_the_head_looks_at_what_eight_bits_lose() -> None:
    values = make_values(64, (128,))
    values[:, 1] = values[:, 0] + 0.002 * torch.randn(64, generator=torch.Generator().manual_seed(3))
    weight = torch.zeros(10, 128)
    weight[:, 0] = 1000 * torch.randn(10, generator=torch.Generator().manual_seed(4))
    weight[:, 1] = -weight[:, 0]  # logits are the difference of two channels that are nearly one
    assert choose_codec("pooled", values)[0] == "sqrt_uint8"
    assert choose_codec("pooled", values, {"weight": weight / 1e6, "bias": torch.zeros(10)})[0] == "sqrt_uint8"
    codec, measured = choose_codec("pooled", values, {"weight": weight, "bias": torch.zeros(10)})
    assert codec != "sqrt_uint8"
    assert measured["logit_loss_change"] <= 0.005


def test_a_request_for_a_type_is_resolved() -> None:
    values = make_values(8, (6,))
    for dtype in ("float32", "float16", "bfloat16"):
        assert resolve_codec("pooled", dtype, values) == make_node(dtype, shape=(6,))
    assert resolve_codec("pooled", "uint8", values) == make_node("sqrt_uint8", shape=(6,))
    assert resolve_codec("pooled", "uint8", values - 1).codec == "token_int8"
    assert resolve_codec("logits", "uint8", values) == make_node("token_int8", "logits", (6,))
    four = resolve_codec("pooled", "uint4", values)
    assert dataclasses.replace(four, measured={}) == make_node("sqrt_uint4", shape=(6,))
    assert 0.01 < four.measured["layer_norm_error"] < 0.2  # never auto's choice, so it says what it costs
    assert resolve_codec("pooled", "uint4", values - 1).codec == "token_int8"
    assert resolve_codec("logits", "uint4", values).codec == "token_int8"
    feature_map = resolve_codec("feature_map", "auto", make_values(4, (6, 2, 3)))
    assert (feature_map.layout, feature_map.shape, feature_map.dtype) == ("feature_map", (6, 2, 3), "auto")
    assert feature_map.measured


@pytest.mark.parametrize(("codec", "expected"), [("float32", 4), ("float16", 2), ("sqrt_uint8", 1), ("bfloat16", 2)])
def test_bytes_of_a_sample(codec: str, expected: int) -> None:
    assert make_node(codec, shape=(3024,)).sample_bytes == 3024 * expected
    assert make_node("sqrt_uint4", shape=(3025,)).sample_bytes == 1513
    assert make_node("sqrt_uint4", "feature_map", (7, 3, 3)).sample_bytes == 4 * 9
    assert make_node("token_int8", "feature_map", (8, 7, 7)).sample_bytes == 8 * 49 + 4 * 49
