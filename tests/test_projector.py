"""The projector is orthonormal and alive at every step, whatever the widths, the precision and the decay."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vkd_cache import orthonormal
from vkd_cache.errors import ConfigError
from vkd_cache.optim import parameter_groups
from vkd_cache.orthonormal import orthonormal_factor
from vkd_cache.projector import KINDS, REFERENCE_KINDS, OrthogonalProjector

ORTHONORMAL = 1e-5


def orthonormality_error(weight: Tensor) -> float:
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.mT
    gram = tall.detach().double().mT @ tall.detach().double()  # float64: autocast leaves it alone
    return float((gram - torch.eye(gram.shape[0], dtype=gram.dtype)).abs().max())


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "linear"])
@pytest.mark.parametrize(("student", "teacher"), [(12, 40), (40, 12), (20, 20), (1, 5), (5, 1)])
def test_every_kind_is_orthonormal_and_shaped_as_a_linear_weight(kind: str, student: int, teacher: int) -> None:
    projector = OrthogonalProjector(student, teacher, kind)
    assert projector.weight.shape == (teacher, student)
    assert orthonormality_error(projector.weight) < ORTHONORMAL
    features = gaussian(3, student)
    assert torch.allclose(projector(features), features @ projector.weight.T, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (4, 4), (5, 1)])
def test_gradient_is_exact(shape: tuple[int, int]) -> None:
    matrix = gaussian(*shape, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(orthonormal_factor, matrix)


def test_gradient_is_exact_where_singular_values_repeat() -> None:
    matrix = 2.5 * torch.linalg.qr(gaussian(6, 4, dtype=torch.float64)).Q
    assert torch.autograd.gradcheck(orthonormal_factor, matrix.clone().requires_grad_())


def test_the_factor_ignores_the_scale_of_columns_and_keeps_what_is_orthonormal() -> None:
    for shape in ((30, 10), (12, 12)):
        matrix = gaussian(*shape, dtype=torch.float64)
        factor = orthonormal_factor(matrix)
        scaled = matrix * torch.logspace(-3, 3, shape[1], dtype=torch.float64)
        assert torch.allclose(orthonormal_factor(scaled), factor, atol=1e-9)
        assert torch.allclose(orthonormal_factor(1e-9 * matrix), factor, atol=1e-12)
        assert torch.allclose(orthonormal_factor(factor), factor, atol=1e-12)
    wide = gaussian(10, 30, dtype=torch.float64)
    assert torch.equal(orthonormal_factor(wide), orthonormal_factor(wide.mT).mT)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 2**31), st.floats(0, 3))
def test_the_factor_and_its_gradient_are_those_of_reflections(side: int, extra: int, seed: int, decades: float) -> None:
    """torch's own QR, whose R may have a negative diagonal, for ratios of singular values up to 1000."""
    left = torch.linalg.qr(gaussian(side + extra, side, seed=seed, dtype=torch.float64)).Q
    right = torch.linalg.qr(gaussian(side, side, seed=seed + 1, dtype=torch.float64)).Q
    ours = ((left * torch.logspace(0, -decades, side, dtype=torch.float64)) @ right).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    factor = orthonormal_factor(ours)
    reflected, upper = torch.linalg.qr(theirs)
    expected = reflected * upper.diagonal().detach().sign()
    assert torch.allclose(factor, expected, atol=1e-8)
    gradient = gaussian(side + extra, side, seed=seed + 2, dtype=torch.float64)
    factor.backward(gradient)
    expected.backward(gradient)
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6 * float(theirs.grad.abs().max()))


