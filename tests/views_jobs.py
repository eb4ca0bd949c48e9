"""What tests of rendering share with the processes they spawn; light to import."""

import dataclasses

import numpy as np
from PIL import Image

from vkd_cache.views.plan import plan_view
from vkd_cache.views.recipe import RECIPES
from vkd_cache.views.render import pixel_digest, render_view

SMALL = {
    name: dataclasses.replace(recipe, size_px=32) for name, recipe in RECIPES.items() if recipe.detection is None
}


def render_digest(job: tuple[str, int, int, int]) -> int:
    """Plan and render (recipe, seed, sample, view); top level, so that a spawned process can run it."""
    name, seed, sample, view = job
    width, height = 40 + 7 * sample % 60, 30 + 11 * sample % 50
    params = plan_view(SMALL[name], seed, f"class/{sample}", view, width_px=width, height_px=height)
    return pixel_digest(render_view(picture(width, height), params, SMALL[name]))


def picture(width: int, height: int) -> Image.Image:
    """A picture with detail at every scale, a pure function of its size."""
    y, x = np.mgrid[:height, :width]
    bands = [127 + 80 * np.sin(x / 9.0 + c) + 47 * np.cos(y / (2.0 + c) + x * y / 300.0) for c in range(3)]
    return Image.fromarray(np.stack(bands, axis=2).astype(np.uint8))
