"""Several processes that train or evaluate one model together, as torchrun starts them."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from vkd_cache.runtime import JobSplit, resolve_device


def take_device(name: str, local_index: int = 0) -> torch.device:
    """The device that a configuration's `name` means, made the current one of this process where it is a GPU.

    Pinned memory, streams and compiled kernels are those of the current device: without this, a run on the second GPU
    keeps a context, and half a gigabyte, on the first.

    Raises:
        ConfigError: as `resolve_device`.
    """
    device = torch.device(resolve_device(name, local_index))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def process_group(split: JobSplit, device: torch.device) -> Iterator[None]:
    """Join the other ranks, where there are any and nobody has: nccl between GPUs, gloo elsewhere."""
    if split.count == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=split.index, world_size=split.count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def summed(values: Tensor) -> Tensor:
    """`values` added up over all ranks, in place; nothing waits for a GPU here."""
    dist.all_reduce(values)
    return values


def gathered(values: Tensor, split: JobSplit) -> list[Tensor]:
    """`values` of every rank, in rank order."""
    if split.count == 1:
        return [values]
    places = [torch.empty_like(values) for _ in range(split.count)]
    dist.all_gather(places, values)
    return places


def broadcast_first(values: Iterable[Tensor]) -> None:
    """Give every rank the first rank's `values`, in place."""
    for value in values:
        dist.broadcast(value, src=0)


def union(values: set[str], split: JobSplit) -> set[str]:
    """The values of all ranks together."""
    if split.count == 1:
        return values
    parts: list[set[str]] = [set()] * split.count
    dist.all_gather_object(parts, values)
    return set().union(*parts)
