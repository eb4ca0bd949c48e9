"""COCO AP of one detector on one source, shared by `eval` and by the evaluations of a training run.

A newcomer's trap: the batches are those of the whole source, and rank r of N takes batches r, r + N, ... of them. So
every image is seen once whatever N is, beside the same batch mates, and the detections are the same numbers. No teacher
is imported here: a process that trains from a cache evaluates through this module.

Shape legend: b images of a batch, L + 1 predictions of a detector, Q detection tokens, K classes.
"""

import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vkd_cache import console
from vkd_cache.config import Config
from vkd_cache.detection.canvas import CanvasBatch, DetectorOutput
from vkd_cache.detection.postprocess import detections, to_coco
from vkd_cache.errors import CheckpointError, ConfigError, SourceError
from vkd_cache.runtime import JobSplit
from vkd_cache.sources.coco import CocoSource
from vkd_cache.stages.accuracy import Broken, batches_to_evaluate, evaluating, warn_of_broken
from vkd_cache.stages.coco_scores import METRICS, DetectionResult, Found, coco_scores
from vkd_cache.stages.ranks import broadcast_first, summed
from vkd_cache.stages.rendering import RenderedBatch, Renderer, RenderTask, render_loader
from vkd_cache.stages.transfer import canvas_batch
from vkd_cache.views.plan import plan_canvas
from vkd_cache.views.recipe import Recipe, detection_eval_recipe

BATCH_SIZE = 8  # where the configuration leaves it to us: images of 800 x 1333 px

_SHOWN = 3


@runtime_checkable
class Detector(Protocol):
    """What `ap_of` asks of a network: a `DetectionStudent` and a `DetectionTeacher` have it."""

    def detect(self, batch: CanvasBatch) -> DetectorOutput:
        """Predictions for images in [0, 1] on the network's own device."""
        ...


def ap_of(
    model: nn.Module,
    source: CocoSource,
    config: Config,
    device: torch.device,
    split: JobSplit,
    *,
    name: str = "student",
    between: Callable[[], None] | None = None,
) -> tuple[DetectionResult, list[Found]]:
    """COCO's twelve numbers over all images of `source`, and the detections behind them.

    Images are shrunk or enlarged to `eval.size_px` by the reference's rule, whole and not flipped, one view each.

    Args:
        model: a `Detector` on `device`. It is put into evaluation mode and back.
        source: annotated images; its annotation file is what pycocotools reads.
        config: sizes, batch size and workers are those of `eval`.
        device: of the model.
        split: this rank; the process group must be up where there are several.
        name: for the result and the progress bar.
        between: called before each batch; what it raises ends the evaluation.

    Returns:
        The result, the same on all ranks; and COCO results, at most 100 an image, by image id: on the first rank all of
        them, on the others none.

    Raises:
        ConfigError: the model is no detector, or categories that it has no class for.
        CheckpointError: what it predicts is not finite.
        SourceError: a file vanished, or not one image could be decoded.
    """
    started = time.monotonic()
    if not isinstance(model, Detector):
        raise ConfigError(
            f"{source.location}: images with boxes, but {name} is a network that classifies whole images, not a "
            "detector. Give a detector (vidt_swin_nano, for one), or a folder of classes."
        )
    recipe = eval_recipe(config)
    batches = _batches(source, recipe, config.eval.batch_size or BATCH_SIZE)
    own = batches[split.index :: split.count]
    tasks = [RenderTask(tag=None, shard=places[:, 0], row=places[:, 1], view=0) for places in own]
    renderer = Renderer(source, recipe, seed=0)
    workers = min(config.eval.workers, len(tasks))
    found: list[Found] = []
    broken: list[Broken] = []
    loader = render_loader(renderer, tasks, workers=workers, pin_memory=device.type == "cuda")
    with evaluating(model), console.track(f"evaluate {name}", sum(len(task.row) for task in tasks)) as progress:
        for batch, pixels in batches_to_evaluate(loader, source, device, broken, between):
            found += _detect(model, source, batch, pixels, name, aloud=split.index == 0 and not found)
            progress.advance(len(batch.row))
    warn_of_broken(source, broken, "count as images in which nothing was found")
    num_images = sum(len(shard.keys) for shard in source.shards)
    found, num_broken = _on_first_rank(found, len(broken), split, device)
    if num_broken == num_images:
        raise SourceError(f"{source.location}: none of its {num_broken} images can be decoded, nothing to evaluate.")
    scores = _scores(source, found, split, device)
    result = DetectionResult(
        name=name,
        split="val",
        num_images=num_images,
        num_broken=num_broken,
        seconds=time.monotonic() - started,
        **scores,
    )
    return result, found


