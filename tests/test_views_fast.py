"""The fast recipes: the views of the reference recipes, drawn alike, rendered by other means that repeat to the bit."""

import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from detection_jobs import detection_config, write_detector
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from train_runs import run
from views_jobs import SMALL, picture

from vkd_cache.cache.reader import open_cache
from vkd_cache.config import Config, ViewsConfig
from vkd_cache.errors import CacheFormatError, ConfigError
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import open_source
from vkd_cache.stages.compare import compare
from vkd_cache.stages.extract import extract
from vkd_cache.stages.rendering import RenderedBatch, Renderer, RenderTask, keep_rows, pixel_versions, render_loader
from vkd_cache.stages.transfer import mixed_images
from vkd_cache.stages.verify import VerifyRequest, verify
from vkd_cache.views import ops
from vkd_cache.views.blend import adjust_colour, colour_rows
from vkd_cache.views.colour import apply_to_pixels, blur_kernel
from vkd_cache.views.ops import apply_op
from vkd_cache.views.params import NO_OP, ViewParams, params_from_columns, params_to_columns
from vkd_cache.views.plan import plan_view
from vkd_cache.views.recipe import RECIPES, Recipe, make_recipe
from vkd_cache.views.render import pixel_digest, render_view
from vkd_cache.views.replay import replay_problem

Pixels = npt.NDArray[np.uint8]
Build = Callable[..., Config]
FAST, VKD = SMALL["fast"], SMALL["vkd"]
BOXED = make_recipe(ViewsConfig(recipe="fast_detection", scales=(64, 96), max_size_px=160))
quick = settings(deadline=None, max_examples=25)
views = st.integers(0, 10**6)
sides = st.one_of(st.integers(1, 5), st.integers(1, 150), st.just(700))


def array(width: int, height: int) -> Pixels:
    return np.array(picture(width, height))


def planned(recipe: Recipe, view: int, width: int, height: int) -> ViewParams:
    return plan_view(recipe, 3, "class/7", view, width_px=width, height_px=height)


def floats(pixels: Pixels, operations: Any) -> torch.Tensor:
    """(H, W, 3) float32 in [0, 1] as a network would see them."""
    batch = torch.from_numpy(pixels[None])
    return mixed_images(batch, None, colour_rows(pixels[None], [operations]))[0].permute(1, 2, 0)


@quick
@given(views, sides, sides)
def test_views_are_drawn_as_the_reference_recipes_are(view: int, width: int, height: int) -> None:
    for fast, reference in (("fast", "vkd"), ("fast_detection", "vidt")):
        assert planned(RECIPES[fast], view, width, height) == planned(RECIPES[reference], view, width, height)
    kernels = {"name": "vkd", "decoder": "pillow", "resizer": "pillow", "colour_kernel": "pillow"}
    assert dataclasses.replace(RECIPES["fast"], **kernels) == RECIPES["vkd"]


@quick
@given(views, sides, sides, st.sampled_from((FAST, BOXED)))
def test_stored_params_give_the_same_bits_with_any_number_of_threads(
    view: int, width: int, height: int, recipe: Recipe
) -> None:
    image = array(width, height)
    params = planned(recipe, view, width, height)
    columns = params_to_columns([params], recipe.max_ops, sized=recipe.detection is not None)
    found = set()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        pixels = render_view(image, params_from_columns(columns, 0), recipe)
        found.add((pixels.shape, pixels.tobytes(), floats(pixels, params.ops).numpy().tobytes()))
    torch.set_num_threads(1)
    assert len(found) == 1
    assert image.tobytes() == array(width, height).tobytes(), "the source was written to"
    assert pixels.flags.c_contiguous and pixels.flags.writeable


@quick
@given(views, sides, sides)
def test_a_crop_in_a_larger_image_is_the_crop_alone(view: int, width: int, height: int) -> None:
    """No pixel outside the crop is seen, and it makes no difference how the crop lies in memory."""
    image = array(width, height)
    params = planned(FAST, view, width, height)
    top, left, crop_height, crop_width = params.crop
    alone = np.ascontiguousarray(image[top : top + crop_height, left : left + crop_width])
    own = dataclasses.replace(params, source_size=(crop_width, crop_height), crop=(0, 0, crop_height, crop_width))
    assert np.array_equal(render_view(image, params, FAST), render_view(alone, own, FAST))


def test_geometry_is_the_references_within_a_level_or_two() -> None:
    """Photograph-like content: the same crop, flip and kernel shape, other rounding."""
    for fast, reference in (("fast", "vkd"), ("fast_detection", "vidt")):
        for view in range(5):
            params = dataclasses.replace(planned(RECIPES[reference], view, 320, 240), ops=())
            theirs = render_view(picture(320, 240), params, RECIPES[reference]).astype(int)
            ours = render_view(array(320, 240), params, RECIPES[fast]).astype(int)
            assert np.abs(ours - theirs).max() <= 12
            assert np.abs(ours - theirs).mean() < 0.25


