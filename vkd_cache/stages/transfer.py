"""From rendered batches on the host to what a network takes on the device: mixed images, or images on canvases.

A GPU copies the next batch while it works on this one: the copy runs on its own stream, from pinned memory. On a CPU
nothing is copied.

Shape legend: b samples, H/W height and width of a view, or of the batch's largest canvas.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.tokens import to_device
from vkd_cache.views.blend import adjust_colour, mix_pixels
from vkd_cache.views.params import MixPlan

if TYPE_CHECKING:  # classification needs neither the detector nor scipy
    from vkd_cache.detection.canvas import CanvasBatch


class HasPixels(Protocol):
    """A batch with (b, H, W, 3) uint8 views on the host."""

    @property
    def pixels(self) -> torch.Tensor:
        """The views."""
        ...


class HasViews(Protocol):
    """What a rendered batch says about its views besides their pixels."""

    mix: MixPlan | None
    view_size: npt.NDArray[np.int64] | None
    canvas: npt.NDArray[np.int64] | None
    colour: torch.Tensor | None


Batch = TypeVar("Batch", bound=HasPixels)


def ahead_on_device(
    batches: Iterable[Batch],
    device: torch.device,
    more: Callable[[Batch, torch.device], tuple[Batch, Sequence[torch.Tensor]]] | None = None,
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Each batch with its (b, H, W, 3) uint8 pixels on `device`, the copy of the next one already under way.

    Args:
        batches: in pinned memory, for a GPU.
        device: where they go; on a CPU they stay as they are.
        more: begins to copy what else a batch has, and gives the batch with it, and all tensors that it copied.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch, batch.pixels
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: tuple[Batch, Sequence[torch.Tensor], torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            pixels = batch.pixels.to(device, non_blocking=True)
            coming, tensors = (batch, ()) if more is None else more(batch, device)
            copied = stream.record_event()
        if waiting is not None:
            yield waiting[0], _arrived(waiting[1], waiting[2])
        waiting = coming, [pixels, *tensors], copied
    if waiting is not None:
        yield waiting[0], _arrived(waiting[1], waiting[2])


def _arrived(tensors: Sequence[torch.Tensor], copied: torch.cuda.Event) -> torch.Tensor:
    current = torch.cuda.current_stream(tensors[0].device)
    current.wait_event(copied)
    for tensor in tensors:
        tensor.record_stream(current)  # the allocator must not reuse the memory while this stream reads it
    return tensors[0]


def mixed_images(pixels: torch.Tensor, mix: MixPlan | None, colour: torch.Tensor | None = None) -> torch.Tensor:
    """(b, H, W, 3) uint8 views -> (b, 3, H, W) float32 images in [0, 1], mixed.

    Args:
        pixels: on the device.
        mix: with partners as positions.
        colour: `RenderedBatch.colour`, which comes before mixing; anywhere.
    """
    mixed = mix is not None and bool(np.any(mix.kind))
    planes = pixels.permute(0, 3, 1, 2)
    if colour is not None:
        images = _coloured(planes, to_device(colour, pixels.device))
    elif mixed:
        images = planes.to(torch.float32).div_(255.0)
    else:
        images = planes.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
    if mix is None or not mixed:
        return images
    device = pixels.device
    return mix_pixels(
        images,
        to_device(torch.from_numpy(mix.partner.astype(np.int64)), device),
        to_device(torch.from_numpy(mix.kind.astype(np.int64)), device),
        to_device(torch.from_numpy(mix.lam), device),
        to_device(torch.from_numpy(mix.box.astype(np.int64)), device),
    )


def _coloured(planes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(b, 3, H, W) float32 in [0, 1] from uint8 and the rows of their colour."""
    if planes.device.type != "cpu":
        return adjust_colour(planes.to(torch.float32, memory_format=torch.contiguous_format), rows)
    images = torch.empty(planes.shape)
    for row in range(len(images)):  # one stays in the processor's cache, a batch does not
        adjust_colour(images[row : row + 1].copy_(planes[row : row + 1]), rows[row : row + 1])
    return images


def canvas_batch(batch: HasViews, pixels: torch.Tensor) -> "CanvasBatch":
    """A detection batch as a detector takes it: float32 in [0, 1], zero outside the views.

    Args:
        batch: of a detection source.
        pixels: its (b, H, W, 3) uint8 views on the device.

    Raises:
        ValueError: the batch is one of classification.
    """
    from vkd_cache.detection.canvas import CanvasBatch

    if batch.view_size is None or batch.canvas is None:
        raise ValueError("canvas_batch: found views without sizes, expected those of a detection source.")
    return CanvasBatch(images=mixed_images(pixels, None), view_size=batch.view_size, canvas=batch.canvas)


def model_input(batch: HasViews, pixels: torch.Tensor) -> "torch.Tensor | CanvasBatch":
    """What a network takes: (b, 3, H, W) float32 images in [0, 1], mixed; detection: a `CanvasBatch`.

    Args:
        batch: a rendered batch.
        pixels: its (b, H, W, 3) uint8 views on the device.
    """
    return mixed_images(pixels, batch.mix, batch.colour) if batch.view_size is None else canvas_batch(batch, pixels)
