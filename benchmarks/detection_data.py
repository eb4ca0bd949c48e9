"""Made data of the detection benchmark: photographs in COCO's layout, a detector's weights, tokens of true sizes.

A newcomer's trap: photographs and their sizes are real, boxes and tokens are not. Boxes are drawn at random, as many as
COCO has; tokens are normally distributed, but there are exactly as many of them, on the same grids, as the teacher
would give. Tokens are stored as they are, never compressed, so what they hold changes neither bytes nor times.

Shape legend: b images, T tokens, C channels, L layers, Q queries.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import data
import numpy as np
import safetensors.torch
import torch

from vkd_cache.cache.schema import Manifest, NodeSpec
from vkd_cache.detection.canvas import NODES, PATCHES
from vkd_cache.detection.vidt import ViDTConfig, create_vidt, valid_grids
from vkd_cache.runtime import library_versions
from vkd_cache.sources import CocoSource, source_identity
from vkd_cache.stages.rendering import RenderedBatch
from vkd_cache.tokens import Tokens, tokens_from_rows
from vkd_cache.views.plan import plan_view
from vkd_cache.views.recipe import Recipe
from vkd_cache.views.sizes import canvas_of

# the most common sizes of COCO's photographs, (width, height) in pixels; not in its exact proportions
SIZES_PX = ((640, 480), (640, 427), (480, 640), (640, 480), (500, 375), (427, 640), (640, 426), (612, 612))
MEAN_BOXES = 7  # of an image of train2017
NUM_CATEGORIES = 90  # the largest category id, so that a student has COCO's 91 outputs
CODECS = {"float16": "float16", "int8": "token_int8"}

Counts = dict[str, np.ndarray[Any, np.dtype[np.int64]]]


def write_coco(folder: Path, count: int, *, seed: int) -> str:
    """Photographs with random boxes as the training split of a COCO tree; returns its root."""
    rng = np.random.default_rng([seed, 4])
    (folder / "train2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images: list[dict[str, object]] = []
    boxes: list[dict[str, object]] = []
    for number, content in enumerate(data.photos(count, seed=seed, sizes_px=SIZES_PX), start=1):
        name = f"{number:012d}.jpg"
        (folder / "train2017" / name).write_bytes(content)
        width, height = SIZES_PX[(number - 1) % len(SIZES_PX)]
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for _ in range(1 + int(rng.poisson(MEAN_BOXES - 1))):
            boxes.append({"id": len(boxes) + 1, "image_id": number, "iscrowd": 0} | _box(rng, width, height))
    document = {
        "info": {"description": "photographs with random boxes"},
        "images": images,
        "annotations": boxes,
        "categories": [{"id": number, "name": f"category {number}"} for number in range(1, NUM_CATEGORIES + 1)],
    }
    path = folder / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return str(folder)


def _box(rng: np.random.Generator, width: int, height: int) -> dict[str, object]:
    wide, high = (int(rng.integers(8, side // 2)) for side in (width, height))
    left, top = int(rng.integers(0, width - wide)), int(rng.integers(0, height - high))
    category = int(rng.integers(1, NUM_CATEGORIES + 1))
    return {"category_id": category, "bbox": [left, top, wide, high], "area": wide * high}


def random_detector(name: str, path: Path, *, seed: int) -> str:
    """Write the seeded random weights of a detector as a safetensors file, and return its path."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = create_vidt(name, NUM_CATEGORIES + 1)
    # several names may share a tensor, which safetensors does not store
    safetensors.torch.save_file({key: value.clone() for key, value in net.state_dict().items()}, path)
    return str(path)


def make_manifest(source: CocoSource, recipe: Recipe, nodes: tuple[NodeSpec, ...], backend: str) -> Manifest:
    """A manifest of a cache of made tokens."""
    return Manifest(
        dataset=source_identity(source).to_json(),
        recipe=recipe.to_json(),
        seed=0,
        nodes=nodes,
        teacher={"name": "made tokens"},
        head=None,
        numerics={"device": "cpu", "autocast": "off", "batch_size": 2},
        versions=library_versions(),
        backend=backend,
        block_samples=256 if backend == "webdataset" else 0,
    )


def token_spec(name: str, width: int, dtype: str, share: float) -> NodeSpec:
    """A node as extraction would store it: `share` is of the patch tokens, the few det tokens are all kept."""
    share = share if name in PATCHES else 1.0
    return NodeSpec(name=name, layout="tokens", shape=(width,), dtype=dtype, codec=CODECS[dtype], tokens=share)


def token_grids(teacher: ViDTConfig, view_size: Any, canvas: Any) -> Counts:
    """(b, 2) grid of every node for views (b, 2) on their canvases (b, 2)."""
    sides = [(int(height), int(width)) for height, width in canvas]
    per_view = [valid_grids(size[None], side) for size, side in zip(view_size, sides, strict=True)]
    grids = {name: np.concatenate([found[level] for found in per_view]) for level, name in enumerate(PATCHES)}
    for name, rows in (("body_det", 1), ("neck_det", teacher.num_layers + 1)):
        grids[name] = np.tile(np.array([rows, teacher.num_queries], np.int64), (len(view_size), 1))
    return grids


class MadeTokens:
    """Normally distributed tokens in place of a teacher's."""

    def __init__(self, teacher: ViDTConfig, *, seed: int) -> None:
        self._teacher = teacher
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: RenderedBatch) -> dict[str, Tokens]:
        """All tokens (T, C) of all nodes for the views of a batch, float32."""
        grids = token_grids(self._teacher, batch.view_size, batch.canvas)
        width = self._teacher.width
        return {
            name: tokens_from_rows(torch.randn(int(grid.prod(1).sum()), width, generator=self._generator), grid)
            for name, grid in grids.items()
        }


def mean_token_counts(teacher: ViDTConfig, recipe: Recipe, count: int, *, seed: int) -> dict[str, float]:
    """Mean number of tokens of each node over `count` planned views of images of the common sizes."""
    totals = dict.fromkeys(NODES, 0.0)
    for size, canvas in _planned(recipe, count, seed):
        for name, grid in token_grids(teacher, size, canvas).items():
            totals[name] += float(grid.prod())
    return {name: total / count for name, total in totals.items()}


def _planned(recipe: Recipe, count: int, seed: int) -> Iterator[tuple[Any, Any]]:
    multiple_px = recipe.detection.canvas_multiple_px if recipe.detection is not None else 1
    for number in range(count):
        width, height = SIZES_PX[number % len(SIZES_PX)]
        size = plan_view(recipe, seed, str(number), 0, width_px=width, height_px=height).view_size
        yield np.array([size], np.int64), np.array([canvas_of(size, multiple_px)], np.int64)


def stored_bytes(specs: Mapping[str, NodeSpec], kept: Mapping[str, float]) -> float:
    """Bytes of the nodes of an image that has `kept` stored tokens of each."""
    return sum(spec.sample_bytes + spec.token_bytes * kept[name] for name, spec in specs.items())
