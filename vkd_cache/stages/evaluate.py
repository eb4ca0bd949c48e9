"""Stage three: exact top-1 and top-5 of a student, of a teacher, or of the teacher in a cache.

A newcomer's trap: under torchrun ranks do not get equal shares; see `accuracy`.

Shape legend: b samples of a batch, K classes, H = W = the model's input side.
"""

import dataclasses
import time

import torch
from torch import Tensor, nn

from vkd_cache.cache.reader import open_cache
from vkd_cache.config import Config
from vkd_cache.errors import ConfigError
from vkd_cache.metrics import TopK
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import Source, open_source, validation_beside
from vkd_cache.stages.accuracy import EvalResult, accuracy_of, eval_result, summed_counts
from vkd_cache.stages.cached_accuracy import count_cached
from vkd_cache.stages.ranks import process_group, take_device
from vkd_cache.stages.saved_student import load_student
from vkd_cache.teachers import Teacher, load_teacher

__all__ = ["EvalRequest", "EvalResult", "accuracy_of", "evaluate", "open_validation"]


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


def evaluate(config: Config, request: EvalRequest, split: JobSplit) -> list[EvalResult]:
    """Evaluate what `request` asks for; under torchrun, every rank gets the same results.

    Raises:
        VkdCacheError: a configuration, source, checkpoint, teacher or cache that cannot be used.
    """
    if not (request.checkpoint or request.teacher or request.cache):
        raise ConfigError("nothing to evaluate: give --checkpoint FILE, --teacher or --cache.")
    device = take_device(config.eval.device, split.local_index)
    results: list[EvalResult] = []
    with process_group(split, device):
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
                results.append(accuracy_of(_LogitsOf(teacher).to(device), source, config, device, split, name=name))
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


def _cached_results(config: Config, device: torch.device, split: JobSplit) -> list[EvalResult]:
    """Accuracy of the cached teacher on each published view, and on all of them."""
    if not config.cache.url:
        raise ConfigError("[cache] url is empty: give --cache, or set it in the pipeline file.")
    started = mark = time.monotonic()
    cache = open_cache(config.cache.url)
    name = f"cached teacher {cache.manifest.teacher.get('name', 'unknown')}"
    results, everything, all_broken = [], TopK(), 0
    for view, own, own_broken in count_cached(cache, device, split):
        counted, broken = summed_counts(own, own_broken, split, device)
        before, mark = mark, time.monotonic()
        results.append(eval_result(name, f"view {view}", counted, broken, mark - before))
        everything, all_broken = everything + counted, all_broken + broken
    return [*results, eval_result(name, "all views", everything, all_broken, time.monotonic() - started)]


class _LogitsOf(nn.Module):
    """A teacher with the node `logits` as a network from pixels in [0, 1] to logits: it normalises by itself."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.input_px = teacher.input_px

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, 3, H, W) -> (b, K)."""
        nodes: dict[str, Tensor] = self.teacher(pixels)
        return nodes["logits"]
