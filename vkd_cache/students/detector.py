"""A student that detects: a ViDT and, during distillation, its projectors, as one module with one forward call.

A newcomer's trap: what goes in is a batch of canvases in [0, 1], not normalised: every image is run on its own canvas,
and the padding has to be zero after the normalisation, so that happens in here.

Shapes: b images, L+1 layers, Q queries, K classes, T valid tokens of all images, Ct teacher width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vkd_cache.detection.canvas import CanvasBatch, DetectorOutput, normalise_canvas, run_by_canvas
from vkd_cache.detection.checkpoint import CLASS_HEAD, load_vidt_weights, vidt_classes, vidt_heads, vidt_weights
from vkd_cache.detection.distillation import TokenProjectors
from vkd_cache.detection.pretrained import load_body_weights
from vkd_cache.detection.vidt import VIDT_NAMES, ViDT, create_vidt
from vkd_cache.errors import ConfigError
from vkd_cache.weights import innermost

_BODY = "net.backbone."
_BODY_TOKENS = ("det_token", "det_pos_embed")


class DetectionStudent(nn.Module):
    """Detector and projectors.

    Attributes:
        net: the detector.
        projectors: of the distilled nodes; None without a feature loss.
        mean, std: (3,) of its normalisation, for pixels in [0, 1].
    """

    def __init__(self, net: ViDT, projectors: TokenProjectors | None = None) -> None:
        super().__init__()
        self.net = net
        self.projectors = projectors
        self.num_classes = net.num_classes
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD), persistent=False)

    def forward(self, batch: CanvasBatch) -> tuple[DetectorOutput, dict[str, Tensor]]:
        """Predictions, and the projected tokens (T, Ct) of each distilled node, float32; none without projectors."""
        output = self.detect(batch)
        return output, {} if self.projectors is None else self.projectors(output.nodes)

    def detect(self, batch: CanvasBatch) -> DetectorOutput:
        """Predictions alone, for images in [0, 1]."""
        return run_by_canvas(self.net, normalise_canvas(batch, self.mean, self.std))

    def undecayed(self) -> set[str]:
        """Names of the parameters that are not decayed; all others are.

        Source: the reference decays everything outside of the body, norms and biases too. Deviation: it decays the
        projectors; here they are spared (docs/losses.md).
        """
        return {
            name
            for name, parameter in self.named_parameters()
            if name.startswith("projectors.")
            or (
                name.startswith(_BODY)
                and (parameter.ndim <= 1 or name.endswith(".bias") or name.rpartition(".")[2] in _BODY_TOKENS)
            )
        }


def create_detector(
    name: str,
    num_classes: int = 91,
    *,
    nodes: Sequence[str] = (),
    teacher_width: int | None = None,
    projector: str = "qr",
    drop_path: float = 0.0,
    cross_scale_fusion: bool = False,
    iou_aware: bool = False,
    token_label: bool = False,
) -> DetectionStudent:
    """Build a detection student with random weights, in training mode.

    Args:
        name: one of `VIDT_NAMES`.
        num_classes: outputs of a class head: largest category id plus one.
        nodes: the teacher's nodes that its own are compared with; none: no projectors.
        teacher_width: channels of the teacher's tokens; None: no projectors.
        projector: kind of the orthogonal maps, see `OrthogonalProjector`.
        drop_path, cross_scale_fusion, iou_aware, token_label: see `ViDTConfig`.

    Raises:
        ConfigError: unknown name or kind, or a value that is out of range.
    """
    if name not in VIDT_NAMES:
        raise ConfigError(
            f"student: found '{name}', expected a detector, because the samples have boxes: {', '.join(VIDT_NAMES)}."
        )
    net = create_vidt(
        name,
        num_classes,
        drop_path=drop_path,
        cross_scale_fusion=cross_scale_fusion,
        iou_aware=iou_aware,
        token_label=token_label,
    )
    if teacher_width is None or not nodes:
        return DetectionStudent(net)
    return DetectionStudent(net, TokenProjectors(nodes, net.width, teacher_width, projector))


def start_detector(student: DetectionStudent, weights: Mapping[str, Any], where: str) -> None:
    """Give a new student the weights of a detector, or a body that was trained to classify; never projectors.

    Raises:
        CheckpointError: they are of neither, or do not fit.
    """
    if any(str(name).endswith(CLASS_HEAD) for name in innermost(weights)):
        load_vidt_weights(student.net, weights, where=where)
    else:
        load_body_weights(student.net, weights, where=where)


def saved_detector(name: str, weights: Mapping[str, Any], where: str) -> DetectionStudent:
    """The detector called `name` with the weights of a file, and as many classes and heads as it has; no projectors.

    Args:
        name: one of `VIDT_NAMES`.
        weights: ours, the authors' or a plain state dict; projectors are left aside.
        where: what to call it in an error, normally its path.

    Raises:
        CheckpointError: no detector, or another one than `name`.
    """
    heads: Any = vidt_heads(vidt_weights(weights, where=where))
    student = create_detector(name, vidt_classes(weights, where=where), **heads)
    load_vidt_weights(student.net, weights, where=where)
    return student
