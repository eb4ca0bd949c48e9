"""Detection views: the reference's sizes, boxes and distribution; boxes that stay on their pixels; canvases."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torchvision.transforms.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import InterpolationMode
from views_jobs import picture

from vkd_cache.config import ViewsConfig, load_config
from vkd_cache.errors import CacheFormatError, ConfigError
from vkd_cache.views.boxes import boxes_in_view, corners_in_view
from vkd_cache.views.geometry import SCALES, DetectionGeometry
from vkd_cache.views.params import ViewParams, params_from_columns, params_to_columns
from vkd_cache.views.plan import plan_canvas, plan_view
from vkd_cache.views.plan_detection import span_in_source
from vkd_cache.views.recipe import RECIPES, Recipe, detection_eval_recipe, make_recipe
from vkd_cache.views.render import pixel_digest, render_view
from vkd_cache.views.sizes import canvas_of, resized_size

quick = settings(deadline=None, max_examples=60)
FACTS: dict[str, Any] = json.loads((Path(__file__).parent / "reference" / "misc_facts.json").read_text())
VIDT = RECIPES["vidt"]
SMALL = make_recipe(
    ViewsConfig(
        recipe="vidt",
        scales=(64, 96, 128),
        max_size_px=213,
        crop_scales=(80, 112),
        crop_min_px=60,
        crop_max_px=100,
        canvas_multiple_px=64,
    )
)
EVAL = detection_eval_recipe(96, 160, 32)
any_recipe = st.sampled_from((VIDT, SMALL, EVAL))
sides = st.one_of(st.integers(1, 4), st.integers(1, 3000), st.integers(200, 800))
seeds = st.integers(0, 2**63 - 1)


def whole(width: int, height: int, view_size: tuple[int, int], *, flip: bool = False) -> ViewParams:
    """The params of a view of a whole image."""
    return ViewParams(
        seed=0, source_size=(width, height), crop=(0, 0, height, width), flip=flip, ops=(), view_size=view_size
    )


def plan(recipe: Recipe, view: int, width: int, height: int, key: str = "a") -> ViewParams:
    return plan_view(recipe, 0, key, view, width_px=width, height_px=height)


def float32(values: Sequence[Any]) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32).reshape(-1, 4)


@pytest.mark.parametrize("case", FACTS["resize"], ids=lambda case: f"{case['w']}x{case['h']}-{case['size']}")
def test_sizes_and_boxes_are_the_references(case: dict[str, Any]) -> None:
    size = resized_size(case["w"], case["h"], case["size"], case["max_size"])
    assert size == (case["out_h"], case["out_w"])
    corners, kept = corners_in_view(float32([10, 20, 50, 60]), whole(case["w"], case["h"], size))
    assert kept.all()
    assert corners[0].tolist() == case["box_10_20_50_60_becomes"]


def test_crop_flip_and_normalisation_of_boxes_are_the_references() -> None:
    facts = FACTS["boxes"]
    width, height = facts["image_wh"]
    boxes, labels = float32(facts["input"]["boxes"]), np.array(facts["input"]["labels"])
    cropped = facts["crop_top50_left100_h384_w450"]
    params = dataclasses.replace(whole(width, height, (384, 450)), crop=(50, 100, 384, 450))
    corners, kept = corners_in_view(boxes, params)
    assert (corners.tolist(), labels[kept].tolist()) == (cropped["boxes"], cropped["labels"])
    flipped, _ = corners_in_view(boxes, whole(width, height, (height, width), flip=True))
    assert flipped.tolist() == facts["hflip"]["boxes"]
    shares, kept_labels = boxes_in_view(boxes, labels, whole(width, height, (height, width)))
    assert shares.tolist() == facts["normalize_to_cxcywh"]["boxes"]
    assert kept_labels.tolist() == facts["normalize_to_cxcywh"]["labels"]


@quick
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(16, 900), st.none() | st.integers(16, 1500))
def test_sizes_of_any_shape_can_be_run(width: int, height: int, short: int, bound: int | None) -> None:
    size = resized_size(width, height, short, bound)
    assert size == resized_size(height, width, short, bound)[::-1]
    assert all(side >= 16 and side % 16 == 0 for side in size)
    assert (size[0] - size[1]) * (height - width) >= 0
    if bound is None:
        assert min(size) == short - short % 16
    else:
        assert max(size) <= 1.04 * bound + 1  # the reference rounds the short side, up to half a pixel of 16 too high
        assert min(size) <= max(16, short)


@quick
@given(any_recipe, seeds, st.text(max_size=20), st.integers(0, 500), sides, sides)
def test_the_canvas_is_a_function_of_the_plan_alone(
    recipe: Recipe, seed: int, key: str, view: int, width: int, height: int
) -> None:
    assert recipe.detection is not None
    params = plan_view(recipe, seed, key, view, width_px=width, height_px=height)
    multiple = recipe.detection.canvas_multiple_px
    canvas = plan_canvas(recipe, seed, key, view, width_px=width, height_px=height)
    assert canvas == canvas_of(params.view_size, multiple)
    for side, view_side in zip(canvas, params.view_size, strict=True):
        assert side % multiple == 0
        assert view_side <= side < view_side + multiple
        assert view_side % 16 == 0


@quick
@given(st.sampled_from((SMALL, EVAL)), seeds, st.integers(0, 99), st.integers(1, 150), st.integers(1, 150), st.data())
def test_params_written_and_read_back_give_the_same_bytes_and_boxes(
    recipe: Recipe, seed: int, view: int, width: int, height: int, data: st.DataObject
) -> None:
    image = picture(width, height)
    params = plan_view(recipe, seed, "key", view, width_px=width, height_px=height)
    columns = params_to_columns([params], recipe.max_ops, sized=True)
    assert (columns["view_size"].dtype, columns["view_size"].shape) == (np.uint16, (1, 2))
    replayed = params_from_columns(columns, 0)
    pixels = render_view(image, params, recipe)
    assert pixels.shape == (*params.view_size, 3)
    assert pixels.tobytes() == render_view(image, replayed, recipe).tobytes()
    assert pixel_digest(pixels) == pixel_digest(render_view(image, replayed, recipe))
    boxes = data.draw(corners_inside(width, height))
    for ours, theirs in zip(
        boxes_in_view(boxes, np.arange(len(boxes)), params),
        boxes_in_view(boxes, np.arange(len(boxes)), replayed),
        strict=True,
    ):
        assert ours.tobytes() == theirs.tobytes()


@st.composite
def corners_inside(draw: st.DrawFn, width: int, height: int) -> npt.NDArray[np.float32]:
    """Up to five boxes with a positive area inside an image."""
    boxes = []
    for _ in range(draw(st.integers(0, 5))):
        spans = []
        for side in (width, height):
            first, last = sorted(draw(st.floats(0.0, side, width=32)) for _ in range(2))
            spans.append((first, last))
        (x0, x1), (y0, y1) = spans
        if x1 > x0 and y1 > y0:
            boxes.append((x0, y0, x1, y1))
    return float32(boxes)


@quick
@given(any_recipe, st.integers(0, 10_000), st.integers(1, 900), st.integers(1, 900), st.data())
def test_boxes_are_where_the_crop_puts_them(
    recipe: Recipe, view: int, width: int, height: int, data: st.DataObject
) -> None:
    params = plan(recipe, view, width, height)
    boxes = data.draw(corners_inside(width, height))
    labels = np.arange(len(boxes), dtype=np.int64)
    shares, kept = boxes_in_view(boxes, labels, params)
    assert (shares.dtype, shares.shape) == (np.float32, (len(kept), 4))
    top, left, crop_height, crop_width = params.crop
    expected = []
    for label, (x0, y0, x1, y1) in zip(labels, boxes.astype(np.float64), strict=True):
        first_x, last_x = (min(max(x - left, 0), crop_width) / crop_width for x in (x0, x1))
        first_y, last_y = (min(max(y - top, 0), crop_height) / crop_height for y in (y0, y1))
        if params.flip:
            first_x, last_x = 1 - last_x, 1 - first_x
        if label in kept:
            expected.append(((first_x + last_x) / 2, (first_y + last_y) / 2, last_x - first_x, last_y - first_y))
        else:
            assert (last_x - first_x) * crop_width < 1e-3 or (last_y - first_y) * crop_height < 1e-3
    assert np.abs(shares - np.array(expected).reshape(-1, 4)).max(initial=0.0) < 1e-5
    assert (shares[:, 2:] > 0).all()
    assert ((shares >= 0) & (shares <= 1 + 2e-7)).all()  # float32, rounded as the reference rounds


MARK = (255, 0, 255)
PHOTOGRAPHS = [image[::3, ::3] // 2 for image in load_sample_images().images]  # dark, so that the mark stands out


@quick
@given(st.sampled_from((SMALL, EVAL)), st.integers(0, 10_000), st.integers(0, 1), st.data())
def test_a_rectangle_is_found_where_its_box_says(recipe: Recipe, view: int, which: int, data: st.DataObject) -> None:
    pixels = PHOTOGRAPHS[which].copy()
    height, width = pixels.shape[:2]
    left, top = data.draw(st.integers(0, width - 24)), data.draw(st.integers(0, height - 24))
    right, bottom = data.draw(st.integers(left + 20, width)), data.draw(st.integers(top + 20, height))
    pixels[top:bottom, left:right] = MARK
    params = plan(recipe, view, width, height)
    view_pixels = render_view(Image.fromarray(pixels), params, recipe).astype(np.int64)
    found = view_pixels[..., 0] + view_pixels[..., 2] - 2 * view_pixels[..., 1] > 255
    corners, _ = corners_in_view(float32([left, top, right, bottom]), params)
    scales = (params.view_size[1] / params.crop[3], params.view_size[0] / params.crop[2])
    if len(corners) == 0 or min(corners[0, 2:] - corners[0, :2]) < 3:
        return  # a sliver at the edge of the crop: too thin to be told from its surroundings
    ys, xs = np.nonzero(found)
    seen = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    assert np.abs(seen - corners[0]).max() <= max(1.0, *scales)


@quick
@given(st.integers(0, 10_000), st.integers(20, 200), st.integers(20, 200))
def test_whole_views_are_the_references_pixels_and_crops_nearly(view: int, width: int, height: int) -> None:
    image = picture(width, height)
    params = plan(SMALL, view, width, height)
    pixels = render_view(image, params, SMALL).astype(np.int64)
    uncropped = dataclasses.replace(params, crop=(0, 0, height, width))
    expected = functional.resize(image, list(params.view_size), InterpolationMode.BILINEAR)
    expected = functional.hflip(expected) if params.flip else expected
    assert np.array_equal(render_view(image, uncropped, SMALL), np.asarray(expected))
    # cut out of the resized image instead: the same picture but for kernels that see beyond the crop
    top, left, crop_height, crop_width = params.crop
    box = (left, top, left + crop_width, top + crop_height)
    inside = image.resize(params.view_size[::-1], Image.Resampling.BILINEAR, box=box)
    inside = functional.hflip(inside) if params.flip else inside
    assert np.abs(pixels - np.asarray(inside).astype(np.int64)).mean() < 3.0


def reference_draw(rng: np.random.Generator, width: int, height: int) -> tuple[float, ...]:
    """(view height, view width, crop's shares: height, width, top, left) by the reference's two ways."""
    crop = (height, width, 0, 0)
    frame = crop[:2]
    if rng.random() >= 0.5:
        frame = resized_size(width, height, int(rng.choice([400, 500, 600])), None)
        crop_width = int(rng.integers(384, min(frame[1], 600) + 1))
        crop_height = int(rng.integers(384, min(frame[0], 600) + 1))
        crop_top = int(rng.integers(0, frame[0] - crop_height + 1))
        crop = (crop_height, crop_width, crop_top, int(rng.integers(0, frame[1] - crop_width + 1)))
    view = resized_size(crop[1], crop[0], int(rng.choice(SCALES)), 1333)
    return (*view, *(value / frame[number % 2] for number, value in enumerate(crop)))


@pytest.mark.parametrize(("width", "height"), [(640, 480), (427, 640), (1000, 300)])
def test_sizes_and_crops_are_distributed_as_the_references(width: int, height: int) -> None:
    number = 2500
    rng = np.random.default_rng(5)
    theirs = np.array([reference_draw(rng, width, height) for _ in range(number)])
    plans = [plan(VIDT, view, width, height) for view in range(number)]
    crops = np.array([p.crop for p in plans]) / np.array([height, width] * 2)
    ours = np.column_stack([[p.view_size for p in plans], crops[:, [2, 3, 0, 1]]])
    for column in range(6):
        # two-sample Kolmogorov-Smirnov at one in a thousand; shares in steps coarser than whole source pixels
        grain = 1.0 if column < 2 else 0.01
        mine, other = (np.sort(np.floor(values[:, column] / grain + 0.5)) for values in (ours, theirs))
        grid = np.union1d(mine, other)
        gap = np.searchsorted(mine, grid, "right") - np.searchsorted(other, grid, "right")
        assert np.abs(gap).max() / number < 1.95 * np.sqrt(2 / number), column
    flips = sum(p.flip for p in plans)
    uncropped = sum(p.crop == (0, 0, height, width) for p in plans)
    assert abs(flips - number / 2) < 5 * np.sqrt(number / 4)
    assert uncropped > number / 2 - 5 * np.sqrt(number / 4)


def test_crops_reach_their_bounds_and_no_further() -> None:
    geometry = dataclasses.replace(DetectionGeometry(), crop_scales=(400,), crop_probability=1.0)
    recipe = dataclasses.replace(VIDT, detection=geometry)
    crops = np.array([plan(recipe, view, 640, 400).crop for view in range(4000)])  # the frame is the source
    assert (crops.min(axis=0) == [0, 0, 384, 384]).all()
    assert (crops.max(axis=0) == [16, 256, 400, 600]).all()
    assert ((crops[:, :2] + crops[:, 2:]) <= [400, 640]).all()
    assert (crops[:, :2] + crops[:, 2:]).max(axis=0).tolist() == [400, 640]


@quick
@given(st.integers(1, 3000), st.integers(16, 3000), st.data())
def test_a_crop_is_at_most_half_a_source_pixel_off(source: int, frame: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, frame - 1))
    length = data.draw(st.integers(1, frame - start))
    first, number = span_in_source(start, length, frame, source)
    assert 0 <= first < first + number <= source
    if number > 1:
        assert abs(first - start * source / frame) <= 0.5
        assert abs(first + number - (start + length) * source / frame) <= 0.5


def test_every_scale_is_drawn_equally_often() -> None:
    plans = [plan(VIDT, view, 640, 640) for view in range(4200)]
    drawn = np.array([min(p.view_size) for p in plans if p.crop == (0, 0, 640, 640)])
    counts = np.array([(drawn == scale).sum() for scale in SCALES])
    assert counts.sum() == len(drawn)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 45.3  # chi-square, 20 degrees, one in a thousand


def test_views_of_a_sample_are_different_and_evaluation_has_one() -> None:
    drawn = {(p.crop, p.flip, p.view_size) for p in (plan(VIDT, view, 640, 480) for view in range(200))}
    assert len(drawn) > 120  # of whole images there are only 21 sizes, flipped or not
    assert len({(p.crop, p.flip, p.view_size) for p in (plan(EVAL, view, 640, 480) for view in range(20))}) == 1
    assert plan(EVAL, 3, 640, 480) == dataclasses.replace(
        whole(640, 480, (96, 128)), seed=plan(EVAL, 3, 640, 480).seed
    )


def test_the_presets_are_the_references_numbers() -> None:
    assert VIDT.detection == DetectionGeometry(
        scales=tuple(range(480, 801, 16)),
        max_size_px=800 * 1333 // 800,
        crop_probability=0.5,
        crop_scales=(400, 500, 600),
        crop_min_px=384,
        crop_max_px=600,
        canvas_multiple_px=128,
    )
    assert (VIDT.flip_probability, VIDT.size_px, VIDT.mixes, VIDT.max_ops) == (0.5, 800, False, 0)
    assert make_recipe(ViewsConfig(recipe="vidt", size_px=32, mixup_alpha=0.1)) == VIDT
    assert (EVAL.name, EVAL.flip_probability, EVAL.size_px) == ("vidt_eval", 0.0, 96)
    no_crops = make_recipe(ViewsConfig(recipe="vidt", crop_scales=())).detection
    assert no_crops is not None
    assert no_crops.crop_probability == 0.0


@pytest.mark.parametrize("recipe", [VIDT, SMALL, EVAL], ids=lambda recipe: f"{recipe.name}-{recipe.size_px}")
def test_json_gives_back_an_equal_recipe(recipe: Recipe) -> None:
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_recipes_of_classification_are_what_they_were_in_version_1() -> None:
    """Their JSON is in the fingerprint of every cache that exists."""
    digests = {
        name: hashlib.sha256(json.dumps(RECIPES[name].to_json()).encode()).hexdigest()[:16] for name in PINNED_JSON
    }
    assert digests == PINNED_JSON
    for name in PINNED_JSON:
        params = plan(RECIPES[name], 0, 40, 30)
        assert params.view_size == (0, 0)
        assert "view_size" not in params_to_columns([params], RECIPES[name].max_ops)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"scales": ()}, "scales: found .*, expected at least one side"),
        ({"scales": (8, 64)}, "scales: found .*, expected sides of 16 to 4096 pixels"),
        ({"max_size_px": 3}, "max_size_px: found 3"),
        ({"crop_probability": 2.0}, "crop_probability: found 2.0, expected a probability"),
        ({"crop_scales": ()}, "crop_scales: found .*, expected at least one side, or a crop_probability of 0"),
        ({"crop_min_px": 401}, "crop_min_px: found 401, expected 1 to 400, the smallest of crop_scales"),
        ({"crop_max_px": 383}, "crop_max_px: found 383, expected at least crop_min_px"),
        ({"canvas_multiple_px": 40}, "canvas_multiple_px: found 40, expected a multiple of 16"),
    ],
)
def test_numbers_that_cannot_be_drawn_from_are_refused_by_name(change: dict[str, Any], text: str) -> None:
    geometry = dataclasses.replace(DetectionGeometry(), **change)
    with pytest.raises(ConfigError, match=f"recipe 'vidt': {text}"):
        dataclasses.replace(VIDT, detection=geometry, size_px=max(geometry.scales, default=1))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mix_probability": 0.5}, "mix_probability: found 0.5, expected 0: views with boxes are not mixed"),
        ({"erase_probability": 0.5}, "erase_probability: found 0.5"),
        ({"colour": "rand_augment"}, "colour: found rand_augment"),
        ({"interpolation": "bicubic"}, "interpolation: found bicubic, expected bilinear"),
        ({"size_px": 640}, "size_px: found 640, expected the largest of scales"),
        ({"geometry": "center_crop"}, "geometry: found 'center_crop', expected 'detection'"),
        ({"detection": None}, "geometry: found 'detection'"),
    ],
)
def test_what_boxes_cannot_follow_is_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        dataclasses.replace(VIDT, **change)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"scales": 480}, "field 'detection': field 'scales': found 480, expected a list of whole numbers"),
        ({"scales": [480.5]}, "field 'scales': found 480.5, expected int"),
        ({"hue": 1}, "field 'detection': unknown field 'hue'"),
        ({"crop_min_px": None}, "field 'crop_min_px': found None, expected int"),
    ],
)
def test_a_manifests_geometry_is_read_strictly(change: dict[str, Any], text: str) -> None:
    document = VIDT.to_json()
    with pytest.raises(CacheFormatError, match=text):
        Recipe.from_json(document | {"detection": document["detection"] | change})
    with pytest.raises(CacheFormatError, match="field 'detection': found 3, expected an object"):
        Recipe.from_json(document | {"detection": 3})


def test_lists_of_numbers_are_read_from_a_pipeline(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[views]\nrecipe = "vidt"\nscales = [320, 640]\ncrop_scales = []\n')
    views = load_config(str(path)).views
    assert (views.scales, views.crop_scales) == ((320, 640), ())
    for wrong, text in (([320.0], r"found \[320.0\], expected a list of whole numbers"), ([8], "found 8, expected")):
        with pytest.raises(ConfigError, match=rf"\[views\] scales: {text}"):
            load_config(overrides={"views": {"scales": wrong}})


PINNED_JSON = {
    "vkd": "7a615620a9353357",
    "randaugment": "6e0690e6e51153ae",
    "crop_flip": "fc6d057d089d3083",
    "none": "07f2c3c46ab697e3",
}
