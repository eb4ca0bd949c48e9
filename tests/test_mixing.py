"""Mixing: laws of the matching, upstream's distribution, and the reference's blended pixels and targets."""

import dataclasses
import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, rand_bbox

from vkd_cache.losses import mix_targets
from vkd_cache.views.blend import mix_pixels, normalise
from vkd_cache.views.mixing import drop_partners, pair_slots, plan_mixing
from vkd_cache.views.params import MIX_CUTMIX, MIX_MIXUP, MIX_NONE, MixPlan
from vkd_cache.views.recipe import RECIPES, Recipe

REFERENCE = Path(__file__).parent / "reference"
quick = settings(deadline=None, max_examples=60)
VKD = RECIPES["vkd"]
recipes = st.builds(
    lambda probability, mixup, cutmix, switch, size: dataclasses.replace(
        VKD, mix_probability=probability, mixup_alpha=mixup, cutmix_alpha=cutmix, cutmix_switch=switch, size_px=size
    ),
    st.sampled_from((0.0, 0.5, 1.0)),
    st.sampled_from((0.0, 0.8, 3.0)),
    st.sampled_from((0.0, 1.0, 0.1)),
    st.sampled_from((0.0, 0.5, 1.0)),
    st.sampled_from((8, 33, 224)),
)
key_lists = st.lists(st.text(max_size=8), max_size=25, unique=True)


@quick
@given(recipes, st.integers(0, 2**63 - 1), key_lists, st.integers(0, 300))
def test_the_matching_is_symmetric_complete_and_in_range(recipe: Recipe, seed: int, keys: list[str], view: int) -> None:
    plan = plan_mixing(recipe, seed, keys, view)
    assert_lawful(plan, len(keys), recipe.size_px)
    mixed = int((plan.kind != MIX_NONE).sum())
    if not recipe.mixes:
        assert mixed == 0
    elif recipe.mix_probability == 1.0:
        assert mixed == len(keys) // 2 * 2  # perfect, and an odd one out stays unmixed
    if recipe.mixup_alpha == 0.0:
        assert not (plan.kind == MIX_MIXUP).any()
    if recipe.cutmix_alpha == 0.0:
        assert not (plan.kind == MIX_CUTMIX).any()


@quick
@given(recipes, st.integers(0, 2**32), key_lists, st.integers(0, 300), st.randoms())
def test_partners_do_not_depend_on_the_order_of_keys(
    recipe: Recipe, seed: int, keys: list[str], view: int, shuffler: random.Random
) -> None:
    shuffled = list(keys)
    shuffler.shuffle(shuffled)
    assert by_key(plan_mixing(recipe, seed, keys, view), keys) == by_key(
        plan_mixing(recipe, seed, shuffled, view), shuffled
    )


@quick
@given(recipes, st.integers(0, 2**32), key_lists, st.data())
def test_broken_rows_free_their_partners_and_nobody_else(
    recipe: Recipe, seed: int, keys: list[str], data: st.DataObject
) -> None:
    plan = plan_mixing(recipe, seed, keys, 0)
    broken = data.draw(st.sets(st.sampled_from(range(len(keys))))) if keys else set()
    kept = drop_partners(plan, broken)
    assert_lawful(kept, len(keys), recipe.size_px)
    freed = broken | {int(plan.partner[row]) for row in broken}
    for row in range(len(keys)):
        if row in freed:
            assert (kept.partner[row], kept.kind[row], kept.lam[row]) == (row, MIX_NONE, 1.0)
        else:
            assert (kept.partner[row], kept.kind[row], kept.lam[row]) == (
                plan.partner[row],
                plan.kind[row],
                plan.lam[row],
            )
            assert (kept.box[row] == plan.box[row]).all()


