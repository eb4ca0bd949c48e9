"""Rendering views in worker processes: every stage that needs pixels asks for them as tasks, here.

One task is one batch. A worker reads, decodes, plans (or replays stored params) and renders it; nothing about the
result depends on which worker does it or when. Mixing is *not* done here: a batch carries the unmixed 8-bit views, both
members of a pair together, and `vkd_cache.views.blend` mixes them on the device.

Shape legend: b samples of a batch, H = W = the recipe's size in pixels; detection: H and W have room for every canvas.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.errors import BrokenImageError, CorruptCacheError, SourceError, VkdCacheError
from vkd_cache.runtime import library_versions
from vkd_cache.sources import Source
from vkd_cache.stages.layout import ViewLayout, detection_source, layout_of
from vkd_cache.views.boxes import ViewBoxes
from vkd_cache.views.decode import decode_image
from vkd_cache.views.mixing import drop_partners
from vkd_cache.views.params import Columns, MixPlan, ViewParams, params_from_columns, params_to_columns
from vkd_cache.views.plan import plan_view
from vkd_cache.views.recipe import Recipe
from vkd_cache.views.render import pixel_digest, render_view


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
    """

    tag: Any
    shard: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    view: int
    mix: MixPlan | None = None
    params: Columns | None = None
    digest: npt.NDArray[np.uint64] | None = None
    check: npt.NDArray[np.bool_] | None = None


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
    error: VkdCacheError | None = None

    def pin_memory(self) -> "RenderedBatch":
        """Called by the loader, so that the copy to a GPU can overlap."""
        self.pixels = self.pixels.pin_memory()
        return self


def keep_rows(rendered: RenderedBatch, keep: npt.NDArray[np.integer]) -> None:
    """Leave only some rows, in the order given; both members of a mixed pair must be among them, or neither.

    The canvases do not change, so `pixels` keeps its height and width.

    Args:
        rendered: changed in place; `broken` stays as it is.
        keep: positions, all different.
    """
    chosen = torch.from_numpy(np.asarray(keep, np.int64))
    rendered.pixels, rendered.label = rendered.pixels[chosen], rendered.label[chosen]
    if rendered.mix is not None:
        where = np.zeros(len(rendered.ok), np.uint32)
        where[keep] = np.arange(len(keep))
        mix = rendered.mix
        rendered.mix = MixPlan(
            partner=where[mix.partner[keep]], kind=mix.kind[keep], lam=mix.lam[keep], box=mix.box[keep]
        )
    rendered.shard, rendered.row, rendered.ok = rendered.shard[keep], rendered.row[keep], rendered.ok[keep]
    rendered.columns = {name: values[keep] for name, values in rendered.columns.items()}
    if rendered.view_size is not None and rendered.canvas is not None and rendered.boxes is not None:
        rendered.view_size, rendered.canvas = rendered.view_size[keep], rendered.canvas[keep]
        rendered.boxes = [rendered.boxes[position] for position in keep.tolist()]


