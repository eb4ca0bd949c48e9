"""Rendering views in worker processes: every stage that needs pixels asks for them as tasks, here.

One task is one batch. A worker reads, decodes, plans (or replays stored params) and renders it; nothing about the
result depends on which worker does it or when. Mixing is *not* done here: a batch carries the unmixed 8-bit views, both
members of a pair together, and `vkd_cache.views.blend` mixes them on the device.

Shape legend: b samples of a batch, H = W = the recipe's size in pixels; detection: H and W have room for every canvas.
"""

import dataclasses
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.cache.pixel_codecs import EncodedViews
from vkd_cache.errors import BrokenImageError, CorruptCacheError, VkdCacheError
from vkd_cache.runtime import library_versions
from vkd_cache.sources import Source
from vkd_cache.stages.layout import ViewLayout, detection_source, layout_of
from vkd_cache.stages.shared_blocks import Empty, private_empty
from vkd_cache.stages.stored_pixels import StoredPixels
from vkd_cache.stages.worker_pool import WorkerPool
from vkd_cache.views.blend import colour_rows
from vkd_cache.views.boxes import ViewBoxes
from vkd_cache.views.decode import decode_image, decode_pixels
from vkd_cache.views.mixing import drop_partners
from vkd_cache.views.params import Columns, MixPlan, ViewParams, params_from_columns, params_to_columns
from vkd_cache.views.plan import plan_view
from vkd_cache.views.recipe import Recipe
from vkd_cache.views.render import image_size, pixel_digest, render_view


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RenderTask:
    """One batch to render.

    Attributes:
        tag: what the caller needs to recognise the batch; returned untouched.
        shard: (b,) int64 shard indices.
        row: (b,) int64 rows within their shards.
        view: the view of all samples.
        mix: mixing with `partner` as positions *within this batch*; None: no mixing.
        params: stored param columns, b rows; None: plan the views.
        digest: (b,) uint64 stored pixel digests, where `check` asks for them.
        check: (b,) bool, which digests to compare.
        stored: pixels to decode, with `params`, instead of reading and rendering the images; None: those are rendered.
    """

    tag: Any
    shard: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    view: int
    mix: MixPlan | None = None
    params: Columns | None = None
    digest: npt.NDArray[np.uint64] | None = None
    check: npt.NDArray[np.bool_] | None = None
    stored: EncodedViews | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class RenderedBatch:
    """A rendered task.

    Attributes:
        tag, shard, row, view: as in the task.
        pixels: (b, H, W, 3) uint8; zeros where the image is broken, and outside the view of a detection image.
        label: (b,) int64 class; detection: what `Shard.labels` has.
        ok: (b,) bool; False where the image is broken.
        broken: (position, reason) of the broken images.
        mix: the task's mixing, with the partners of broken images unmixed.
        columns: param columns of all b rows and `digest` (b,) uint64; rows of broken images hold zeros.
        view_size: detection: (b, 2) int64 (height, width) of each view, in the top left corner of `pixels`; those of
            broken images too.
        canvas: detection: (b, 2) int64 (height, width) of each view's canvas.
        boxes: detection: what there is to find in each view.
        colour: fast recipes with colour operations: (b, 3) float32 of `colour_rows`, for `adjust_colour`.
        stored: rendered views as their cache stores them, broken ones empty; None: it does not, or has them already.
        error: what stopped the task, if anything did; then the arrays mean nothing.
    """

    tag: Any
    shard: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    view: int
    pixels: torch.Tensor
    label: torch.Tensor
    ok: npt.NDArray[np.bool_]
    broken: list[tuple[int, str]]
    mix: MixPlan | None
    columns: dict[str, npt.NDArray[np.generic]]
    view_size: npt.NDArray[np.int64] | None = None
    canvas: npt.NDArray[np.int64] | None = None
    boxes: list[ViewBoxes] | None = None
    colour: torch.Tensor | None = None
    stored: EncodedViews | None = None
    error: VkdCacheError | None = None


def keep_rows(rendered: RenderedBatch, keep: npt.NDArray[np.integer]) -> None:
    """Leave only some rows, in the order given; both members of a mixed pair must be among them, or neither.

    The canvases do not change, so `pixels` keeps its height and width.

    Args:
        rendered: changed in place; `broken` stays as it is.
        keep: positions, all different.
    """
    chosen = torch.from_numpy(np.asarray(keep, np.int64))
    rendered.pixels, rendered.label = rendered.pixels[chosen], rendered.label[chosen]
    rendered.colour = None if rendered.colour is None else rendered.colour[chosen]
    if rendered.mix is not None:
        where = np.zeros(len(rendered.ok), np.uint32)
        where[keep] = np.arange(len(keep))
        mix = rendered.mix
        rendered.mix = MixPlan(
            partner=where[mix.partner[keep]], kind=mix.kind[keep], lam=mix.lam[keep], box=mix.box[keep]
        )
    rendered.shard, rendered.row, rendered.ok = rendered.shard[keep], rendered.row[keep], rendered.ok[keep]
    rendered.columns = {name: values[keep] for name, values in rendered.columns.items()}
    rendered.stored = None if rendered.stored is None else rendered.stored.take(keep)
    if rendered.view_size is not None and rendered.canvas is not None and rendered.boxes is not None:
        rendered.view_size, rendered.canvas = rendered.view_size[keep], rendered.canvas[keep]
        rendered.boxes = [rendered.boxes[position] for position in keep.tolist()]


