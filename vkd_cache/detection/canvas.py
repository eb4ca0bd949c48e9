"""Images of several sizes through a detector, one canvas at a time, so that no image's output depends on its batch.

A newcomer would pad a batch to its largest image, as the reference does: GroupNorm then runs over padding that the
other images decide. Here an image's canvas follows from its own view alone, every image is run on exactly that canvas,
and only the valid rectangle of each token map leaves this module.

Shape legend: b images, H/W pixels, L+1 layers, Q queries, K classes, D width, T tokens of all b images.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vkd_cache.detection.vidt import ViDT, ViDTOutput, valid_grids
from vkd_cache.errors import ConfigError
from vkd_cache.tokens import Tokens, to_device, tokens_from_rows

PATCHES = ("patch_1", "patch_2", "patch_3", "patch_4")
NODES = (*PATCHES, "body_det", "neck_det")

Sizes = npt.NDArray[np.int64]

_COMPILED_SHAPES = 64  # of a process; torch runs what comes after them uncompiled


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CanvasBatch:
    """Images of one batch in one tensor, each in the top left corner of its own canvas.

    Attributes:
        images: (b, 3, H, W) floating point in [0, 1], or normalised; zero outside the content. H and W are those of
            the batch's largest canvas.
        view_size: (b, 2) int64 (height, width) of the content, on the host.
        canvas: (b, 2) int64 (height, width) of each image's canvas, at least its view size, on the host.
    """

    images: Tensor
    view_size: Sizes
    canvas: Sizes

    def __len__(self) -> int:
        return len(self.images)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DetectorOutput:
    """What a detector says about a batch, in the batch's order.

    Attributes:
        logits: (L+1, b, Q, K); index 0 is the body's own detection tokens, the last one the final prediction.
        boxes: (L+1, b, Q, 4) cxcywh in [0, 1], relative to the content.
        ious: (L+1, b, Q, 1) logits of the predicted overlap, where the model has that head.
        token_logits: per patch node (T, K) class logits of the valid tokens, where the model has that head.
        nodes: per node (T, D) valid tokens, the images end to end: patches in row-major order of the valid rectangle,
            `body_det` by query, `neck_det` by layer and query.
        grids: per node (b, 2) int64 (height, width) of each image's tokens; (1, Q) and (L+1, Q) for the last two.
    """

    logits: Tensor
    boxes: Tensor
    nodes: dict[str, Tensor]
    grids: dict[str, Sizes]
    ious: Tensor | None = None
    token_logits: dict[str, Tensor] | None = None


def normalise_canvas(batch: CanvasBatch, mean: Tensor, std: Tensor) -> CanvasBatch:
    """The batch with its content normalised, (x - mean) / std, and zero in the padding.

    Args:
        batch: images in [0, 1].
        mean, std: 3 numbers each, on the device of the images.
    """
    images = (batch.images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    padding = padding_mask(batch.view_size, (images.shape[-2], images.shape[-1]), images.device)
    return dataclasses.replace(batch, images=images.masked_fill(padding[:, None], 0))


def padding_mask(view_size: Sizes, canvas: tuple[int, int], device: torch.device) -> Tensor:
    """(b, H, W) bool, True outside the content, for contents (b, 2) (height, width) on a canvas (H, W)."""
    sizes = to_device(torch.from_numpy(np.ascontiguousarray(view_size)), device)
    rows = torch.arange(canvas[0], device=device) >= sizes[:, :1]
    columns = torch.arange(canvas[1], device=device) >= sizes[:, 1:]
    return rows[:, :, None] | columns[:, None, :]


def run_by_canvas(net: ViDT, batch: CanvasBatch) -> DetectorOutput:
    """One forward pass for each distinct canvas of the batch, the results in the batch's order.

    Args:
        net: on the device of the images; in training or evaluation mode.
        batch: images normalised, zero in the padding.

    Raises:
        ConfigError: no image, a content larger than its canvas, or a canvas larger than the images.
    """
    _check(batch)
    canvases, group = np.unique(batch.canvas, axis=0, return_inverse=True)
    members = [np.flatnonzero(group.reshape(-1) == number) for number in range(len(canvases))]
    parts = [
        _run_one(net, batch, rows, (int(height), int(width)))
        for rows, (height, width) in zip(members, canvases, strict=True)
    ]
    return parts[0] if len(parts) == 1 else _in_order(parts, members)


def compile_by_canvas(net: nn.Module) -> None:
    """Let `run_by_canvas` run the detector `net` compiled, each canvas and number of images when it first comes.

    Not with symbolic sizes, as torch would from the second canvas on: the sizes of windows, of four levels and of
    their padding are expressions of them, and the tracing alone takes many minutes.
    """
    from torch._dynamo import config  # takes seconds to import

    limits: Any = config
    limits.cache_size_limit = max(limits.cache_size_limit, _COMPILED_SHAPES)
    net.compile(dynamic=False)


def teacher_tokens(output: DetectorOutput, names: Sequence[str]) -> dict[str, Tokens]:
    """The tokens of the named nodes with the statistics of each image, free of gradients.

    Raises:
        ConfigError: a node that the detector does not have.
    """
    unknown = [name for name in names if name not in output.nodes]
    if unknown:
        raise ConfigError(f"nodes: found {', '.join(unknown)}, a detector has {', '.join(output.nodes)}.")
    return {name: tokens_from_rows(output.nodes[name].detach(), output.grids[name]) for name in names}


def _check(batch: CanvasBatch) -> None:
    height, width = batch.images.shape[-2:]
    fits = (batch.view_size <= batch.canvas).all() and (batch.canvas <= (height, width)).all()
    if not (len(batch) and len(batch) == len(batch.view_size) == len(batch.canvas) and fits):
        raise ConfigError(
            f"detector: found {len(batch)} images of {height}x{width} px with contents {batch.view_size.tolist()} on "
            f"canvases {batch.canvas.tolist()}; expected each content inside its canvas, and that inside the images."
        )


def _run_one(net: ViDT, batch: CanvasBatch, rows: npt.NDArray[np.intp], canvas: tuple[int, int]) -> DetectorOutput:
    """The images `rows` of the batch, which share a canvas."""
    height, width = canvas
    whole = len(rows) == len(batch)
    chosen = batch.images if whole else batch.images[to_device(torch.from_numpy(rows), batch.images.device)]
    sizes = batch.view_size[rows]
    mask = padding_mask(sizes, canvas, batch.images.device)
    output: ViDTOutput = net(chosen[:, :, :height, :width], mask)
    grids = dict(zip(PATCHES, valid_grids(sizes, canvas), strict=True))
    nodes = {
        name: _valid_rows(maps.movedim(1, -1), grids[name]) for name, maps in zip(PATCHES, output.patches, strict=True)
    }
    num_layers, num_images, num_queries, _ = output.neck_det.shape
    nodes["body_det"] = output.body_det.flatten(0, 1)
    nodes["neck_det"] = output.neck_det.transpose(0, 1).flatten(0, 2)
    for name, shape in (("body_det", (1, num_queries)), ("neck_det", (num_layers, num_queries))):
        grids[name] = np.tile(np.array(shape, np.int64), (num_images, 1))
    token_logits = None
    if output.token_logits is not None:
        by_level = zip(PATCHES, output.token_logits, strict=True)
        token_logits = {name: _valid_rows(maps, grids[name]) for name, maps in by_level}
    return DetectorOutput(
        logits=output.logits,
        boxes=output.boxes,
        ious=output.ious,
        token_logits=token_logits,
        nodes=nodes,
        grids=grids,
    )


def _valid_rows(maps: Tensor, grid: Sizes) -> Tensor:
    """The valid tokens (T, C) of maps (b, H, W, C), the images end to end."""
    if (grid == maps.shape[1:3]).all():
        return maps.flatten(0, 2)
    cut = [image[:height, :width].flatten(0, 1) for image, (height, width) in zip(maps, grid.tolist(), strict=True)]
    return torch.cat(cut)


def _in_order(parts: Sequence[DetectorOutput], members: Sequence[npt.NDArray[np.intp]]) -> DetectorOutput:
    """The outputs of several groups of images as one, image `members[g][i]` being the i-th of group g."""
    order = np.argsort(np.concatenate(members))  # where each image of the batch lies among the groups end to end
    picked = to_device(torch.from_numpy(order), parts[0].logits.device)

    def stacked(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors), dim=1).index_select(1, picked)

    def ragged(name: str, tensors: Sequence[Tensor]) -> Tensor:
        images: list[Tensor] = []
        for part, rows in zip(parts, tensors, strict=True):
            images += torch.split(rows, part.grids[name].prod(1).tolist())
        return torch.cat([images[place] for place in order])

    ious = [part.ious for part in parts if part.ious is not None]
    labelled = [part.token_logits for part in parts if part.token_logits is not None]
    return DetectorOutput(
        logits=stacked([part.logits for part in parts]),
        boxes=stacked([part.boxes for part in parts]),
        ious=stacked(ious) if ious else None,
        token_logits={name: ragged(name, [part[name] for part in labelled]) for name in PATCHES} if labelled else None,
        nodes={name: ragged(name, [part.nodes[name] for part in parts]) for name in NODES},
        grids={name: np.concatenate([part.grids[name] for part in parts])[order] for name in NODES},
    )
