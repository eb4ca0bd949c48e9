"""Benchmarks: each runs from the command line, keeps every repetition beside its baseline, and says where it ran.

Nothing here looks at how fast anything was.
"""

import gzip
import importlib
import json
import statistics
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vkd_cache.sources import open_source
from vkd_cache.views.decode import decode_image

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# what each has to measure, and relate, whatever else it does
MEASURED = {
    "extract": ["teacher alone", "rendering alone", "extract", "publish zarr float16", "read zarr float16",
                "publish webdataset uint8", "read webdataset uint8"],
    "read": [f"{what}, {recipe}" for recipe in ("vkd", "fast") for what in
             ("feed with cache", "feed of images", "CPU, feature path", "CPU, image path")],
    "bytes": [f"{what} {backend} {dtype}" for what in ("publish", "read") for backend in ("zarr", "webdataset")
              for dtype in ("float32", "float16", "bfloat16", "uint8", "uint4")],
    "image_pipeline": [
        *(f"{kind}, {end}" for kind in ("torchvision", "vkd", "fast", "torchvision detection", "vidt", "fast_detection")
          for end in ("8-bit", "float")),
        *(f"{recipe}: {stage}" for recipe in ("vkd", "fast")
          for stage in ("read", "decode", "plan", "render", "digest")),
        "fast: colour map",
    ],
    "pipelines": [f"{what}{kind}" for what in ("", "CPU, ") for kind in
                  ("vkd", "vkd with cache", "fast", "fast with cache", "torchvision, PIL", "webdataset")],
    "worker_pool": [f"{what}{kind}, {count} images, 1 workers" for what in ("", "CPU, ", "CPU of the main process, ")
                    for kind in ("pool", "DataLoader") for count in (4, 8)],
    "scaling_workers": [f"fast with cache, {processes} x 1 workers" for processes in (1, 2)],
    "pixels": [
        *(f"{what}, vkd, {kind}" for what in ("training CPU", "extraction CPU", "CPU of the main process")
          for kind in ("none", "jpeg", "lossless")),
        "decode, jpeg 90 444", "decode, delta_zstd", "decode, png 1",
    ],
    "step": [f"{what}, {kind}" for what in ("step", "rate", "peak memory") for kind in
             ("cache", "plain", "live", "timm", "large cache")],
    "orthogonal": ["12x4, QR, Cholesky (shipped)", "12x4, polar, Newton-Schulz",
                   "linear (no constraint): loss at the end", "cayley: orthonormality error, worst"],
    "detection": [
        *(f"{what}, {kind}" for what in ("step", "peak memory") for kind in
          ("cache", "cache, 10 % int8", "plain", "live")),
        *(f"{what}, {choice}" for what in ("read and join", "read and join in bytes") for choice in
          ("float16", "int8", "float16, 25 %", "int8, 10 %", "int8, patch_3 and neck_det")),
    ],
}  # fmt: skip
RATIOS = {
    "extract": ["extract / teacher alone", "extract / the slower of both", "publish zarr float16 / 30 us"],
    "read": ["feed with cache / feed of images, vkd", "CPU of the feature path / of the image path, fast"],
    "bytes": [*(f"bytes per view before zstd, {backend} uint8 / 3.1 kB" for backend in ("zarr", "webdataset")),
              "bytes per view, zarr uint8 / 2 kB", "publish zarr uint8 / 30 us", "columns, packed / as numbers",
              "uint4, rows, zstd 1 / uncompressed", "float16, planes, zstd 9 / uncompressed"],
    "image_pipeline": [f"{kind} / torchvision, {end}" for kind in ("vkd", "fast", "vidt", "fast_detection")
                       for end in ("8-bit", "float")],
    "pipelines": ["fast / torchvision, PIL", "fast with cache / webdataset", "vkd with cache / vkd"],
    "worker_pool": ["pool / DataLoader, 8 images, 1 workers", "CPU, pool / DataLoader, 8 images, 1 workers"],
    "scaling_workers": ["efficiency, fast with cache, 2 x 1 workers"],
    "pixels": [f"{what}, vkd, {ratio}" for kind in ("jpeg", "lossless") for what, ratio in
               (("training CPU", f"none / {kind}"), ("extraction CPU", f"{kind} / none"))],
    "step": ["cache / plain", "large cache / plain", "live / cache", "timm / cache", "peak memory, timm / cache"],
    "orthogonal": ["polar, eigenvectors / shipped, 12x4"],
    "detection": ["cache / plain", "live / cache", "live / cache, 10 % int8", "peak memory, live / cache",
                  "bytes, int8, 10 % / float16", "bytes, made tokens / the teacher's, same views",
                  "read / this student's need, int8, 10 %"],
}  # fmt: skip
REPETITIONS = 2


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", MEASURED)
def test_benchmark_runs_and_writes_every_repetition(name: str, tmp_path: Path) -> None:
    output, scratch = tmp_path / "results" / f"{name}.json", tmp_path / "scratch"
    scratch.mkdir()
    options = ("--tiny", "--repetitions", str(REPETITIONS), "--seed", "3", "--threads", "1")
    result = run(f"{name}.py", *options, "--output", str(output), "--scratch", str(scratch))
    assert result.returncode == 0, result.stderr
    assert list(scratch.iterdir()) == []
    document = json.loads(output.read_text(encoding="utf-8"))
    check_origin(document, name, str(tmp_path))
    for what in MEASURED[name]:
        found = document["measurements"][what]
        expected = 1 if what.startswith("peak memory") else REPETITIONS
        check_spread(found, expected)
        assert found["unit"]
        assert what in result.stdout
    for what in RATIOS[name]:
        found = document["ratios"][what]
        check_spread(found, len(found["values"]))
        assert what in result.stdout
        if "numerator" in found:
            check_pairs(found, document["measurements"])
    if name in ("step", "detection"):
        assert document["facts"]["live / cache by FLOPs alone"] > 1
        losses = document["facts"]["loss after the timed steps"]
        assert losses["live"] == pytest.approx(losses["cache"], rel=0.01)
    if name == "detection":  # made tokens take as many bytes as the teacher's own
        twin = document["ratios"]["bytes, made tokens / the teacher's, same views"]
        assert twin["median"] == pytest.approx(1, abs=0.02)


