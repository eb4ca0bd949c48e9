"""A detector's tokens as what a student learns from: out of a cache, or from a live teacher on the same canvases.

A newcomer's trap: a cache may hold a sample of each image's tokens. Where a batch carries such a sample, the live
teacher gives the same places, so that `compare` compares the same loss; alone, it gives all tokens.

Shape legend: C teacher width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from vkd_cache.cache.reader import Cache
from vkd_cache.config import Config
from vkd_cache.detection.canvas import NODES, CanvasBatch
from vkd_cache.errors import CacheMismatchError
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.supply import TeacherOutput, check_teacher_named
from vkd_cache.tokens import Tokens


class CachedTokens:
    """Stored tokens of every node that the cache holds, on the device as they are stored."""

    identity: dict[str, Any] | None = None
    num_classes: int | None = None

    def __init__(self, cache: Cache, device: torch.device) -> None:
        specs = {node.name: node for node in cache.manifest.nodes}
        self.nodes = self.distilled = tuple(name for name in NODES if name in specs and specs[name].layout == "tokens")
        if not self.nodes:
            raise CacheMismatchError(
                f"{cache.url}: holds the nodes {', '.join(specs)}; a detector learns from tokens: {', '.join(NODES)}. "
                "Extract a cache of this source with a detector as teacher, or set [loss] feature_weight = 0."
            )
        widths = {name: specs[name].shape[0] for name in self.nodes}
        if len(set(widths.values())) > 1:
            raise CacheMismatchError(
                f"{cache.url}: holds tokens of different widths, {widths}; a detector's all have one. Extract it again."
            )
        self.width: int | None = widths[self.nodes[0]]
        self.numerics: dict[str, Any] = {}
        self._device = device

    def __call__(self, batch: FedBatch, images: CanvasBatch) -> TeacherOutput:
        """What the cache holds for the batch's views."""
        tokens = {name: values for name, values in batch.nodes.items() if isinstance(values, Tokens)}
        return TeacherOutput(nodes={name: values.to(self._device) for name, values in tokens.items()})


class LiveTokens:
    """The detector in memory, run on the very canvases that the student sees."""

    nodes: tuple[str, ...] = ()
    num_classes: int | None = None

    def __init__(self, config: Config, distilled: Sequence[str], num_classes: int, device: torch.device) -> None:
        """`distilled`: the nodes to compare; none: those of [cache] nodes, or all six."""
        check_teacher_named(config)
        from vkd_cache.stages.batch_size import beside_a_student
        from vkd_cache.stages.teaching import start_teacher
        from vkd_cache.teachers import load_detector

        wanted = distilled or config.cache.nodes or NODES
        teacher = load_detector(config.teacher, nodes=wanted, num_classes=num_classes)
        self._run = start_teacher(teacher, beside_a_student(config), device, padded=False)
        self.distilled = tuple(name for name in NODES if name in teacher.nodes)
        self.identity: dict[str, Any] | None = teacher.identity
        self.numerics = self._run.numerics()
        self.width: int | None = teacher.identity["width"]

    def __call__(self, batch: FedBatch, images: CanvasBatch) -> TeacherOutput:
        """Run the teacher; of nodes that the batch carries a sample of, the same sample."""
        found = {name: _usable(tokens) for name, tokens in self._run(images).items()}
        for name, stored in batch.nodes.items():
            if isinstance(stored, Tokens) and stored.index is not None and name in found:
                found[name] = found[name].sampled(stored.index, stored.kept)
        return TeacherOutput(nodes=found)


def _usable(tokens: Tokens) -> Tokens:
    """Tokens that may take part in autograd: those made in inference mode may not."""
    if not tokens.values.is_inference():
        return tokens
    return dataclasses.replace(
        tokens, values=tokens.values.clone(), total=tokens.total.clone(), squares=tokens.squares.clone()
    )
