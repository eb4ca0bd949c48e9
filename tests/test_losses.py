"""The three terms: the reference's numbers, values and gradients, and every subset of them."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import recipe
from torch import Tensor

from vkd_cache.errors import ConfigError
from vkd_cache.losses import (
    FEATURE_LOSSES,
    VkdLoss,
    feature_loss,
    logit_loss,
    mix_targets,
    normalise_features,
    soft_cross_entropy,
    whitening_statistics,
)
from vkd_cache.projector import OrthogonalProjector
from vkd_cache.students import StudentOutput

REFERENCE = Path(__file__).parent / "reference"
CASES: dict[str, Any] = json.loads((REFERENCE / "deit_losses.json").read_text())
FACTS: dict[str, Any] = json.loads((REFERENCE / "misc_facts.json").read_text())
ARRAYS = np.load(REFERENCE / "deit_losses.npz")
TOLERANCE = 1e-6
KIND = {"tall_48_80": "householder", "wide_80_48": "householder", "square_64_64": "matrix_exp"}
OTHER_MAPS = {
    "tall_48_80_matrix_exp": "matrix_exp",
    "wide_80_48_matrix_exp": "matrix_exp",
    "tall_48_80_cayley": "cayley",
}
TERMS = {"xe": "task", "repr": "feature", "kl": "logit", "total": "total"}


def close(found: Tensor, expected: Any, tolerance: float = TOLERANCE) -> bool:
    """Within `tolerance`, relative to the largest expected number or 1."""
    wanted = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    scale = max(1.0, float(wanted.abs().max()))
    return bool((found.detach().double() - wanted).abs().max() <= tolerance * scale)


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of a reference case; z_s, y_s and y_d ask for gradients."""
    setup, tag = CASES["cases"][name]["setup"], f"loss.{name}."
    batch, classes = setup["B"], setup["classes"]
    side = setup["map_hw"]
    arrays = {
        "z_s": recipe.normal(tag + "z_s", (batch, setup["N"], setup["Cs"])),
        "f_t": np.abs(recipe.normal(tag + "f_t", (batch, setup["Ct"], side, side))),
        "y_s": recipe.normal(tag + "y_s", (batch, classes), std=2),
        "y_d": recipe.normal(tag + "y_d", (batch, classes), std=2),
        "y_t": recipe.normal(tag + "y_t", (batch, classes), std=3),
    }
    tensors = {key: torch.tensor(value, dtype=dtype) for key, value in arrays.items()}
    for key in ("z_s", "y_s", "y_d"):
        tensors[key].requires_grad_()
    labels = torch.tensor(setup["labels"])
    share = torch.full((batch,), setup["lam"])
    tensors["targets"] = mix_targets(labels, labels.flip(0), share, classes, setup["smoothing"])
    return tensors


def reference_projector(name: str, kind: str) -> OrthogonalProjector:
    setup = CASES["cases"][name]["setup"]
    projector = OrthogonalProjector(setup["Cs"], setup["Ct"], kind)
    state = {
        row["name"]: torch.tensor(recipe.param(row["key"], row["shape"], row["kind"])) for row in setup["projector"]
    }
    projector.load_state_dict(state)
    return projector


def run_case(
    projector: OrthogonalProjector, given: dict[str, Tensor], loss: VkdLoss | None = None
) -> dict[str, Tensor]:
    projected = projector(given["z_s"].mean(1))
    output = StudentOutput(given["y_s"], given["y_d"], projected)
    terms = (loss or VkdLoss())(output, given["targets"], given["f_t"].mean((2, 3)), given["y_t"])
    return terms | {"z_proj": projected}


@pytest.mark.parametrize(("name", "kind"), list((KIND | OTHER_MAPS).items()))
def test_reference_values_and_gradients(name: str, kind: str) -> None:
    projector, given = reference_projector(name, kind), inputs(name)
    assert close(given["targets"], ARRAYS[f"{name}.targets"])
    assert close(projector.weight, ARRAYS[f"{name}.W"])
    found = run_case(projector, given)
    found["total"].backward()
    for theirs, ours in TERMS.items():
        assert close(found[ours], CASES["cases"][name]["f32"][theirs]), theirs
    assert close(found["z_proj"], ARRAYS[f"{name}.z_proj"])
    assert close(normalise_features(given["f_t"].mean((2, 3)), "layer_norm"), ARRAYS[f"{name}.zt_norm"])
    for key in ("z_s", "y_s", "y_d"):
        gradient = given[key].grad
        assert gradient is not None
        assert close(gradient, ARRAYS[f"{name}.grad_{key}"]), key
    original = next(projector.parameters()).grad
    assert original is not None
    assert close(original, ARRAYS[f"{name}.grad_original"])