class Renderer:
    """Renders tasks of one source under one recipe and cache seed; worker processes hold a copy each."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        seed: int,
        *,
        made_with: Mapping[str, str] | None = None,
        stored: StoredPixels | None = None,
    ) -> None:
        """
        Args:
            source: the images.
            recipe, seed: of the plan.
            made_with: library versions of the cache whose views are replayed, for messages.
            stored: how a cache stores the views, which are what that leaves of them; None: it does not.

        Raises:
            ConfigError: the recipe is not for this kind of data.
        """
        self.source = source
        self._boxed = detection_source(source, recipe)
        self.recipe = recipe
        self._decode = decode_pixels if recipe.fast else decode_image
        self._maps_colour = recipe.colour_kernel == "affine"
        self.seed = seed
        self._made_with = made_with
        self._stored = stored

    def __getitem__(self, task: RenderTask) -> RenderedBatch:
        """Render one task; an error is returned in the batch, so that the caller decides what it stops."""
        return self.render(task, private_empty)

    def render(self, task: RenderTask, empty: Empty) -> RenderedBatch:
        """The same, with pixels in memory that `empty` gives."""
        count = len(task.row)
        known = [self._known_params(task, position) for position in range(count)]
        layout = self._layout(task, known)
        frame = (self.recipe.size_px, self.recipe.size_px) if layout is None else layout.frame
        pixels = empty((count, *frame, 3))
        if layout is not None:
            pixels.fill(0)  # canvases are larger than views
        params: list[ViewParams] = []
        digests = np.zeros(count, np.uint64)
        stored = [b""] * count
        broken: list[tuple[int, str]] = []
        error: VkdCacheError | None = None
        try:
            for position in range(count):
                try:
                    if task.stored is not None:
                        view_params, content = self._stored_view(task, position, known[position], pixels[position])
                    else:
                        view_params, content = self._render(task, position, known[position])
                        if self._stored is not None:
                            stored[position], content = self._stored.stored(content)
                    digests[position] = pixel_digest(content)
                    pixels[position, : content.shape[0], : content.shape[1]] = content
                    self._check_digest(task, position, int(digests[position]))
                except BrokenImageError as reason:
                    broken.append((position, str(reason)))
                    view_params = _NO_PARAMS
                params.append(view_params)
        except VkdCacheError as caught:
            error = caught
            params = [_NO_PARAMS] * count
        ok = np.ones(count, np.bool_)
        ok[[position for position, _ in broken]] = False
        pixels[~ok] = 0
        mix = task.mix
        if mix is not None and broken:
            mix = drop_partners(mix, np.flatnonzero(~ok))
        shards = self.source.shards
        labels = [int(shards[s].labels[r]) for s, r in zip(task.shard, task.row, strict=True)]
        return RenderedBatch(
            tag=task.tag,
            shard=task.shard,
            row=task.row,
            view=task.view,
            pixels=torch.from_numpy(pixels),
            label=torch.tensor(labels, dtype=torch.int64),
            ok=ok,
            broken=broken,
            mix=mix,
            columns=params_to_columns(params, self.recipe.max_ops, sized=layout is not None) | {"digest": digests},
            view_size=None if layout is None else layout.view_size,
            canvas=None if layout is None else layout.canvas,
            boxes=None if layout is None else layout.boxes,
            colour=colour_rows(pixels, [view.ops for view in params]) if self._maps_colour else None,
            stored=EncodedViews.joined(stored) if self._stored is not None and task.stored is None else None,
            error=error,
        )

    def _known_params(self, task: RenderTask, position: int) -> ViewParams | None:
        """What is known of a view before its image is read: all of it, unless the image's size must be seen first."""
        if task.params is not None:
            return params_from_columns(task.params, position)
        if self._boxed is None:
            return None
        shard, row = int(task.shard[position]), int(task.row[position])
        return self._plan(shard, row, task.view, self._boxed.image_size(shard, row))

    def _plan(self, shard: int, row: int, view: int, size: tuple[int, int]) -> ViewParams:
        key = self.source.shards[shard].keys[row]
        return plan_view(self.recipe, self.seed, key, view, width_px=size[0], height_px=size[1])

    def _layout(self, task: RenderTask, known: Sequence[ViewParams | None]) -> ViewLayout | None:
        if self._boxed is None:
            return None
        params = [view for view in known if view is not None]
        return layout_of(self._boxed, self.recipe, task.shard, task.row, params)

    def _render(
        self, task: RenderTask, position: int, params: ViewParams | None
    ) -> tuple[ViewParams, npt.NDArray[np.uint8]]:
        shard, row = int(task.shard[position]), int(task.row[position])
        image = self._decode(self.source.read(shard, row), oriented=self._boxed is None)
        size = image_size(image)
        if params is None:
            params = self._plan(shard, row, task.view, size)
        found, expected = (f"{width}x{height}" for width, height in (size, params.source_size))
        if found != expected:
            if task.params is None:
                raise BrokenImageError(f"image of {found} pixels, {expected} in the annotation file")
            raise CorruptCacheError(
                f"{self.source.location}: image of key '{self.source.shards[shard].keys[row]}', view {task.view}, "
                f"is {found} pixels, the teacher saw one of {expected}. {self._what_changed()}"
            )
        return params, render_view(image, params, self.recipe)

    def _stored_view(
        self, task: RenderTask, position: int, params: ViewParams | None, room: npt.NDArray[np.uint8]
    ) -> tuple[ViewParams, npt.NDArray[np.uint8]]:
        """A view from its stored pixels, in `room` where it fills that, without a look at the image."""
        if self._stored is None or task.stored is None or params is None:
            raise ValueError("RenderTask: found stored pixels, expected params too, and a renderer of such views.")
        height, width = params.view_size if self._boxed is not None else room.shape[:2]
        content = room if (height, width) == room.shape[:2] else np.empty((height, width, 3), np.uint8)
        self._stored.decode(task.stored[position], content, f"view {task.view} of key '{self._key(task, position)}'")
        return params, content

    def _key(self, task: RenderTask, position: int) -> str:
        return self.source.shards[int(task.shard[position])].keys[int(task.row[position])]

    def _check_digest(self, task: RenderTask, position: int, digest: int) -> None:
        if task.digest is None or task.check is None or not task.check[position]:
            return
        expected = int(task.digest[position])
        if digest != expected:
            key = self._key(task, position)
            if self._stored is not None and task.stored is not None:
                raise self._stored.other_pixels(f"view {task.view} of key '{key}'", digest, expected)
            raise CorruptCacheError(
                f"{self.source.location}: view {task.view} of key '{key}' renders to pixels with digest "
                f"{digest:016x}, the teacher saw {expected:016x}. {self._what_changed()}"
            )

    def _what_changed(self) -> str:
        theirs = f", {pixel_versions(self.recipe, self._made_with)} when the cache was made" if self._made_with else ""
        here = pixel_versions(self.recipe)
        return f"The image file or the decoder changed: {here} here{theirs}. Use the images of the cache."


