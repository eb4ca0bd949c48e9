"""VkD's loss for detectors: orthogonally projected student tokens against the teacher's, both standardised.

A newcomer would standardise a sample of the tokens with the sample's own mean and deviation. The statistics here are
always those of all valid tokens of the batch, over all processes: the student has them all at hand, the teacher's come
from stored sums. Hence the loss of a sample is an unbiased estimate of the full one, and padding never enters.

Shape legend: b images, T valid tokens of all images, n and m valid and kept tokens of one image, N valid tokens of all
images and processes, C channels (Cs student's, Ct teacher's).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vkd_cache.detection.moments import Moments, centred_tokens, joint_moments, num_processes, stored_moments
from vkd_cache.errors import ConfigError
from vkd_cache.losses import feature_loss, token_distance
from vkd_cache.normalisation import full_precision
from vkd_cache.projector import OrthogonalProjector
from vkd_cache.tokens import Tokens, to_device

STANDARDISE_EPS = 1e-5
_CONSTANT = 1e-3  # a teacher's channel whose deviation is a smaller share of its size is half precision's noise


class TokenProjector(nn.Module):
    """Tokens (T, Cs) -> orthogonal map -> scale and bias of each channel -> (T, Ct), in the parameters' precision.

    The standardisation of the loss undoes scale and bias, so they do not learn from it; they are there because
    published checkpoints have them.
    """

    def __init__(self, in_features: int, out_features: int, kind: str = "qr") -> None:
        super().__init__()
        self.projector = OrthogonalProjector(in_features, out_features, kind)
        self.weight = nn.Parameter(torch.ones(out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, tokens: Tensor) -> Tensor:
        weight = self.projector.weight
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.to(weight.dtype), weight * self.weight[:, None], self.bias)


class TokenProjectors(nn.Module):
    """One `TokenProjector` for each distilled node, under the names of the published checkpoints.

    Args:
        nodes: names of the nodes, a patch node as `patch_1`.
        student_width, teacher_width: channels of the tokens on either side.
        kind: of every orthogonal map.

    Raises:
        ConfigError: unknown kind, or a width below 1.
    """

    def __init__(self, nodes: Sequence[str], student_width: int, teacher_width: int, kind: str = "qr") -> None:
        super().__init__()
        self.node_names = tuple(nodes)
        for name in self.node_names:
            self.add_module(_module_name(name), TokenProjector(student_width, teacher_width, kind))

    def forward(self, nodes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The projected tokens (T, Ct) of every node that has a projector."""
        return {name: self.get_submodule(_module_name(name))(nodes[name]) for name in self.node_names}

    def project(self, nodes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same as calling the module."""
        projected: dict[str, Tensor] = self(nodes)
        return projected


def detection_feature_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tokens],
    *,
    kind: str = "smooth_l1",
    eps: float = STANDARDISE_EPS,
) -> Tensor:
    """The sum over nodes of the mean distance between standardised tokens.

    In a job of several processes every one has to call it with the same nodes; the mean of the gradients over
    processes is then that of one process with all images, so a caller multiplies by no batch share of its own.

    Args:
        student: per node all valid tokens (T, Ct), projected, the images end to end; (0, Ct) for a process that has no
            image left.
        teacher: per node the same images' tokens, all of them or a sample of each image's, any dtype.
        kind: smooth_l1, l2, l1, cosine or log_sum, of one token; see `vkd_cache.losses.feature_loss`.
        eps: added to the unbiased deviation of each channel, on both sides.

    Returns:
        A scalar, float32 (float64 for a float64 student), finite whatever channels are constant.

    Source: VkD (arXiv 2403.06213), section 3.2, and the reference's six terms. Deviations: eps; statistics over valid
    tokens of all processes; a channel of the teacher that is constant to half precision has target 0.

    Raises:
        ConfigError: a node on one side only, another number of tokens or channels, or an unknown kind.
    """
    _check(student, teacher)
    names = sorted(teacher)
    with torch.autocast(student[names[0]].device.type, enabled=False):
        centred = [centred_tokens(full_precision(student[name])) for name in names]
        own = [moments for _, moments in centred]
        joint = joint_moments(own + [stored_moments(teacher[name]) for name in names])
        terms = []
        for number, (name, (values, here)) in enumerate(zip(names, centred, strict=True)):
            of_student, of_teacher = joint[number], joint[number + len(names)]
            scale = 1 / (of_student.deviation() + eps)
            shift = None if of_student is here else (here.mean - of_student.mean) * scale
            tokens = teacher[name]
            target = _target(tokens, of_teacher, values.dtype, eps)
            summed = _summed_distance(_picked(values, tokens), target, scale, shift, tokens, kind)
            terms.append(summed * (num_processes() / of_student.number.clamp_min(1)))
        return torch.stack(terms).sum()


def _picked(values: Tensor, tokens: Tokens) -> Tensor:
    """The student's tokens (T, C) at the places of the teacher's, where these are a sample."""
    if tokens.index is None:
        return values
    return values.index_select(0, to_device(torch.from_numpy(tokens.places()), values.device))


def _target(tokens: Tokens, moments: Moments, dtype: torch.dtype, eps: float) -> Tensor:
    """The teacher's standardised tokens; 0 in a channel that is constant to half precision."""
    deviation = moments.deviation()
    size = (moments.mean.square() + deviation.square()).sqrt()
    scale = (1 / (deviation + eps)).masked_fill(deviation <= _CONSTANT * size, 0).to(dtype)
    return (tokens.dense().to(dtype) - moments.mean.to(dtype)).mul_(scale)


def _summed_distance(
    centred: Tensor,
    target: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    tokens: Tokens,
    kind: str,
) -> Tensor:
    """The sum over all valid tokens of the distance between standardised ones, estimated where they are a sample."""
    student = centred * scale if shift is None else torch.addcmul(shift, centred, scale)
    if tokens.index is None and len(student):
        return feature_loss(kind)(student, target) * len(student)
    each = token_distance(kind)(student, target)
    if tokens.index is not None:
        weights = np.repeat(tokens.counts / tokens.kept, tokens.kept).astype(np.float32)
        each = each * to_device(torch.from_numpy(weights), each.device)
    return each.sum()


def _check(student: Mapping[str, Tensor], teacher: Mapping[str, Tokens]) -> None:
    if not teacher or set(student) != set(teacher):
        raise ConfigError(
            f"detection feature loss: the student gives {', '.join(sorted(student)) or 'nothing'}, the teacher "
            f"{', '.join(sorted(teacher)) or 'nothing'}; expected the same nodes. Store what the student projects."
        )
    for name, tokens in teacher.items():
        expected = (int(tokens.counts.sum()), tokens.total.shape[1])
        if student[name].shape != expected:
            raise ConfigError(
                f"detection feature loss: {name}: found student tokens of shape {tuple(student[name].shape)}, "
                f"expected {expected}, what the teacher has for these images. Run both on the same canvases."
            )


def _module_name(node: str) -> str:
    kind, _, number = node.partition("_")
    return f"patch_projector_{number}" if kind == "patch" else f"{node}_projector"