class Renderer(torch.utils.data.Dataset[RenderedBatch]):
    """Renders tasks of one source under one recipe and cache seed; the loader's workers hold a copy each."""

    def __init__(
        self, source: Source, recipe: Recipe, seed: int, *, made_with: Mapping[str, str] | None = None
    ) -> None:
        """`made_with`: library versions of the cache whose views are replayed, for messages.

        Raises:
            ConfigError: the recipe is not for this kind of data.
        """
        self.source = source
        self._boxed = detection_source(source, recipe)
        self.recipe = recipe
        self.seed = seed
        self._made_with = made_with

    def __getitem__(self, task: RenderTask) -> RenderedBatch:
        """Render one task; an error is returned in the batch, because a loader would bury its message."""
        count = len(task.row)
        known = [self._known_params(task, position) for position in range(count)]
        layout = self._layout(task, known)
        frame = (self.recipe.size_px, self.recipe.size_px) if layout is None else layout.frame
        pixels = np.zeros((count, *frame, 3), np.uint8)
        params: list[ViewParams] = []
        digests = np.zeros(count, np.uint64)
        broken: list[tuple[int, str]] = []
        error: VkdCacheError | None = None
        try:
            for position in range(count):
                try:
                    view_params, content = self._render(task, position, known[position])
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
        image = decode_image(self.source.read(shard, row), oriented=self._boxed is None)
        if params is None:
            params = self._plan(shard, row, task.view, image.size)
        found, expected = (f"{width}x{height}" for width, height in (image.size, params.source_size))
        if found != expected:
            if task.params is None:
                raise BrokenImageError(f"image of {found} pixels, {expected} in the annotation file")
            raise CorruptCacheError(
                f"{self.source.location}: image of key '{self.source.shards[shard].keys[row]}', view {task.view}, "
                f"is {found} pixels, the teacher saw one of {expected}. {self._what_changed()}"
            )
        return params, render_view(image, params, self.recipe)

    def _check_digest(self, task: RenderTask, position: int, digest: int) -> None:
        if task.digest is None or task.check is None or not task.check[position]:
            return
        if digest != int(task.digest[position]):
            key = self.source.shards[int(task.shard[position])].keys[int(task.row[position])]
            raise CorruptCacheError(
                f"{self.source.location}: view {task.view} of key '{key}' renders to pixels with digest "
                f"{digest:016x}, the teacher saw {int(task.digest[position]):016x}. {self._what_changed()}"
            )

    def _what_changed(self) -> str:
        theirs = f", {pixel_versions(self._made_with)} when the cache was made" if self._made_with else ""
        return f"The image file or the decoder changed: {pixel_versions()} here{theirs}. Use the images of the cache."


_NO_PARAMS = ViewParams(seed=0, source_size=(0, 0), crop=(0, 0, 0, 0), flip=False, ops=())


def pixel_versions(versions: Mapping[str, str] | None = None) -> str:
    """The versions that decide a view's pixels, as text; `versions`: those of a cache instead of this process'."""
    found = library_versions() if versions is None else versions
    return f"Pillow {found.get('pillow', 'unknown')} with libjpeg {found.get('libjpeg', 'unknown')}"


def render_loader(
    renderer: Renderer, tasks: Iterable[RenderTask], *, workers: int, pin_memory: bool = False
) -> Generator[RenderedBatch, None, None]:
    """Rendered batches in the order of `tasks`, made by `workers` processes (0: by this one).

    `tasks` is read lazily, a few batches ahead of what has been yielded, in this process. What stopped a task is not
    raised: it comes as `RenderedBatch.error`, and the caller decides.

    Raises:
        SourceError: a worker process was killed.
    """
    loader = torch.utils.data.DataLoader(
        renderer,
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=2 if workers else None,
        multiprocessing_context=_worker_context() if workers else None,
        worker_init_fn=_start_worker if workers else None,
    )
    with _signals_held_back():
        batches = iter(loader)
    try:
        yield from batches
    except (RuntimeError, ConnectionError, EOFError) as error:
        # a batch whose sender died before it was fetched shows as a connection that nobody answers
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SourceError(
            f"{renderer.source.location}: a data worker process died ({reason}). The usual cause is memory: use fewer "
            "--workers or a smaller --batch-size. Run the same command again to continue."
        ) from error


def _worker_context() -> Any:
    # Not fork: zarr and torch run threads in this process. The server imports torch once, workers fork from it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vkd_cache.stages.rendering"])
    return context


def _start_worker(_: int) -> None:
    sys.excepthook = _unless_hung_up
    main_process = multiprocessing.parent_process()
    if main_process is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for the threads, one of which waits for it
        for watch in (_exit_after, _exit_when_told):
            threading.Thread(target=watch, args=(main_process,), daemon=True, name=watch.__name__).start()


def _unless_hung_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # of the thread that hands batches over: a main process that stops in the middle of one is no news
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _exit_after(main_process: BaseProcess) -> None:
    # the loader's own watch is on the server, which lives as long as a worker does: both would stay for ever
    main_process.join()
    os._exit(1)


def _exit_when_told(main_process: BaseProcess) -> None:
    # how the main process ends its workers; from anybody else the signal was meant for the main process
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process.pid:
        pass
    os._exit(1)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started meanwhile do not end by SIGINT or SIGTERM; this one receives what came at the end.

    Both often go to a whole process group (Ctrl-C, batch systems), and the main process decides when workers stop: it
    may need batches for a step to be finished.
    """
    resource_tracker.ensure_running()  # starting it later would let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