@pytest.mark.parametrize("decades", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("spread", ["one large", "one small", "even"])
def test_orthonormal_for_any_spectrum_that_training_could_meet(spread: str, decades: int) -> None:
    left = torch.linalg.qr(gaussian(90, 48, dtype=torch.float64)).Q
    right = torch.linalg.qr(gaussian(48, 48, seed=1, dtype=torch.float64)).Q
    values = torch.logspace(0, -decades, 48, dtype=torch.float64)
    if spread != "even":
        values = torch.full_like(values, 10.0 ** (-decades if spread == "one large" else 0))
        values[0] = 10.0 ** (0 if spread == "one large" else -decades)
    matrix = ((left * values) @ right).float()
    assert orthonormality_error(orthonormal_factor(matrix)) < ORTHONORMAL
    if decades <= 5:  # without a look from the host, as on a GPU
        upper, _ = torch.linalg.cholesky_ex(matrix.double().mT @ matrix.double(), upper=True)
        assert orthonormality_error(orthonormal._divided(matrix.double(), upper)) < ORTHONORMAL


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_matrix_without_full_rank_still_gives_an_orthonormal_factor(rank: int) -> None:
    matrix = (gaussian(20, rank) @ gaussian(rank, 6, seed=1)).requires_grad_()
    weight = orthonormal_factor(matrix)
    assert orthonormality_error(weight) < ORTHONORMAL
    weight.sum().backward()
    assert matrix.grad is not None
    assert matrix.grad.isfinite().all()


@pytest.mark.parametrize("size", [(4, 2), (200, 150)])
def test_non_finite_parameters_show(size: tuple[int, int]) -> None:
    matrix = gaussian(*size)
    matrix[0, 0] = float("inf")
    assert orthonormal_factor(matrix).isnan().all()


def test_the_operators_are_sound_for_compilers() -> None:
    laws = ("test_schema", "test_autograd_registration", "test_faketensor")
    for shape in ((6, 3), (3, 6)):
        torch.library.opcheck(orthonormal._factor, (gaussian(*shape).requires_grad_(),), test_utils=laws)
        saved = orthonormal._factor(gaussian(*shape))
        torch.library.opcheck(orthonormal._factor_backward, (gaussian(*shape, seed=1), *saved), test_utils=laws)
    projector = OrthogonalProjector(3, 6)
    compiled = torch.compile(projector, backend="aot_eager", fullgraph=True)
    features = gaussian(2, 3)
    compiled(features).square().sum().backward()
    grad = projector.directions.grad
    assert grad is not None
    projector.directions.grad = None
    projector(features).square().sum().backward()
    assert torch.allclose(grad, projector.directions.grad)


def train(
    projector: OrthogonalProjector, steps: int, *, decayed: bool, autocast: bool = False, lr: float = 5e-4
) -> list[float]:
    """AdamW towards a fixed rotation; checks orthonormality and a live gradient at every step."""
    groups = [{"params": list(projector.parameters())}] if decayed else parameter_groups(projector, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.05)
    features, target = gaussian(16, projector.in_features), gaussian(16, projector.out_features, seed=1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            projected = projector(features)
            assert projected.dtype == projector.weight.dtype == torch.float32
            assert orthonormality_error(projector.weight) < ORTHONORMAL
        loss = torch.nn.functional.smooth_l1_loss(projected, target)
        loss.backward()
        gradient = next(projector.parameters()).grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert float(gradient.norm()) > 0
        optimizer.step()
        losses.append(loss.item())
    assert orthonormality_error(projector.weight) < ORTHONORMAL
    return losses


@pytest.mark.parametrize("decayed", [False, True], ids=["our groups", "decayed on purpose"])
@pytest.mark.parametrize(
    ("student", "teacher", "steps"), [(192, 3024, 12), (384, 3024, 6), (3024, 192, 12), (192, 192, 12)]
)
def test_the_default_stays_alive(student: int, teacher: int, steps: int, decayed: bool) -> None:
    torch.manual_seed(0)
    losses = train(OrthogonalProjector(student, teacher), steps, decayed=decayed)
    assert losses[-1] < losses[0]


def test_the_default_stays_alive_for_hundreds_of_steps_with_heavy_decay_and_autocast() -> None:
    torch.manual_seed(0)
    projector = OrthogonalProjector(24, 96)
    losses = train(projector, 400, decayed=True, autocast=True, lr=3e-2)
    assert losses[-1] < 0.9 * losses[0]


def test_the_default_stays_alive_when_square() -> None:
    torch.manual_seed(0)
    projector = OrthogonalProjector(768, 768)
    before = projector.weight
    (before * gaussian(768, 768)).sum().backward()
    torch.optim.AdamW(projector.parameters(), lr=5e-4, weight_decay=0.05).step()
    after = projector.weight.detach()
    assert orthonormality_error(after) < ORTHONORMAL
    assert float((after - before.detach()).norm()) > 0.1


@pytest.mark.parametrize("kind", REFERENCE_KINDS)
def test_reference_kinds_live_in_our_groups_and_ignore_autocast(kind: str) -> None:
    torch.manual_seed(0)
    losses = train(OrthogonalProjector(12, 20, kind), 30, decayed=False, autocast=True)
    assert losses[-1] < losses[0]


def test_the_reference_s_own_set_up_dies_at_its_first_step() -> None:
    """The fact that docs/losses.md explains; when torch mends it, that page has to change."""
    projector = OrthogonalProjector(48, 80, "householder")
    optimizer = torch.optim.AdamW(projector.parameters(), lr=5e-4, weight_decay=0.05)
    projector(gaussian(4, 48)).square().sum().backward()
    optimizer.step()
    assert not projector.weight.any()


@pytest.mark.parametrize("kind", REFERENCE_KINDS)
def test_published_names(kind: str) -> None:
    state = OrthogonalProjector(12, 20, kind).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "parametrizations.weight.original": (20, 12),
        "parametrizations.weight.0.base": (20, 20),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_state_dicts_carry_the_map(kind: str) -> None:
    projector = OrthogonalProjector(12, 20, kind)
    duplicate = copy.deepcopy(projector)
    other = OrthogonalProjector(12, 20, kind)
    other.load_state_dict(projector.state_dict())
    assert torch.equal(duplicate.weight, projector.weight)
    assert torch.equal(other.weight, projector.weight)
    duplicate(gaussian(2, 12)).sum().backward()
    assert all(parameter.grad is None for parameter in projector.parameters())


def test_the_default_s_state_is_its_directions_alone() -> None:
    state = OrthogonalProjector(192, 3024).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {"directions": (3024, 192)}


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="found 'svd', expected one of qr, householder"):
        OrthogonalProjector(2, 3, "svd")
    with pytest.raises(ConfigError, match="0 -> 3"):
        OrthogonalProjector(0, 3)
