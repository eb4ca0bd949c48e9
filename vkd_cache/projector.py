"""The orthogonal map from student width to teacher width.

A newcomer would use torch's `orthogonal` parametrization as it is, and lose the feature loss at the first optimizer
step: its Householder map multiplies by the diagonal of its parameter *cast to int*, so the first weight decay turns -1
into -0.999975, the cast gives 0, and the projector is exactly zero from then on (docs/losses.md). Here the default map
is the orthonormal factor of an unconstrained matrix: its scale does not matter, so nothing a decay does can kill it;
and `never_decays` keeps every kind out of the decayed parameters (vkd_cache.optim).

Shapes: B batch, Cs student width, Ct teacher width.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from vkd_cache.errors import ConfigError
from vkd_cache.orthonormal import orthonormal_factor

REFERENCE_KINDS = ("householder", "matrix_exp", "cayley")  # torch's own maps, for comparison with the reference
KINDS = ("qr", *REFERENCE_KINDS, "linear")


class OrthogonalProjector(nn.Module):
    """z (B, Cs) -> z W^T (B, Ct), W (Ct, Cs) with orthonormal columns where Ct >= Cs, rows where Ct <= Cs.

    Orthonormal to 1e-5 at every step and computed in float32 whatever autocast says. Kinds: `qr` (default, one
    parameter `directions` of W's shape), torch's `householder`, `matrix_exp` and `cayley` (parameter and buffer named
    as published: `parametrizations.weight.original`, `parametrizations.weight.0.base`, the latter square with the
    longer side) and `linear` (parameter `unconstrained`, W itself, as ablation).

    Source: VkD (arXiv 2403.06213), section 3.1; deviation: the map is ours, the reference trains torch's.

    Raises:
        ConfigError: unknown kind, or a width below 1.
    """

    never_decays: ClassVar[bool] = True
    directions: nn.Parameter  # of kind qr
    unconstrained: nn.Parameter  # of kind linear

    def __init__(self, in_features: int, out_features: int, kind: str = "qr") -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"projector: found '{kind}', expected one of {', '.join(KINDS)}.")
        if min(in_features, out_features) < 1:
            raise ConfigError(f"projector: found widths {in_features} -> {out_features}, expected at least 1 each.")
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        if kind in REFERENCE_KINDS:
            plain = nn.Linear(in_features, out_features, bias=False)
            # the carrier is thrown away: only its parameter list is kept, under the names of published checkpoints
            carrier = parametrizations.orthogonal(plain, orthogonal_map=kind)
            self.parametrizations = carrier.get_submodule("parametrizations")
        else:
            start = nn.init.orthogonal_(torch.empty(out_features, in_features))
            # two names, so that a checkpoint of one kind is never taken for the other
            self.register_parameter("directions" if kind == "qr" else "unconstrained", nn.Parameter(start))

    @property
    def weight(self) -> Tensor:
        """W (Ct, Cs), in the parameter's own precision; each read computes the map anew."""
        if self.kind == "qr":
            return orthonormal_factor(self.directions)
        if self.kind == "linear":
            return self.unconstrained
        constraint = self.get_submodule("parametrizations.weight")
        with torch.autocast(next(constraint.parameters()).device.type, enabled=False):
            weight: Tensor = constraint()
        return weight

    def forward(self, features: Tensor) -> Tensor:
        """Project features (..., Cs), any float type, to (..., Ct) in the weight's precision."""
        weight = self.weight
        with torch.autocast(weight.device.type, enabled=False):
            return F.linear(features.to(weight.dtype), weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"
