"""The orthonormal factor Q of a matrix A = Q R, R triangular with a positive diagonal, with its exact gradient.

A newcomer would call `torch.linalg.qr`: its reflections are slow, its gradient slower, and on a GPU both keep the queue
waiting. R is the Cholesky factor of the small Gram matrix A^T A (n = the shorter side), and Q = A R^-1: a handful of
matrix products and one n x n factorisation, the same on every device, without a look at the numbers from the host. The
Gram matrix squares the ratio of A's singular values, so all of this is in float64, where Q is orthonormal to 1e-5 for
ratios up to 100,000; 10,000 AdamW steps from an orthonormal start leave it below 10 (benchmarks/orthogonal.py).

With G the gradient with respect to Q, and mirror(X) the symmetric matrix with the lower triangle of X:

    dL/dA = (G - Q mirror(G^T Q)) R^-T

Source: CholeskyQR (Golub and Van Loan, Matrix Computations, section 5.2); the gradient from differentiating
A = Q R, Q^T Q = I. Two operators are registered with torch, so that torch.compile sees opaque calls.

Shapes: m the longer side, n the shorter one.
"""

from typing import Any

import torch
from torch import Tensor

_SMALLEST_RATIO = 1e-3  # of the diagonal of R; below, the Gram matrix may have lost too many digits
_SMALLEST_PIVOT = 1e-6  # of the largest one: finite gradients without full rank


def orthonormal_factor(matrix: Tensor) -> Tensor:
    """The orthonormal factor of `matrix`, differentiable once.

    Args:
        matrix: (m, n) or (n, m), float32 or float64. The scale of its columns (rows, where it is wide) does not
            matter. Where it has not full rank (on the CPU) some orthonormal completion is taken.

    Returns:
        Same shape and dtype: orthonormal columns where it is tall, rows where it is wide, both where square. All NaN
        where `matrix` holds a number that is not finite.
    """
    factor: Tensor = _factor(matrix)[0]
    return factor


@torch.library.custom_op("vkd_cache::orthonormal", mutates_args=())
def _factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, R), both in the precision of `matrix`."""
    with torch.autocast(matrix.device.type, enabled=False):
        wide = matrix.shape[0] < matrix.shape[1]
        tall = (matrix.mT if wide else matrix).to(torch.float64)
        lower, failed = torch.linalg.cholesky_ex(tall.mT @ tall)
        upper = lower.mT
        if not matrix.is_cpu:
            factor = _divided(tall, upper.where(failed == 0, float("nan")))
        elif _is_doubtful(upper, failed):
            factor, upper = _with_care(tall)
        else:
            factor = _divided(tall, upper)
        return _laid_out(factor.mT if wide else factor, matrix.dtype), _laid_out(upper, matrix.dtype)


@_factor.register_fake
def _(matrix: Tensor) -> tuple[Tensor, Tensor]:
    side = min(matrix.shape[0], matrix.shape[1])
    return matrix.new_empty(matrix.shape), matrix.new_empty((side, side))


@torch.library.custom_op("vkd_cache::orthonormal_backward", mutates_args=())
def _factor_backward(gradient: Tensor, factor: Tensor, upper: Tensor) -> Tensor:
    """The gradient with respect to the matrix, by the formula at the top of this module."""
    with torch.autocast(gradient.device.type, enabled=False):
        wide = factor.shape[0] < factor.shape[1]
        outer, tall = (gradient.mT, factor.mT) if wide else (gradient, factor)
        lower = (outer.mT @ tall).tril_()
        mirrored = lower + lower.tril(-1).mT
        result = _divided(torch.addmm(outer, tall, mirrored, alpha=-1), upper.mT, lower=True)
        return _laid_out(result.mT if wide else result, gradient.dtype)


@_factor_backward.register_fake
def _(gradient: Tensor, factor: Tensor, upper: Tensor) -> Tensor:
    return gradient.new_empty(factor.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output)


def _backward(ctx: Any, gradient: Tensor, *_unused: Tensor) -> Tensor:
    factor, upper = ctx.saved_tensors
    result: Tensor = _factor_backward(gradient, factor, upper)
    return result


_factor.register_autograd(_backward, setup_context=_save_for_backward)


def _divided(tall: Tensor, triangle: Tensor, *, lower: bool = False) -> Tensor:
    """X (m, n) with X T = A for a triangular T (n, n)."""
    # written as T^T X^T = A^T: this is how the libraries lay matrices out, and it saves copies
    quotient: Tensor = torch.linalg.solve_triangular(triangle.mT, tall.mT, upper=lower)
    return quotient.mT


def _is_doubtful(upper: Tensor, failed: Tensor) -> bool:
    diagonal = upper.diagonal()
    return bool(failed) or not bool(diagonal.min() > _SMALLEST_RATIO * diagonal.max())


def _with_care(tall: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, R) of a tall matrix by reflections, which need no full rank."""
    if not bool(tall.isfinite().all()):
        return torch.full_like(tall, float("nan")), tall.new_full((tall.shape[1],) * 2, float("nan"))
    factor, upper = torch.linalg.qr(tall)
    signs = torch.where(upper.diagonal() < 0, -1.0, 1.0)
    upper = upper * signs[:, None]
    pivots = upper.diagonal()
    largest = pivots.max()
    pivots.copy_(pivots.clamp_min(torch.where(largest > 0, largest * _SMALLEST_PIVOT, 1.0)))
    return factor * signs, upper


def _laid_out(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Row by row and sharing nothing with an input: what an operator has to return."""
    return values.to(dtype, memory_format=torch.contiguous_format, copy=True)