@pytest.mark.parametrize("size", [(1, 60000), (60000, 1), (1, 1), (3, 2000), (5000, 4)])
def test_extreme_shapes_are_views_too(size: tuple[int, int]) -> None:
    width, height = size
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    for view in range(3):
        params = dataclasses.replace(planned(FAST, view, width, height), crop=(0, 0, height, width), ops=())
        found = render_view(image, params, FAST).astype(int)
        expected = render_view(Image.fromarray(image), params, VKD).astype(int)
        assert np.abs(found - expected).max() <= 4


# --- colour -------------------------------------------------------------------------------------------------------

jitters = st.permutations([ops.BRIGHTNESS, ops.CONTRAST, ops.SATURATION]).flatmap(
    lambda order: st.tuples(*(st.tuples(st.just(op), st.floats(0.75, 1.25, width=32)) for op in order))
)
grey = st.sampled_from((((ops.GREY, 0.0),), ()))


def in_sequence(pixels: Pixels, operations: Any) -> npt.NDArray[np.float64]:
    """One operation after another in doubles, 0 to 255, nothing clipped or rounded: textbook definitions."""
    values = pixels.astype(np.float64)
    for op, factor in operations:
        luma = (values @ np.array([0.299, 0.587, 0.114]))[..., None]
        if op == ops.GREY:
            values = np.broadcast_to(luma, values.shape)
        elif op == ops.BRIGHTNESS:
            values = values * factor
        elif op == ops.CONTRAST:
            values = luma.mean() + factor * (values - luma.mean())
        else:
            values = luma + factor * (values - luma)
    return values


@quick
@given(grey, jitters, st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 300))
def test_the_affine_map_is_its_operations_in_sequence(
    first: Any, jitter: Any, seed: int, width: int, height: int
) -> None:
    operations = first + jitter
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    expected = np.clip(in_sequence(pixels, operations) / 255, 0.0, 1.0)
    assert np.abs(floats(pixels, operations).numpy() - expected).max() < 1e-5
    # where nothing clips, Pillow's sequence differs only by its rounding after each operation
    middle = (100 + pixels // 10).astype(np.uint8)
    params = ViewParams(seed=0, source_size=(width, height), crop=(0, 0, height, width), flip=False, ops=operations)
    image = Image.fromarray(middle)
    for op, value in params.ops:
        image = apply_op(image, op, value)
    assert np.abs(255 * floats(middle, operations).numpy() - np.asarray(image)).max() < 3.0


@quick
@given(st.floats(0.0, 6.0, width=32), st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32))
def test_blur_is_whole_number_arithmetic_that_keeps_the_mean_of_a_constant(
    radius: float, width: int, height: int, seed: int
) -> None:
    kernel = blur_kernel(radius)
    assert kernel[0] + 2 * sum(kernel[1:]) == 256 and min(kernel) >= 0
    flat = np.full((height, width, 3), seed % 256, np.uint8)
    operations = ((ops.GAUSSIAN_BLUR, radius),)
    assert np.array_equal(apply_to_pixels(flat, operations), flat)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    kept = pixels.copy()
    whole = [*kernel[:0:-1], *kernel]
    reach = len(kernel) - 1
    expected = pixels.astype(int)
    for axis in (0, 1):
        margins = [(reach, reach) if each == axis else (0, 0) for each in range(3)]
        padded = np.pad(expected, margins, "edge")
        shifted = [np.take(padded, range(at, at + pixels.shape[axis]), axis) for at in range(len(whole))]
        expected = (sum(weight * part for weight, part in zip(whole, shifted, strict=True)) + 128) >> 8
    found = apply_to_pixels(pixels, operations)
    assert np.array_equal(found, expected) and np.array_equal(pixels, kept)


@pytest.mark.parametrize("radius", [0.1, 0.4, 0.8, 1.3, 2.0])
def test_blur_is_pillows_but_for_rounding_and_margins(radius: float) -> None:
    image = picture(96, 80)
    theirs = np.asarray(image.filter(ImageFilter.GaussianBlur(radius))).astype(int)
    ours = apply_to_pixels(np.asarray(image), ((ops.GAUSSIAN_BLUR, radius),)).astype(int)
    inside = np.abs(ours - theirs)[8:-8, 8:-8]
    assert inside.max() <= 3 and inside.mean() < 0.8


