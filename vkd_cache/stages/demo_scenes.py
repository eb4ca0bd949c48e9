"""The data set of the detection demo: real scanned digits on real photographs, in COCO's layout, with exact boxes.

    scenes/train2017/000000000042.jpg, scenes/val2017/000000000007.jpg
    scenes/annotations/instances_train2017.json, instances_val2017.json

Digits and photographs come with scikit-learn. The validation scenes use digits and parts of the photographs that no
training scene has: scans are divided by a seeded permutation, photographs by their lower quarter.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vkd_cache.stages.demo_data import JPEG_QUALITY, load_digits

SIDE_PX = 96
NUM_TRAIN, NUM_VAL = 2000, 300
NUM_LEARNT = 500  # of the training scenes, those that students get
MAX_DIGITS = 3  # of a scene, at least 1
DIGIT_PX = (24, 44)  # side of the scan's square, smallest and largest
_NUM_VAL_DIGITS = 397
_SPLIT_SEED = 0
_SCENE_SEED = 1
_PLACING_TRIES = 20
_INK_THRESHOLD = 32  # of 255: fainter pixels of the enlarged scan are not part of the digit

Pixels = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True)
class _Digit:
    """One digit of a scene: its class, and its box (left, top, width, height) in pixels."""

    label: int
    box: tuple[int, int, int, int]


def write_scenes(folder: Path, *, num_train: int = NUM_TRAIN, num_val: int = NUM_VAL) -> Path:
    """Write both splits below `folder`, and return it.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    images, labels = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    scans = {"train2017": order[_NUM_VAL_DIGITS:], "val2017": order[:_NUM_VAL_DIGITS]}
    (folder / "annotations").mkdir(parents=True)
    first_id = 1
    for number, (split, count) in enumerate({"train2017": num_train, "val2017": num_val}.items()):
        grounds = _photographs(lower=split == "val2017")
        rng = np.random.default_rng([_SCENE_SEED, number])
        (folder / split).mkdir()
        entries = []
        for image_id in range(first_id, first_id + count):
            pixels, digits = _scene(rng, grounds, images[scans[split]], labels[scans[split]])
            name = f"{image_id:012d}.jpg"
            Image.fromarray(pixels).save(folder / split / name, "JPEG", quality=JPEG_QUALITY)
            entries.append((image_id, name, digits))
        first_id += count
        document = _coco(entries)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def first_scenes(scenes: Path, folder: Path, count: int) -> Path:
    """A data set of the first `count` training scenes of `scenes`, without a validation split; returns `folder`."""
    name = "instances_train2017.json"
    document = json.loads((scenes / "annotations" / name).read_text(encoding="utf-8"))
    document["images"] = document["images"][:count]
    kept = {image["id"] for image in document["images"]}
    document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] in kept]
    for part in ("annotations", "train2017"):
        (folder / part).mkdir(parents=True)
    for image in document["images"]:
        file_name = image["file_name"]
        shutil.copyfile(scenes / "train2017" / file_name, folder / "train2017" / file_name)
    (folder / "annotations" / name).write_text(json.dumps(document), encoding="utf-8")
    return folder


def _photographs(*, lower: bool) -> list[Pixels]:
    """The lower quarters of scikit-learn's two photographs, or the rest of them."""
    from sklearn.datasets import load_sample_images

    images = load_sample_images().images
    cuts = [image.shape[0] * 3 // 4 for image in images]
    return [image[cut:] if lower else image[:cut] for image, cut in zip(images, cuts, strict=True)]


def _scene(
    rng: np.random.Generator, grounds: list[Pixels], scans: Pixels, labels: npt.NDArray[np.int64]
) -> tuple[Pixels, list[_Digit]]:
    """(SIDE_PX, SIDE_PX, 3) pixels with one to MAX_DIGITS digits that do not touch."""
    ground = grounds[rng.integers(len(grounds))]
    top, left = (int(rng.integers(0, length - SIDE_PX + 1)) for length in ground.shape[:2])
    scene = ground[top : top + SIDE_PX, left : left + SIDE_PX].copy()
    digits: list[_Digit] = []
    for _ in range(int(rng.integers(1, MAX_DIGITS + 1))):
        number = int(rng.integers(len(scans)))
        ink = _ink(scans[number], int(rng.integers(DIGIT_PX[0], DIGIT_PX[1] + 1)))
        place = _free_place(rng, ink.shape, digits)
        if place is not None:
            _draw(scene, ink, place, rng)
            digits.append(_Digit(int(labels[number]), (place[1], place[0], ink.shape[1], ink.shape[0])))
    return scene, digits


def _ink(scan: Pixels, side_px: int) -> npt.NDArray[np.float64]:
    """The enlarged scan's coverage in [0, 1], cut to the digit itself: its borders are the box."""
    large = np.asarray(Image.fromarray(scan).resize((side_px, side_px), Image.Resampling.BICUBIC))
    inked = large >= _INK_THRESHOLD
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    part = large * inked
    cut: npt.NDArray[np.float64] = part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] / 255.0
    return cut


def _free_place(rng: np.random.Generator, shape: tuple[int, ...], digits: list[_Digit]) -> tuple[int, int] | None:
    """(top, left) where a digit of `shape` touches none of `digits`; None where no try finds one."""
    height, width = shape
    for _ in range(_PLACING_TRIES):
        top = int(rng.integers(0, SIDE_PX - height + 1))
        left = int(rng.integers(0, SIDE_PX - width + 1))
        apart = [
            left + width < x or x + w < left or top + height < y or y + h < top
            for x, y, w, h in (digit.box for digit in digits)
        ]
        if all(apart):
            return top, left
    return None


def _draw(scene: Pixels, ink: npt.NDArray[np.float64], place: tuple[int, int], rng: np.random.Generator) -> None:
    """Paint in a colour far from the ground's mean, so that the digit can be seen everywhere."""
    window = scene[place[0] : place[0] + ink.shape[0], place[1] : place[1] + ink.shape[1]]
    dark = window.mean() > 127
    colour = rng.uniform(0, 70, 3) if dark else rng.uniform(185, 255, 3)
    window[:] = np.rint(window * (1 - ink[..., None]) + colour * ink[..., None])


def _coco(entries: list[tuple[int, str, list[_Digit]]]) -> dict[str, Any]:
    """The annotation file of a split; a digit's category is one more than its value, because COCO counts from 1."""
    size = {"width": SIDE_PX, "height": SIDE_PX}
    return {
        "info": {"description": "scikit-learn's scanned digits on its sample photographs"},
        "images": [{"id": number, "file_name": name} | size for number, name, _ in entries],
        "annotations": list(_annotations(entries)),
        "categories": [{"id": value + 1, "name": f"digit {value}"} for value in range(10)],
    }


def _annotations(entries: list[tuple[int, str, list[_Digit]]]) -> Iterator[dict[str, Any]]:
    number = 0
    for image_id, _, digits in entries:
        for digit in digits:
            number += 1
            yield {
                "id": number,
                "image_id": image_id,
                "category_id": digit.label + 1,
                "bbox": list(digit.box),
                "area": digit.box[2] * digit.box[3],
                "iscrowd": 0,
            }
