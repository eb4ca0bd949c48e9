"""A student: a classification network with, during distillation, its projector, as one module with one forward call.

A newcomer would call the network and the projector one after the other; under DDP only what goes through the wrapped
module's own `forward` has its gradients averaged, so both live in here.

Shapes: B batch, C student width, K classes, Ct teacher width, H/W of the input.
"""

from typing import NamedTuple

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vkd_cache.errors import ConfigError
from vkd_cache.projector import OrthogonalProjector
from vkd_cache.students.layout import mean_features, num_prefix_tokens, probe_layout


class StudentOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        logits: (B, K) of the task head; in evaluation the mean of both heads where there are two.
        distill_logits: (B, K) of the distillation head in training; None in evaluation and without such a head.
        projected: (B, Ct) mean features through the projector, float32; None without a projector.
    """

    logits: Tensor
    distill_logits: Tensor | None
    projected: Tensor | None


class Student(nn.Module):
    """Network and projector.

    Args:
        net: timm-like classification network: `forward_features(pixels)` and `forward_head(features)`.
        teacher_width: Ct of the feature loss; None: no projector.
        input_px: side of the images it will see, to find the layout of its features.
        projector: kind of the map, see `OrthogonalProjector`.

    Raises:
        ConfigError: the network's features have no layout we know, or the projector kind is unknown.
    """

    def __init__(
        self, net: nn.Module, teacher_width: int | None = None, *, input_px: int = 224, projector: str = "qr"
    ) -> None:
        super().__init__()
        self.net = net
        settings = getattr(net, "pretrained_cfg", None) or {}
        self.mean = tuple(float(value) for value in settings.get("mean", IMAGENET_DEFAULT_MEAN))
        self.std = tuple(float(value) for value in settings.get("std", IMAGENET_DEFAULT_STD))
        self.num_classes = int(getattr(net, "num_classes", 0))
        self.input_px = input_px
        self.projector: OrthogonalProjector | None = None
        if teacher_width is not None:
            if not hasattr(net, "forward_features") or not hasattr(net, "forward_head"):
                raise ConfigError(f"student {type(net).__name__}: has no forward_features and forward_head.")
            self.layout, width = probe_layout(net, input_px)
            self.num_prefix_tokens = num_prefix_tokens(net)
            self.projector = OrthogonalProjector(width, teacher_width, projector)

    def forward(self, pixels: Tensor) -> StudentOutput:
        """Pixels (B, 3, H, W), normalised with this student's mean and std."""
        if self.projector is None:
            scores, projected = self.net(pixels), None
        else:
            features = self.net.forward_features(pixels)  # type: ignore[operator]
            scores = self.net.forward_head(features)  # type: ignore[operator]
            projected = self.projector(mean_features(features, self.layout, self.num_prefix_tokens))
        logits, distill_logits = scores if isinstance(scores, tuple) else (scores, None)
        return StudentOutput(logits, distill_logits, projected)
