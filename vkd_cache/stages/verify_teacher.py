"""Third level of a verification: the teacher runs again on replayed views, and its values are compared.

A newcomer's trap: batches are put together anew here, and kernels add in another order for another batch. A stored
value may therefore differ by its codec's rounding and by the noise of the arithmetic that the manifest names.

Shape legend: b rows of a task.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache import console
from vkd_cache.cache.documents import Fields
from vkd_cache.cache.pixel_codecs import EncodedViews
from vkd_cache.cache.reader import MANIFEST_PATH, Cache, Unit
from vkd_cache.cache.units import UnitId, record_path
from vkd_cache.config import MAX_CLASSES, MAX_SIDE_PX, Config, ExtractConfig, TeacherConfig
from vkd_cache.errors import TeacherError
from vkd_cache.sources import Source
from vkd_cache.stages.ranks import take_device
from vkd_cache.stages.rendering import Renderer, RenderTask, render_loader
from vkd_cache.stages.stored_pixels import StoredPixels
from vkd_cache.stages.teaching import TeacherRun, start_teacher
from vkd_cache.stages.transfer import ahead_on_device, model_input
from vkd_cache.stages.unit_tokens import on_host
from vkd_cache.stages.verify_pixels import FEW_VIEWS, param_columns
from vkd_cache.stages.verify_sample import Level
from vkd_cache.stages.verify_tokens import Gap, tokens_gap
from vkd_cache.teachers import load_teacher, names_code
from vkd_cache.tokens import Tokens
from vkd_cache.views.params import MixPlan
from vkd_cache.views.recipe import Recipe
from vkd_cache.views.replay import replay_problem

# Noise of the arithmetic, as a share of the largest value of a sample: measured is a tenth of it or less.
_NOISE = {"off": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_NOISE_TF32 = 1e-2
_NOISE_OTHER_DEVICE = 1e-3
# GroupNorm divides by the spread of a group: on a small map (3 x 3 positions, 2 channels a group) a nearly constant
# group multiplies the noise of its input; 6e-4 was measured between batch sizes.
_NOISE_DETECTOR = 2e-3

_MAX_BATCH_VALUES = 2**28  # of one batch of pixels: a gigabyte in float32, whatever batch size a manifest asks for

Slot = tuple[int, ...]  # places in the unit that belong together: a mixed pair, or one row


class _Part(NamedTuple):
    """Rows of one unit within a task: places in the unit, and which of them were asked for (not just partners)."""

    unit: Unit
    place: npt.NDArray[np.int64]
    asked: npt.NDArray[np.bool_]


def check_teacher(
    cache: Cache, source: Source, config: Config, chosen: Mapping[UnitId, npt.NDArray[np.int64]], level: Level
) -> None:
    """Run the teacher again on `chosen` (rows of the source shards by unit) and compare.

    Raises:
        TeacherError: the teacher cannot be had.
    """
    run = _start(cache, config, level)
    if run is None:
        return
    recipe = cache.recipe
    under_way: deque[list[_Part]] = deque()
    tasks = _tasks(_replayable(cache, recipe, chosen, level), recipe, run.batch_size, under_way)
    renderer = Renderer(source, recipe, cache.manifest.seed, stored=StoredPixels.of_cache(cache))
    total = sum(map(len, chosen.values()))
    workers = config.extract.workers if total > FEW_VIEWS else 0
    loader = render_loader(renderer, tasks, workers=workers, pin_memory=run.device.type == "cuda")
    with console.track("verify teacher", total, "views") as progress:
        for batch, pixels in ahead_on_device(loader, run.device):
            parts = under_way.popleft()
            if batch.error is not None or batch.broken:
                reason = str(batch.error) if batch.error is not None else f"broken image: {batch.broken[0][1]}"
                level.error(MANIFEST_PATH, f"views cannot be replayed ({reason}): see `verify --pixels`.")
                continue
            _compare(cache, run, parts, run(model_input(batch, pixels)), level)
            progress.advance(sum(int(part.asked.sum()) for part in parts))


def _start(cache: Cache, config: Config, level: Level) -> TeacherRun | None:
    """The teacher as the manifest describes it; None, with the reasons noted, if it is not the same one."""
    manifest = cache.manifest
    stored: dict[str, Any] = manifest.teacher
    recipe = cache.recipe
    wanted, run_as = _wanted(cache, config, recipe)
    nodes = [spec.name for spec in manifest.nodes]
    teacher = load_teacher(
        wanted, nodes=nodes, num_classes=manifest.dataset["num_classes"], view_px=recipe.size_px
    )
    differing = [name for name in sorted(stored | teacher.identity) if stored.get(name) != teacher.identity.get(name)]
    for name in differing:
        message = f"teacher.{name}: found {teacher.identity.get(name)!r}, the cache was made with {stored.get(name)!r}."
        if name == "timm":
            level.note(MANIFEST_PATH, message)
        else:
            level.error(MANIFEST_PATH, f"{message} Give the same teacher and --teacher-weights.")
    if set(differing) - {"timm"}:
        return None
    run = start_teacher(teacher, run_as, take_device(config.extract.device), padded=False)
    then = manifest.numerics["device"]
    if run.device.type != then:
        level.note(MANIFEST_PATH, f"the teacher runs on {run.device.type} here, it ran on {then} then.")
    return run


def _wanted(cache: Cache, config: Config, recipe: Recipe) -> tuple[TeacherConfig, ExtractConfig]:
    """Which teacher to build and how to run it: what the manifest says, where the user says nothing.

    Raises:
        CacheFormatError: the manifest does not say it, or something absurd.
        TeacherError: it names a callable that the user did not name.
    """
    where = f"{cache.url}/{MANIFEST_PATH}"
    teacher = Fields(cache.manifest.teacher, where, "teacher.")
    numerics = Fields(cache.manifest.numerics, where, "numerics.")
    name = teacher.text("name")
    if names_code(name) and config.teacher.name != name:
        raise TeacherError(
            f"{where}: the cache was made with teacher {name!r}, which is code on this machine that the cache asks to "
            f"run. If you know it and want that, name it yourself: --teacher-name {name}."
        )
    num_classes, input_px = teacher.whole("num_classes", 0, MAX_CLASSES), teacher.whole("input_px", 0, MAX_SIDE_PX)
    wanted = TeacherConfig(
        name=config.teacher.name or name,
        weights=config.teacher.weights,
        num_classes=config.teacher.num_classes or num_classes,
        input_px=config.teacher.input_px or input_px,
    )
    sides = (recipe.size_px, recipe.size_px)
    if recipe.detection is not None:
        sides = (max(recipe.detection.scales), recipe.detection.max_size_px)
    fitting = max(2, _MAX_BATCH_VALUES // max(3 * sides[0] * sides[1], 3 * input_px**2))
    run_as = dataclasses.replace(
        config.extract,
        batch_size=min(numerics.whole("batch_size", 1), fitting),
        autocast=numerics.text("autocast", tuple(_NOISE)),
        channels_last=_flag(numerics, "channels_last"),
        compile=_flag(numerics, "compiled"),
    )
    _flag(numerics, "tf32")
    numerics.text("device")
    return wanted, run_as


def _flag(fields: Fields, name: str) -> bool:
    value = fields.body.get(name)
    if not isinstance(value, bool):
        raise fields.refuse(name, "true or false")
    return value


def _replayable(
    cache: Cache, recipe: Recipe, chosen: Mapping[UnitId, npt.NDArray[np.int64]], level: Level
) -> Iterator[tuple[Unit, npt.NDArray[np.int64]]]:
    """Units by view and shard, with the places in them that were asked for; those that cannot be rendered are noted."""
    for unit_id in sorted(chosen, key=lambda unit: (unit.view, unit.shard)):
        unit = cache.read(*unit_id)
        problem = replay_problem(unit.columns, recipe)
        if problem is None:
            yield unit, np.flatnonzero(np.isin(unit.rows, chosen[unit_id]))
        else:
            level.error(record_path(unit_id), f"{problem}. Extract into another cache.")


def _tasks(
    units: Iterator[tuple[Unit, npt.NDArray[np.int64]]],
    recipe: Recipe,
    batch_size: int,
    under_way: deque[list[_Part]],
) -> Iterator[RenderTask]:
    """Tasks of at most `batch_size` rows, each of one view, with partners; their parts are queued in `under_way`."""
    waiting: list[_Part] = []
    count = 0
    for unit, asked in units:
        if waiting and waiting[0].unit.id.view != unit.id.view:
            yield _task(waiting, recipe, under_way)
            waiting, count = [], 0
        slots = _slots(unit, asked)
        while slots:
            places: list[int] = []
            while slots and count + len(places) + len(slots[0]) <= batch_size:
                places += slots.popleft()
            if places:
                place = np.array(places, np.int64)
                waiting.append(_Part(unit, place, np.isin(place, asked)))
                count += len(places)
            if slots:
                yield _task(waiting, recipe, under_way)
                waiting, count = [], 0
    if waiting:
        yield _task(waiting, recipe, under_way)


def _slots(unit: Unit, asked: npt.NDArray[np.int64]) -> deque[Slot]:
    """The places of a unit to render: what is asked for, each with its partner."""
    partner = np.searchsorted(unit.rows, unit.columns["partner"][asked])
    pairs = zip(asked.tolist(), partner.tolist(), strict=True)
    return deque(dict.fromkeys(tuple(sorted({one, other})) for one, other in pairs))


def _task(parts: list[_Part], recipe: Recipe, under_way: deque[list[_Part]]) -> RenderTask:
    under_way.append(list(parts))
    starts = np.cumsum([0, *(len(part.place) for part in parts)])
    partner = np.concatenate([start + _partner(part) for start, part in zip(starts[:-1], parts, strict=True)])
    columns = {
        name: np.concatenate([part.unit.columns[name][part.place] for part in parts])
        for name in (*param_columns(recipe), "mix_kind", "mix_lambda", "mix_box")
    }
    kind, lam, box = (columns.pop(name) for name in ("mix_kind", "mix_lambda", "mix_box"))
    return RenderTask(
        tag=None,
        shard=np.concatenate([np.full(len(part.place), part.unit.id.shard, np.int64) for part in parts]),
        row=np.concatenate([part.unit.rows[part.place].astype(np.int64) for part in parts]),
        view=parts[0].unit.id.view,
        mix=MixPlan(
            partner=partner.astype(np.uint32),
            kind=kind.astype(np.uint8),
            lam=lam.astype(np.float32),
            box=box.astype(np.uint16),
        ),
        params=columns,
        stored=_stored_views(parts),
    )


def _stored_views(parts: list[_Part]) -> EncodedViews | None:
    """The pixels that the teacher saw, where the cache stores them."""
    found = [(part.unit.pixels, part.place.tolist()) for part in parts]
    views = [pixels[place] for pixels, places in found if pixels is not None for place in places]
    return EncodedViews.joined(views) if views else None


def _partner(part: _Part) -> npt.NDArray[np.int64]:
    """Position of each row's partner within the part."""
    position = np.zeros(len(part.unit), np.int64)
    position[part.place] = np.arange(len(part.place))
    partner: npt.NDArray[np.int64] = position[
        np.searchsorted(part.unit.rows, part.unit.columns["partner"][part.place])
    ]
    return partner


