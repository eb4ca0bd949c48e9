"""The teacher as every stage sees it: pixels in [0, 1] in, nodes by name out, frozen for ever.

A newcomer's trap: the teacher normalises by itself, with its own mean and standard deviation, which need not be the
student's. Give it pixels, not normalised pixels.

Shape legend: B batch, C channels, H/W spatial positions, K classes.
"""

from collections.abc import Sequence
from typing import Any, Self

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from vkd_cache.config import TeacherConfig
from vkd_cache.errors import TeacherError
from vkd_cache.teachers.build import BuiltTeacher, build
from vkd_cache.teachers.taps import FEATURE_MAP, LOGITS, POOLED, make_tap
from vkd_cache.teachers.weights import state_sha256

HEAD_TOLERANCE = 1e-4  # of the largest logit: float32 sums over thousands of channels differ by about 1e-6
_PROBE_IMAGES = 4


class Teacher(nn.Module):
    """A frozen network that maps pixels to nodes.

    Attributes:
        identity: name, weights_sha256, timm (version), input_px, mean, std, interpolation, num_classes (0: no head),
            width (channels of `pooled`, None where that is not asked for): JSON values, for the manifest.
        nodes: names that `forward` returns, in order.
        node_shapes: shape of each node for one image.
    """

    def __init__(self, name: str, built: BuiltTeacher, nodes: Sequence[str]) -> None:
        super().__init__()
        self.model = built.model
        self.input_px = built.input_px
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(built.mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(built.std).reshape(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.model.eval()
        self.training = False
        probe = self._normalised(_probe_images(self.input_px))
        try:
            with torch.no_grad():
                self._tap = make_tap(self.model, name, probe)
                found = self._run_probe(name, probe, nodes)
        except (RuntimeError, AssertionError) as error:  # how torch and timm refuse a shape
            side = f"{self.input_px}x{self.input_px} px"
            raise TeacherError(
                f"{name}: cannot run on images of {side} ({_first_line(error)}). Give the side of its "
                "input as [teacher] input_px."
            ) from error
        headless = getattr(self.model, "num_classes", None) == 0  # timm's feature extractors (DINO, MAE, ...)
        if headless and LOGITS in nodes:
            raise TeacherError(f"{name}: has no classifier, so there is no node 'logits'. Ask for 'pooled'.")
        self._head = self._linear_head(found) if POOLED in nodes and not headless else None
        stored = dict.fromkeys(nodes)  # an ordered set
        if POOLED in stored and self._head is None and not headless:
            stored[LOGITS] = None
        self.nodes = tuple(stored)
        self.node_shapes = {node: tuple(found[node].shape[1:]) for node in self.nodes}
        self.identity: dict[str, Any] = {
            "name": name,
            "weights_sha256": state_sha256(self.model),
            "timm": timm.__version__,
            "input_px": self.input_px,
            "mean": list(built.mean),
            "std": list(built.std),
            "interpolation": "bicubic",
            "num_classes": 0 if headless else found[LOGITS].shape[1],
            "width": found[POOLED].shape[1] if POOLED in found else None,
        }

    @property
    def head(self) -> tuple[Tensor, Tensor] | None:
        """(weight (K, C), bias (K,)) float32 with logits = pooled @ weight.T + bias; None where that does not hold."""
        if self._head is None:
            return None
        weight = self._head.weight.detach().float().flatten(1)
        bias = self._head.bias
        return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().float()

    def head_tensors(self) -> dict[str, Tensor] | None:
        """`weight` (K, C) and `bias` (K,) of `head` as float32 on the CPU, as a cache stores them; None without one."""
        if self.head is None:
            return None
        weight, bias = self.head
        return {"weight": weight.cpu().contiguous(), "bias": bias.cpu().contiguous()}

    def train(self, mode: bool = True) -> Self:
        """Does nothing: a teacher is in evaluation mode whatever the module that holds it does."""
        del mode
        return self

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """The nodes of a batch.

        Args:
            pixels: (B, 3, H, W) floating point in [0, 1]; resized to the teacher's input where H or W differ.

        Returns:
            `nodes` by name: pooled (B, C), logits (B, K), feature_map (B, C, H', W'); without gradients.
        """
        found = self._tap(self._normalised(pixels), self.nodes)
        return {node: found[node] for node in self.nodes}

    def _normalised(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] != (self.input_px, self.input_px):
            resized = functional.interpolate(
                pixels, (self.input_px, self.input_px), mode="bicubic", antialias=True, align_corners=False
            )
            pixels = resized.clamp(0.0, 1.0)  # bicubic overshoots, and no image has values outside
        return (pixels - self.mean.to(pixels)) / self.std.to(pixels)

    def _run_probe(self, name: str, probe: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """`nodes` and `logits` of the probe images.

        Raises:
            TeacherError: numbers that are not finite; or the network's plain forward gives other logits: it is random
                in evaluation mode (a functional dropout left on), or its taps are not what it computes.
        """
        found = self._tap(probe, (*nodes, LOGITS))
        if not all(bool(value.isfinite().all()) for value in found.values()):
            raise TeacherError(f"{name}: gives numbers that are not finite on plain images. Check its weights.")
        logits = self._tap(probe, (LOGITS,))[LOGITS]
        if not _close(found[LOGITS], logits):
            raise TeacherError(
                f"{name}: two runs on the same images give different logits: the network is random in evaluation mode "
                "(dropout that ignores it?), or its forward is not forward_head(forward_features). Its features cannot "
                "be cached."
            )
        return found

    def _linear_head(self, found: dict[str, Tensor]) -> nn.Linear | nn.Conv2d | None:
        """The classifier, where it alone reproduces the network's logits from `pooled`."""
        layer = self._tap.classifier()
        if not (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))):
            return None
        weight = layer.weight.flatten(1)
        if weight.shape != (found[LOGITS].shape[1], found[POOLED].shape[1]):
            return None
        return layer if _close(functional.linear(found[POOLED], weight, layer.bias), found[LOGITS]) else None


def load_classifier(config: TeacherConfig, *, nodes: Sequence[str], num_classes: int, view_px: int) -> Teacher:
    """Build the classification teacher that `config` names, with its weights, on the CPU.

    Args:
        config: name, weights, number of classes and input size; see its fields.
        nodes: wanted outputs: `pooled`, `logits`, `feature_map`.
        num_classes: of the source; used where neither the configuration nor the weights say.
        view_px: side of the views; the input size of networks that take any.

    Raises:
        TeacherError: unknown name, weights that cannot be had, read or fitted, a node that cannot be tapped, an output
            that is random in evaluation mode.
    """
    unknown = [node for node in nodes if node not in (POOLED, LOGITS, FEATURE_MAP)]
    if unknown or not nodes:
        raise TeacherError(f"nodes: found {list(nodes)}, expected some of {POOLED}, {LOGITS}, {FEATURE_MAP}.")
    built = build(config, num_classes=num_classes, view_px=view_px)
    return Teacher(config.name, built, nodes)


def _probe_images(side_px: int) -> Tensor:
    """(4, 3, H, W) fixed images in [0, 1]: noise, and blotches that drive the features further apart."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(_PROBE_IMAGES // 2, 3, side_px, side_px, generator=generator)
    blotches = torch.rand(_PROBE_IMAGES // 2, 3, 4, 4, generator=generator)
    return torch.cat([noise, functional.interpolate(blotches, (side_px, side_px), mode="nearest")])


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__


def _close(found: Tensor, expected: Tensor) -> bool:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return bool(((found - expected).abs() <= HEAD_TOLERANCE * scale).all())
