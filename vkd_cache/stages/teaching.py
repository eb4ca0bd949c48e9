"""The teacher at work: mixed images in, node values out, always in batches of one shape.

Batches are padded to the full batch size, because kernels are chosen by shape: a unit's numbers then do not depend on
how many samples its last batch happens to hold. A detector's batches are of one canvas each; a unit has many canvases,
and the last batch of each is filled up to a power of two only, or a third of the work would go into black images.

Shape legend: b images.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.config import ExtractConfig
from vkd_cache.detection.canvas import CanvasBatch
from vkd_cache.errors import TeacherMemoryError
from vkd_cache.memory import is_out_of_memory
from vkd_cache.stages.rendering import RenderedBatch, Renderer, RenderTask, render_loader
from vkd_cache.stages.transfer import ahead_on_device
from vkd_cache.teachers import DetectionTeacher, Teacher
from vkd_cache.tokens import Tokens, join_tokens, to_device

AUTOCAST_DTYPES = {"off": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherRun:
    """A teacher on its device, with the numerics it is run with.

    Attributes:
        teacher: frozen, in eval mode.
        device: where it lies.
        batch_size: samples of every forward pass, padding included; 0: not decided yet.
        padded: a detector's batches are filled up, as for a cache; without, some arithmetic is saved and the last bits
            may differ.
        autocast: off, float16 or bfloat16.
        channels_last: memory format of images and weights.
        compiled: the teacher went through torch.compile.
    """

    teacher: Teacher | DetectionTeacher
    device: torch.device
    batch_size: int
    padded: bool = True
    autocast: str = "off"
    channels_last: bool = False
    compiled: bool = False

    @overload
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]: ...

    @overload
    def __call__(self, images: CanvasBatch) -> dict[str, Tokens]: ...

    def __call__(self, images: torch.Tensor | CanvasBatch) -> dict[str, torch.Tensor] | dict[str, Tokens]:
        """(b, 3, H, W) images in [0, 1] on the device, b <= batch_size -> node values (b, ...); or any number of
        views on their canvases -> tokens of b images."""
        if isinstance(images, CanvasBatch):
            return self._tokens(images)
        outputs: dict[str, torch.Tensor] = self._forward(_filled(images, self.batch_size))
        return {name: values[: len(images)] for name, values in outputs.items()}

    def _tokens(self, batch: CanvasBatch) -> dict[str, Tokens]:
        """Canvas by canvas, at most `batch_size` images at once; in the batch's order."""
        chunks = _chunks_by_canvas(batch.canvas, self.batch_size)
        found = [self._tokens_of_one_canvas(batch, rows) for rows in chunks]
        if len(found) == 1:
            return found[0]
        order = np.argsort(np.concatenate(chunks))
        return {name: join_tokens([part[name] for part in found]).select(order) for name in found[0]}

    def _tokens_of_one_canvas(self, batch: CanvasBatch, rows: npt.NDArray[np.int64]) -> dict[str, Tokens]:
        height, width = (int(side) for side in batch.canvas[rows[0]])
        images = batch.images[:, :, :height, :width]
        if len(rows) < len(images):
            images = images[to_device(torch.from_numpy(rows), images.device)]
        few_shapes = min(self.batch_size, 1 << (len(rows) - 1).bit_length())
        images = _filled(images, few_shapes if self.padded else len(rows))
        canvas = np.tile(batch.canvas[rows[0]], (len(images), 1))
        # black images without padding of their own stand in for those that are not there
        view_size = np.concatenate([batch.view_size[rows], canvas[len(rows) :]])
        outputs: dict[str, Tokens] = self._forward(CanvasBatch(images=images, view_size=view_size, canvas=canvas))
        if len(images) == len(rows):
            return outputs
        return {name: tokens.select(np.arange(len(rows))) for name, tokens in outputs.items()}

    def _forward(self, images: torch.Tensor | CanvasBatch) -> Any:
        if self.channels_last and isinstance(images, torch.Tensor):
            images = images.contiguous(memory_format=torch.channels_last)
        elif self.channels_last and isinstance(images, CanvasBatch):
            laid_out = images.images.contiguous(memory_format=torch.channels_last)
            images = dataclasses.replace(images, images=laid_out)
        dtype = AUTOCAST_DTYPES[self.autocast]
        cast: Any = torch.autocast(self.device.type, dtype) if dtype is not None else contextlib.nullcontext()
        with torch.inference_mode(), cast:
            return self.teacher(images)

    def numerics(self) -> dict[str, Any]:
        """What of this run changes stored numbers, for the manifest."""
        on_gpu = self.device.type == "cuda"
        return {
            "device": self.device.type,
            "autocast": self.autocast,
            "channels_last": self.channels_last,
            "compiled": self.compiled,
            "tf32": on_gpu and bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32),
            "batch_size": self.batch_size,
        }


def _filled(images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """`images` (b, 3, H, W), followed by black ones up to `batch_size`."""
    if len(images) >= batch_size:
        return images
    return torch.cat([images, images.new_zeros(batch_size - len(images), *images.shape[1:])])


def _chunks_by_canvas(canvas: npt.NDArray[np.int64], batch_size: int) -> list[npt.NDArray[np.int64]]:
    """Rows of `canvas` (b, 2) that share a canvas, in pieces of at most `batch_size`."""
    distinct, group = np.unique(canvas, axis=0, return_inverse=True)
    chunks = []
    for number in range(len(distinct)):
        rows = np.flatnonzero(group.reshape(-1) == number).astype(np.int64)
        chunks += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return chunks


@contextlib.contextmanager
def memory_told(run: TeacherRun) -> Iterator[None]:
    """Around batches of `run`: says of which size they are where memory cannot be had.

    Raises:
        TeacherMemoryError: in place of the errors that torch has for it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or ["no more can be had"]
        raise TeacherMemoryError(
            f"out of memory on {run.device} with batches of {run.batch_size} ({lines[0][:200]}). Give a smaller "
            "[extract] batch_size (--batch-size); for a new cache, auto finds one that fits. What is published is "
            "intact: the same command with another size makes the rest."
        ) from error


def start_teacher(
    teacher: Teacher | DetectionTeacher, config: ExtractConfig, device: torch.device, *, padded: bool = True
) -> TeacherRun:
    """Put the teacher on its device as `config` says; `padded` as in TeacherRun."""
    teacher = teacher.to(device)
    if config.channels_last:
        teacher = teacher.to(memory_format=torch.channels_last)
    if config.compile:
        teacher.compile(dynamic=False)  # with symbolic sizes, as torch's second shape would be, numbers are others
    return TeacherRun(
        teacher=teacher,
        device=device,
        batch_size=config.batch_size,
        padded=padded,
        autocast=config.autocast,
        channels_last=config.channels_last,
        compiled=config.compile,
    )


def taught_batches(
    renderer: Renderer, tasks: Iterable[RenderTask], workers: int, run: TeacherRun
) -> Iterator[tuple[RenderedBatch, torch.Tensor]]:
    """Rendered batches with their pixels on the teacher's device, in the order of `tasks`."""
    loader = render_loader(renderer, tasks, workers=workers, pin_memory=run.device.type == "cuda")
    return ahead_on_device(loader, run.device)
