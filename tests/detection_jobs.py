"""What tests of detection stages share: a detector's file, a small configuration, and damage to a COCO data set."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vkd_cache.config import Config, load_config
from vkd_cache.detection.vidt import create_vidt

NUM_CLASSES = 11  # ten digits, and id 0 that COCO does not use
SHARD_SIZE = 8
VIEWS: dict[str, Any] = {
    "recipe": "vidt",
    "scales": (96, 112, 128),
    "max_size_px": 192,
    "crop_scales": (80, 96),
    "crop_min_px": 48,
    "crop_max_px": 80,
    "canvas_multiple_px": 32,
    "seed": 5,
}


def write_detector(path: Path, name: str = "test_vidt", num_classes: int = NUM_CLASSES, **heads: bool) -> Path:
    """The authors' form of file: seeded weights under `model`, none of them at the zeros they start from."""
    torch.manual_seed(3)
    net = create_vidt(name, num_classes, **heads)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    torch.save({"model": net.state_dict(), "epoch": 3}, path)
    return path


def detection_config(root: Path, weights: Path, url: Path, **sections: dict[str, Any]) -> Config:
    """A small extraction on the CPU in this process; sections are merged."""
    defaults: dict[str, dict[str, Any]] = {
        "source": {"train": str(root), "shard_size": SHARD_SIZE},
        "views": dict(VIEWS),
        "teacher": {"name": "test_vidt", "weights": str(weights)},
        "cache": {"url": str(url), "dtype": "float32"},
        "extract": {"batch_size": 4, "workers": 0, "device": "cpu"},
    }
    return load_config(overrides={name: values | sections.get(name, {}) for name, values in defaults.items()})


def annotations_of(root: Path) -> Path:
    return root / "annotations" / "instances_train2017.json"


def change_annotations(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the training annotations."""
    path = annotations_of(root)
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def image_path(root: Path, key: str) -> Path:
    return root / "train2017" / f"{int(key):012d}.jpg"


def paint(root: Path, key: str, colour: str, size: tuple[int, int] | None = None) -> None:
    """Replace an image by one of a single colour, of its own size unless another is given."""
    path = image_path(root, key)
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        size = size or image.size
    Image.new("RGB", size, colour).save(path, "JPEG")
