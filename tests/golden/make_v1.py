"""Made the golden caches of format version 1, with the images and the expected values beside them. Run once.

Never again for version 1: what lies in tests/golden/v1 is what a release wrote, and every later one has to read it.
A new format version gets a script and a folder of its own.

    zarr        sqrt_uint8 of pooled features, 2 views of 2 shards, a broken image, an odd sample alone, the head
    webdataset  float16 of pooled features and logits, one view of the same images, in blocks of 4 rows
    tokens      zarr; token_int8 of patch tokens, half of them, and of [DET] tokens, all of them; detection

    OMP_NUM_THREADS=1 python tests/golden/make_v1.py
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

ROOT = Path(__file__).parent / "v1"
sys.path.insert(0, str(Path(__file__).parent.parent))

from detection_jobs import VIEWS, write_detector  # noqa: E402

from vkd_cache.cache.reader import Cache, Unit, open_cache  # noqa: E402
from vkd_cache.config import load_config  # noqa: E402
from vkd_cache.runtime import JobSplit  # noqa: E402
from vkd_cache.stages.extract import extract  # noqa: E402

NUM_IMAGES, SIDE_PX, SHARD_SIZE = 9, 16, 5


def main() -> None:
    ROOT.mkdir()
    torch.set_num_threads(1)
    write_digits(ROOT / "digits")
    write_coco(ROOT / "coco")
    with tempfile.TemporaryDirectory() as folder:
        teacher = write_classifier(Path(folder) / "classifier.pt")
        detector = write_detector(Path(folder) / "detector.pth")
        classify: dict[str, Any] = {
            "source": {"train": str(ROOT / "digits"), "shard_size": SHARD_SIZE},
            "views": {"size_px": SIDE_PX, "seed": 5, "count": "2", "mix_probability": 0.7},
            "teacher": {"name": "test_resnet", "weights": str(teacher)},
        }
        detect: dict[str, Any] = {
            "source": {"train": str(ROOT / "coco"), "shard_size": 2},
            "views": VIEWS | {"scales": (48, 64), "max_size_px": 64, "crop_scales": (40, 48), "crop_min_px": 24,
                              "crop_max_px": 40, "count": "1"},
            "teacher": {"name": "test_vidt", "weights": str(detector)},
        }  # fmt: skip
        make("zarr", classify, folder, dtype="uint8")
        one_view = classify | {"views": classify["views"] | {"count": "1"}}
        make("webdataset", one_view, folder, dtype="float16", nodes=["pooled", "logits"], backend="webdataset",
             block_samples=4)  # fmt: skip
        make("tokens", detect, folder, dtype="int8", nodes=["patch_3", "neck_det"], tokens=0.5)


def make(name: str, sections: dict[str, Any], folder: str, **cache: Any) -> None:
    """Extract the cache `name`, write down what is in it, and compare that with what the teacher said in float32."""
    url = ROOT / name
    common = {"extract": {"batch_size": 4, "workers": 0, "device": "cpu"}}
    exact_url = Path(folder) / name
    for target, settings in ((url, cache), (exact_url, cache | {"dtype": "float32"})):
        config = load_config(overrides=sections | common | {"cache": {"url": str(target)} | settings})
        assert extract(config, JobSplit()).exit_code == 0
    for log in (url / "runs").iterdir():  # not part of the content, and full of paths of the machine it was made on
        log.unlink()
    for empty in (url / "runs", url / ".incomplete"):
        empty.rmdir()
    stored, exact = open_cache(str(url)), open_cache(str(exact_url))
    document: dict[str, Any] = {"fingerprint": stored.fingerprint, "units": {}}
    arrays: dict[str, np.ndarray] = {}
    for unit_id in stored.units:
        unit, reference = stored.read(unit_id), exact.read(unit_id)
        where = f"view {unit_id.view} shard {unit_id.shard}"
        record = stored.record(*unit_id)
        document["units"][where] = {
            "shard": unit_id.shard,
            "view": unit_id.view,
            "keys": unit.keys,
            "broken": [list(entry) for entry in record.broken],
            "file": record.files[0][0],
            "columns": {name: values.tolist() for name, values in unit.columns.items() if not name.startswith("key_")},
        }
        for spec in stored.manifest.nodes:
            values, bound, wanted = dense(unit, spec.name), unit.rounding(spec.name), dense(reference, spec.name)
            assert bool(((values - wanted).abs() <= bound * (1 + 1e-5) + 1e-6).all()), f"{where}: {spec.name}"
            arrays[f"{where} {spec.name}"] = values.numpy()
            if spec.layout == "tokens":
                tokens = unit.tokens(spec.name)
                arrays[f"{where} {spec.name} grid"] = tokens.grid
                arrays[f"{where} {spec.name} places"] = tokens.places()
                arrays[f"{where} {spec.name} total"] = tokens.total.numpy()
                arrays[f"{where} {spec.name} squares"] = tokens.squares.numpy()
    add_head(stored, arrays)
    (ROOT / f"{name}.json").write_text(json.dumps(document, indent=None, sort_keys=True) + "\n", encoding="utf-8")
    np.savez_compressed(ROOT / f"{name}.npz", **arrays)


def dense(unit: Unit, node: str) -> torch.Tensor:
    """Values as float32; of tokens, those that are stored, end to end."""
    values = unit.tokens(node).dense() if unit.layout(node) == "tokens" else unit.node(node)
    return values.float()


def add_head(cache: Cache, arrays: dict[str, np.ndarray]) -> None:
    head = cache.head()
    if head is not None:
        arrays |= {"head weight": head[0].numpy(), "head bias": head[1].numpy()}


def write_digits(root: Path) -> None:
    """Real handwritten digits as PNGs of 12 to 15 px, by class, and one file that is no image."""
    data = load_digits()
    for index in range(NUM_IMAGES):
        side = 12 + index % 4
        image = Image.fromarray((data.images[index] * 15.9).astype(np.uint8))
        path = root / "train" / f"digit{data.target[index]}" / f"image{index}.png"
        path.parent.mkdir(parents=True)
        image.resize((side, side + index % 2), Image.Resampling.BICUBIC).save(path, optimize=True)
    (root / "train/digit9").mkdir()
    (root / "train/digit9/lost.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")


def write_coco(root: Path) -> None:
    """Two pieces of photographs with a digit on each, as PNGs, one upright and one wide, and their boxes."""
    digits, photographs = load_digits(), load_sample_images().images
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    images, annotations = [], []
    for number, (width, height) in enumerate(((24, 32), (36, 24))):
        piece = (photographs[number][100 : 100 + height, 200 : 200 + width] * 0.5).astype(np.uint8)
        left, top = 5 + number, 7
        ink = (digits.images[number] * 15.9).astype(np.uint8)[..., None]
        piece[top : top + 8, left : left + 8] = np.maximum(piece[top : top + 8, left : left + 8], ink)
        name = f"{number + 1:012d}.png"
        Image.fromarray(piece).save(root / "train2017" / name, optimize=True)
        images.append({"id": number + 1, "file_name": name, "width": width, "height": height})
        annotations.append({"id": number + 1, "image_id": number + 1, "category_id": int(digits.target[number]) + 1,
                            "bbox": [left, top, 8, 8], "area": 64, "iscrowd": 0})  # fmt: skip
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1 + digit, "name": f"digit {digit}"} for digit in range(10)],
    }
    (root / "annotations/instances_train2017.json").write_text(json.dumps(document), encoding="utf-8")


def write_classifier(path: Path) -> Path:
    """Seeded weights, and batch-norm statistics of the digits themselves, so that features differ."""
    torch.manual_seed(11)
    model = timm.create_model("test_resnet", num_classes=10)
    pixels = torch.from_numpy(load_digits().images[:64] / 16.0).float()[:, None].repeat(1, 3, 2, 2)
    with torch.no_grad():
        model.get_classifier().weight.normal_(std=0.5)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(1.0)
                module.momentum = None
        model.train()(pixels * 2 - 1)
    torch.save(model.state_dict(), path)
    return path


if __name__ == "__main__":
    main()