@quick
@given(st.integers(0, 256), st.integers(0, 2**32))
def test_solarising_is_pillows(threshold: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    params = ((ops.SOLARISE, float(threshold)),)
    expected = apply_op(Image.fromarray(pixels), *params[0])
    assert np.array_equal(apply_to_pixels(pixels, params), np.asarray(expected))


def test_an_operation_without_a_whole_number_form_is_refused() -> None:
    with pytest.raises(ValueError, match="number 11, expected one of three-augment under a fast recipe"):
        apply_to_pixels(array(4, 4), ((ops.ROTATE, 5.0), (ops.GREY, 0.0)))


some_ops = st.tuples(st.integers(0, 20), st.floats(-2000, 2000, width=32) | st.just(math.nan) | st.just(16.0))
good_ops = st.one_of(
    st.tuples(st.sampled_from((ops.SOLARISE, ops.GAUSSIAN_BLUR)), st.floats(0, 16, width=32)),
    st.tuples(st.sampled_from((ops.GREY, ops.BRIGHTNESS, ops.CONTRAST, ops.SATURATION)), st.floats(-9, 9, width=32)),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(some_ops | good_ops, max_size=FAST.max_ops))
def test_stored_operations_are_rendered_or_refused(stored: list[tuple[int, float]]) -> None:
    """A unit may come from a stranger."""
    params = dataclasses.replace(planned(FAST, 0, 9, 7), ops=tuple(stored))
    problem = replay_problem(params_to_columns([params], FAST.max_ops), FAST)
    kept = [op for op, _ in stored if op != NO_OP]
    early = {op for at, op in enumerate(kept) if any(later in (2, 3) for later in kept[at:])}
    assert (problem is None) == (
        all(1 <= op <= 6 for op in kept)
        and not early & {ops.GREY, ops.BRIGHTNESS, ops.CONTRAST, ops.SATURATION}
        and all(0 <= value <= {2: 256, 3: 16}.get(op, 1024) or (op not in (2, 3) and value >= -1024 and value <= 0)
                for op, value in stored)
    )  # fmt: skip
    if problem is None:
        pixels = render_view(array(9, 7), params, FAST)
        assert colour_rows(pixels[None], [params.ops]).isfinite().all()


def test_colour_of_a_batch_is_that_of_each_view() -> None:
    """Batches of any size, on any device, take the same path to the same bits."""
    params = [planned(FAST, view, 90, 70) for view in range(7)]
    pixels = np.stack([render_view(array(90, 70), each, FAST) for each in params])
    rows = colour_rows(pixels, [each.ops for each in params])
    together = mixed_images(torch.from_numpy(pixels), None, rows)
    at_once = adjust_colour(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float(), rows)
    assert torch.equal(together, at_once)
    for position, each in enumerate(params):
        assert torch.equal(together[position].permute(1, 2, 0), floats(pixels[position], each.ops))
    assert together.min() >= 0.0 and together.max() <= 1.0


# --- recipes and fingerprints -------------------------------------------------------------------------------------


def test_only_new_recipes_say_more_than_they_used_to() -> None:
    new = {"resizer", "colour_kernel"}
    for name, recipe in RECIPES.items():
        document = recipe.to_json()
        assert Recipe.from_json(document) == recipe
        assert (new & document.keys() != set()) == recipe.fast == name.startswith("fast"), name
        assert recipe.libraries == (("simplejpeg",) if recipe.fast else ())
    kernels = {"decoder": "simplejpeg", "resizer": "torch", "colour_kernel": "affine"}
    assert RECIPES["fast"].to_json().items() >= kernels.items()
    with pytest.raises(CacheFormatError, match="field 'resizer': found 'opencv', expected one of pillow, torch"):
        Recipe.from_json(RECIPES["fast"].to_json() | {"resizer": "opencv"})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"resizer": "pillow"}, "resizer and colour_kernel: found"),
        ({"decoder": "pillow"}, "resizer and colour_kernel: found"),
        ({"colour_kernel": "pillow"}, "resizer and colour_kernel: found"),
        ({"colour": "none"}, "resizer and colour_kernel: found"),
        ({"colour": "rand_augment"}, "expected 'pillow' with RandAugment or random erasing"),
        ({"erase_probability": 0.1}, "expected 'pillow' with RandAugment or random erasing"),
        ({"geometry": "center_crop"}, "expected 'pillow' for centre crops"),
        ({"blur_radius": (0.1, 17.0)}, "blur_radius: found .* expected at most 16"),
    ],
)
def test_what_the_fast_path_cannot_render_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        dataclasses.replace(RECIPES["fast"], **changes)
    assert dataclasses.replace(RECIPES["fast"], colour="none", colour_kernel="pillow").fast


# --- through the stages -------------------------------------------------------------------------------------------


def task(rows: list[int], **changes: Any) -> RenderTask:
    row = np.array(rows, np.int64)
    return RenderTask(tag=None, shard=np.zeros(len(row), np.int64), row=row, view=1, **changes)


