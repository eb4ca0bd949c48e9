"""The polar factor of a matrix: the nearest matrix with orthonormal rows or columns, with its exact gradient.

A newcomer would expect an SVD. The factor needs only the small Gram matrix (n = the shorter side), so a
3024 x 192 projector costs milliseconds, and the gradient below never divides by a *difference* of singular values,
only by their sums: repeated singular values, as every fresh projector has, are harmless.

With A (m, n), m >= n, A = W H, H = (A^T A)^(1/2), G the gradient with respect to W and M = W^T G:

    dL/dA = W S(M - M^T) + (G - W M) H^(-1),      S(X) the solution of H S + S H = X.

Source: differentiate A = W H and take the adjoint (the Sylvester equation is standard for polar decompositions,
Higham, Functions of Matrices, ch. 8). Two operators are registered with torch, so that torch.compile sees opaque
calls: on the CPU the eigenvectors of A^T A serve both directions; on other devices, where small eigenproblems are slow
and stall the queue, Newton-Schulz iterations of matrix products do.

Shapes: m the longer side, n the shorter one.
"""

from typing import Any

import torch
from torch import Tensor

EIGH_FLOAT64_MAX = 1024  # up to this n everything runs in float64; above, on the CPU, in float32 with a polish
# contraction 1.5 each, and no host synchronisation: orthonormal to 1e-7 for ratios of singular values up to 1e6
# (thousands of AdamW steps from the orthonormal start leave it near 10)
NEWTON_ITERATIONS = 40
POLISH_STEPS = 2
# smallest over largest singular value below which the Gram matrix has lost too many digits
_SMALLEST_RATIO = {torch.float64: 1e-4, torch.float32: 1e-1}


def polar_factor(matrix: Tensor) -> Tensor:
    """The orthonormal factor of `matrix`, differentiable once.

    Args:
        matrix: (m, n) or (n, m), float32 or float64. Its scale does not matter. Where it has not full rank (on the
            CPU) some orthonormal completion is taken.

    Returns:
        Same shape and dtype: orthonormal columns where it is tall, rows where it is wide, both where square. All NaN
        where `matrix` holds a number that is not finite.
    """
    weight: Tensor = _polar(matrix)[0]
    return weight


