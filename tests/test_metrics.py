"""Counts are exact, add up, and decide ties and NaN the same way everywhere."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd_cache.errors import ConfigError
from vkd_cache.metrics import TopK, spread, top_k


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 20), st.integers(1, 12), st.integers(0, 2**31), st.integers(0, 20))
def test_counts_equal_a_sort_and_add_up(batch: int, num_classes: int, seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(4, (batch, num_classes), generator=generator).float()  # many ties
    labels = torch.randint(num_classes, (batch,), generator=generator)
    order = logits.argsort(dim=1, descending=True, stable=True)
    hits = order == labels.unsqueeze(1)
    found = top_k(logits, labels)
    assert found == TopK(count=batch, correct1=int(hits[:, :1].sum()), correct5=int(hits[:, :5].sum()))
    assert top_k(logits[:cut], labels[:cut]) + top_k(logits[cut:], labels[cut:]) == found
    assert TopK.from_tensor(found.to_tensor()) == found


def test_fewer_than_five_classes_are_all_in_the_top_five() -> None:
    found = top_k(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([0]))
    assert (found.top1, found.top5) == (0.0, 100.0)


def test_nan_is_wrong_and_nothing_counted_is_nan() -> None:
    found = top_k(torch.tensor([[math.nan, 0.0], [1.0, 0.0]]), torch.tensor([0, 0]))
    assert found == TopK(count=2, correct1=1, correct5=1)
    assert math.isnan(TopK().top1)
    assert math.isnan(TopK().top5)


def test_wrong_shapes_and_labels_are_named() -> None:
    with pytest.raises(ConfigError, match=r"labels \(3,\)"):
        top_k(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"labels 0..9, but the model has 4 classes"):
        top_k(torch.zeros(2, 4), torch.tensor([0, 9]))


def test_spread_is_the_sample_deviation() -> None:
    found = spread([70.0, 72.0, 74.0])
    assert (found.mean, found.std, found.count) == (72.0, 2.0, 3)
    assert str(found) == "72.00 ± 2.00 (n=3)"
    assert spread([5.0]).std == 0.0
    with pytest.raises(ConfigError, match="no values"):
        spread([])
