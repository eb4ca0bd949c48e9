"""Views: deterministic augmented renderings of samples, as plans of resolved params.

Nothing exported here imports torch; blending on the device is in `vkd_cache.views.blend`.
"""

from vkd_cache.views.decode import decode_image
from vkd_cache.views.mixing import drop_partners, pair_slots, plan_mixing
from vkd_cache.views.params import MixPlan, ViewParams
from vkd_cache.views.plan import plan_view
from vkd_cache.views.recipe import Recipe
from vkd_cache.views.render import pixel_digest, render_view

__all__ = [
    "MixPlan",
    "Recipe",
    "ViewParams",
    "decode_image",
    "drop_partners",
    "pair_slots",
    "pixel_digest",
    "plan_mixing",
    "plan_view",
    "render_view",
]