@torch.library.custom_op("vkd_cache::polar", mutates_args=())
def _polar(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(factor, basis, spectrum): basis = eigenvectors of A^T A and spectrum = singular values, or H and nothing."""
    with torch.autocast(matrix.device.type, enabled=False):
        tall = matrix.detach() if matrix.shape[0] >= matrix.shape[1] else matrix.detach().mT
        if _by_eigenvectors(matrix):
            factor, basis, spectrum = _factor_by_eigenvectors(tall.to(_working_dtype(matrix)))
        else:
            factor, basis = _factor_by_newton_schulz(tall.double())
            spectrum = basis.new_empty(0)
        if tall.shape != matrix.shape:
            factor = factor.mT
        return _laid_out(factor, matrix.dtype), basis.contiguous(), spectrum


@_polar.register_fake
def _(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    side = min(matrix.shape[0], matrix.shape[1])
    basis = matrix.new_empty((side, side), dtype=_working_dtype(matrix))
    return matrix.new_empty(matrix.shape), basis, basis.new_empty(side if _by_eigenvectors(matrix) else 0)


@torch.library.custom_op("vkd_cache::polar_backward", mutates_args=())
def _polar_backward(gradient: Tensor, factor: Tensor, basis: Tensor, spectrum: Tensor) -> Tensor:
    """The gradient with respect to the matrix, by the formula at the top of this module."""
    with torch.autocast(gradient.device.type, enabled=False):
        wide = factor.shape[0] < factor.shape[1]
        outer = (gradient.mT if wide else gradient).to(basis.dtype)
        tall = (factor.mT if wide else factor).to(basis.dtype)
        inner = tall.mT @ outer
        skew = inner - inner.mT
        normal = None if tall.shape[0] == tall.shape[1] else outer - tall @ inner  # zero for a square matrix
        if spectrum.numel():
            largest = spectrum.max()
            values = spectrum.clamp_min(torch.where(largest > 0, largest * 1e-6, 1.0))  # finite without full rank
            rotated = (basis.mT @ skew @ basis) / (values[:, None] + values[None, :])
            result = tall @ (basis @ rotated @ basis.mT)
            if normal is not None:
                result = result + normal @ ((basis / values) @ basis.mT)
        else:
            result = tall @ _sylvester_by_newton_schulz(basis, skew)
            if normal is not None:
                result = result + torch.linalg.solve_ex(basis, normal.mT)[0].mT
        return _laid_out(result.mT if wide else result, gradient.dtype)


@_polar_backward.register_fake
def _(gradient: Tensor, factor: Tensor, basis: Tensor, spectrum: Tensor) -> Tensor:
    return gradient.new_empty(factor.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output)


def _backward(ctx: Any, gradient: Tensor, *_unused: Tensor) -> Tensor:
    factor, basis, spectrum = ctx.saved_tensors
    result: Tensor = _polar_backward(gradient, factor, basis, spectrum)
    return result


_polar.register_autograd(_backward, setup_context=_save_for_backward)


def _laid_out(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Row by row and sharing nothing with an input: what an operator has to return."""
    return values.to(dtype, memory_format=torch.contiguous_format, copy=True)


def _by_eigenvectors(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu"


def _working_dtype(matrix: Tensor) -> torch.dtype:
    large = min(matrix.shape[0], matrix.shape[1]) > EIGH_FLOAT64_MAX
    return torch.float32 if large and _by_eigenvectors(matrix) and matrix.dtype != torch.float64 else torch.float64


def _factor_by_eigenvectors(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(W, V, s) of a tall matrix in its own precision; falls back to more digits, then to the SVD, when needed."""
    gram = tall.mT @ tall
    if not bool(gram.isfinite().all()):  # eigh would raise or return numbers, depending on its size
        nothing = torch.full_like(gram, float("nan"))
        return torch.full_like(tall, float("nan")), nothing, nothing[0].clone()
    squares, basis = torch.linalg.eigh(gram)
    spectrum = squares.clamp_min(0).sqrt()
    if bool(spectrum[0] <= _SMALLEST_RATIO[tall.dtype] * spectrum[-1]):
        return _factor_with_care(tall)
    factor = tall @ ((basis / spectrum) @ basis.mT)
    if tall.dtype == torch.float32:
        factor = _polished(factor)
    return factor, basis, spectrum


def _polished(factor: Tensor) -> Tensor:
    """A nearly orthonormal factor, made orthonormal to the precision of its numbers."""
    for _ in range(POLISH_STEPS):
        factor = torch.addmm(factor, factor, factor.mT @ factor, beta=1.5, alpha=-0.5)
    return factor


def _factor_with_care(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if tall.dtype == torch.float32:
        factor, basis, spectrum = _factor_by_eigenvectors(tall.double())
        return factor, basis.float(), spectrum.float()
    left, spectrum, right = torch.linalg.svd(tall, full_matrices=False)
    return left @ right, right.mT.contiguous(), spectrum


def _factor_by_newton_schulz(tall: Tensor) -> tuple[Tensor, Tensor]:
    """(W, H) of a tall matrix by the coupled iteration Y -> (A^T A / c)^(1/2), Z -> its inverse."""
    gram = tall.mT @ tall
    scale = torch.linalg.matrix_norm(gram, ord=float("inf"))  # no eigenvalue exceeds it
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    root, inverse = gram / scale, identity
    for _ in range(NEWTON_ITERATIONS):
        step = 1.5 * identity - 0.5 * (inverse @ root)
        root, inverse = root @ step, step @ inverse
    factor = _polished(tall @ (inverse / scale.sqrt()))
    stretch: Tensor = factor.mT @ tall
    return factor, 0.5 * (stretch + stretch.mT)


def _sylvester_by_newton_schulz(stretch: Tensor, right: Tensor) -> Tensor:
    """The solution S of H S + S H = X for positive definite H: half the corner of sign([[H, X], [0, -H]])."""
    scale = torch.linalg.matrix_norm(stretch, ord=float("inf"))
    identity = 3.0 * torch.eye(stretch.shape[0], dtype=stretch.dtype, device=stretch.device)
    block, corner = stretch / scale, right / scale
    for _ in range(NEWTON_ITERATIONS):
        step = identity - block @ block
        corner = 0.5 * (corner @ step - block @ (block @ corner - corner @ block))
        block = 0.5 * (block @ step)
    solution: Tensor = 0.5 * corner
    return solution
