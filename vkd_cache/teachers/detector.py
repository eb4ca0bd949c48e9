"""A ViDT detector as a teacher: views on their canvases in, tokens of its nodes out, frozen for ever.

A newcomer's trap: nothing here may depend on what else is in a batch. Every image is run on the canvas that its own
plan says, never padded to a batch mate's, and tokens of the padding are left out.

Shape legend: b images, D channels, Q det tokens, K classes.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vkd_cache.config import TeacherConfig, suggestion
from vkd_cache.detection.canvas import (
    NODES,
    CanvasBatch,
    DetectorOutput,
    compile_by_canvas,
    normalise_canvas,
    run_by_canvas,
    teacher_tokens,
)
from vkd_cache.detection.checkpoint import CLASS_HEAD, load_vidt_weights, vidt_heads
from vkd_cache.detection.vidt import VIDT_NAMES, ViDT, create_vidt, valid_grids
from vkd_cache.errors import CheckpointError, TeacherError
from vkd_cache.teachers.weights import read_weights, state_sha256
from vkd_cache.tokens import Tokens


class DetectionTeacher(nn.Module):
    """A frozen detector that maps views on canvases to tokens.

    Attributes:
        net: the detector.
        identity: name, weights_sha256, input_px (0: as the view is), mean, std, interpolation, num_classes, width (D),
            num_queries, num_layers: JSON values, for the manifest.
        nodes: names that `forward` returns, in order.
        node_shapes: shape of one token of each node.
        mean, std: (1, 3, 1, 1) of its normalisation, for pixels in [0, 1].
    """

    def __init__(self, name: str, net: ViDT, nodes: Sequence[str]) -> None:
        super().__init__()
        self.net = net
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).reshape(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.net.eval()
        self.training = False
        self.nodes = tuple(dict.fromkeys(nodes))
        self.node_shapes = dict.fromkeys(self.nodes, (net.width,))
        self.identity: dict[str, Any] = {
            "name": name,
            "weights_sha256": state_sha256(net),
            "input_px": 0,
            "mean": list(IMAGENET_DEFAULT_MEAN),
            "std": list(IMAGENET_DEFAULT_STD),
            "interpolation": "none",
            "num_classes": net.num_classes,
            "width": net.width,
            "num_queries": net.num_queries,
            "num_layers": net.num_layers,
        }

    @property
    def head(self) -> None:
        """None: a detector's predictions are no linear map of one stored vector."""
        return None

    def head_tensors(self) -> dict[str, Tensor] | None:
        """None, see `head`."""
        return None

    def train(self, mode: bool = True) -> Self:
        """Does nothing: a teacher is never trained."""
        del mode
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network alone: what is around it sorts images by canvas on the host. Takes no arguments."""
        del args, kwargs
        compile_by_canvas(self.net)

    @torch.no_grad()
    def forward(self, batch: CanvasBatch) -> dict[str, Tokens]:
        """The nodes of a batch of views in [0, 1]: tokens of b images, without gradients."""
        return teacher_tokens(self.detect(batch), self.nodes)

    @torch.no_grad()
    def detect(self, batch: CanvasBatch) -> DetectorOutput:
        """Everything that the network says of a batch of views in [0, 1]."""
        return run_by_canvas(self.net, normalise_canvas(batch, self.mean, self.std))

    def token_counts(
        self, view_size: npt.NDArray[np.int64], canvas: tuple[int, int]
    ) -> dict[str, npt.NDArray[np.int64]]:
        """(b,) tokens of each node for views of `view_size` (b, 2) (height, width) on one canvas (height, width)."""
        patches = valid_grids(view_size, canvas)
        counts = {f"patch_{level}": grid[:, 0] * grid[:, 1] for level, grid in enumerate(patches, start=1)}
        det = np.full(len(view_size), self.net.num_queries, np.int64)
        counts |= {"body_det": det, "neck_det": det * (self.net.num_layers + 1)}
        return {node: counts[node] for node in self.nodes}


def is_detector(name: str) -> bool:
    """Whether `name` asks for a detector; a misspelt one counts."""
    return name in VIDT_NAMES or name.startswith("vidt")


def load_detector(config: TeacherConfig, *, nodes: Sequence[str], num_classes: int) -> DetectionTeacher:
    """Build the detector that `config` names, with its weights, on the CPU.

    Args:
        config: name, weights and number of classes; see its fields.
        nodes: wanted outputs, of `vkd_cache.detection.canvas.NODES`.
        num_classes: of the source; used where neither the configuration nor the weights say.

    Raises:
        TeacherError: unknown name, no weights, weights that cannot be read or fitted, unknown nodes.
    """
    _check_request(config, nodes)
    state = read_weights(config.weights)
    classifier = state.get(CLASS_HEAD)
    found = num_classes if classifier is None else len(classifier)
    # building a network draws its initial weights: the generator of the caller must not notice
    with torch.random.fork_rng(devices=[]):
        net = create_vidt(config.name, config.num_classes or found, **vidt_heads(state))
    try:
        load_vidt_weights(net, state, where=config.weights)
    except CheckpointError as error:
        raise TeacherError(str(error)) from error
    if not all(bool(value.isfinite().all()) for value in net.state_dict().values() if value.is_floating_point()):
        raise TeacherError(f"{config.weights}: holds weights that are not finite. Its training diverged: give another.")
    return DetectionTeacher(config.name, net, nodes)


def _check_request(config: TeacherConfig, nodes: Sequence[str]) -> None:
    if config.name not in VIDT_NAMES:
        raise TeacherError(
            f"[teacher] name: found '{config.name}', expected a detector{suggestion(config.name, VIDT_NAMES) or ':'} "
            f"{', '.join(VIDT_NAMES)}."
        )
    if not config.weights:
        raise TeacherError(
            f"[teacher] weights is empty: '{config.name}' needs --teacher-weights FILE (a checkpoint of vkd-cache "
            "train, or the authors' file). A detector with random weights teaches nothing."
        )
    if config.input_px:
        raise TeacherError(
            f"[teacher] input_px: found {config.input_px}, but a detector sees views as they are. Leave it out, and "
            "set [views] scales."
        )
    unknown = [node for node in nodes if node not in NODES]
    if unknown or not nodes:
        raise TeacherError(
            f"nodes: found {list(nodes)}, expected some of {', '.join(NODES)}: those of the detector '{config.name}'."
        )