def _compare(
    cache: Cache, run: TeacherRun, parts: list[_Part], outputs: Mapping[str, torch.Tensor | Tokens], level: Level
) -> None:
    start = 0
    noise = _noise(cache, run)
    for part in parts:
        asked = np.flatnonzero(part.asked)
        place = part.place[asked]
        for name, values in outputs.items():
            if isinstance(values, Tokens):
                image = on_host(values.select(start + asked))
                gap = tokens_gap(image, part.unit, name, place, max(noise, _NOISE_DETECTOR))
            else:
                gap = _dense_gap(values.cpu()[torch.from_numpy(start + asked)], part.unit, name, place, noise)
            _note(cache, name, (part.unit, place), gap, level)
        level.checked += len(asked)
        start += len(part.place)


def _dense_gap(
    values: torch.Tensor, unit: Unit, name: str, place: npt.NDArray[np.int64], noise: float
) -> Gap:
    found, stored = values.float(), unit.node(name, place).float()
    allowed = noise * found.flatten(1).abs().amax(1).reshape([-1] + [1] * (found.ndim - 1))
    excess = ((found - stored).abs() - unit.rounding(name, place) - allowed).flatten(1).amax(1)
    error = (found - stored).flatten(1).norm(dim=1) / found.flatten(1).norm(dim=1).clamp_min(1e-12)
    return Gap((excess <= 0).numpy(), error.numpy())  # nan is no pass


def _note(cache: Cache, name: str, at: tuple[Unit, npt.NDArray[np.int64]], gap: Gap, level: Level) -> None:
    unit, place = at
    largest = f"{name}_error"
    level.measured[largest] = max(level.measured.get(largest, 0.0), float(gap.error.max()))
    for row in np.flatnonzero(~gap.explained).tolist():
        level.error(
            record_path(unit.id),
            f"node '{name}' of key '{unit.keys[place[row]]}', view {unit.id.view}: the teacher's values differ from "
            f"the stored ones by {float(gap.error[row]):.2g} of their norm, more than codec "
            f"{cache.manifest.node(name).codec} and arithmetic explain. Extract into another cache.",
        )


def _noise(cache: Cache, run: TeacherRun) -> float:
    numerics = cache.manifest.numerics
    noise = _NOISE[run.autocast]
    if numerics["tf32"] or run.numerics()["tf32"]:
        noise = max(noise, _NOISE_TF32)
    if numerics["device"] != run.device.type:
        noise = max(noise, _NOISE_OTHER_DEVICE)
    return noise
