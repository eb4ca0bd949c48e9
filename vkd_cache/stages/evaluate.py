"""Stage three: exact top-1 and top-5 of a student, of a teacher, or of the teacher in a cache.

A newcomer's trap: ranks do not get equal shares. Rank r of N takes samples r, r + N, ... of the whole source, none
twice and none left out, and integers are summed; a sampler that pads would count some images twice.

Shape legend: b samples of a batch, K classes, H = W = the model's input side.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vkd_cache import console
from vkd_cache.cache.reader import open_cache
from vkd_cache.config import Config
from vkd_cache.errors import ConfigError, SourceError
from vkd_cache.metrics import TopK, top_k
from vkd_cache.runtime import JobSplit, resolve_device
from vkd_cache.sources import Source, open_source, validation_beside
from vkd_cache.stages.cached_accuracy import count_cached
from vkd_cache.stages.rendering import Renderer, RenderTask, render_loader
from vkd_cache.stages.saved_student import load_student
from vkd_cache.stages.transfer import ahead_on_device, mixed_images
from vkd_cache.students import Student
from vkd_cache.teachers import Teacher, load_teacher
from vkd_cache.views.blend import normalise
from vkd_cache.views.recipe import RECIPES, Recipe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_SHOWN_BROKEN = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What to evaluate; any number of them.

    Attributes:
        checkpoint: file of a student: ours, the authors' or a plain state dict.
        ema: the weight average in the checkpoint instead of its weights.
        teacher: the teacher that the configuration names.
        cache: the teacher as it is in the configured cache, on the cached views.
    """

    checkpoint: str = ""
    ema: bool = False
    teacher: bool = False
    cache: bool = False


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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def evaluate(config: Config, request: EvalRequest, split: JobSplit) -> list[EvalResult]:
    """Evaluate what `request` asks for; under torchrun, every rank gets the same results.

    Raises:
        VkdCacheError: a configuration, source, checkpoint, teacher or cache that cannot be used.
    """
    if not (request.checkpoint or request.teacher or request.cache):
        raise ConfigError("nothing to evaluate: give --checkpoint FILE, --teacher or --cache.")
    device = torch.device(resolve_device(config.eval.device, split.local_index))
    results: list[EvalResult] = []
    with _process_group(split, device):
        if request.checkpoint or request.teacher:
            source = open_validation(config)
            if request.checkpoint:
                name, student = load_student(request.checkpoint, config, source.num_classes, ema=request.ema)
                results.append(accuracy_of(student.to(device), source, config, device, split, name=name))
            if request.teacher:
                teacher = load_teacher(
                    config.teacher, nodes=("logits",), num_classes=source.num_classes, view_px=config.views.size_px
                )
                name = f"teacher {config.teacher.name}"
                results.append(accuracy_of(teacher.to(device), source, config, device, split, name=name))
        if request.cache:
            results += _cached_results(config, device, split)
    return results


def open_validation(config: Config) -> Source:
    """The source to evaluate on: the configured one, or val/ beside the training split.

    Raises:
        ConfigError: there is neither.
        SourceError: it cannot be used.
    """
    spec = config.source.val or validation_beside(config.source.train)
    if spec is None:
        raise ConfigError(
            f"[source] val is empty, and there is no val/ beside '{config.source.train}'. Give --source."
        )
    return open_source(spec, split="val", shard_size=config.source.shard_size)


