"""The teacher at work: mixed images in, node values out, always in batches of one shape.

Batches are padded to the full batch size, because kernels are chosen by shape: a unit's numbers then do not depend on
how many samples its last batch happens to hold.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from vkd_cache.config import ExtractConfig
from vkd_cache.stages.rendering import RenderedBatch, Renderer, RenderTask, render_loader
from vkd_cache.stages.transfer import ahead_on_device
from vkd_cache.teachers import Teacher

AUTOCAST_DTYPES = {"off": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherRun:
    """A teacher on its device, with the numerics it is run with.

    Attributes:
        teacher: frozen, in eval mode.
        device: where it lies.
        batch_size: samples of every forward pass, padding included.
        autocast: off, float16 or bfloat16.
        channels_last: memory format of images and weights.
        compiled: the teacher went through torch.compile.
    """

    teacher: Teacher
    device: torch.device
    batch_size: int
    autocast: str = "off"
    channels_last: bool = False
    compiled: bool = False

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(b, 3, H, W) images in [0, 1] on the device, b <= batch_size -> node values (b, ...)."""
        count = len(images)
        if count < self.batch_size:
            images = torch.cat([images, images.new_zeros(self.batch_size - count, *images.shape[1:])])
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        dtype = AUTOCAST_DTYPES[self.autocast]
        cast: Any = torch.autocast(self.device.type, dtype) if dtype is not None else contextlib.nullcontext()
        with torch.inference_mode(), cast:
            outputs: dict[str, torch.Tensor] = self.teacher(images)
        return {name: values[:count] for name, values in outputs.items()}

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


def start_teacher(teacher: Teacher, config: ExtractConfig, device: torch.device) -> TeacherRun:
    """Put the teacher on its device as `config` says."""
    teacher = teacher.to(device)
    if config.channels_last:
        teacher = teacher.to(memory_format=torch.channels_last)
    if config.compile:
        teacher.compile()
    return TeacherRun(
        teacher=teacher,
        device=device,
        batch_size=config.batch_size,
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