@pytest.mark.parametrize("name", list(KIND))
def test_the_default_map_gives_the_reference_s_losses_for_the_reference_s_weight(name: str) -> None:
    setup, given = CASES["cases"][name]["setup"], inputs(name)
    projector = OrthogonalProjector(setup["Cs"], setup["Ct"])
    with torch.no_grad():
        projector.directions.copy_(3.0 * torch.tensor(ARRAYS[f"{name}.W"]))  # the scale does not matter
    found = run_case(projector, given)
    found["total"].backward()
    for theirs, ours in TERMS.items():
        assert close(found[ours], CASES["cases"][name]["f32"][theirs]), theirs
    assert given["z_s"].grad is not None
    assert close(given["z_s"].grad, ARRAYS[f"{name}.grad_z_s"])


def test_reference_weights_of_the_terms() -> None:
    loss = VkdLoss(feature_weight=0.5, logit_weight=2.0)
    found = run_case(reference_projector("tall_48_80", "householder"), inputs("tall_48_80"), loss)
    assert close(found["total"], CASES["cases"]["tall_48_80"]["alpha0.5_gamma2"]["total"])


def test_reference_at_full_size() -> None:
    """192 -> 3024 and 1000 classes; the projector's map alone is compared, for its gradient takes many seconds."""
    name = "deit_ti_192_3024"
    case, given = CASES["cases"][name], inputs(name)
    projector = reference_projector(name, "householder")
    with torch.no_grad():
        weight = projector.weight
    row = case["f32"]["tensors"]["W"]
    found = recipe.summary("loss." + name + ".W", weight.numpy())
    assert found["first8"] == pytest.approx(row["first8"], abs=TOLERANCE)
    assert found["l2"] == pytest.approx(row["l2"], rel=TOLERANCE)
    ours = OrthogonalProjector(192, 3024)
    ours.load_state_dict({"directions": weight})
    terms = run_case(ours, given)
    terms["total"].backward()
    for theirs, ours in TERMS.items():
        assert close(terms[ours], case["f32"][theirs]), theirs
    for key in ("y_s", "y_d"):
        gradient = given[key].grad
        assert gradient is not None
        assert close(gradient, ARRAYS[f"{name}.grad_{key}"]), key
    assert given["z_s"].grad is not None
    assert float(given["z_s"].grad.norm()) == pytest.approx(case["f32"]["tensors"]["grad_z_s"]["l2"], rel=1e-5)


@pytest.mark.parametrize("case", FACTS["mixup"]["cases"] + FACTS["mixup"]["mixup_target"])
def test_targets_are_the_reference_s(case: dict[str, Any]) -> None:
    labels = torch.tensor(FACTS["mixup"]["labels"])
    expected = torch.tensor(case["targets"])
    share = torch.full((len(labels),), case["lam"])
    found = mix_targets(labels, labels.flip(0), share, expected.shape[1], case.get("smoothing", 0.1))
    assert torch.allclose(found, expected, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 6), st.floats(0, 0.99), st.integers(0, 2**31))
