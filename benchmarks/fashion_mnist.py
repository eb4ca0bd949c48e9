"""Fashion-MNIST as WebDataset shards of JPEG files: the real images of the end-to-end result in docs/results.

    python benchmarks/fashion_mnist.py --input /usr/share/datasets/fashion-mnist --output data/fashion-mnist

Debian's package `dataset-fashion-mnist` holds the four files of the data set; any copy of them will do. The same input
gives the same bytes: the order is a seeded shuffle, so every tar mixes all classes, and members carry no date.
"""

import argparse
import gzip
import math
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from packing import jpeg, pack_samples
from PIL import Image

from vkd_cache import console
from vkd_cache.cli import guarded
from vkd_cache.errors import SourceError

SPLITS = {"train": "train", "val": "t10k"}
SHARD_SAMPLES = 1000
JPEG_QUALITY = 95
_IMAGES, _LABELS = 0x803, 0x801  # magic numbers of idx files: unsigned bytes in 3 and in 1 dimensions


def main() -> int:
    """Write both splits."""
    made = argparse.ArgumentParser(description="Fashion-MNIST as WebDataset shards of JPEG files.")
    made.add_argument("--input", required=True, metavar="DIR", help="folder with the four idx.gz files")
    made.add_argument("--output", required=True, metavar="DIR", help="train/ and val/ with the tars go below it")
    made.add_argument("--limit", type=int, default=0, metavar="N", help="N training and N/6 validation images; 0: all")
    made.add_argument("--seed", type=int, default=0, help="of the order")
    options = made.parse_args()
    for split, prefix in SPLITS.items():
        limit = math.ceil(options.limit / (6 if split == "val" else 1)) or None
        folder = Path(options.output) / split
        written = write_split(Path(options.input), prefix, folder, limit=limit, seed=options.seed)
        console.say(f"{split}: {written[1]} images in {written[0]} tars -> {folder}")
    return 0


def write_split(source: Path, prefix: str, folder: Path, *, limit: int | None, seed: int) -> tuple[int, int]:
    """Write the tars of one split below `folder`; returns the numbers of tars and of images.

    Raises:
        SourceError: an input file is missing or not what it should be, or the folder holds tars already.
    """
    images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz", _IMAGES)
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", _LABELS)
    if len(images) != len(labels):
        raise SourceError(f"{source}: found {len(images)} images and {len(labels)} labels of '{prefix}'.")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise SourceError(f"{folder}: holds tars already; give an empty --output, lest two runs are mixed.")
    order = np.random.default_rng(seed).permutation(len(images))[:limit]
    starts = range(0, len(order), SHARD_SAMPLES)
    for number, start in enumerate(starts):
        rows = order[start : start + SHARD_SAMPLES]
        pack_samples(folder / f"{folder.name}-{number:06d}.tar", _samples(prefix, images, labels, rows))
    return len(starts), len(order)


def _samples(
    prefix: str, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]
) -> Iterator[tuple[str, bytes, int]]:
    """Key (its place in the original file), grey JPEG, and label of each row."""
    for row in rows.tolist():
        yield f"{prefix}_{row:05d}", jpeg(Image.fromarray(images[row]), JPEG_QUALITY), int(labels[row])


def read_idx(path: Path, magic: int) -> npt.NDArray[np.uint8]:
    """The array of an idx file of unsigned bytes.

    Raises:
        SourceError: missing, damaged, or of another kind than `magic` says.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise SourceError(
            f"{path}: not there. --input is the folder of the four idx.gz files, in Debian's package "
            "dataset-fashion-mnist /usr/share/datasets/fashion-mnist."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path}: not a whole gzip file ({error}). Fetch it again.") from error
    dimensions = magic & 0xFF
    header = 4 * (1 + dimensions)
    found, *shape = struct.unpack_from(f">{1 + dimensions}I", content.ljust(header, b"\0"))
    if found != magic or len(content) - header != math.prod(shape):
        raise SourceError(f"{path}: not an idx file of unsigned bytes in {dimensions} dimensions.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


if __name__ == "__main__":
    sys.exit(guarded(main))