def check_origin(document: dict[str, Any], name: str, folder: str) -> None:
    """What a reader needs to place the numbers, and nothing that only this machine knows."""
    assert document["benchmark"] == name
    assert document["date"].endswith("+00:00")
    assert document["commit"] == "unknown" or len(document["commit"]) == 40
    assert document["config"]["seed"] == 3 and document["config"]["tiny"] is True
    assert {"torch", "pillow", "libjpeg", "vkd_cache"} <= document["versions"].keys()
    assert {"cpu", "cores", "torch_threads"} <= document["hardware"].keys()
    assert folder not in json.dumps(document)


def check_spread(found: dict[str, Any], repetitions: int) -> None:
    values = found["values"]
    assert len(values) == repetitions
    assert all(value > 0 for value in values)
    assert (found["min"], found["median"], found["max"]) == (min(values), statistics.median(values), max(values))


def check_pairs(ratio: dict[str, Any], measurements: dict[str, Any]) -> None:
    """A ratio relates the two values of the same repetition."""
    above, below = (measurements[ratio[side]]["values"] for side in ("numerator", "denominator"))
    assert ratio["values"] == pytest.approx([a / b for a, b in zip(above, below, strict=True)], rel=1e-4)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("harness")


def test_kinds_take_turns_and_none_is_always_first(harness: ModuleType) -> None:
    calls: list[str] = []

    def kind(name: str) -> Any:
        def call() -> float:
            calls.append(name)
            return float(len(calls))

        return call

    found = harness.interleave("test", {name: kind(name) for name in "abc"}, 3)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert found == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}


