"""Rendered batches of a detection source: nothing depends on the batch, the worker or the canvas of another image."""

import dataclasses
import io
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vkd_cache.config import ViewsConfig
from vkd_cache.errors import BrokenImageError, ConfigError, CorruptCacheError
from vkd_cache.sources import CocoSource, Source, open_source
from vkd_cache.stages.rendering import RenderedBatch, Renderer, RenderTask, keep_rows, render_loader
from vkd_cache.stages.transfer import canvas_batch, model_input
from vkd_cache.views.boxes import boxes_in_view
from vkd_cache.views.decode import decode_image
from vkd_cache.views.params import MixPlan
from vkd_cache.views.plan import plan_canvas, plan_view
from vkd_cache.views.recipe import RECIPES, make_recipe
from vkd_cache.views.render import pixel_digest, render_view

RECIPE = make_recipe(
    ViewsConfig(
        recipe="vidt",
        scales=(48, 64, 96),
        max_size_px=160,
        crop_scales=(64, 80),
        crop_min_px=48,
        crop_max_px=72,
        canvas_multiple_px=32,
    )
)
SEED = 11


@pytest.fixture(scope="module")
def source(coco_tree: Path) -> CocoSource:
    opened = open_source(str(coco_tree), split="train")
    assert isinstance(opened, CocoSource)
    return opened


def task(rows: Iterable[int], view: int = 1) -> RenderTask:
    row = np.fromiter(rows, np.int64)
    return RenderTask(tag=view, shard=np.zeros(len(row), np.int64), row=row, view=view)


def contents(batch: RenderedBatch) -> dict[tuple[int, int], tuple[object, ...]]:
    """Everything about each sample of a batch, by (row, view)."""
    assert batch.view_size is not None
    assert batch.canvas is not None
    assert batch.boxes is not None
    assert batch.error is None
    found = {}
    for position, row in enumerate(batch.row.tolist()):
        height, width = batch.view_size[position].tolist()
        found[row, batch.view] = (
            batch.pixels[position, :height, :width].numpy().tobytes(),
            (height, width),
            tuple(batch.canvas[position].tolist()),
            {name: values[position].tobytes() for name, values in batch.columns.items()},
            batch.boxes[position].boxes.tobytes(),
            batch.boxes[position].labels.tolist(),
            batch.boxes[position].image_id,
            int(batch.label[position]),
        )
    return found


def test_a_batch_is_what_plan_render_and_boxes_say(source: CocoSource) -> None:
    batch = Renderer(source, RECIPE, SEED)[task(range(24))]
    found = contents(batch)
    assert batch.canvas is not None
    assert batch.pixels.shape == (24, *batch.canvas.max(axis=0), 3)
    assert len({canvas for _, _, canvas, *_ in found.values()}) > 2
    for row, key in enumerate(source.shards[0].keys):
        width, height = source.image_size(0, row)
        params = plan_view(RECIPE, SEED, key, 1, width_px=width, height_px=height)
        pixels = render_view(decode_image(source.read(0, row), oriented=False), params, RECIPE)
        annotation = source.boxes(0, row)
        boxes, labels = boxes_in_view(annotation.boxes, annotation.labels, params)
        content, view_size, canvas, _, in_view, view_labels, image_id, label = found[row, 1]
        assert content == pixels.tobytes()
        assert view_size == params.view_size
        assert canvas == plan_canvas(RECIPE, SEED, key, 1, width_px=width, height_px=height)
        assert (in_view, view_labels) == (boxes.tobytes(), labels.tolist())
        assert (str(image_id), label) == (key, int(source.shards[0].labels[row]))
        assert int(batch.columns["digest"][row]) == pixel_digest(pixels)
        outside = batch.pixels[row].clone()
        outside[: params.view_size[0], : params.view_size[1]] = 0
        assert not outside.any()


@settings(deadline=None, max_examples=15)
@given(rows=st.lists(st.integers(0, 23), min_size=1, max_size=8, unique=True), view=st.integers(0, 3))
def test_batch_mates_change_nothing(source: CocoSource, rows: list[int], view: int) -> None:
    renderer = Renderer(source, RECIPE, SEED)
    together = contents(renderer[task(rows, view)])
    for row in rows:
        assert together[row, view] == contents(renderer[task([row], view)])[row, view]


def test_spawned_workers_render_the_same_whatever_their_number_and_the_batch(source: CocoSource) -> None:
    def everything(workers: int, batch_size: int) -> dict[tuple[int, int], tuple[object, ...]]:
        starts = range(0, 24, batch_size)
        tasks = [task(range(start, min(start + batch_size, 24)), view) for view in (0, 1) for start in starts]
        found: dict[tuple[int, int], tuple[object, ...]] = {}
        for batch in render_loader(Renderer(source, RECIPE, SEED), tasks, workers=workers):
            found |= contents(batch)
        return found

    here = everything(0, 24)
    assert len(here) == 48
    assert everything(2, 5) == here
    differ = sum(here[row, 0][0] != here[row, 1][0] for row in range(24))
    assert differ > 16  # of whole images there are only three sizes here, flipped or not