def test_targets_are_probabilities(num_classes: int, batch: int, smoothing: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels, partners = torch.randint(num_classes, (2, batch), generator=generator)
    targets = mix_targets(labels, partners, torch.rand(batch, generator=generator), num_classes, smoothing)
    assert torch.allclose(targets.sum(1), torch.ones(batch), atol=1e-5)
    assert bool((targets >= 0).all())


def student_output() -> tuple[StudentOutput, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, requires_grad=True)

    output = StudentOutput(leaf(4, 10), leaf(4, 10), leaf(4, 12))
    targets = leaf(4, 10).softmax(1).detach()
    return output, {"targets": targets, "teacher_features": leaf(4, 12), "teacher_logits": leaf(4, 10)}


@pytest.mark.parametrize("active", list(itertools.product([False, True], repeat=3)))
def test_every_combination_of_terms(active: tuple[bool, bool, bool]) -> None:
    """Only active terms are computed, asked for and differentiated; nothing ever flows into the teacher."""
    output, data = student_output()
    names = ("task", "feature", "logit")
    weights = {f"{name}_weight": 2.0 * on for name, on in zip(names, active, strict=True)}
    needed = {key: value for (key, value), on in zip(data.items(), active, strict=True) if on}
    terms = VkdLoss(**weights)(output, **needed)
    assert set(terms) == {"total", *(name for name, on in zip(names, active, strict=True) if on)}
    assert float(terms["total"].detach()) == pytest.approx(
        sum(2.0 * float(value.detach()) for name, value in terms.items() if name != "total")
    )
    terms["total"].backward()
    for part, on in zip((output.logits, output.projected, output.distill_logits), active, strict=True):
        assert part is not None
        assert part.grad is not None  # present even when zero: DDP must find no unused parameter
        assert bool(part.grad.any()) == on
    assert data["teacher_features"].grad is None
    assert data["teacher_logits"].grad is None


def test_without_a_distillation_head_the_task_head_is_distilled() -> None:
    output, data = student_output()
    single = StudentOutput(output.logits, None, None)
    terms = VkdLoss(task_weight=0, feature_weight=0)(single, teacher_logits=data["teacher_logits"])
    assert torch.equal(terms["logit"], logit_loss(output.logits, data["teacher_logits"]))
    terms["total"].backward()
    assert output.logits.grad is not None
    assert output.logits.grad.any()


def test_missing_inputs_are_named() -> None:
    output, data = student_output()
    for name, key in (("task", "targets"), ("feature", "teacher_features"), ("logit", "teacher_logits")):
        with pytest.raises(ConfigError, match=rf"loss.{name}_weight .* {key}"):
            VkdLoss()(output, **(data | {key: None}))
    with pytest.raises(ConfigError, match="no projector"):
        VkdLoss()(StudentOutput(output.logits, None, None), **data)
    with pytest.raises(ConfigError, match=r"teacher_features have shape \(4, 11\), the student's side \(4, 12\)"):
        VkdLoss()(output, **(data | {"teacher_features": data["teacher_features"][:, :11]}))
    with pytest.raises(ConfigError, match=r"expected 0..9"):
        mix_targets(torch.tensor([10]), torch.tensor([0]), torch.ones(1), 10)
    for wrong in ({"feature_loss": "l3"}, {"normalisation": "batch"}, {"temperature": 0.0}, {"task_weight": -1.0}):
        with pytest.raises(ConfigError, match="found"):
            VkdLoss(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="whiten needs statistics"):
        VkdLoss(normalisation="whiten")


def test_autocast_changes_nothing() -> None:
    output, data = student_output()
    exact = VkdLoss()(output, **data)
    with torch.autocast("cpu", torch.bfloat16):
        found = VkdLoss()(output, **data)
    assert all(torch.equal(found[name], exact[name]) for name in exact)
    half = StudentOutput(output.logits.bfloat16(), output.distill_logits, output.projected)
    assert VkdLoss()(half, **data)["total"].dtype == torch.float32


@pytest.mark.parametrize("kind", list(FEATURE_LOSSES))
def test_distances_fall_towards_the_target_and_stay_finite_on_it(kind: str) -> None:
    target = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    student = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    distance = feature_loss(kind)
    values = [float(distance(target + share * (student - target), target)) for share in (1.0, 0.5, 0.1, 0.0)]
    assert values == sorted(values, reverse=True)
    on_it = target.clone().requires_grad_()
    distance(on_it, target).backward()
    assert on_it.grad is not None
    assert on_it.grad.isfinite().all()


def test_logit_loss_is_a_divergence_scaled_by_temperature_squared() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    assert float(logit_loss(teacher, teacher, 3.0)) == pytest.approx(0.0, abs=1e-12)
    assert float(logit_loss(3 * student, 3 * teacher, 3.0)) == pytest.approx(9 * float(logit_loss(student, teacher)))
    entropy = -(teacher.softmax(1) * teacher.log_softmax(1)).sum(1).mean()
    cross = soft_cross_entropy(student, teacher.softmax(1))
    assert float(cross - entropy) == pytest.approx(float(logit_loss(student, teacher)))


def test_standardisation_ignores_padding_and_survives_a_constant_channel() -> None:
    tokens = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0))
    tokens[..., 3] = 5.0
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    expected = normalise_features(tokens[mask], "standardize")
    noisy = tokens.masked_fill(~mask.unsqueeze(-1), 1e6).requires_grad_()
    found = normalise_features(noisy, "standardize", mask=mask)
    assert torch.allclose(found[mask], expected, atol=1e-6)
    assert not found[~mask].any()
    assert torch.allclose(found[mask][:, :3].std(0), torch.ones(3), atol=1e-3)
    found.square().sum().backward()
    assert noisy.grad is not None
    assert noisy.grad.isfinite().all()
    with pytest.raises(ConfigError, match=r"mask of shape \(2, 6\), expected \(2, 7\)"):
        normalise_features(tokens, "standardize", mask=mask[:, :6])


def test_whitening_gives_unit_covariance_and_stays_nearest_to_the_features() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 3.0
    statistics = whitening_statistics(features)
    white = normalise_features(features, "whiten", whitening=statistics)
    assert torch.allclose(torch.cov(white.T), torch.eye(6), atol=1e-2)
    assert torch.allclose(statistics.matrix, statistics.matrix.T)  # ZCA: no rotation
    constant = whitening_statistics(torch.ones(4, 3))
    assert normalise_features(torch.ones(4, 3), "whiten", whitening=constant).isfinite().all()
    output, data = student_output()
    loss = VkdLoss(normalisation="whiten", whitening=whitening_statistics(torch.randn(40, 12, generator=generator)))
    assert loss(output, **data)["total"].isfinite()
    with pytest.raises(ConfigError, match="width 6, features of 5"):
        normalise_features(features[:, :5], "whiten", whitening=statistics)
