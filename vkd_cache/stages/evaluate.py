"""Stage three: exact top-1 and top-5 of a student, of a teacher, or of the teacher in a cache; COCO AP of a detector.

A newcomer's trap: under torchrun ranks do not get equal shares; see `accuracy` and `coco_accuracy`. Which of the two
is asked for follows from the source: one with boxes takes a detector.

Shape legend: b samples of a batch, K classes, H = W = the model's input side.
"""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vkd_cache import console
from vkd_cache.cache.reader import Cache, open_cache
from vkd_cache.config import Config
from vkd_cache.errors import ConfigError
from vkd_cache.metrics import TopK
from vkd_cache.runtime import JobSplit, expand_home, write_atomic
from vkd_cache.sources import CocoSource, Source, is_detection, open_source, validation_beside
from vkd_cache.stages.accuracy import EvalResult, accuracy_of, eval_result, summed_counts
from vkd_cache.stages.cached_accuracy import count_cached
from vkd_cache.stages.coco_accuracy import Detector, ap_of
from vkd_cache.stages.coco_scores import DetectionResult, Found
from vkd_cache.stages.contact_sheet import write_contact_sheet
from vkd_cache.stages.copying import copies_of
from vkd_cache.stages.ranks import process_group, take_device
from vkd_cache.stages.saved_student import load_student, trained_sizes
from vkd_cache.teachers import DetectionTeacher, Teacher, is_detector, load_teacher

__all__ = ["DetectionResult", "EvalRequest", "EvalResult", "accuracy_of", "evaluate", "open_validation"]


DETECTIONS = "detections"  # name of the files that a detector's evaluation writes, without suffix


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


def evaluate(config: Config, request: EvalRequest, split: JobSplit) -> list[EvalResult | DetectionResult]:
    """Evaluate what `request` asks for; under torchrun, every rank gets the same results.

    Of a detector, `detections.json` (COCO's format of results) and `detections.png` are written to `eval.output`, or
    beside the file of its weights; with both a checkpoint and a teacher, the teacher's go to `eval.output`/teacher.

    Raises:
        VkdCacheError: a configuration, source, checkpoint, teacher or cache that cannot be used.
    """
    if not (request.checkpoint or request.teacher or request.cache):
        raise ConfigError("nothing to evaluate: give --checkpoint FILE, --teacher or --cache.")
    device = take_device(config.eval.device, split.local_index)
    cache = _open_cache(config) if request.cache else None
    results: list[EvalResult | DetectionResult] = []
    with process_group(split, device):
        if request.checkpoint or request.teacher:
            source = open_validation(config)
            if request.checkpoint:
                name, student = load_student(request.checkpoint, config, source.num_classes, ema=request.ema)
                sized = config
                if isinstance(student, Detector):  # the sizes it was trained with, unless [eval] says others
                    sized = dataclasses.replace(config, views=trained_sizes(request.checkpoint, config.views))
                evaluation = _Evaluation(sized, source, device, split, _folder(config, request.checkpoint))
                results.append(evaluation.of(student, name))
            if request.teacher:
                part = "teacher" if request.checkpoint else ""
                folder = _folder(config, config.teacher.weights, part)
                evaluation = _Evaluation(config, source, device, split, folder)
                results.append(evaluation.of(_load_teacher(config, source), f"teacher {config.teacher.name}"))
        if cache is not None:
            results += _cached_results(cache, device, split)
    return results


@dataclasses.dataclass(frozen=True, slots=True)
class _Evaluation:
    """Evaluates networks on one source; `folder` is where detections are written."""

    config: Config
    source: Source
    device: torch.device
    split: JobSplit
    folder: Path

    def of(self, model: nn.Module, name: str) -> EvalResult | DetectionResult:
        """Top-1 and top-5, or COCO AP, of a network on the CPU."""
        if is_detection(self.source):
            return self._detections_of(model.to(self.device), self.source, name)
        if isinstance(model, Detector):
            raise ConfigError(
                f"{self.source.location}: images with one class each, but {name} is a detector. Give a folder with "
                "annotations/instances_val*.json, as COCO has it."
            )
        return accuracy_of(model.to(self.device), self.source, self.config, self.device, self.split, name=name)

    def _detections_of(self, model: nn.Module, source: CocoSource, name: str) -> DetectionResult:
        _make_writable(self.folder)  # now, not after an hour's work
        result, found = ap_of(model, source, self.config, self.device, self.split, name=name)
        if self.split.index == 0:
            write_detections(self.folder, source, found, name)
            console.say(f"wrote {self.folder / DETECTIONS}.json and .png")
        return result


def write_detections(folder: Path, source: CocoSource, found: Sequence[Found], title: str) -> None:
    """Write `detections.json` and `detections.png` into `folder`, which exists."""
    write_atomic(folder / f"{DETECTIONS}.json", json.dumps(found).encode())
    write_contact_sheet(folder / f"{DETECTIONS}.png", source, found, title=title)


def _folder(config: Config, weights: str, part: str = "") -> Path:
    """Where a detector's results go: `part` of the configured directory, or beside the file of its weights."""
    if config.eval.output:
        return Path(expand_home(config.eval.output)) / part
    return Path(expand_home(weights)).absolute().parent


def _make_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder}: detections cannot be written there. Give --output DIR.")


def _load_teacher(config: Config, source: Source) -> nn.Module:
    """The configured teacher, as a network that `_Evaluation.of` takes."""
    boxed = is_detection(source)
    if boxed != is_detector(config.teacher.name):
        found, expected = ("boxes", "a detector, as vidt_swin_base") if boxed else ("classes", "a classifier")
        raise ConfigError(
            f"[teacher] name: found '{config.teacher.name}', but {source.location} has images with {found}: expected "
            f"{expected}."
        )
    nodes = ("neck_det",) if boxed else ("logits",)  # a detector's predictions are no node
    teacher = load_teacher(
        config.teacher, nodes=nodes, num_classes=source.num_classes, view_px=config.views.size_px
    )
    return teacher if isinstance(teacher, DetectionTeacher) else _LogitsOf(teacher)


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
    return open_source(spec, split="val", shard_size=config.source.shard_size, copies=copies_of(config.source))


def _open_cache(config: Config) -> Cache:
    """The configured cache, of a teacher that classifies."""
    if not config.cache.url:
        raise ConfigError("[cache] url is empty: give --cache, or set it in the pipeline file.")
    cache = open_cache(config.cache.url, copies=copies_of(config.source))
    if cache.manifest.recipe.get("geometry") == "detection":
        raise ConfigError(
            f"{cache.url}: holds a detector's tokens, not its detections, so it has no accuracy of its own. Evaluate "
            "the teacher itself: --teacher NAME --teacher-weights FILE."
        )
    return cache


def _cached_results(cache: Cache, device: torch.device, split: JobSplit) -> list[EvalResult]:
    """Accuracy of the cached teacher on each published view, and on all of them."""
    started = mark = time.monotonic()
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
