"""Laws of the counter-based draws: pure functions of their seed, in range, and of the right distribution."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd_cache.views.draws import Draws, view_seed

seeds = st.integers(0, 2**64 - 1)
quick = settings(deadline=None, max_examples=60)


@quick
@given(seeds, st.text(max_size=40), st.integers(0, 10_000))
def test_a_view_seed_is_pure_and_fits_64_bits(seed: int, key: str, view: int) -> None:
    first = view_seed(seed, key, view)
    assert first == view_seed(seed, key, view)
    assert 0 <= first < 2**64


def test_a_view_seed_depends_on_each_of_its_arguments() -> None:
    found = {view_seed(seed, key, view) for seed in range(6) for key in ("a", "b", "a/b", "") for view in range(6)}
    assert len(found) == 6 * 4 * 6


def test_seeds_and_words_are_pinned_for_ever() -> None:
    """A change here would change the views of every cache that will be extended."""
    assert view_seed(0, "n01440764/n01440764_10026", 0) == PINNED_SEED
    draws = Draws(1)
    assert [draws.word() for _ in range(9)][::8] == PINNED_WORDS


@quick
@given(seeds, st.integers(-1000, 1000), st.integers(1, 10**9))
def test_draws_stay_in_range(seed: int, low: int, span: int) -> None:
    draws = Draws(seed)
    for _ in range(20):
        assert 0.0 <= draws.uniform() < 1.0
        assert low <= draws.integer(low, low + span) < low + span
        assert math.isfinite(draws.normal(9.0, 0.5))


@quick
@given(seeds, st.floats(1e-300, 1e300), st.floats(1e-300, 1e300))
def test_beta_is_finite_for_any_positive_parameters(seed: int, a: float, b: float) -> None:
    assert 0.0 <= Draws(seed).beta(a, b) <= 1.0


def test_impossible_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="empty range"):
        Draws(0).integer(3, 3)
    for a, b in ((0.0, 1.0), (1.0, -1.0), (math.inf, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="positive finite"):
            Draws(0).beta(a, b)


def test_integers_are_uniform() -> None:
    draws = Draws(7)
    counts = np.bincount([draws.integer(0, 6) for _ in range(12_000)], minlength=6)
    assert np.square(counts - 2000).sum() / 2000 < 25.0  # chi-square with 5 degrees of freedom, p = 1e-4


@pytest.mark.parametrize(("a", "b"), [(0.8, 0.8), (1.0, 1.0), (0.2, 0.6), (0.3, 2.5), (4.0, 2.0)])
def test_beta_has_the_distribution_of_numpys(a: float, b: float) -> None:
    draws = Draws(11)
    ours = np.sort([draws.beta(a, b) for _ in range(4000)])
    theirs = np.sort(np.random.default_rng(0).beta(a, b, 4000))
    assert ks_distance(ours, theirs) < 0.0498  # p = 1e-4


def test_normal_has_its_mean_and_deviation() -> None:
    draws = Draws(5)
    values = np.array([draws.normal(9.0, 0.5) for _ in range(8000)])
    assert abs(values.mean() - 9.0) < 0.025
    assert abs(values.std() - 0.5) < 0.02
    assert abs(np.mean(values > 10.0) - 0.02275) < 0.008


def ks_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Two-sample Kolmogorov-Smirnov statistic."""
    points = np.union1d(ours, theirs)
    below = [np.searchsorted(np.sort(side), points, side="right") / len(side) for side in (ours, theirs)]
    return float(np.abs(below[0] - below[1]).max())


PINNED_SEED = 17799583401768768539
PINNED_WORDS = [14325272297397969235, 3238082480998084315]
