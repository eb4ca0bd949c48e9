"""The reference's two images, boxes and networks, and small random detector outputs."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import recipe
from torch import Tensor

from vkd_cache.detection import ViDT, ViDTOutput, create_vidt
from vkd_cache.detection.canvas import NODES, PATCHES, DetectorOutput
from vkd_cache.detection.criterion import BoxTargets

REFERENCE = Path(__file__).parent / "reference"
CONTENTS = ((192, 256), (224, 208))  # (height, width) of the reference's case A
CANVAS = (224, 256)


@functools.cache
def reference() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((REFERENCE / "vidt_outputs.json").read_text(encoding="utf-8"))
    return facts


def reference_weights(rows: str) -> dict[str, Tensor]:
    """`student_tensors` or `teacher_tensors`."""
    return {
        row["name"]: torch.from_numpy(recipe.param(row["key"], row["shape"], row["kind"]))
        for row in reference()[rows]
        if row["kind"] != "index"
    }


def reference_net(rows: str) -> ViDT:
    net = create_vidt("vidt_swin_nano")
    weights = reference_weights(rows)
    own = {name: weights[name] for name in net.state_dict() if name in weights}
    missing = net.load_state_dict(own, strict=False).missing_keys
    assert all("relative_position_index" in name for name in missing), missing
    return net.eval()


def reference_images() -> tuple[Tensor, Tensor]:
    """Images (2, 3, 224, 256), zero in the padding, and their mask."""
    images, mask = torch.zeros(2, 3, *CANVAS), torch.ones(2, *CANVAS, dtype=torch.bool)
    for i, (height, width) in enumerate(CONTENTS):
        images[i, :, :height, :width] = torch.from_numpy(recipe.image(f"vidt.A.{i}", (3, height, width)))
        mask[i, :height, :width] = False
    return images, mask


@functools.cache
def reference_run(rows: str) -> DetectorOutput:
    """Case A with every token counted valid, padding included, as the reference does."""
    with torch.no_grad():
        return whole(reference_net(rows)(*reference_images()))


def reference_targets(case: str = "A") -> list[BoxTargets]:
    facts = reference()["A.f32" if case == "A" else f"targets.{case}"]["targets"]
    return [targets(image["boxes"], image["labels"]) for image in facts]


def whole(output: ViDTOutput) -> DetectorOutput:
    """A network's output as if no token were padding."""
    patches = dict(zip(PATCHES, output.patches, strict=True))
    nodes = {name: maps.permute(0, 2, 3, 1).flatten(0, 2) for name, maps in patches.items()}
    nodes |= {"body_det": output.body_det.flatten(0, 1), "neck_det": output.neck_det.transpose(0, 1).flatten(0, 2)}
    sizes = [maps.shape[2:] for maps in output.patches] + [(1, output.body_det.shape[1]), output.neck_det.shape[::2]]
    grids = {
        name: np.tile(np.array(size, np.int64), (len(output.body_det), 1))
        for name, size in zip(NODES, sizes, strict=True)
    }
    return DetectorOutput(logits=output.logits, boxes=output.boxes, nodes=nodes, grids=grids)


def targets(boxes: Any, labels: Any) -> BoxTargets:
    return BoxTargets(
        labels=torch.tensor(labels, dtype=torch.int64), boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    )


def random_boxes(generator: torch.Generator, *shape: int) -> Tensor:
    """(*shape, 4) cxcywh inside the unit square."""
    size = 0.02 + 0.6 * torch.rand(*shape, 2, generator=generator)
    return torch.cat([size / 2 + (1 - size) * torch.rand(*shape, 2, generator=generator), size], -1)


def random_targets(generator: torch.Generator, counts: tuple[int, ...], num_classes: int) -> list[BoxTargets]:
    return [
        BoxTargets(
            labels=torch.randint(num_classes, (count,), generator=generator), boxes=random_boxes(generator, count)
        )
        for count in counts
    ]


def random_output(
    generator: torch.Generator,
    *,
    layers: int = 2,
    images: int = 3,
    queries: int = 6,
    classes: int = 4,
    heads: bool = False,
) -> DetectorOutput:
    """Predictions without tokens, leaves of a graph; with both optional heads, over token grids of 1 x 2, 2 x 2, ..."""
    grid = np.array([(1 + i % 2, 2) for i in range(images)], np.int64)
    labels = {name: torch.randn(int(grid.prod(1).sum()), classes, generator=generator) for name in PATCHES[:2]}
    ious = torch.randn(layers, images, queries, 1, generator=generator)
    return DetectorOutput(
        logits=torch.randn(layers, images, queries, classes, generator=generator).requires_grad_(),
        boxes=random_boxes(generator, layers, images, queries).requires_grad_(),
        ious=ious.requires_grad_() if heads else None,
        token_logits={name: rows.requires_grad_() for name, rows in labels.items()} if heads else None,
        nodes={},
        grids=dict.fromkeys(labels, grid),
    )