_NO_PARAMS = ViewParams(seed=0, source_size=(0, 0), crop=(0, 0, 0, 0), flip=False, ops=())


def pixel_versions(recipe: Recipe, versions: Mapping[str, str] | None = None) -> str:
    """The versions that decide a view's pixels, as text; `versions`: those of a cache instead of this process'."""
    found = library_versions(*recipe.libraries) if versions is None else versions
    pillow = f"Pillow {found.get('pillow', 'unknown')} with libjpeg {found.get('libjpeg', 'unknown')}"
    if not recipe.fast:
        return pillow
    return f"simplejpeg {found.get('simplejpeg', 'unknown')}, torch {found.get('torch', 'unknown')} and {pillow}"


def render_loader(
    renderer: Renderer, tasks: Iterable[RenderTask], *, workers: int, pin_memory: bool = False
) -> Generator[RenderedBatch, None, None]:
    """Rendered batches in the order of `tasks`, made by `workers` processes (0: by this one).

    `tasks` is read lazily, a few batches ahead of what has been yielded, in this process. What stopped a task is not
    raised: it comes as `RenderedBatch.error`, and the caller decides. `pin_memory`: the copy to a GPU can overlap.

    Raises:
        SourceError: a worker process was killed.
    """
    finish = _Pinning() if pin_memory else None
    if not workers:
        for task in tasks:
            yield renderer[task] if finish is None else finish(renderer[task])
        return
    with WorkerPool(renderer.render, workers, name=renderer.source.location, finish=finish) as pool:
        yield from pool.results(tasks)


class _Pinning:
    """Moves batches to pinned memory, in the thread that receives them, for the GPU of the thread that made this."""

    def __init__(self) -> None:
        self._device = torch.cuda.current_device()

    def __call__(self, rendered: RenderedBatch) -> RenderedBatch:
        with torch.cuda.device(self._device):  # else this thread would start up the first GPU as well
            rendered.pixels = rendered.pixels.pin_memory()
            if rendered.colour is not None:
                rendered.colour = rendered.colour.pin_memory()
        return rendered
