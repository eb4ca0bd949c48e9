"""Small COCO data sets of real pixels: handwritten digits pasted on pieces of photographs, with exact boxes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

NUM_COCO_TRAIN, NUM_COCO_VAL = 24, 10
FIRST_IDS = {"train": 9, "val": 800}


def write_coco(root: Path, *, num_train: int = NUM_COCO_TRAIN, num_val: int = NUM_COCO_VAL, seed: int = 17) -> Path:
    """Write train2017/, val2017/ and annotations/ below `root`, and return it.

    Images are 60 to 100 px wide and high, all of different sizes, upright ones and wide ones; categories 1..10 are
    called "digit 0".."digit 9". In each split the second image has no annotation and the third one, beside its digits,
    a crowd. In the training split the fourth image holds a box without width.
    """
    from sklearn.datasets import load_digits, load_sample_images

    digits, photographs = load_digits(), load_sample_images().images
    rng = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", num_train), ("val", num_val)):
        folder = root / f"{split}2017"
        folder.mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(count):
            identity = FIRST_IDS[split] + 7 * number  # ids with gaps, as in COCO
            width, height = (int(side) for side in rng.integers(60, 101, size=2))
            pixels = _piece(photographs[number % len(photographs)], width, height, rng)
            boxes = []
            for slot in range(0 if number == 1 else int(rng.integers(1, 4))):
                index = int(rng.integers(len(digits.target)))
                box = _paste(pixels, digits.images[index], slot, rng)
                boxes.append((box, int(digits.target[index]) + 1, 0))
            if number == 2:
                boxes.append(((0, height // 2, width, height - height // 2), 4, 1))
            if number == 3 and split == "train":
                boxes.append(((width // 2, 10, 0, 20), 5, 0))
            name = f"{identity:012d}.jpg"
            Image.fromarray(pixels).save(folder / name, "JPEG", quality=92)
            images.append({"id": identity, "file_name": name, "width": width, "height": height})
            annotations += [
                {
                    "id": 100 * identity + slot,
                    "image_id": identity,
                    "category_id": category,
                    "bbox": [float(value) for value in box],
                    "area": float(box[2] * box[3]),
                    "iscrowd": crowd,
                }
                for slot, (box, category, crowd) in enumerate(boxes)
            ]
        document = {
            "info": {"description": "digits on photographs"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1 + digit, "name": f"digit {digit}"} for digit in range(10)],
        }
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(document), encoding="utf-8")
    return root


def _piece(
    photograph: npt.NDArray[np.uint8], width: int, height: int, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """A darkened (height, width, 3) piece, so that white digits stand out."""
    top = int(rng.integers(photograph.shape[0] - 2 * height))
    left = int(rng.integers(photograph.shape[1] - 2 * width))
    piece = Image.fromarray(photograph[top : top + 2 * height, left : left + 2 * width])
    small = np.asarray(piece.resize((width, height), Image.Resampling.BICUBIC))
    return (small * 0.6).astype(np.uint8)


def _paste(
    pixels: npt.NDArray[np.uint8], digit: npt.NDArray[np.float64], slot: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a digit into column `slot` of three; its x, y, width and height in whole pixels."""
    rows, columns = np.nonzero(digit > 4)
    tight = digit[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    third = pixels.shape[1] // 3
    height = int(rng.integers(20, 36))
    width = min(max(6, round(height * tight.shape[1] / tight.shape[0])), third)
    image = Image.fromarray((tight * 15.9).astype(np.uint8))
    ink = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    left = slot * third + int(rng.integers(third - width + 1))
    top = int(rng.integers(pixels.shape[0] - height + 1))
    target = pixels[top : top + height, left : left + width]
    target[:] = np.maximum(target, ink[..., None])
    return left, top, width, height
