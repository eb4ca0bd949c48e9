"""Normalisation of the teacher's features, the target of the feature loss.

A newcomer would standardise without an eps and over padding, as upstream's detector does: a constant channel is then
non-finite, and an image's target depends on the other images of its batch.

Shapes: B batch, N tokens, C channels.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from vkd_cache.errors import ConfigError

LAYER_NORM_EPS = 1e-5
NORMALISATIONS = ("layer_norm", "standardize", "whiten", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whitening:
    """Statistics of a whitening: mean (C,) and symmetric ZCA matrix (C, C); (z - mean) @ matrix is white."""

    mean: Tensor
    matrix: Tensor

    def to(self, device: torch.device) -> "Whitening":
        """The same on another device."""
        return Whitening(mean=self.mean.to(device), matrix=self.matrix.to(device))


def whitening_statistics(features: Tensor, eps: float = 1e-5) -> Whitening:
    """ZCA statistics of teacher features (N, C), computed in float64, stored in float32.

    Args:
        features: (N, C), N >= 2.
        eps: added to every eigenvalue of the covariance, relative to their mean.

    Raises:
        ConfigError: not (N >= 2, C).
    """
    if features.ndim != 2 or features.shape[0] < 2:
        raise ConfigError(f"whiten: found features of shape {tuple(features.shape)}, expected (samples >= 2, C).")
    values = features.double()
    mean = values.mean(0)
    covariance = torch.cov(values.mT).reshape(values.shape[1], values.shape[1])
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    floor = eps * eigenvalues.mean().clamp_min(torch.finfo(torch.float32).tiny)
    matrix = (vectors / (eigenvalues.clamp_min(0) + floor).sqrt()) @ vectors.mT
    return Whitening(mean=mean.float(), matrix=matrix.float())


def normalise_features(
    features: Tensor,
    kind: str,
    *,
    eps: float = LAYER_NORM_EPS,
    mask: Tensor | None = None,
    whitening: Whitening | None = None,
) -> Tensor:
    """Normalise features (..., C).

    Args:
        features: (..., C); half types are computed in float32.
        kind: `layer_norm` over C without affine; `standardize` each channel over all (valid) leading positions with
            the unbiased deviation; `whiten` with given statistics; `none`.
        eps: added to the variance (layer_norm) or to the deviation (standardize).
        mask: (...,) bool, True where a position is valid; for `standardize` only. Invalid positions come back as 0.
        whitening: statistics for `whiten`.

    Source: VkD, section 3.2; upstream standardises without eps and over padding, which is non-finite on a constant
    channel and depends on batch mates.

    Raises:
        ConfigError: unknown kind, `whiten` without statistics or with those of another width, or a mask of
            another shape.
    """
    values = full_precision(features)
    with torch.autocast(values.device.type, enabled=False):
        if kind == "layer_norm":
            return F.layer_norm(values, values.shape[-1:], eps=eps)
        if kind == "standardize":
            return _standardize(values, eps, mask)
        if kind == "whiten":
            return _whiten(values, whitening)
        if kind == "none":
            return values
    raise ConfigError(f"normalisation: found '{kind}', expected one of {', '.join(NORMALISATIONS)}.")


def _standardize(values: Tensor, eps: float, mask: Tensor | None) -> Tensor:
    if mask is None:
        mask = torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
    if mask.shape != values.shape[:-1]:
        expected = tuple(values.shape[:-1])
        raise ConfigError(f"standardize: found a mask of shape {tuple(mask.shape)}, expected {expected}.")
    valid = mask.unsqueeze(-1)
    axes = tuple(range(values.ndim - 1))
    count = mask.sum()
    mean = values.where(valid, 0).sum(axes) / count.clamp_min(1)
    centred = (values - mean).where(valid, 0)
    variance = centred.square().sum(axes) / (count - 1).clamp_min(1)
    # sqrt has no finite slope at 0: a constant channel takes its deviation, and its gradient, as 0
    constant = variance == 0
    deviation = variance.masked_fill(constant, 1).sqrt().masked_fill(constant, 0)
    return centred / (deviation + eps)


def _whiten(values: Tensor, whitening: Whitening | None) -> Tensor:
    if whitening is None:
        raise ConfigError("whiten: no statistics. Compute whitening_statistics on teacher features, or use layer_norm.")
    if whitening.mean.shape != values.shape[-1:]:
        raise ConfigError(f"whiten: statistics of width {whitening.mean.shape[0]}, features of {values.shape[-1]}.")
    return (values - whitening.mean.to(values)) @ whitening.matrix.to(values)


def full_precision(values: Tensor) -> Tensor:
    """float64 as it is, everything else as float32."""
    return values if values.dtype == torch.float64 else values.float()
