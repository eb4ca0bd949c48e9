"""The teacher's values on the first samples of the first unit: what codecs are measured on.

A newcomer's trap: the sample is the same whatever share of the units a worker has, or every worker would decide for
itself.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.cache.codecs import enough_to_measure
from vkd_cache.cache.units import UnitId
from vkd_cache.errors import SourceError, TeacherError, VkdCacheError
from vkd_cache.sources import Source
from vkd_cache.stages.rendering import Renderer
from vkd_cache.stages.stored_pixels import StoredPixels
from vkd_cache.stages.teaching import TeacherRun, taught_batches
from vkd_cache.stages.transfer import model_input
from vkd_cache.stages.unit_tokens import on_host, stored_dtype
from vkd_cache.stages.units import Output, finite_rows, unit_tasks
from vkd_cache.tokens import Tokens, join_tokens
from vkd_cache.views.recipe import Recipe


def probe_teacher(
    source: Source, recipe: Recipe, seed: int, run: TeacherRun, stored: StoredPixels | None = None
) -> dict[str, Output]:
    """Node values (n, ...) or tokens of n images of the first unit that has any.

    As many batches as it takes (`enough_to_measure`). Broken images, unreadable files and
    features that are not finite are left out: the units they belong to will tell.

    Raises:
        SourceError, TeacherError: there is no sample with finite features.
    """
    renderer = Renderer(source, recipe, seed, stored=stored)
    why: VkdCacheError | None = None
    for shard in range(len(source.shards)):
        found: list[dict[str, Output]] = []
        for batch, pixels in taught_batches(
            renderer, unit_tasks(source, recipe, seed, UnitId(shard, 0), run.batch_size), 0, run
        ):
            why = why or batch.error
            if batch.error is not None or not batch.ok.any():
                continue
            outputs = run(model_input(batch, pixels))
            kept = _finite_part({name: _on_host(values) for name, values in outputs.items()}, batch.ok)
            if kept is None:
                why = why or TeacherError(
                    f"{run.teacher.identity['name']}: gives features that are not finite. Under float16 autocast "
                    "values overflow at 65504: use [extract] autocast = 'bfloat16' or 'off'."
                )
                continue
            found.append(kept)
            if _enough(found):
                break
        if found:
            return {name: _together([part[name] for part in found]) for name in found[0]}
    raise why or SourceError(f"{source.location}: not one of its images can be decoded.")


def _on_host(values: Output) -> Output:
    return on_host(values) if isinstance(values, Tokens) else values.to(stored_dtype(values, None)).cpu()


def _finite_part(outputs: Mapping[str, Output], ok: npt.NDArray[np.bool_]) -> dict[str, Output] | None:
    """The rows that are `ok` and finite in every node; None if there is none."""
    keep = ok.copy()
    for values in outputs.values():
        keep &= finite_rows(values)
    if not keep.any():
        return None
    rows = np.flatnonzero(keep)
    return {
        name: values.select(rows) if isinstance(values, Tokens) else values[torch.from_numpy(rows)]
        for name, values in outputs.items()
    }


def _enough(found: Sequence[Mapping[str, Output]]) -> bool:
    samples = sum(len(next(iter(part.values()))) for part in found)
    tokens = sum(len(values.values) for part in found for values in part.values() if isinstance(values, Tokens))
    return enough_to_measure(samples, tokens)


def _together(parts: Sequence[Output]) -> Output:
    tokens = [part for part in parts if isinstance(part, Tokens)]
    return join_tokens(tokens) if tokens else torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
