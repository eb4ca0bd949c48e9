"""Second level of a verification: views rendered again from their stored params, and planned again from the seed.

A newcomer's trap: both are needed. Equal digests show that training will see what the teacher saw; an equal plan shows
where the params came from, so that further views belong to the same distribution. Of stored views both are checked:
what they decode to, and what comes of rendering and storing them again.

Shape legend: b rows of a task.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vkd_cache import console
from vkd_cache.cache.reader import Cache, Unit
from vkd_cache.cache.units import UnitId, record_path
from vkd_cache.detection.sampling import sample_places
from vkd_cache.sources import Source
from vkd_cache.stages.rendering import RenderedBatch, Renderer, RenderTask, pixel_versions, render_loader
from vkd_cache.stages.stored_pixels import StoredPixels
from vkd_cache.stages.verify_sample import Level
from vkd_cache.views.mixing import drop_partners, plan_mixing_in
from vkd_cache.views.params import params_from_columns, params_to_columns
from vkd_cache.views.plan import plan_view
from vkd_cache.views.recipe import Recipe
from vkd_cache.views.replay import replay_problem

_BATCH = 64  # views per render task
FEW_VIEWS = 512  # rendered here before worker processes would have started


def param_columns(recipe: Recipe) -> tuple[str, ...]:
    """Names of the columns that views of a recipe are replayed from."""
    return tuple(params_to_columns([], 0, sized=recipe.detection is not None))


class PixelCheck:
    """The pixels level over the chosen rows of a cache's units; `run` does it."""

    def __init__(self, cache: Cache, source: Source, level: Level) -> None:
        self._cache = cache
        self._source = source
        self._level = level
        self._recipe = cache.recipe
        self._stored = StoredPixels.of_cache(cache)
        self._renderer = Renderer(source, self._recipe, cache.manifest.seed, stored=self._stored)
        self._under_way: deque[tuple[RenderTask, Unit]] = deque()

    def run(self, chosen: Mapping[UnitId, npt.NDArray[np.int64]], workers: int) -> None:
        """Check `chosen` (rows of the source shards by unit) with `workers` processes."""
        total = sum(map(len, chosen.values()))
        loader = render_loader(self._renderer, self._tasks(chosen), workers=workers if total > FEW_VIEWS else 0)
        with console.track("verify pixels", total, "views") as progress:
            for batch in loader:
                task, unit = self._under_way.popleft()
                for at, part in enumerate(self._each(batch, task)):
                    if task.stored is not None:
                        self._check_stored(part, unit, int(task.row[at]))
                    else:
                        self._check_row(part, unit, int(task.row[at]))
                if task.stored is None:
                    self._level.checked += len(task.row)
                    progress.advance(len(task.row))

    def _tasks(self, chosen: Mapping[UnitId, npt.NDArray[np.int64]]) -> Iterator[RenderTask]:
        for unit_id, rows in chosen.items():
            unit = self._cache.read(*unit_id)
            problem = replay_problem(unit.columns, self._recipe)
            if problem is not None:
                self._level.error(record_path(unit.id), f"{problem}. Extract into another cache.")
                continue
            self._check_unit(unit)
            stored = np.isin(rows, unit.rows)
            # broken images have no params: they are planned, which gets no further than finding them broken
            for part, replayed in ((rows[stored], True), (rows[~stored], False)):
                for start in range(0, len(part), _BATCH):
                    batch_rows = part[start : start + _BATCH]
                    for task in self._tasks_of(unit, batch_rows, replayed):
                        self._under_way.append((task, unit))
                        yield task

    def _tasks_of(self, unit: Unit, rows: npt.NDArray[np.int64], replayed: bool) -> Iterator[RenderTask]:
        at = np.searchsorted(unit.rows, rows)
        task = RenderTask(
            tag=None,
            shard=np.full(len(rows), unit.id.shard, np.int64),
            row=rows,
            view=unit.id.view,
            params={name: unit.columns[name][at] for name in param_columns(self._recipe)} if replayed else None,
        )
        yield task
        if replayed and unit.pixels is not None:
            yield dataclasses.replace(task, stored=unit.pixels.take(at))

    def _each(self, batch: RenderedBatch, task: RenderTask) -> Iterator[tuple[RenderedBatch, int]]:
        """Every row as (batch, position in it); rows of a batch that met an error are rendered one by one."""
        for at in range(len(task.row)):
            if batch.error is None:
                yield batch, at
                continue
            one = slice(at, at + 1)
            params = None if task.params is None else {name: values[one] for name, values in task.params.items()}
            stored = None if task.stored is None else task.stored.take([at])
            shard, row = task.shard[one], task.row[one]
            single = RenderTask(tag=None, shard=shard, row=row, view=task.view, params=params, stored=stored)
            yield self._renderer[single], 0

    def _check_stored(self, rendered: tuple[RenderedBatch, int], unit: Unit, row: int) -> None:
        """What a stored view decodes to."""
        batch, at = rendered
        key = self._source.shards[unit.id.shard].keys[row]
        found, expected = int(batch.columns["digest"][at]), int(unit.columns["digest"][np.searchsorted(unit.rows, row)])
        error = batch.error
        if error is None and found != expected and self._stored is not None:
            error = self._stored.other_pixels(f"view {unit.id.view} of key '{key}'", found, expected)
        if error is not None:
            self._level.error(record_path(unit.id), str(error))

    def _check_row(self, rendered: tuple[RenderedBatch, int], unit: Unit, row: int) -> None:
        batch, at = rendered
        where = record_path(unit.id)
        key = self._source.shards[unit.id.shard].keys[row]
        if batch.error is not None:
            self._level.error(where, str(batch.error))
            return
        reasons = dict(batch.broken)
        place = int(np.searchsorted(unit.rows, row))
        if place == len(unit.rows) or unit.rows[place] != row:
            if at not in reasons:
                self._level.error(
                    where, f"image of key '{key}' is recorded as broken, but decodes here. Extract into another cache."
                )
            return
        if at in reasons:
            self._level.error(
                where, f"image of key '{key}' is broken ({reasons[at]}), but the teacher saw it whole. Restore it."
            )
            return
        found, stored = int(batch.columns["digest"][at]), int(unit.columns["digest"][place])
        if found != stored:
            self._level.error(
                where,
                f"view {unit.id.view} of key '{key}' renders to pixels with digest {found:016x}, the teacher saw "
                f"{stored:016x}. The image file or the decoder changed: {pixel_versions(self._recipe)} here, "
                f"{pixel_versions(self._recipe, self._cache.manifest.versions)} when the cache was made. "
                f"{self._stored.versions() if self._stored is not None else ''}".rstrip(),
            )
        self._check_plan(unit, place, key, where)
        self._check_sample(unit, place, key, where)

    def _check_plan(self, unit: Unit, place: int, key: str, where: str) -> None:
        """The seed proves where the params came from."""
        stored = params_from_columns(unit.columns, place)
        width, height = stored.source_size
        seed = self._cache.manifest.seed
        planned = plan_view(self._recipe, seed, key, unit.id.view, width_px=width, height_px=height)
        if planned != stored:
            self._level.error(
                where,
                f"view {unit.id.view} of key '{key}': found {stored}, cache seed {seed} plans {planned}. Its params "
                "are not those of the plan: extract into another cache.",
            )

    def _check_sample(self, unit: Unit, place: int, key: str, where: str) -> None:
        """Which tokens are stored is drawn from the seed, too."""
        for spec in self._cache.manifest.nodes:
            if spec.tokens == 1.0:
                continue
            stored = unit.tokens(spec.name, np.array([place]))
            count = int(stored.counts[0])
            planned = sample_places(self._cache.manifest.seed, key, unit.id.view, spec.name, count, spec.tokens)
            if stored.index is None or not np.array_equal(stored.index, planned):
                self._level.error(
                    where,
                    f"view {unit.id.view} of key '{key}': node '{spec.name}' holds other tokens than the "
                    f"{len(planned)} of {count} that the cache seed draws. Extract into another cache.",
                )

    def _check_unit(self, unit: Unit) -> None:
        """Keys, labels and mixing of a whole unit against source and plan: hashes only, nothing is decoded."""
        where = record_path(unit.id)
        shard = self._source.shards[unit.id.shard]
        rows = unit.rows.astype(np.int64)
        if unit.keys != [shard.keys[row] for row in rows]:
            self._level.error(where, f"holds other keys than shard {unit.id.shard} of {self._source.location}.")
            return
        if not len(rows):  # every image of the shard is broken
            return
        if not np.array_equal(unit.columns["label"], shard.labels[rows]):
            self._level.error(where, f"holds other labels than shard {unit.id.shard} of {self._source.location}.")
        groups = self._cache.record(*unit.id).planned_in or (len(shard.keys),)
        if sum(groups) != len(shard.keys):
            self._level.error(
                where, f"origin.planned_in: found {sum(groups)} samples in all, the shard has {len(shard.keys)}."
            )
            return
        plan = plan_mixing_in(groups, self._recipe, self._cache.manifest.seed, shard.keys, unit.id.view)
        broken = np.setdiff1d(np.arange(len(shard.keys)), rows)
        plan = drop_partners(plan, broken.tolist()) if len(broken) else plan
        planned: dict[str, npt.NDArray[Any]] = {
            "partner": plan.partner,
            "mix_kind": plan.kind,
            "mix_lambda": plan.lam,
            "mix_box": plan.box,
        }
        for name, values in planned.items():
            differing = (unit.columns[name] != values[rows]).reshape(len(rows), -1).any(1)
            if differing.any():
                first = int(np.flatnonzero(differing)[0])
                self._level.error(
                    where,
                    f"{name} of key '{unit.keys[first]}': found {unit.columns[name][first].tolist()}, the cache seed "
                    f"plans {values[rows[first]].tolist()}; {int(differing.sum())} rows differ.",
                )
