"""Orthogonal maps that do not ship, beside those that do: what `orthogonal.py` compares.

A newcomer's trap: each map turns an unconstrained matrix A into a W with orthonormal columns, and all start from the
same W; what differs is time, how well W keeps to it, and where the same optimizer goes.

Shapes: m the longer side (rows, here), n the shorter one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vkd_cache.projector import REFERENCE_KINDS, OrthogonalProjector

NEWTON_ITERATIONS = 40  # contraction 1.5 each: for ratios of singular values up to 1e6
SLOW = REFERENCE_KINDS


class PolarByEigenvectors(torch.autograd.Function):
    """A -> A (A^T A)^-1/2, and its exact gradient, from the eigenvectors of A^T A in float64."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        tall = matrix.double()
        squares, basis = torch.linalg.eigh(tall.mT @ tall)
        values = squares.clamp_min(0).sqrt()
        factor = tall @ ((basis / values) @ basis.mT)
        ctx.save_for_backward(factor, basis, values)
        return factor.to(matrix.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        factor, basis, values = ctx.saved_tensors
        outer = gradient.double()
        inner = factor.mT @ outer
        rotated = (basis.mT @ (inner - inner.mT) @ basis) / (values[:, None] + values[None, :])
        result = factor @ (basis @ rotated @ basis.mT)
        result = result + (outer - factor @ inner) @ ((basis / values) @ basis.mT)
        return result.to(gradient.dtype)


class PolarByNewtonSchulz(torch.autograd.Function):
    """The same by iterations of matrix products alone, forwards and backwards, in float64."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        tall = matrix.double()
        gram = tall.mT @ tall
        scale = torch.linalg.matrix_norm(gram, ord=float("inf"))  # no eigenvalue exceeds it
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        root, inverse = gram / scale, identity
        for _ in range(NEWTON_ITERATIONS):
            step = 1.5 * identity - 0.5 * (inverse @ root)
            root, inverse = root @ step, step @ inverse
        factor = tall @ (inverse / scale.sqrt())
        stretch = factor.mT @ tall
        ctx.save_for_backward(factor, 0.5 * (stretch + stretch.mT))
        return factor.to(matrix.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        factor, stretch = ctx.saved_tensors
        outer = gradient.double()
        inner = factor.mT @ outer
        result = factor @ _sylvester(stretch, inner - inner.mT)
        result = result + torch.linalg.solve_ex(stretch, (outer - factor @ inner).mT)[0].mT
        return result.to(gradient.dtype)


def _sylvester(stretch: Tensor, right: Tensor) -> Tensor:
    """The solution S of H S + S H = X for positive definite H: half the corner of sign([[H, X], [0, -H]])."""
    scale = torch.linalg.matrix_norm(stretch, ord=float("inf"))
    identity = 3.0 * torch.eye(len(stretch), dtype=stretch.dtype, device=stretch.device)
    block, corner = stretch / scale, right / scale
    for _ in range(NEWTON_ITERATIONS):
        step = identity - block @ block
        corner = 0.5 * (corner @ step - block @ (block @ corner - corner @ block))
        block = 0.5 * (block @ step)
    return 0.5 * corner


def by_reflections(matrix: Tensor) -> Tensor:
    """Q of torch's QR by Householder reflections, with torch's gradient; the diagonal of R is made positive."""
    factor, upper = torch.linalg.qr(matrix)
    return factor * upper.diagonal().sign()


class Candidate(nn.Module):
    """A map that does not ship; `weight` (m, n) of its only parameter."""

    def __init__(self, start: Tensor, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.parameter = nn.Parameter(start.clone())
        self._make = make

    @property
    def weight(self) -> Tensor:
        """W, anew at each read."""
        return self._make(self.parameter)


_CANDIDATES: dict[str, Callable[[Tensor], Tensor]] = {
    "polar, eigenvectors": PolarByEigenvectors.apply,  # type: ignore[dict-item]
    "polar, Newton-Schulz": PolarByNewtonSchulz.apply,  # type: ignore[dict-item]
    "QR, reflections": by_reflections,
}
SHIPPED = {"QR, Cholesky (shipped)": "qr", "linear (no constraint)": "linear"} | {
    kind: kind for kind in REFERENCE_KINDS
}
NAMES = (*list(SHIPPED)[:2], *_CANDIDATES, *REFERENCE_KINDS)


def make_map(name: str, start: Tensor) -> nn.Module:
    """The map called `name`, whose W is `start` (m, n), with orthonormal columns, m >= n."""
    if name in _CANDIDATES:
        return Candidate(start, _CANDIDATES[name])
    projector = OrthogonalProjector(start.shape[1], start.shape[0], SHIPPED[name])
    if SHIPPED[name] in REFERENCE_KINDS:
        plain = nn.Linear(start.shape[1], start.shape[0], bias=False)
        with torch.no_grad():
            plain.weight.copy_(start)
        carrier = nn.utils.parametrizations.orthogonal(plain, orthogonal_map=SHIPPED[name])
        projector.load_state_dict(carrier.state_dict())
    else:
        with torch.no_grad():
            next(projector.parameters()).copy_(start)
    return projector