def test_workers_batches_and_rows_left_out_change_nothing(digits_tree: Path) -> None:
    source = open_source(str(digits_tree), split="train", shard_size=48)
    renderer = Renderer(source, FAST, 5)

    def everything(batches: list[RenderedBatch]) -> dict[int, tuple[bytes, bytes, int]]:
        return {
            int(row): (pixels.numpy().tobytes(), colour.numpy().tobytes(), int(digest))
            for batch in batches
            for row, pixels, colour, digest in zip(
                batch.row, batch.pixels, batch.colour, batch.columns["digest"], strict=True
            )
        }

    whole = renderer[task(list(range(20)))]
    expected = everything([whole])
    tasks = [task(list(range(start, start + 5))) for start in range(0, 20, 5)]
    assert everything(list(render_loader(renderer, tasks, workers=2))) == expected
    keep_rows(whole, np.array([7, 2, 11]))
    assert everything([whole]) == {row: expected[row] for row in (7, 2, 11)}
    for row, pixels in zip(whole.row.tolist(), whole.pixels, strict=True):
        assert pixel_digest(pixels.numpy()) == expected[row][2]


def test_a_cache_of_fast_views(tiny_config: Build, digits_tree: Path, tmp_path: Path) -> None:
    """Extract, verify by rendering and by the teacher, compare with the live teacher, train."""
    url = tmp_path / "cache"
    config = tiny_config(
        source={"train": str(digits_tree), "shard_size": 96},
        views={"recipe": "fast"},
        cache={"url": str(url), "dtype": "float32"},
        train={"epochs": 1, "batch_size": 32, "output": str(tmp_path / "out")},
    )
    assert extract(config, JobSplit()).exit_code == 0
    manifest = open_cache(str(url)).manifest
    assert manifest.recipe["decoder"] == "simplejpeg" and "simplejpeg" in manifest.versions
    older = dataclasses.replace(manifest, versions=manifest.versions | {"simplejpeg": "1.7.0"})
    assert older.fingerprint() != manifest.fingerprint()
    assert "simplejpeg" in pixel_versions(Recipe.from_json(manifest.recipe), manifest.versions)
    request = VerifyRequest(url=str(url), source=str(digits_tree), pixels=True, teacher=True, sample=24)
    assert verify(config, request).exit_code == 0
    report = compare(config, steps=2)
    assert report.within_bound and report.lockstep["task"] == [0.0, 0.0]
    assert run(config).broken == 0
    other = tiny_config(cache={"url": str(tmp_path / "vkd"), "dtype": "float32"}, views={"size_px": 32})
    assert extract(other, JobSplit()).exit_code == 0
    plain = open_cache(str(tmp_path / "vkd")).manifest
    assert "simplejpeg" not in plain.versions and plain.fingerprint() != manifest.fingerprint()
    one, two = (open_cache(str(folder)).read(0, 0).columns for folder in (url, tmp_path / "vkd"))
    assert not np.isin(one["digest"], two["digest"]).any()


def test_a_cache_of_fast_detection_views(coco_tree: Path, tmp_path: Path) -> None:
    url = tmp_path / "cache"
    weights = write_detector(tmp_path / "teacher.pt")
    config = detection_config(coco_tree, weights, url, views={"recipe": "fast_detection"})
    assert extract(config, JobSplit()).exit_code == 0
    cache = open_cache(str(url))
    assert cache.manifest.recipe.items() >= {"decoder": "simplejpeg", "resizer": "torch"}.items()
    assert "colour_kernel" not in cache.manifest.recipe
    request = VerifyRequest(url=str(url), source=str(coco_tree), pixels=True, teacher=True, sample=6)
    assert verify(config, request).exit_code == 0
    renderer = Renderer(open_source(str(coco_tree), split="train"), cache.recipe, 5)
    assert renderer[task([0, 1])].colour is None


def test_a_changed_pixel_is_found(tiny_config: Build, digits_tree: Path) -> None:
    source = open_source(str(digits_tree), split="train", shard_size=48)
    renderer = Renderer(source, FAST, 5)
    batch = renderer[task([0, 1])]
    digest = batch.columns["digest"].astype(np.uint64)
    stored = {name: values for name, values in batch.columns.items() if name != "digest"}
    again = task([0, 1], params=stored, digest=digest, check=np.ones(2, np.bool_))
    assert renderer[again].error is None
    error = renderer[dataclasses.replace(again, digest=digest ^ np.uint64(1))].error
    assert "simplejpeg" in str(error) and "torch" in str(error)


def test_a_file_through_memory_is_a_file(digits_tree: Path) -> None:
    """Views of a Pillow image and of its array are the same."""
    stream = io.BytesIO()
    picture(60, 50).save(stream, "PNG")
    params = planned(FAST, 4, 60, 50)
    assert np.array_equal(render_view(Image.open(stream), params, FAST), render_view(array(60, 50), params, FAST))