def eval_recipe(config: Config) -> Recipe:
    """The views that a detector is evaluated on; sizes that `eval` leaves open are the largest of `views`.

    Raises:
        ConfigError: a size that cannot be used.
    """
    views = config.views
    return detection_eval_recipe(
        config.eval.size_px or max(views.scales), config.eval.max_size_px or views.max_size_px, views.canvas_multiple_px
    )


def check_same_categories(train: CocoSource, val: CocoSource) -> None:
    """Refuse a validation split in which a category id means something else than in training.

    Raises:
        ConfigError: an id with another name, or one that training does not have.
    """
    known, found = (dict(enumerate(source.class_names or ())) for source in (train, val))
    differ = [
        f"{number} is '{name}', in training '{known.get(number, '')}'"
        for number, name in found.items()
        if name and known.get(number) != name
    ]
    if differ:
        more = ", ..." if len(differ) > _SHOWN else ""
        raise ConfigError(
            f"{val.location}: categories unlike those of {train.location}: {', '.join(differ[:_SHOWN])}{more}. "
            "Annotate both splits with the same categories."
        )


def _batches(source: CocoSource, recipe: Recipe, size: int) -> list[npt.NDArray[np.int64]]:
    """(b, 2) shard and row of every image, in batches of one canvas each, the largest canvas first."""
    by_canvas: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for shard, part in enumerate(source.shards):
        for row, key in enumerate(part.keys):
            width, height = source.image_size(shard, row)
            canvas = plan_canvas(recipe, 0, key, 0, width_px=width, height_px=height)
            by_canvas.setdefault(canvas, []).append((shard, row))
    order = sorted(by_canvas, key=lambda canvas: (-canvas[0] * canvas[1], canvas))  # too little memory shows at once
    return [
        np.array(by_canvas[canvas][start : start + size], np.int64)
        for canvas in order
        for start in range(0, len(by_canvas[canvas]), size)
    ]


def _detect(
    model: Detector, source: CocoSource, batch: RenderedBatch, pixels: Tensor, name: str, *, aloud: bool
) -> list[Found]:
    """COCO results of the images of a batch that could be decoded; `aloud`: remark that categories may be others."""
    decoded = np.flatnonzero(batch.ok)
    if not len(decoded):
        return []
    with torch.no_grad():
        output = model.detect(canvas_batch(batch, pixels))  # broken images are black
    rows = torch.from_numpy(decoded).to(pixels.device)
    logits, boxes = output.logits[-1][rows], output.boxes[-1][rows]
    _check_classes(logits.shape[-1], source, name, aloud=aloud)
    if not bool((logits.isfinite().all() & boxes.isfinite().all()).item()):
        raise CheckpointError(f"{name}: its outputs are not finite numbers. Was its training cut off in time?")
    places = [(int(batch.shard[at]), int(batch.row[at])) for at in decoded]
    sizes = [source.image_size(*place) for place in places]
    return to_coco(detections(logits, boxes, sizes), [source.boxes(*place).image_id for place in places])


def _check_classes(num_classes: int, source: CocoSource, name: str, *, aloud: bool) -> None:
    """Whether the annotated categories can be those that a model of `num_classes` was trained on."""
    where, last = source.annotation_file, source.num_classes - 1
    if num_classes < source.num_classes:
        raise ConfigError(
            f"{where}: has categories up to {last}, but {name} has classes 0 to {num_classes - 1}: it was trained on "
            "other categories. Give the annotations that belong to it."
        )
    if num_classes > source.num_classes and aloud:
        console.warn(
            f"{where}: has categories up to {last}, {name} has classes 0 to {num_classes - 1}: the numbers below mean "
            "something only if the ids that are in both mean the same."
        )


def _on_first_rank(
    found: list[Found], num_broken: int, split: JobSplit, device: torch.device
) -> tuple[list[Found], int]:
    """The detections of all ranks on the first one, by image id, and the number of broken images on every rank."""
    if split.count > 1:
        parts: list[list[Found]] | None = [[]] * split.count if split.index == 0 else None
        dist.gather_object(found, parts)
        found = [entry for part in parts or () for entry in part]
        num_broken = int(summed(torch.tensor([num_broken], device=device)))
    return sorted(found, key=lambda entry: int(entry["image_id"])), num_broken  # stable: an image's best comes first


def _scores(source: CocoSource, found: list[Found], split: JobSplit, device: torch.device) -> dict[str, float]:
    """The twelve numbers, counted by the first rank, on every rank."""
    scores = coco_scores(source.annotation_file, found) if split.index == 0 else {}
    values = torch.tensor([scores.get(metric.name, 0.0) for metric in METRICS], dtype=torch.float64, device=device)
    if split.count > 1:
        broadcast_first([values])
    return {metric.name: value for metric, value in zip(METRICS, values.tolist(), strict=True)}
