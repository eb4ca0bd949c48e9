"""The three terms of VkD's loss: task, feature and logit, any subset of them.

A newcomer would normalise both sides. Only the teacher's features are normalised; the student's pass through the
orthogonal projector alone, which is what lets the student's features keep their own geometry (docs/losses.md).
Everything here runs in float32 (float64 stays float64), whatever autocast says.

Shapes: B batch, N tokens, C channels, K classes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vkd_cache.errors import ConfigError
from vkd_cache.normalisation import (
    NORMALISATIONS,
    Whitening,
    full_precision,
    normalise_features,
    whitening_statistics,
)

__all__ = [
    "FEATURE_LOSSES",
    "VkdLoss",
    "Whitening",
    "feature_loss",
    "logit_loss",
    "mix_targets",
    "normalise_features",
    "soft_cross_entropy",
    "token_distance",
    "whitening_statistics",
]

LOG_SUM_POWER = 4
_LOG_SUM_FLOOR = 1e-12  # keeps the logarithm finite where student and teacher agree


class DistillationOutput(Protocol):
    """What a student's forward pass returns: logits (B, K), distill_logits (B, K) or None, projected (B, C) or None."""

    @property
    def logits(self) -> Tensor: ...
    @property
    def distill_logits(self) -> Tensor | None: ...
    @property
    def projected(self) -> Tensor | None: ...


def _smooth_l1(student: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(student, target, reduction="none").mean(-1)


def _l2(student: Tensor, target: Tensor) -> Tensor:
    return (student - target).square().mean(-1)


def _l1(student: Tensor, target: Tensor) -> Tensor:
    return (student - target).abs().mean(-1)


def _cosine(student: Tensor, target: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, target, dim=-1)


def _log_sum(student: Tensor, target: Tensor) -> Tensor:
    return ((student - target).abs().pow(LOG_SUM_POWER).sum(-1) + _LOG_SUM_FLOOR).log()


FEATURE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of each position
    "smooth_l1": _smooth_l1,
    "l2": _l2,
    "l1": _l1,
    "cosine": _cosine,
    "log_sum": _log_sum,
}

_MEANS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smooth_l1": F.smooth_l1_loss,
    "l2": F.mse_loss,
    "l1": F.l1_loss,
}


def token_distance(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The distance (student (..., C), target (..., C)) -> (...) of that name, of each position.

    `smooth_l1` (beta 1), `l2` and `l1` are means over channels; `cosine` is 1 - cosine, `log_sum` the logarithm of the
    sum over channels of |difference|^4.

    Raises:
        ConfigError: unknown name.
    """
    if kind not in FEATURE_LOSSES:
        raise ConfigError(f"feature_loss: found '{kind}', expected one of {', '.join(FEATURE_LOSSES)}.")
    return FEATURE_LOSSES[kind]


def feature_loss(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean of `token_distance` over all positions: (student (..., C), target (..., C)) -> scalar.

    Raises:
        ConfigError: unknown name.
    """
    distance = token_distance(kind)
    if kind in _MEANS:  # without a value for each position
        return _MEANS[kind]
    return lambda student, target: distance(student, target).mean()


def logit_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) at a temperature, summed over classes, mean over the batch, times temperature squared.

    The factor keeps the gradients' size independent of the temperature (Hinton et al., 2015); at 1, the reference's
    setting, it changes nothing.

    Args:
        student_logits, teacher_logits: (B, K).
        temperature: > 0.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = full_precision(student_logits), full_precision(teacher_logits)
        if temperature != 1:
            student, teacher = student / temperature, teacher / temperature
        log_probs, wanted = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
        return _times(F.kl_div(log_probs, wanted, reduction="batchmean", log_target=True), temperature**2)


