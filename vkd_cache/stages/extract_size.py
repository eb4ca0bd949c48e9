"""How large a view will be in the cache, before any image is read.

A newcomer's trap: tokens are ragged. How many a view has follows from its planned size, so the estimate plans some
views of the data set; it knows nothing of compression, which tokens do not get anyway.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vkd_cache.cache.schema import NodeSpec
from vkd_cache.sources import CocoSource, Source, is_detection
from vkd_cache.teachers import DetectionTeacher, Teacher
from vkd_cache.views.plan import plan_view
from vkd_cache.views.recipe import Recipe
from vkd_cache.views.sizes import canvas_of

PLANNED_VIEWS = 512


def view_bytes(
    specs: Sequence[NodeSpec], source: Source, recipe: Recipe, seed: int, teacher: Teacher | DetectionTeacher
) -> float:
    """Mean bytes of the nodes of a view before compression; of tokens by the plans of at most PLANNED_VIEWS views."""
    size = float(sum(spec.sample_bytes for spec in specs))
    if is_detection(source) and isinstance(teacher, DetectionTeacher):
        counts = _token_counts(source, recipe, seed, teacher)
        size += sum(spec.token_bytes * _mean_kept(counts[spec.name], spec.tokens) for spec in specs)
    return size


def _mean_kept(counts: npt.NDArray[np.int64], share: float) -> float:
    return float(np.maximum(1, np.ceil(share * counts)).mean()) if len(counts) else 0.0


def _token_counts(
    source: CocoSource, recipe: Recipe, seed: int, teacher: DetectionTeacher
) -> dict[str, npt.NDArray[np.int64]]:
    """Tokens of each node for some views 0, spread over the data set."""
    ends = np.cumsum([len(shard.keys) for shard in source.shards])
    total = int(ends[-1]) if len(ends) else 0
    multiple_px = recipe.detection.canvas_multiple_px if recipe.detection is not None else 1
    found: list[dict[str, npt.NDArray[np.int64]]] = []
    for sample in range(0, total, max(1, -(-total // PLANNED_VIEWS))):
        shard = int(np.searchsorted(ends, sample, "right"))
        keys = source.shards[shard].keys
        row = sample - int(ends[shard]) + len(keys)
        width, height = source.image_size(shard, row)
        params = plan_view(recipe, seed, keys[row], 0, width_px=width, height_px=height)
        canvas = canvas_of(params.view_size, multiple_px)
        found.append(teacher.token_counts(np.array([params.view_size], np.int64), canvas))
    return {node: np.array([counts[node][0] for counts in found], np.int64) for node in teacher.nodes}
