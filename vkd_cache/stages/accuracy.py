"""Exact accuracy of one network on one source, shared by `eval` and by the evaluations of a training run.

A newcomer's trap: ranks do not get equal shares. Rank r of N takes samples r, r + N, ... of the whole source, none
twice and none left out, and integers are summed; a sampler that pads would count some images twice. No teacher is
imported here: a process that trains from a cache evaluates through this module.

Shape legend: b samples of a batch, K classes, H = W = the model's input side.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vkd_cache import console
from vkd_cache.config import Config
from vkd_cache.errors import SourceError
from vkd_cache.metrics import TopK, top_k
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import Source
from vkd_cache.stages.ranks import summed
from vkd_cache.stages.rendering import RenderedBatch, Renderer, RenderTask, render_loader
from vkd_cache.stages.transfer import ahead_on_device, mixed_images
from vkd_cache.students import Student
from vkd_cache.views.blend import normalise
from vkd_cache.views.recipe import RECIPES, Recipe

BATCH_SIZE = 128  # where the configuration leaves it to us
_SHOWN_BROKEN = 3

Broken = tuple[str, str]  # key, reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalResult:
    """One accuracy.

    Attributes:
        name: whose.
        split: `val` for a source; `view N` or `all views` for a cache.
        num_samples: samples that were counted.
        num_broken: images that could not be decoded, and so were not.
        top1, top5: percent of `num_samples`; for mixed views against the label with the larger share.
        seconds: wall-clock time.
    """

    name: str
    split: str
    num_samples: int
    num_broken: int
    top1: float
    top5: float
    seconds: float

    @property
    def score(self) -> float:
        """The one number that a student is judged by: top-1."""
        return self.top1

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def accuracy_of(
    model: nn.Module,
    source: Source,
    config: Config,
    device: torch.device,
    split: JobSplit,
    *,
    name: str = "student",
    between: Callable[[], None] | None = None,
) -> EvalResult:
    """Exact accuracy over all samples of `source`, each rank counting every N-th of them.

    Images are resized and centre-cropped (the recipe `none` with `eval.crop_fraction`) to the model's `input_px`, or
    the configured view size where it has none.

    Args:
        model: on `device`: a `Student`, or any network that maps pixels (b, 3, H, W), normalised with its `mean` and
            `std` (ImageNet's where it has none), to logits (b, K). It is put into evaluation mode and back.
        source: labelled images.
        config: batch size and workers are those of `eval`.
        device: of the model.
        split: this rank; the process group must be up where there are several.
        name: for the result and the progress bar.
        between: called before each batch; what it raises ends the evaluation.

    Raises:
        ConfigError: a label that the model has no class for.
        SourceError: a file vanished, or not one image could be decoded.
    """
    started = time.monotonic()
    side_px = getattr(model, "input_px", config.views.size_px)
    renderer = Renderer(source, _recipe(config, side_px), seed=0)
    shard, row = _own_samples(source, split)
    size = config.eval.batch_size or BATCH_SIZE
    tasks = [
        RenderTask(tag=None, shard=shard[start : start + size], row=row[start : start + size], view=0)
        for start in range(0, len(row), size)
    ]
    workers = min(config.eval.workers, len(tasks))
    counted = TopK()
    broken: list[Broken] = []
    loader = render_loader(renderer, tasks, workers=workers, pin_memory=device.type == "cuda")
    with evaluating(model), console.track(f"evaluate {name}", len(row)) as progress:
        for batch, pixels in batches_to_evaluate(loader, source, device, broken, between):
            decoded = torch.from_numpy(batch.ok)
            if bool(decoded.any()):
                images = mixed_images(pixels, None)[decoded.to(device)]
                counted += top_k(_logits(model, images), batch.label[decoded].to(device))
            progress.advance(len(batch.row))
    warn_of_broken(source, broken, "are not counted")
    total, num_broken = summed_counts(counted, len(broken), split, device)
    if total.count == 0:
        raise SourceError(f"{source.location}: none of its {num_broken} images can be decoded, nothing to evaluate.")
    return eval_result(name, "val", total, num_broken, time.monotonic() - started)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """(b, K) logits of images (b, 3, H, W) in [0, 1]."""
    network = model.net if isinstance(model, Student) else model  # a student's projector is not needed here
    mean, std = getattr(model, "mean", IMAGENET_DEFAULT_MEAN), getattr(model, "std", IMAGENET_DEFAULT_STD)
    with torch.no_grad():
        logits: Tensor = network(normalise(images, mean, std))
    return logits


def _recipe(config: Config, side_px: int) -> Recipe:
    return dataclasses.replace(RECIPES["none"], size_px=side_px, crop_fraction=config.eval.crop_fraction)


def _own_samples(source: Source, split: JobSplit) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Shard and row, (n,) int64 each, of the samples that this rank counts."""
    counts = [len(shard.keys) for shard in source.shards]
    shard = np.repeat(np.arange(len(counts)), counts)
    row = np.concatenate([np.arange(count) for count in counts]) if counts else np.zeros(0, np.int64)
    return shard[split.index :: split.count], row[split.index :: split.count]


def eval_result(name: str, split_name: str, counted: TopK, num_broken: int, seconds: float) -> EvalResult:
    """Counts as percentages; 0 where nothing was counted."""
    return EvalResult(
        name=name,
        split=split_name,
        num_samples=counted.count,
        num_broken=num_broken,
        top1=0.0 if math.isnan(counted.top1) else counted.top1,
        top5=0.0 if math.isnan(counted.top5) else counted.top5,
        seconds=seconds,
    )


def summed_counts(counted: TopK, num_broken: int, split: JobSplit, device: torch.device) -> tuple[TopK, int]:
    """Counts over all ranks."""
    if split.count == 1:
        return counted, num_broken
    sums = summed(torch.cat([counted.to_tensor(device), torch.tensor([num_broken], device=device)]))
    return TopK.from_tensor(sums[:-1]), int(sums[-1])


def batches_to_evaluate(
    loader: Iterable[RenderedBatch],
    source: Source,
    device: torch.device,
    broken: list[Broken],
    between: Callable[[], None] | None,
) -> Iterator[tuple[RenderedBatch, Tensor]]:
    """Each batch of `loader` with its pixels on `device`; its broken images are added to `broken`.

    `between` is called before each batch; what it raises, and what stopped a batch, ends the evaluation.
    """
    for batch, pixels in ahead_on_device(loader, device):
        if between is not None:
            between()
        if batch.error is not None:
            raise batch.error
        broken += [(source.shards[batch.shard[at]].keys[batch.row[at]], reason) for at, reason in batch.broken]
        yield batch, pixels


def warn_of_broken(source: Source, broken: Sequence[Broken], what_happens: str) -> None:
    """Say which images, as (key, reason), could not be decoded, and what becomes of them; nothing if there are none."""
    if broken:
        shown = "; ".join(f"{key} ({reason})" for key, reason in broken[:_SHOWN_BROKEN])
        more = ", ..." if len(broken) > _SHOWN_BROKEN else ""
        console.warn(f"{source.location}: {len(broken)} broken images {what_happens}: {shown}{more}")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and with the global generator untouched."""
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        model.train(was_training)
