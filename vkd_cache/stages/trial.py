"""One batch size tried: what a batch of extraction does, on made images, with the memory that is needed beside it.

A newcomer's trap: a size that just fits alone does not fit in the job, where the next batch is on the device already
and memory is in pieces. So two more batches of pixels are held meanwhile, and a part of the memory has to stay free.

Shape legend: b samples of a batch, H/W pixels.
"""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.memory import available_memory_bytes, memory_bytes
from vkd_cache.runtime import peak_memory_bytes
from vkd_cache.stages.teaching import TeacherRun
from vkd_cache.stages.transfer import model_input
from vkd_cache.views.colour import IDENTITY
from vkd_cache.views.params import MIX_CUTMIX, MIX_MIXUP, MixPlan
from vkd_cache.views.recipe import Recipe
from vkd_cache.views.sizes import canvas_of

KEPT_FREE = 0.1  # of a GPU's memory: fragments, and what others on it take
KEPT_FREE_ON_HOST = 0.5  # data workers and the units in the making need theirs
_TIMED_S = 1.0  # of the repetitions together; a batch that takes longer is timed once
_REPETITIONS = 3
_MOST_BATCHES = 50  # of a repetition


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of a size.

    Attributes:
        batch_size: the size.
        images_per_s: rows a second, padding not told from samples.
        memory_bytes: at the peak: what the allocator held of a GPU; of the host, what this process grew by.
    """

    batch_size: int
    images_per_s: float
    memory_bytes: int


@dataclasses.dataclass(kw_only=True)
class MadeViews:
    """What a batch says about its views besides their pixels; see `vkd_cache.stages.transfer.HasViews`."""

    mix: MixPlan | None = None
    view_size: npt.NDArray[np.int64] | None = None
    canvas: npt.NDArray[np.int64] | None = None
    colour: torch.Tensor | None = None


class TrialBatch:
    """Makes batches as a recipe does, the most expensive ones."""

    def __init__(self, recipe: Recipe) -> None:
        self._mixed = recipe.mixes
        self._maps_colour = recipe.colour_kernel == "affine"
        self._views: tuple[int, int] | None = None
        self.height, self.width = recipe.size_px, recipe.size_px
        if recipe.detection is not None:
            short = max(recipe.detection.scales)
            self._views = short, max(short, recipe.detection.max_size_px)
            self.height, self.width = canvas_of(self._views, recipe.detection.canvas_multiple_px)

    def views(self, size: int) -> MadeViews:
        """Everything but the pixels of `size` views."""
        if self._views is not None:
            canvas = np.tile(np.array([self.height, self.width], np.int64), (size, 1))
            return MadeViews(view_size=np.tile(np.array(self._views, np.int64), (size, 1)), canvas=canvas)
        colour = torch.tensor(IDENTITY).repeat(size, 1) if self._maps_colour else None
        if not self._mixed:
            return MadeViews(colour=colour)
        box = np.array([0, 0, self.height // 2, self.width // 2], np.uint16)
        mix = MixPlan(
            partner=(np.arange(size) ^ 1).astype(np.uint32),
            kind=np.where(np.arange(size) // 2 % 2, MIX_CUTMIX, MIX_MIXUP).astype(np.uint8),
            lam=np.full(size, 0.75, np.float32),
            box=np.tile(box, (size, 1)),
        )
        return MadeViews(mix=mix, colour=colour)

    def pixels(self, size: int, device: torch.device) -> torch.Tensor:
        """(b, H, W, 3) uint8 on the device, always the same."""
        draw = torch.Generator(device).manual_seed(0)
        shape = (size, self.height, self.width, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=draw)


def measure(run: TeacherRun, made: TrialBatch, seen: Sequence[Measured]) -> Measured | None:
    """Time batches of `run.batch_size`, after one that is not timed; None where too little memory would be left.

    Args:
        run: the teacher on its device.
        made: the batches.
        seen: what was measured of smaller sizes; of the host's memory, all of it would be taken before an error comes.

    Raises:
        RuntimeError, MemoryError: whatever torch says of memory that cannot be had.
    """
    on_gpu, size = run.device.type == "cuda", run.batch_size
    if not on_gpu and _too_large_for_host(size, seen):
        return None
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)
    before = memory_bytes()
    views = made.views(size)
    batches = [made.pixels(size, run.device) for _ in range(3)]  # one at work, one queued, one on its way
    _seconds(run, views, batches, 1)  # compiles, chooses kernels, grows the allocator's memory
    seconds = _seconds(run, views, batches, 1)
    if seconds < _TIMED_S:
        count = min(_MOST_BATCHES, max(1, round(_TIMED_S / _REPETITIONS / seconds)))
        seconds = min(_seconds(run, views, batches, count) / count for _ in range(_REPETITIONS))
    taken = max(0, peak_memory_bytes() - before)
    if on_gpu:
        taken = torch.cuda.max_memory_reserved(run.device)
        free, _ = torch.cuda.mem_get_info(run.device)
        if free < KEPT_FREE * (free + taken):
            return None
    return Measured(batch_size=size, images_per_s=size / seconds, memory_bytes=taken)


def _seconds(run: TeacherRun, views: MadeViews, batches: Sequence[torch.Tensor], count: int) -> float:
    """How long `count` batches take, one behind the other."""
    started = time.perf_counter()
    for number in range(count):
        run(model_input(views, batches[number % len(batches)]))
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    return time.perf_counter() - started


def _too_large_for_host(size: int, seen: Sequence[Measured]) -> bool:
    available = available_memory_bytes()
    if available is None or not seen:
        return False
    last = seen[-1]
    return last.memory_bytes * size / last.batch_size > KEPT_FREE_ON_HOST * available