def accuracy_of(
    model: nn.Module, source: Source, config: Config, device: torch.device, split: JobSplit, *, name: str = "student"
) -> EvalResult:
    """Exact accuracy over all samples of `source`, each rank counting every N-th of them.

    Images are resized and centre-cropped (the recipe `none` with `eval.crop_fraction`) to the model's `input_px`, or
    the configured view size where it has none.

    Args:
        model: on `device`: a `Student`, a `Teacher` with the node `logits`, or any network that maps pixels
            (b, 3, H, W), normalised with its `mean` and `std` (ImageNet's where it has none), to logits (b, K). It is
            put into evaluation mode and back.
        source: labelled images.
        config: batch size and workers are those of `eval`.
        device: of the model.
        split: this rank; the process group must be up where there are several.
        name: for the result and the progress bar.

    Raises:
        ConfigError: a label that the model has no class for.
        SourceError: a file vanished, or not one image could be decoded.
    """
    started = time.monotonic()
    side_px = getattr(model, "input_px", config.views.size_px)
    renderer = Renderer(source, _recipe(config, side_px), seed=0)
    shard, row = _own_samples(source, split)
    size = config.eval.batch_size
    tasks = [
        RenderTask(tag=None, shard=shard[start : start + size], row=row[start : start + size], view=0)
        for start in range(0, len(row), size)
    ]
    workers = min(config.eval.workers, len(tasks))
    counted, broken = TopK(), []
    loader = render_loader(renderer, tasks, workers=workers, pin_memory=device.type == "cuda")
    with _evaluating(model), console.track(f"evaluate {name}", len(row)) as progress:
        for batch, pixels in ahead_on_device(loader, device):
            if batch.error is not None:
                raise batch.error
            broken += [(source.shards[batch.shard[at]].keys[batch.row[at]], reason) for at, reason in batch.broken]
            decoded = torch.from_numpy(batch.ok)
            if bool(decoded.any()):
                images = mixed_images(pixels, None)[decoded.to(device)]
                counted += top_k(_logits(model, images), batch.label[decoded].to(device))
            progress.advance(len(batch.row))
    if broken:
        shown = "; ".join(f"{key} ({reason})" for key, reason in broken[:_SHOWN_BROKEN])
        more = ", ..." if len(broken) > _SHOWN_BROKEN else ""
        console.warn(f"{source.location}: {len(broken)} broken images are not counted: {shown}{more}")
    total, num_broken = _summed(counted, len(broken), split, device)
    if total.count == 0:
        raise SourceError(f"{source.location}: none of its {num_broken} images can be decoded, nothing to evaluate.")
    return _result(name, "val", total, num_broken, time.monotonic() - started)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """(b, K) logits of images (b, 3, H, W) in [0, 1]."""
    with torch.no_grad():
        if isinstance(model, Teacher):
            nodes: dict[str, Tensor] = model(images)
            return nodes["logits"]
        network = model.net if isinstance(model, Student) else model  # a student's projector is not needed here
        mean, std = getattr(model, "mean", IMAGENET_MEAN), getattr(model, "std", IMAGENET_STD)
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


def _cached_results(config: Config, device: torch.device, split: JobSplit) -> list[EvalResult]:
    """Accuracy of the cached teacher on each published view, and on all of them."""
    if not config.cache.url:
        raise ConfigError("[cache] url is empty: give --cache, or set it in the pipeline file.")
    started = mark = time.monotonic()
    cache = open_cache(config.cache.url)
    name = f"cached teacher {cache.manifest.teacher.get('name', 'unknown')}"
    results, everything, all_broken = [], TopK(), 0
    for view, own, own_broken in count_cached(cache, device, split):
        counted, broken = _summed(own, own_broken, split, device)
        before, mark = mark, time.monotonic()
        results.append(_result(name, f"view {view}", counted, broken, mark - before))
        everything, all_broken = everything + counted, all_broken + broken
    return [*results, _result(name, "all views", everything, all_broken, time.monotonic() - started)]


def _result(name: str, split_name: str, counted: TopK, num_broken: int, seconds: float) -> EvalResult:
    return EvalResult(
        name=name,
        split=split_name,
        num_samples=counted.count,
        num_broken=num_broken,
        top1=0.0 if math.isnan(counted.top1) else counted.top1,
        top5=0.0 if math.isnan(counted.top5) else counted.top5,
        seconds=seconds,
    )


def _summed(counted: TopK, num_broken: int, split: JobSplit, device: torch.device) -> tuple[TopK, int]:
    """Counts over all ranks."""
    if split.count == 1:
        return counted, num_broken
    sums = torch.cat([counted.to_tensor(device), torch.tensor([num_broken], device=device)])
    dist.all_reduce(sums)
    return TopK.from_tensor(sums[:-1]), int(sums[-1])


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and with the global generator (a loader draws from it) untouched."""
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _process_group(split: JobSplit, device: torch.device) -> Iterator[None]:
    """Join the other ranks, where there are any and nobody has."""
    if split.count == 1 or dist.is_initialized():
        yield
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=split.index, world_size=split.count)
    try:
        yield
    finally:
        dist.destroy_process_group()