def test_a_target_is_met_on_its_own_side(harness: ModuleType) -> None:
    assert harness.Target(bound=1.03).met(1.03) and not harness.Target(bound=1.03).met(1.04)
    at_least = harness.Target(bound=0.97, at_most=False)
    assert at_least.met(0.97) and not at_least.met(0.96)


@pytest.fixture
def idx_files(tmp_path: Path) -> Path:
    """Both splits in the format of Fashion-MNIST: 2100 and 24 images."""
    folder = tmp_path / "idx"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 2100), ("t10k", 24)):
        images, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), (np.arange(count) % 10).astype(np.uint8)
        packed = struct.pack(">4I", 0x803, count, 28, 28) + images.tobytes()
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(packed))
        packed = struct.pack(">2I", 0x801, count) + labels.tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(packed))
    return folder


def convert(source: Path, output: Path, *more: str) -> dict[str, bytes]:
    result = run("fashion_mnist.py", "--input", str(source), "--output", str(output), *more)
    assert result.returncode == 0, result.stderr
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*.tar"))}


def test_fashion_mnist_tars_are_mixed_readable_and_reproducible(idx_files: Path, tmp_path: Path) -> None:
    files = convert(idx_files, tmp_path / "one")
    assert files == convert(idx_files, tmp_path / "two")
    assert list(files) == ["train/train-000000.tar", "train/train-000001.tar", "train/train-000002.tar",
                           "val/val-000000.tar"]  # fmt: skip
    source = open_source(str(tmp_path / "one" / "train" / "*.tar"))
    assert [len(shard.keys) for shard in source.shards] == [1000, 1000, 100]
    assert source.num_classes == 10
    assert all(len(np.unique(shard.labels)) == 10 for shard in source.shards)
    for row in range(3):  # the key says where the sample was, so that its label can be looked up
        assert int(source.shards[0].keys[row].rpartition("_")[2]) % 10 == source.shards[0].labels[row]
    assert decode_image(source.read(0, 0)).size == (28, 28)
    assert len({key for shard in source.shards for key in shard.keys}) == 2100


def test_accuracy_by_stored_type(idx_files: Path, tmp_path: Path) -> None:
    output, page = tmp_path / "bytes_accuracy.json", tmp_path / "page.md"
    page.write_text("# Mine\n", encoding="utf-8")
    options = ["--tiny", "--seed", "3", "--dtypes", "uint4", "--output", str(output), "--page", str(page)]
    result = run("bytes_accuracy.py", "--input", str(idx_files), *options)
    assert result.returncode == 0, result.stderr
    document = json.loads(output.read_text(encoding="utf-8"))
    check_origin(document, "bytes_accuracy", str(tmp_path))
    assert document["measurements"].keys() == {"float32", "uint4", "no distillation"}
    facts = document["facts"]
    assert facts["uint4: bytes per view, everything"] < facts["float32: bytes per view, everything"]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Mine\n") and "sqrt_uint4" in text and "uint4 costs nothing" in text


def test_fashion_mnist_limit_and_a_second_run(idx_files: Path, tmp_path: Path) -> None:
    convert(idx_files, tmp_path / "few", "--limit", "60")
    splits = {split: open_source(str(tmp_path / "few" / split / "*.tar")) for split in ("train", "val")}
    assert {name: len(source.shards[0].keys) for name, source in splits.items()} == {"train": 60, "val": 10}
    again = run("fashion_mnist.py", "--input", str(idx_files), "--output", str(tmp_path / "few"))
    assert again.returncode == 1
    assert "holds tars already" in again.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not there"), (b"not gzip", "not a whole gzip file"), (gzip.compress(b"\0\0\x08\x01"), "not an idx file")],
)
def test_fashion_mnist_input_that_is_not_one(
    idx_files: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = idx_files / "train-images-idx3-ubyte.gz"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    result = run("fashion_mnist.py", "--input", str(idx_files), "--output", str(tmp_path / "out"))
    assert result.returncode == 1
    assert str(path) in result.stderr and message in result.stderr
    assert "Traceback" not in result.stderr