def test_stored_params_give_the_same_batch_and_changed_pixels_are_found(source: CocoSource) -> None:
    renderer = Renderer(source, RECIPE, SEED)
    planned = renderer[task(range(6))]
    digest = planned.columns["digest"].astype(np.uint64)
    stored = {name: values for name, values in planned.columns.items() if name != "digest"}
    replay = dataclasses.replace(task(range(6)), params=stored, digest=digest, check=np.ones(6, np.bool_))
    other_seed = Renderer(source, RECIPE, SEED + 1)
    assert contents(other_seed[replay]) == contents(planned)
    wrong = dataclasses.replace(replay, digest=digest + np.uint64(1))
    assert isinstance(other_seed[wrong].error, CorruptCacheError)
    stretched = stored | {"source_size": stored["source_size"] + np.uint32(1)}
    error = other_seed[dataclasses.replace(replay, params=stretched)].error
    assert isinstance(error, CorruptCacheError)
    assert "the teacher saw one of" in str(error)


def test_an_image_unlike_its_record_is_broken_and_keeps_its_place(coco_tree: Path, tmp_path: Path) -> None:
    root = shutil.copytree(coco_tree, tmp_path / "coco")
    path = root / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    wrong, damaged = document["images"][3], document["images"][5]
    true_size = f"{wrong['width']}x{wrong['height']}"
    wrong["width"] += 7
    path.write_text(json.dumps(document))
    (root / "train2017" / damaged["file_name"]).write_bytes(b"\xff\xd8\xff")
    source = open_source(str(root), split="train")
    keys = source.shards[0].keys
    batch = Renderer(source, RECIPE, SEED)[task(range(24))]
    reasons = {keys[position]: reason for position, reason in batch.broken}
    assert set(reasons) == {str(wrong["id"]), str(damaged["id"])}
    assert reasons[str(wrong["id"])] == (
        f"image of {true_size} pixels, {wrong['width']}x{wrong['height']} in the annotation file"
    )
    assert batch.view_size is not None
    assert batch.canvas is not None
    for position in (position for position, _ in batch.broken):
        assert not batch.ok[position]
        assert not batch.pixels[position].any()
        assert not batch.columns["view_size"][position].any()
        assert (batch.view_size[position] >= 16).all()  # its place in the batch can be run like any other
        assert (batch.canvas[position] >= batch.view_size[position]).all()


def test_kept_rows_keep_all_that_is_theirs(source: CocoSource) -> None:
    renderer = Renderer(source, RECIPE, SEED)
    whole = contents(renderer[task(range(8))])
    batch = renderer[task(range(8))]
    batch.mix = MixPlan(
        partner=np.array([0, 6, 2, 3, 4, 5, 1, 7], np.uint32),
        kind=np.zeros(8, np.uint8),
        lam=np.ones(8, np.float32),
        box=np.zeros((8, 4), np.uint16),
    )
    keep_rows(batch, np.array([1, 4, 6]))
    assert contents(batch) == {(row, 1): whole[row, 1] for row in (1, 4, 6)}
    assert batch.mix is not None
    assert batch.mix.partner.tolist() == [2, 1, 0]
    assert len(batch.pixels) == len(batch.ok) == len(batch.shard) == 3
    keep_rows(batch, np.array([], np.int64))
    assert contents(batch) == {}


def test_a_network_gets_its_views_in_their_canvases(source: CocoSource) -> None:
    batch = Renderer(source, RECIPE, SEED)[task(range(5))]
    given_to_network = canvas_batch(batch, batch.pixels)
    assert given_to_network.images.dtype == torch.float32
    assert torch.equal(given_to_network.images * 255, batch.pixels.permute(0, 3, 1, 2).float())
    assert given_to_network.view_size is batch.view_size
    assert given_to_network.canvas is batch.canvas
    assert type(model_input(batch, batch.pixels)) is type(given_to_network)


def test_classification_gets_mixed_images(digits_tree: Path) -> None:
    recipe = dataclasses.replace(RECIPES["none"], size_px=16)
    batch = Renderer(open_source(str(digits_tree), split="train"), recipe, SEED)[task(range(2))]
    assert batch.view_size is batch.canvas is batch.boxes is None
    images = model_input(batch, batch.pixels)
    assert isinstance(images, torch.Tensor)
    assert images.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="found views without sizes"):
        canvas_batch(batch, batch.pixels)


def test_a_recipe_for_other_data_is_refused(source: CocoSource, digits_tree: Path) -> None:
    digits: Source = open_source(str(digits_tree), split="train")
    found = r"annotated with boxes; found the view recipe 'vkd', .* one of vidt, fast_detection\."
    with pytest.raises(ConfigError, match=found):
        Renderer(source, RECIPES["vkd"], SEED)
    with pytest.raises(ConfigError, match=r"annotated with classes, not boxes; found .* 'vidt', .* one of vkd, "):
        Renderer(digits, RECIPE, SEED)


def test_the_pixels_of_detection_are_as_stored_whatever_exif_says() -> None:
    image = Image.fromarray(np.arange(3 * 20 * 30, dtype=np.uint32).reshape(20, 30, 3).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert decode_image(buffer.getvalue()).size == (20, 30)
    assert decode_image(buffer.getvalue(), oriented=False).tobytes() == image.tobytes()
    with pytest.raises(BrokenImageError, match="empty file"):
        decode_image(b"", oriented=False)
