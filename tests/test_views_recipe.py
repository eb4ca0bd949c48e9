"""Recipes: presets, JSON round trip, and the texts of what cannot be drawn from."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd_cache.config import ViewsConfig
from vkd_cache.errors import CacheFormatError, ConfigError
from vkd_cache.views.plan import plan_view
from vkd_cache.views.recipe import RECIPES, Recipe, make_recipe

shares = st.floats(0.0, 1.0)
intervals = st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)).map(lambda pair: (min(pair), max(pair)))
recipes = st.builds(
    Recipe,
    name=st.text(max_size=12),
    geometry=st.sampled_from(("random_resized_crop", "center_crop")),
    size_px=st.integers(1, 4096),
    scale=intervals,
    ratio=intervals,
    crop_fraction=st.floats(0.01, 1.0),
    flip_probability=shares,
    colour=st.sampled_from(("three_augment", "rand_augment", "none")),
    jitter=shares,
    num_ops=st.integers(0, 16),
    magnitude=st.floats(0.0, 10.0),
    erase_probability=shares,
    mix_probability=shares,
    mixup_alpha=st.floats(0.0, 1e6),
)


@settings(deadline=None, max_examples=60)
@given(recipes)
def test_json_gives_back_an_equal_recipe(recipe: Recipe) -> None:
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_presets_are_those_a_pipeline_can_name() -> None:
    field = next(f for f in dataclasses.fields(ViewsConfig) if f.name == "recipe")
    assert tuple(RECIPES) == field.metadata["choices"]
    for name in RECIPES:
        assert make_recipe(ViewsConfig(recipe=name)) == RECIPES[name]


def test_the_vkd_preset_is_the_reference_recipe(reference_facts: dict[str, Any]) -> None:
    details, vkd = reference_facts["deit_train_transform_details"], RECIPES["vkd"]
    assert list(vkd.scale) == details["crop_scale"]
    assert list(vkd.ratio) == details["crop_ratio"]
    assert details["crop_interpolation"].endswith(vkd.interpolation.upper())
    assert vkd.flip_probability == details["hflip_p"]
    assert list(vkd.blur_radius) == details["blur_radius"]
    for low, high in details["jitter_brightness_contrast_saturation"]:
        assert (low, high) == (1 - vkd.jitter, 1 + vkd.jitter)
    assert (vkd.mix_probability, vkd.mixup_alpha, vkd.cutmix_alpha, vkd.cutmix_switch) == (1.0, 0.8, 1.0, 0.5)
    assert (vkd.colour, vkd.erase_probability, vkd.solarise_threshold) == ("three_augment", 0.0, 128)


def test_a_section_overrides_size_and_mixing() -> None:
    views = ViewsConfig(recipe="vkd", size_px=32, mix_probability=0.25, mixup_alpha=0.0, cutmix_switch=0.0)
    recipe = make_recipe(views)
    assert (recipe.size_px, recipe.mix_probability, recipe.mixup_alpha, recipe.cutmix_switch) == (32, 0.25, 0.0, 0.0)
    assert recipe.mixes
    assert not dataclasses.replace(recipe, cutmix_alpha=0.0).mixes
    assert not make_recipe(ViewsConfig(recipe="none")).mixes
    assert make_recipe(ViewsConfig(recipe="none", mix_probability=1.0)).mixes


@pytest.mark.parametrize("name", ["vkd", "randaugment", "crop_flip", "none", "vidt"])
def test_a_section_decides_on_mirroring(name: str) -> None:
    """Never, always, or or as the recipe does."""
    never, always, own = (make_recipe(ViewsConfig(recipe=name, flip_probability=p)) for p in (0.0, 1.0, None))
    assert own.flip_probability == RECIPES[name].flip_probability
    for view in range(20):
        flips = [plan_view(recipe, 3, "key", view, width_px=640, height_px=480).flip for recipe in (never, always)]
        assert flips == [False, True]


def test_an_unknown_preset_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"found 'vdk', expected one of vkd, randaugment, crop_flip, none"):
        make_recipe(ViewsConfig(recipe="vdk"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size_px", 0),
        ("size_px", 65_536),
        ("crop_fraction", 0.0),
        ("flip_probability", 1.5),
        ("scale", (0.5, 0.2)),
        ("ratio", (0.0, 1.0)),
        ("erase_area", (0.1, 1.1)),
        ("blur_radius", (-1.0, 1.0)),
        ("jitter", 2.0),
        ("solarise_threshold", 257),
        ("num_ops", -1),
        ("magnitude", 11.0),
        ("magnitude_std", float("inf")),
        ("mixup_alpha", float("nan")),
    ],
)
def test_values_that_cannot_be_drawn_from_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"recipe 'vkd': {field}: found .* expected"):
        dataclasses.replace(RECIPES["vkd"], **{field: value})


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(ConfigError, match=r"(?s)jitter.*magnitude"):
        Recipe(name="x", jitter=-1.0, magnitude=99.0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size_px": None}, "missing field 'size_px'"),
        ({"hue": 0.1}, "unknown field 'hue'"),
        ({"colour": "sepia"}, "field 'colour': found 'sepia', expected one of three_augment"),
        ({"scale": [0.1]}, "field 'scale': found .* expected two numbers"),
        ({"scale": [0.1, "1"]}, "field 'scale': found '1', expected float"),
        ({"size_px": 2.5}, "field 'size_px': found 2.5, expected int"),
        ({"num_ops": True}, "field 'num_ops': found True, expected int"),
        ({"name": 3}, "field 'name': found 3, expected str"),
        ({"jitter": 7}, "jitter: found 7"),
    ],
)
def test_a_manifests_recipe_is_read_strictly(change: dict[str, Any], text: str) -> None:
    document = RECIPES["vkd"].to_json() | change
    with pytest.raises(CacheFormatError, match=text):
        Recipe.from_json({name: value for name, value in document.items() if value is not None})


def test_planning_and_rendering_import_no_torch() -> None:
    script = "import sys, vkd_cache.views; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.fixture
def reference_facts() -> dict[str, Any]:
    from pathlib import Path

    facts: dict[str, Any] = json.loads((Path(__file__).parent / "reference" / "misc_facts.json").read_text())
    return facts
