"""COCO's twelve numbers of a list of detections, counted by pycocotools.

A newcomer's trap: every image of the annotation file counts, also one without boxes, one in which a model found
nothing, and one that could not be decoded; its boxes are then missed. And -1 is not a bad score: it says that the
annotation file has no box of that size.
"""

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Found = dict[str, Any]  # a detection: image_id, category_id, bbox (left, top, width, height in pixels), score


class Metric(NamedTuple):
    """One of the twelve: name of the field, and what it averages over, in COCO's words."""

    name: str
    label: str
    iou: str
    area: str
    num_detections: int


METRICS = (
    Metric("ap", "AP", "0.50:0.95", "all", 100),
    Metric("ap50", "AP50", "0.50", "all", 100),
    Metric("ap75", "AP75", "0.75", "all", 100),
    Metric("ap_small", "AP small", "0.50:0.95", "small", 100),
    Metric("ap_medium", "AP medium", "0.50:0.95", "medium", 100),
    Metric("ap_large", "AP large", "0.50:0.95", "large", 100),
    Metric("ar1", "AR1", "0.50:0.95", "all", 1),
    Metric("ar10", "AR10", "0.50:0.95", "all", 10),
    Metric("ar100", "AR100", "0.50:0.95", "all", 100),
    Metric("ar_small", "AR small", "0.50:0.95", "small", 100),
    Metric("ar_medium", "AR medium", "0.50:0.95", "medium", 100),
    Metric("ar_large", "AR large", "0.50:0.95", "large", 100),
)  # in the order of COCOeval.stats


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionResult:
    """The twelve numbers of one detector.

    Attributes:
        name: whose.
        split: `val`.
        num_images: images of the annotation file; all of them count.
        num_broken: how many of these could not be decoded, and so have no detections.
        ap: average precision over IoU 0.50 to 0.95, percent, as all that follow; -1 where there is no box to find.
        ap50, ap75: at one IoU.
        ap_small, ap_medium, ap_large: of boxes under 32 x 32 px, in between, and over 96 x 96 px of area.
        ar1, ar10, ar100: average recall of the best 1, 10 and 100 detections of an image.
        ar_small, ar_medium, ar_large: of the best 100, by area.
        seconds: wall-clock time.
    """

    name: str
    split: str
    num_images: int
    num_broken: int
    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    seconds: float

    @property
    def score(self) -> float:
        """The one number that a detector is judged by: AP."""
        return self.ap

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


def coco_scores(annotation_file: Path, detections: Sequence[Found]) -> dict[str, float]:
    """The twelve numbers by name (`METRICS`), percent; -1 where the annotation file has nothing of the kind.

    Args:
        annotation_file: COCO's instances_*.json. An annotation without `iscrowd` is none, one without `area` has that
            of its box.
        detections: any number, of images of the annotation file; not changed.

    Source: pycocotools' COCOeval, unchanged, for boxes. It cannot load an empty list of results; here that is a
    detector that finds nothing.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints; stdout belongs to our results
        truth = COCO(str(annotation_file))
        for annotation in truth.dataset.get("annotations", ()):
            annotation.setdefault("iscrowd", 0)
            if annotation.get("area") is None:
                annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        # copies: loadRes writes into what it is given
        found = truth.loadRes([dict(detection) for detection in detections]) if detections else COCO()
        counts = COCOeval(truth, found, "bbox")
        counts.evaluate()
        counts.accumulate()
        counts.summarize()
    values = [float(value) for value in counts.stats]
    return {metric.name: 100 * value if value >= 0 else -1.0 for metric, value in zip(METRICS, values, strict=True)}


def score_table(results: Sequence[DetectionResult]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for people: a line a number, a column a detector."""
    columns = ["", "IoU", "area", "best", *(result.name for result in results)]
    rows = [
        [
            metric.label,
            metric.iou,
            metric.area,
            str(metric.num_detections),
            *(_shown(getattr(result, metric.name)) for result in results),
        ]
        for metric in METRICS
    ]
    rows.append(["images", "", "", "", *(str(result.num_images) for result in results)])
    rows.append(["broken", "", "", "", *(str(result.num_broken) for result in results)])
    rows.append(["seconds", "", "", "", *(f"{result.seconds:.1f}" for result in results)])
    return columns, rows


def _shown(value: float) -> str:
    return "-" if value < 0 else f"{value:.1f}"