def mix_targets(
    labels: Tensor, partner_labels: Tensor, lam: Tensor, num_classes: int, smoothing: float = 0.0
) -> Tensor:
    """Target probabilities (B, K), float32, of mixed samples: lam * own + (1 - lam) * partner's smoothed one-hot.

    Args:
        labels, partner_labels: (B,) integers in [0, num_classes); a sample that is not mixed is its own partner.
        lam: (B,) in [0, 1], the share of the sample itself (for CutMix the true share of its area).
        num_classes: K.
        smoothing: s in [0, 1): off s/K, on 1 - s + s/K, as upstream.

    Raises:
        ConfigError: a label outside [0, num_classes), where the labels are on the CPU (elsewhere looking would stall).
    """
    both = torch.stack([labels, partner_labels]).long()
    if both.is_cpu and bool(((both < 0) | (both >= num_classes)).any()):
        raise ConfigError(
            f"targets: found labels {int(both.min())}..{int(both.max())}, expected 0..{num_classes - 1}. "
            "Give the student as many classes as the source has."
        )
    share = lam.float().unsqueeze(1)
    off = smoothing / num_classes
    own, partner = (torch.full((len(labels), num_classes), off, device=both.device) for _ in range(2))
    own.scatter_(1, both[0].unsqueeze(1), 1.0 - smoothing + off)
    partner.scatter_(1, both[1].unsqueeze(1), 1.0 - smoothing + off)
    return own * share + partner * (1.0 - share)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of logits (B, K) against target probabilities (B, K), mean over the batch."""
    with torch.autocast(logits.device.type, enabled=False):
        log_probs = F.log_softmax(full_precision(logits), dim=-1)
        return -(targets.to(log_probs.dtype) * log_probs).sum(-1).mean()


@dataclasses.dataclass(frozen=True, kw_only=True)
class VkdLoss:
    """The weighted sum of the three terms; a term with weight 0 is not computed.

    Attributes:
        task_weight, feature_weight, logit_weight: >= 0.
        temperature: of the logit loss, > 0.
        feature_loss: smooth_l1, l2, l1, cosine or log_sum.
        normalisation: of the teacher's features: layer_norm, standardize, whiten or none.
        whitening: statistics, for `whiten`.

    Source: VkD (arXiv 2403.06213), equation 1 and section 3.2; docs/losses.md lists the deviations.

    Raises:
        ConfigError: at construction, a weight below 0, a temperature that is not above 0, or an unknown name.
    """

    task_weight: float = 1.0
    feature_weight: float = 1.0
    logit_weight: float = 1.0
    temperature: float = 1.0
    feature_loss: str = "smooth_l1"
    normalisation: str = "layer_norm"
    whitening: Whitening | None = None

    def __post_init__(self) -> None:
        for name in ("task_weight", "feature_weight", "logit_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"loss.{name}: found {getattr(self, name)}, expected 0 or more.")
        if not self.temperature > 0:
            raise ConfigError(f"loss.temperature: found {self.temperature}, expected more than 0.")
        feature_loss(self.feature_loss)
        if self.normalisation not in NORMALISATIONS:
            raise ConfigError(
                f"loss.normalisation: found '{self.normalisation}', expected one of {', '.join(NORMALISATIONS)}."
            )
        if self.feature_weight > 0 and self.normalisation == "whiten" and self.whitening is None:
            raise ConfigError("loss.normalisation: whiten needs statistics of the teacher's features, found none.")

    def __call__(
        self,
        output: DistillationOutput,
        targets: Tensor | None = None,
        teacher_features: Tensor | None = None,
        teacher_logits: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The active terms, unweighted, and their weighted sum.

        Args:
            output: of a student in training mode.
            targets: (B, K) probabilities, for the task loss.
            teacher_features: (B, Ct) pooled, not normalised, for the feature loss.
            teacher_logits: (B, K) before softmax, for the logit loss.

        Returns:
            Scalars: `task`, `feature`, `logit`, those with a weight above 0, and `total`. Every output of the student
            has a gradient with respect to `total`, zero where its term is off, so that DDP finds no parameter unused.

        Raises:
            ConfigError: an active term lacks its input, or the shapes of the two sides differ.
        """
        terms: dict[str, Tensor] = {}
        weighted: list[Tensor] = []
        if self.task_weight > 0:
            terms["task"] = soft_cross_entropy(output.logits, _given("task", "targets", targets, output.logits))
            weighted.append(_times(terms["task"], self.task_weight))
        if self.feature_weight > 0:
            terms["feature"] = self._feature_term(output.projected, teacher_features)
            weighted.append(_times(terms["feature"], self.feature_weight))
        distilled = output.logits if output.distill_logits is None else output.distill_logits
        if self.logit_weight > 0:
            teacher = _given("logit", "teacher_logits", teacher_logits, distilled)
            terms["logit"] = logit_loss(distilled, teacher.detach(), self.temperature)
            weighted.append(_times(terms["logit"], self.logit_weight))
        weighted += [_attached_zero(part) for part in self._unused(output)]
        return terms | {"total": functools.reduce(torch.add, weighted)}

    def _unused(self, output: DistillationOutput) -> list[Tensor]:
        """The outputs that no active term looks at."""
        distilled = self.logit_weight > 0
        used = {
            "logits": self.task_weight > 0 or (distilled and output.distill_logits is None),
            "distill_logits": distilled,
            "projected": self.feature_weight > 0,
        }
        parts = [(getattr(output, name), looked_at) for name, looked_at in used.items()]
        return [part for part, looked_at in parts if part is not None and not looked_at]

    def _feature_term(self, projected: Tensor | None, teacher_features: Tensor | None) -> Tensor:
        if projected is None:
            raise ConfigError("loss.feature_weight: the student has no projector. Give create_student a teacher_width.")
        teacher = _given("feature", "teacher_features", teacher_features, projected)
        target = normalise_features(teacher.detach(), self.normalisation, whitening=self.whitening)
        with torch.autocast(projected.device.type, enabled=False):
            return feature_loss(self.feature_loss)(full_precision(projected), target)


def _given(term: str, name: str, value: Tensor | None, like: Tensor) -> Tensor:
    if value is None:
        raise ConfigError(f"loss.{term}_weight is above 0 and {name} are not given. Set it to 0, or store that node.")
    if value.shape != like.shape:
        raise ConfigError(f"loss: {name} have shape {tuple(value.shape)}, the student's side {tuple(like.shape)}.")
    return value


def _times(term: Tensor, weight: float) -> Tensor:
    """Weighted; a weight of 1 costs nothing."""
    return term if weight == 1 else term * weight


def _attached_zero(part: Tensor) -> Tensor:
    """0 as a function of an output that no term uses: the sum over an empty slice of it."""
    return full_precision(part[:0]).sum()
