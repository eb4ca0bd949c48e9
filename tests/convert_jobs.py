"""What the tests of conversion share: a small data set with holes, and a conversion in one line."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from extract_jobs import contents

from vkd_cache.config import Config
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import open_source
from vkd_cache.stages.convert import ConvertRequest, convert
from vkd_cache.stages.convert_job import ConvertSummary
from vkd_cache.stages.convert_plan import Wish
from vkd_cache.stages.verify import VerifyRequest, verify

MakeConfig = Callable[..., Config]
NODES = ("pooled", "logits", "feature_map")
NUM_IMAGES, SHARD_SIZE, NUM_SHARDS = 61, 13, 5
WISHES = {field.name for field in dataclasses.fields(Wish)}


def do(source: Path, target: Path, *, worker: tuple[int, int] = (0, 1), **asked: Any) -> ConvertSummary:
    """Convert in this process; fields of the request and of its wish alike."""
    wish = Wish(**{name: value for name, value in asked.items() if name in WISHES})
    rest = {name: value for name, value in asked.items() if name not in WISHES}
    request = ConvertRequest(source=str(source), target=str(target), wish=wish, **rest)
    return convert(request, JobSplit(index=worker[0], count=worker[1]))


def content(url: Path) -> dict[str, bytes]:
    """Manifest, head and units of a cache: all but the records, which say where a unit came from, and logs."""
    return {path: data for path, data in contents(url).items() if not path.startswith("records/")}


def assert_sound(config: Config, url: Path, **request: Any) -> None:
    """The cache passes `verify`, with every pixel."""
    asked = {"sample": 0, "pixels": True, "source": config.source.train} | request
    report = verify(config, VerifyRequest(url=str(url), **asked))
    assert [finding for level in report.levels for finding in level.findings if finding.is_error] == []


def few_digits(tiny_config: MakeConfig, digits_tree: Path, root: Path) -> MakeConfig:
    """Small configurations over a few digits below `root`, all dense nodes, two views; some images are broken.

    These are the first row of a shard, the last one of another, and two neighbours.
    """
    images = sorted((digits_tree / "train").rglob("*.jpg"), key=lambda path: path.name)
    for path in images[:NUM_IMAGES]:
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.parent.name)
    source = open_source(str(root), shard_size=SHARD_SIZE)
    assert [len(shard.keys) for shard in source.shards] == [13, 13, 13, 13, 9]
    for shard, row in ((0, 0), (1, 12), (3, 4), (3, 5), (4, 3)):
        (root / f"{source.shards[shard].keys[row]}.jpg").write_bytes(b"no image")

    def build(**sections: dict[str, Any]) -> Config:
        defaults: dict[str, dict[str, Any]] = {
            "source": {"train": str(root), "shard_size": SHARD_SIZE},
            "cache": {"dtype": "float32", "nodes": NODES, "block_samples": 7},
            "views": {"count": "2"},
            "extract": {"batch_size": 8},
        }
        return tiny_config(**sections | {name: given | sections.get(name, {}) for name, given in defaults.items()})

    return build
