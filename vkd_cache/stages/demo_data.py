"""The data set of the demo: scikit-learn's 1,797 scanned digits, as files that any data set might come in.

    data/train/<digit>/0042.jpg, data/val/<digit>/0007.jpg    a folder of classes
    data/shards/train-000.tar                                 64 of the training images, as a WebDataset tar

The teacher learns from the folder, the students from the tar: a student that has seen six of each digit can be told
something by a teacher that has seen a hundred.

A newcomer's trap: the images come in the order of the people who wrote them, so the split and the tars follow a seeded
permutation instead.
"""

import dataclasses
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from vkd_cache.errors import ConfigError

NUM_TRAIN = 1000
NUM_IN_TARS = 64
TAR_SAMPLES = 64
SIDE_PX = 32  # scanned at 8 x 8, enlarged so that crops and patches have something to cut
JPEG_QUALITY = 90
_SPLIT_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoData:
    """Where the digits are.

    Attributes:
        tree: folder with train/ and val/.
        tars: pattern of the tar shards.
        num_train, num_val: images of each split in the tree.
        num_in_tars: images of the training split that are in the tars too.
    """

    tree: str
    tars: str
    num_train: int
    num_val: int
    num_in_tars: int


def write_digits(folder: Path) -> DemoData:
    """Write both forms below `folder`.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    images, labels = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    encoded = {int(number): _jpeg(images[number]) for number in order}
    splits = {"train": order[:NUM_TRAIN], "val": order[NUM_TRAIN:]}
    for split, numbers in splits.items():
        for number in numbers.tolist():
            path = folder / split / str(labels[number]) / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded[number])
    shards = folder / "shards"
    shards.mkdir()
    starts = range(0, NUM_IN_TARS, TAR_SAMPLES)
    for shard, start in enumerate(starts):
        with tarfile.open(shards / f"train-{shard:03d}.tar", "w") as tar:
            for number in splits["train"][start : start + TAR_SAMPLES].tolist():
                for name, data in _members(number, encoded[number], labels[number]):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return DemoData(
        tree=str(folder),
        tars=str(shards / f"train-{{000..{len(starts) - 1:03d}}}.tar"),
        num_train=NUM_TRAIN,
        num_val=len(images) - NUM_TRAIN,
        num_in_tars=NUM_IN_TARS,
    )


def load_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """(1797, 8, 8) grey images and their labels.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        import sklearn.datasets
    except ImportError as error:
        raise ConfigError(
            "demo: the digits come with scikit-learn, which is not installed. Run: pip install scikit-learn"
        ) from error
    digits = sklearn.datasets.load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # scikit-learn counts ink from 0 to 16
    return grey, digits.target.astype(np.int64)


def _jpeg(grey: npt.NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(grey).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _members(number: int, image: bytes, label: int) -> Iterator[tuple[str, bytes]]:
    yield f"{number:04d}.jpg", image
    yield f"{number:04d}.cls", str(label).encode()
