"""The projector is orthonormal and alive at every step, whatever the widths, the precision and the decay."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vkd_cache import polar
from vkd_cache.errors import ConfigError
from vkd_cache.optim import parameter_groups
from vkd_cache.polar import polar_factor
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
def test_polar_gradient_is_exact(shape: tuple[int, int]) -> None:
    matrix = gaussian(*shape, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(polar_factor, matrix)


def test_polar_gradient_is_exact_where_singular_values_repeat() -> None:
    matrix = 2.5 * torch.linalg.qr(gaussian(6, 4, dtype=torch.float64)).Q
    assert torch.autograd.gradcheck(polar_factor, matrix.clone().requires_grad_())


def test_polar_factor_is_the_svd_s_and_ignores_scale() -> None:
    for shape in ((30, 10), (10, 30), (12, 12)):
        matrix = gaussian(*shape, dtype=torch.float64)
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.allclose(polar_factor(matrix), left @ right, atol=1e-12)
        assert torch.allclose(polar_factor(1e-9 * matrix), left @ right, atol=1e-12)
        assert torch.allclose(polar_factor(left @ right), left @ right, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 2**31), st.floats(0, 3))
def test_newton_schulz_agrees_with_eigenvectors(side: int, extra: int, seed: int, decades: float) -> None:
    """What runs on a GPU is what runs on a CPU: factor and gradient, for conditions up to 1000."""
    left = torch.linalg.qr(gaussian(side + extra, side, seed=seed, dtype=torch.float64)).Q
    right = torch.linalg.qr(gaussian(side, side, seed=seed + 1, dtype=torch.float64)).Q
    tall = (left * torch.logspace(0, -decades, side, dtype=torch.float64)) @ right
    factor, basis, spectrum = polar._factor_by_eigenvectors(tall)
    iterated, stretch = polar._factor_by_newton_schulz(tall)
    assert torch.allclose(iterated, factor, atol=1e-8)
    gradient = gaussian(side + extra, side, seed=seed + 2, dtype=torch.float64)
    exact = polar._polar_backward(gradient, factor, basis, spectrum)
    other = polar._polar_backward(gradient, factor, stretch, spectrum[:0])
    assert torch.allclose(other, exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("decades", [4, 5, 6])
@pytest.mark.parametrize("spread", ["one large", "one small", "even"])
def test_newton_schulz_is_orthonormal_for_any_spectrum_that_training_could_meet(spread: str, decades: int) -> None:
    left = torch.linalg.qr(gaussian(90, 48, dtype=torch.float64)).Q
    right = torch.linalg.qr(gaussian(48, 48, seed=1, dtype=torch.float64)).Q
    values = torch.logspace(0, -decades, 48, dtype=torch.float64)
    if spread != "even":
        values = torch.full_like(values, 10.0 ** (-decades if spread == "one large" else 0))
        values[0] = 10.0 ** (0 if spread == "one large" else -decades)
    weight, _ = polar._factor_by_newton_schulz((left * values) @ right)
    assert orthonormality_error(weight) < 1e-7
    assert torch.allclose(weight, left @ right, atol=1e-4)


def test_the_large_float32_path_gives_the_same_factor_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gaussian(96, 64) / 8 + torch.linalg.qr(gaussian(96, 64, seed=1)).Q
    upstream = gaussian(96, 64, seed=2)

    def factor_and_gradient() -> tuple[Tensor, Tensor]:
        leaf = matrix.clone().requires_grad_()
        weight = polar_factor(leaf)
        weight.backward(upstream)
        assert leaf.grad is not None
        return weight.detach(), leaf.grad

    exact, exact_gradient = factor_and_gradient()
    monkeypatch.setattr(polar, "EIGH_FLOAT64_MAX", 8)
    weight, gradient = factor_and_gradient()
    assert orthonormality_error(weight) < 1e-6
    assert torch.allclose(weight, exact, atol=1e-5)
    assert torch.allclose(gradient, exact_gradient, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_matrix_without_full_rank_still_gives_an_orthonormal_factor(rank: int) -> None:
    matrix = (gaussian(20, rank) @ gaussian(rank, 6, seed=1)).requires_grad_()
    weight = polar_factor(matrix)
    assert orthonormality_error(weight) < ORTHONORMAL
    weight.sum().backward()
    assert matrix.grad is not None
    assert matrix.grad.isfinite().all()


@pytest.mark.parametrize("size", [(4, 2), (200, 150)])
def test_non_finite_parameters_show(size: tuple[int, int]) -> None:
    matrix = gaussian(*size)
    matrix[0, 0] = float("inf")
    assert polar_factor(matrix).isnan().all()


def test_the_operators_are_sound_for_compilers() -> None:
    laws = ("test_schema", "test_autograd_registration", "test_faketensor")
    for shape in ((6, 3), (3, 6)):
        torch.library.opcheck(polar._polar, (gaussian(*shape).requires_grad_(),), test_utils=laws)
        saved = polar._polar(gaussian(*shape))
        torch.library.opcheck(polar._polar_backward, (gaussian(*shape, seed=1), *saved), test_utils=laws)
    projector = OrthogonalProjector(3, 6)
    compiled = torch.compile(projector, backend="aot_eager", fullgraph=True)
    features = gaussian(2, 3)
    compiled(features).square().sum().backward()
    grad = projector.matrix.grad
    assert grad is not None
    projector.matrix.grad = None
    projector(features).square().sum().backward()
    assert torch.allclose(grad, projector.matrix.grad)


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
def test_polar_stays_alive(student: int, teacher: int, steps: int, decayed: bool) -> None:
    torch.manual_seed(0)
    losses = train(OrthogonalProjector(student, teacher), steps, decayed=decayed)
    assert losses[-1] < losses[0]


def test_polar_stays_alive_for_hundreds_of_steps_with_heavy_decay_and_autocast() -> None:
    torch.manual_seed(0)
    projector = OrthogonalProjector(24, 96)
    losses = train(projector, 400, decayed=True, autocast=True, lr=3e-2)
    assert losses[-1] < 0.9 * losses[0]


def test_polar_stays_alive_at_3024_square() -> None:
    torch.manual_seed(0)
    projector = OrthogonalProjector(3024, 3024)
    before = projector.weight
    (before * gaussian(3024, 3024)).sum().backward()
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


def test_polar_state_is_its_matrix_alone() -> None:
    state = OrthogonalProjector(192, 3024).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {"matrix": (3024, 192)}


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="found 'qr', expected one of polar, householder"):
        OrthogonalProjector(2, 3, "qr")
    with pytest.raises(ConfigError, match="0 -> 3"):
        OrthogonalProjector(0, 3)