@quick
@given(recipes, st.integers(0, 2**32), key_lists)
def test_slots_hold_every_row_once_and_keep_pairs_together(recipe: Recipe, seed: int, keys: list[str]) -> None:
    plan = plan_mixing(recipe, seed, keys, 0)
    slots = pair_slots(plan)
    assert slots.dtype == np.int64
    assert slots.shape == ((len(keys) + 1) // 2, 2)
    rows = slots.ravel().tolist()
    assert sorted(row for row in rows if row >= 0) == list(range(len(keys)))
    assert rows[:-1].count(-1) == 0
    paired = plan.partner != np.arange(len(keys))
    num_pairs = int(paired.sum()) // 2
    for first, second in slots[:num_pairs]:
        assert plan.partner[first] == second
        assert first < second
    assert (np.diff(slots[:num_pairs, 0]) > 0).all()
    rest = [row for row in slots[num_pairs:].ravel().tolist() if row >= 0]
    assert rest == sorted(np.flatnonzero(~paired).tolist())


def test_views_and_seeds_match_differently() -> None:
    keys = [str(i) for i in range(100)]
    matchings = {plan_mixing(VKD, seed, keys, view).partner.tobytes() for seed in (0, 1) for view in range(10)}
    assert len(matchings) == 20


def test_partners_are_spread_evenly() -> None:
    """Over many views everybody meets everybody about equally often."""
    keys = [str(i) for i in range(10)]
    met = np.zeros((10, 10), int)
    for view in range(3000):
        met[np.arange(10), plan_mixing(VKD, 0, keys, view).partner] += 1
    off_diagonal = met[~np.eye(10, dtype=bool)]
    assert np.abs(off_diagonal - 3000 / 9).max() < 80
    assert np.trace(met) == 0


def test_lambda_box_and_switch_have_timms_distribution() -> None:
    plan = plan_mixing(VKD, 1, [str(i) for i in range(16_000)], 0)
    rows = np.flatnonzero(plan.partner > np.arange(16_000))
    mixup, cutmix = rows[plan.kind[rows] == MIX_MIXUP], rows[plan.kind[rows] == MIX_CUTMIX]
    theirs = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch")
    np.random.seed(0)
    lams, boxes, box_lams = [], [], []
    for _ in range(8000):
        lam, use_cutmix = theirs._params_per_batch()
        if use_cutmix:
            (top, bottom, left, right), lam = cutmix_bbox_and_lam((3, 224, 224), lam)
            boxes.append((top, left, bottom - top, right - left))
            box_lams.append(lam)
        else:
            lams.append(lam)
    assert abs(len(cutmix) - 4000) < 175
    assert_same_distribution(plan.lam[mixup], np.array(lams))
    assert_same_distribution(plan.lam[cutmix], np.array(box_lams))
    for column in range(4):
        assert_same_distribution(plan.box[cutmix, column], np.array(boxes)[:, column])
    probability = dataclasses.replace(VKD, mix_probability=0.3)
    share = float((plan_mixing(probability, 1, [str(i) for i in range(8000)], 0).kind != MIX_NONE).mean())
    assert abs(share - 0.3) < 0.03


@pytest.mark.parametrize("alpha", [0.2, 0.8, 3.0])
def test_each_kind_draws_from_its_own_beta(alpha: float) -> None:
    """By the variance, 1 / (4 (2 alpha + 1)): a tighter test of alpha than the distribution functions' distance."""
    keys = [str(i) for i in range(8000)]
    mixup = plan_mixing(dataclasses.replace(VKD, mixup_alpha=alpha, cutmix_alpha=0.0), 2, keys, 0)
    expected = 1 / (4 * (2 * alpha + 1))
    assert float(mixup.lam.var()) == pytest.approx(expected, rel=0.06)
    cutmix = plan_mixing(dataclasses.replace(VKD, mixup_alpha=0.0, cutmix_alpha=alpha), 2, keys, 0)
    np.random.seed(0)
    drawn = np.random.default_rng(0).beta(alpha, alpha, 8000)
    theirs = np.array([cutmix_bbox_and_lam((3, VKD.size_px, VKD.size_px), lam)[1] for lam in drawn])
    assert_same_distribution(cutmix.lam[cutmix.partner > np.arange(8000)], theirs)


def test_boxes_are_exactly_timms_set() -> None:
    """On a 6 px view, where all centres occur: every box of theirs, and no other, and their lambda."""
    recipe = dataclasses.replace(VKD, size_px=6, mixup_alpha=0.0)
    plan = plan_mixing(recipe, 0, [str(i) for i in range(20_000)], 0)
    np.random.seed(0)
    theirs = set()
    for lam in np.random.default_rng(0).random(10_000):
        top, bottom, left, right = (int(v) for v in rand_bbox((3, 6, 6), lam))
        theirs.add((top, left, bottom - top, right - left))
    area = lambda boxes: {box for box in boxes if box[2] * box[3]}  # noqa: E731 (where an empty box lies is of no interest)
    assert area(map(tuple, plan.box.tolist())) == area(theirs)
    shares = plan.box[:, 2].astype(float) * plan.box[:, 3] / 36
    assert np.allclose(plan.lam, 1 - shares, atol=1e-7)


@pytest.fixture(scope="module")
def reference_recipe() -> ModuleType:
    specification = importlib.util.spec_from_file_location("reference_recipe", REFERENCE / "recipe.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


CASES: list[dict[str, Any]] = json.loads((REFERENCE / "misc_facts.json").read_text())["mixup"]["cases"]
LABELS: list[int] = json.loads((REFERENCE / "misc_facts.json").read_text())["mixup"]["labels"]


@pytest.mark.parametrize("case", CASES, ids=[str(case["seed"]) for case in CASES])
def test_blended_pixels_and_lambda_are_the_references(case: dict[str, Any], reference_recipe: ModuleType) -> None:
    pixels = torch.from_numpy(reference_recipe.image("mixup", (6, 3, 32, 48)))
    box = torch.zeros(6, 4, dtype=torch.int64)
    if case["use_cutmix"]:
        top, bottom, left, right = case["bbox_yl_yh_xl_xh"]
        box[:] = torch.tensor([top, left, bottom - top, right - left])
        assert 1 - (bottom - top) * (right - left) / (32 * 48) == pytest.approx(case["lam"])
    kind = torch.full((6,), MIX_CUTMIX if case["use_cutmix"] else MIX_MIXUP)
    lam = torch.full((6,), case["lam"], dtype=torch.float32)
    mixed = mix_pixels(pixels, torch.arange(5, -1, -1), kind, lam, box)
    summary = reference_recipe.summary(f"mixup.{case['seed']}", mixed.numpy())
    for name in ("first8", "mean", "std", "absmax", "l2", "dot"):
        assert summary[name] == pytest.approx(case["mixed"][name], rel=1e-6, abs=1e-5), name
    labels = torch.tensor(LABELS)
    targets = mix_targets(labels, labels.flip(0), lam, 10, 0.1)
    assert torch.allclose(targets, torch.tensor(case["targets"]), atol=1e-6)


@quick
@given(st.integers(1, 9), st.integers(0, 2**32), st.sampled_from((8, 13)))
def test_blending_a_batch_is_blending_each_row(n: int, seed: int, size: int) -> None:
    """Against a loop in numpy, and bit for bit whatever the rest of the batch."""
    recipe = dataclasses.replace(VKD, size_px=size, mix_probability=0.8)
    plan = plan_mixing(recipe, seed, [str(i) for i in range(n)], 0)
    pixels = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
    mixed = mix_pixels(pixels, *tensors(plan))
    assert bool((mixed >= 0).all())
    assert bool((mixed <= 1 + 1e-6).all())
    for row in range(n):
        expected = blend_slowly(pixels.numpy(), plan, row)
        assert np.abs(mixed[row].numpy() - expected).max() < 1e-6
        if plan.kind[row] == MIX_NONE:
            assert torch.equal(mixed[row], pixels[row])
        both = [row, int(plan.partner[row])]
        _, kind, lam, box = tensors(plan)
        alone = mix_pixels(pixels[both], torch.tensor([1, 0]), kind[both], lam[both], box[both])
        assert torch.equal(alone[0], mixed[row])


def test_blending_keeps_the_type_and_the_input() -> None:
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.bfloat16)
    before = pixels.clone()
    partner, kind, lam = torch.tensor([1, 0]), torch.tensor([1, 1], dtype=torch.uint8), torch.tensor([0.3, 0.3])
    mixed = mix_pixels(pixels, partner, kind, lam, torch.zeros(2, 4, dtype=torch.int32))
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(pixels, before)
    assert not torch.equal(mixed, before)


def test_mixing_commutes_with_normalising() -> None:
    """Upstream normalises first, we mix first: the same numbers."""
    plan = plan_mixing(dataclasses.replace(VKD, size_px=16), 4, [str(i) for i in range(12)], 0)
    pixels = torch.rand(12, 3, 16, 16, dtype=torch.float64)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    first = normalise(mix_pixels(pixels, *tensors(plan)), mean, torch.tensor(std))
    second = mix_pixels(normalise(pixels, mean, torch.tensor(std)), *tensors(plan))
    assert torch.allclose(first, second, atol=1e-12)
    assert torch.allclose(first[0, 1].mean(), (mix_pixels(pixels, *tensors(plan))[0, 1].mean() - 0.456) / 0.224)


def assert_lawful(plan: MixPlan, n: int, size_px: int) -> None:
    assert (plan.partner.dtype, plan.kind.dtype, plan.lam.dtype, plan.box.dtype) == (
        np.uint32,
        np.uint8,
        np.float32,
        np.uint16,
    )
    assert plan.partner.shape == plan.kind.shape == plan.lam.shape == (n,)
    assert plan.box.shape == (n, 4)
    rows = np.arange(n)
    assert (plan.partner[plan.partner] == rows).all()
    for column in (plan.kind, plan.lam, plan.box):
        assert (column[plan.partner] == column).all()
    assert (np.isfinite(plan.lam) & (plan.lam >= 0) & (plan.lam <= 1)).all()
    alone = plan.partner == rows
    assert (alone == (plan.kind == MIX_NONE)).all()
    assert (plan.lam[alone] == 1).all()
    assert (plan.box[plan.kind != MIX_CUTMIX] == 0).all()
    top, left, height, width = plan.box.astype(int).T
    assert (top + height <= size_px).all()
    assert (left + width <= size_px).all()
    cut = plan.kind == MIX_CUTMIX
    assert np.allclose(plan.lam[cut], 1 - height[cut] * width[cut] / size_px**2, atol=1e-7)


def by_key(plan: MixPlan, keys: list[str]) -> dict[str, tuple[str, int, float, tuple[int, ...]]]:
    return {
        key: (keys[plan.partner[row]], int(plan.kind[row]), float(plan.lam[row]), tuple(plan.box[row].tolist()))
        for row, key in enumerate(keys)
    }


def tensors(plan: MixPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.from_numpy(plan.partner.astype(np.int64)),
        torch.from_numpy(plan.kind),
        torch.from_numpy(plan.lam),
        torch.from_numpy(plan.box.astype(np.int64)),
    )


def blend_slowly(pixels: np.ndarray, plan: MixPlan, row: int) -> np.ndarray:
    other = pixels[plan.partner[row]]
    if plan.kind[row] == MIX_MIXUP:
        return plan.lam[row] * pixels[row] + (1 - plan.lam[row]) * other
    mixed = pixels[row].copy()
    if plan.kind[row] == MIX_CUTMIX:
        top, left, height, width = (int(v) for v in plan.box[row])
        mixed[:, top : top + height, left : left + width] = other[:, top : top + height, left : left + width]
    return mixed


def assert_same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Kolmogorov-Smirnov at p = 1e-4; seeds are fixed, so it fails always or never."""
    one, two = np.sort(ours.astype(np.float32)), np.sort(theirs.astype(np.float32))
    points = np.union1d(one, two)
    gap = np.abs(np.searchsorted(one, points, "right") / len(one) - np.searchsorted(two, points, "right") / len(two))
    assert gap.max() < 2.225 * np.sqrt(1 / len(one) + 1 / len(two))
