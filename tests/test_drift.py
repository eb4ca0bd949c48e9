"""What changes between extraction and use: each change that matters is named where it matters, the others are accepted.

docs/trust.md has the table; a row names the test that shows it, here or in another file.
"""

import ast
import io
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NUM_TRAIN
from extract_jobs import contents
from PIL import Image, JpegImagePlugin

from vkd_cache.cache.documents import seal, unseal
from vkd_cache.cache.reader import open_cache
from vkd_cache.config import Config
from vkd_cache.errors import CacheMismatchError, CorruptCacheError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import ExtractSummary, extract
from vkd_cache.stages.run import prepare_run
from vkd_cache.stages.train import train
from vkd_cache.stages.verify import VerifyReport, VerifyRequest, verify

Build = Callable[..., Config]
TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "trust.md"


def see_all(config: Config) -> int:
    """Feed every batch of a training run as `train` does; how many samples came."""
    run = prepare_run(config, JobSplit())
    with run.feed(run.supply(live=False)) as feed:
        return sum(len(batch) for batch in feed.batches(epoch=0, step=0, workers=0))


def pixels_of(config: Config, url: Path) -> VerifyReport:
    return verify(config, VerifyRequest(url=str(url), source=config.source.train, pixels=True, sample=0))


def messages(report: VerifyReport, level: str) -> list[str]:
    return [
        finding.message
        for found in report.levels
        if found.name == level
        for finding in found.findings
        if finding.is_error
    ]


def grow(config: Config) -> ExtractSummary:
    return extract(config, JobSplit())


@pytest.fixture
def cache(small_cache: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_cache, tmp_path / "cache")


@pytest.fixture
def build(tiny_config: Build, cache: Path, tmp_path: Path) -> Build:
    """A configuration of the copied cache: training sees every sample once, an extraction would add a view."""

    def made(**sections: dict[str, Any]) -> Config:
        defaults: dict[str, dict[str, Any]] = {
            "cache": {"url": str(cache)},
            "views": {"count": "3"},
            "train": {"epochs": 1, "batch_size": 2, "output": str(tmp_path / "run")},
        }
        names = {**defaults, **sections}
        return tiny_config(**{name: defaults.get(name, {}) | sections.get(name, {}) for name in names})

    return made


@pytest.fixture
def tree(digits_tree: Path, tmp_path: Path) -> Path:
    return shutil.copytree(digits_tree, tmp_path / "digits")


# ------------------------------------------------------------------------------------------------- pixels that differ


class _OtherDecoder(JpegImagePlugin.JpegImageFile):
    """A decoder that rounds otherwise: one value of one pixel in each image."""

    def load(self) -> Any:
        fresh = self.tile != []
        access = super().load()
        if fresh:
            red, *others = np.asarray(self.getpixel((3, 3)))
            self.putpixel((3, 3), (int(red) ^ 1, *map(int, others)))
        return access


def _other_kernel(resize: Callable[..., Image.Image]) -> Callable[..., Image.Image]:
    def other(image: Image.Image, size: tuple[int, int], resample: Any = None, **keywords: Any) -> Image.Image:
        return resize(image, size, Image.Resampling.HAMMING, **keywords)

    return other


@pytest.fixture(params=["decoder", "kernel"])
def other_pillow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pillow, built another way."""
    if request.param == "kernel":
        monkeypatch.setattr(Image.Image, "resize", _other_kernel(Image.Image.resize))
    else:
        from vkd_cache.views import decode

        kept = tuple(entry if entry[0] != "JPEG" else ("JPEG", entry[1], _OtherDecoder) for entry in decode._FORMATS)
        monkeypatch.setattr(decode, "_FORMATS", kept)
    return


@pytest.mark.usefixtures("other_pillow")
def test_another_decoder_or_resize_kernel_is_noticed(build: Build, cache: Path) -> None:
    with pytest.raises(CorruptCacheError, match=r"view 0 of key '\S+' renders to pixels with digest \w+, the"):
        see_all(build())
    assert len(messages(pixels_of(build(), cache), "pixels")) > 10  # a value that is cropped away is no matter


def test_one_pixel_is_noticed(build: Build, cache: Path, tree: Path) -> None:
    path = sorted((tree / "train").glob("*/*.jpg"))[50]
    key = path.relative_to(tree / "train").with_suffix("").as_posix()
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    middle = pixels[len(pixels) // 2, pixels.shape[1] // 2]
    middle ^= 128
    Image.fromarray(pixels).save(path, "PNG")  # without loss: all other pixels are as they were
    config = build(source={"train": str(tree)})
    with pytest.raises(CorruptCacheError, match=rf"view 0 of key '{key}' renders to .*Pillow .* when the cache was"):
        see_all(config)
    found = messages(pixels_of(config, cache), "pixels")
    assert found
    assert all(key in message for message in found)


def test_the_image_of_a_key_was_exchanged(build: Build, cache: Path, tree: Path) -> None:
    path, other = sorted((tree / "train").glob("*/*.jpg"))[60:62]
    key = path.relative_to(tree / "train").with_suffix("").as_posix()
    shutil.copy(other, path)
    config = build(source={"train": str(tree)})
    with pytest.raises(CorruptCacheError, match=key):
        see_all(config)
    assert all(key in message for message in messages(pixels_of(config, cache), "pixels"))


# ----------------------------------------------------------------------------------------------- another data set


def tar_cache(build: Build, tars: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Sections of a configuration whose cache of one view is made of tars."""
    sections = {
        "source": {"train": f"{tars}/train-{{00000..00004}}.tar", "val": str(tars / "val-00000.tar")},
        "cache": {"url": str(tmp_path / "tar-cache")},
        "views": {"count": "1"},
        "teacher": {"name": "extract_jobs:colours", "weights": ""},
        "loss": {"logit_weight": 0.0},
    }
    assert grow(build(**sections)).exit_code == 0
    return sections


def test_other_labels_are_named(build: Build, digits_tars: Path, tmp_path: Path) -> None:
    tars = shutil.copytree(digits_tars, tmp_path / "tars")
    sections = tar_cache(build, tars, tmp_path)
    data = io.BytesIO((tars / "train-00003.tar").read_bytes())
    with tarfile.open(fileobj=data) as archive:
        member = next(entry for entry in archive if entry.name.endswith(".cls"))
        label = data.getvalue()[member.offset_data : member.offset_data + 1]
    changed = bytearray(data.getvalue())
    changed[member.offset_data] = ord("1") if label != b"1" else ord("2")
    (tars / "train-00003.tar").write_bytes(changed)
    with pytest.raises(CacheMismatchError, match=r"another data set .*shard_hashes: 1 of 5 shards differ, .* shard 3"):
        see_all(build(**sections))
    with pytest.raises(CacheMismatchError, match=r"dataset\.shard_hashes\[3\]: '\w+' in the cache, '\w+' asked for"):
        grow(build(**sections))


def test_another_order_of_shards_is_named(build: Build, digits_tars: Path, tmp_path: Path) -> None:
    sections = tar_cache(build, digits_tars, tmp_path)
    sections["source"]["train"] = f"{digits_tars}/train-{{00000,00002,00001,00003,00004}}.tar"
    with pytest.raises(CacheMismatchError, match=r"shard_hashes: 2 of 5 shards differ, the first is shard 1"):
        see_all(build(**sections))
    with pytest.raises(CacheMismatchError, match=r"dataset\.shard_hashes\[1\]"):
        grow(build(**sections))


# ------------------------------------------------------------------------------------------- another teacher or recipe


def test_a_live_teacher_of_other_weights_is_refused(build: Build, teacher_file: Path, tmp_path: Path) -> None:
    state = torch.load(teacher_file, weights_only=True)
    state["fc.bias"] += 1
    torch.save(state, tmp_path / "other.pt")
    config = build(
        teacher={"weights": str(tmp_path / "other.pt")}, train={"live_teacher": True}, loss={"logit_weight": 0.5}
    )
    with pytest.raises(CacheMismatchError, match=r"with teacher 'test_resnet'.*weights_sha256 '\w+' there, '\w+' here"):
        train(config, JobSplit())


def test_settings_that_the_cache_overrules_are_said(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_run(build(), JobSplit())
    assert capsys.readouterr().err == ""
    views = {"size_px": 48, "recipe": "none", "seed": 6}
    run = prepare_run(build(views=views, teacher={"name": "resnet18", "weights": ""}), JobSplit())
    said = " ".join(capsys.readouterr().err.split())
    assert "holds other views than [views] asks for" in said
    for field in ("name 'vkd' there, 'none' here", "size_px 32 there, 48 here", "seed 5 there, 6 here"):
        assert field in said
    assert "holds what teacher 'test_resnet' says, [teacher] name is 'resnet18'" in said
    assert (run.recipe.name, run.recipe.size_px, run.config.views.seed) == ("vkd", 32, 5)


# ---------------------------------------------------------------------------------------------------------- no matter


def test_where_the_data_and_the_cache_lie_is_no_matter(build: Build, cache: Path, tree: Path, tmp_path: Path) -> None:
    tree = tree.rename(tmp_path / "elsewhere")
    link = tmp_path / "link"
    link.symlink_to(tree)
    for path in tree.rglob("*.jpg"):
        path.touch()
    moved = cache.rename(tmp_path / "moved")
    sections = {"source": {"train": str(link)}, "cache": {"url": str(moved)}}
    assert see_all(build(**sections)) == NUM_TRAIN
    assert pixels_of(build(**sections), moved).errors == 0
    assert grow(build(**sections)).units_published == 5
    assert verify(build(), VerifyRequest(url=str(moved))).errors == 0


def test_how_the_work_is_shared_is_no_matter(build: Build, small_cache: Path, tmp_path: Path) -> None:
    """Another number of workers, of data workers, another order: the bytes are the same."""
    url = tmp_path / "shared"
    sections = {"cache": {"url": str(url)}, "views": {"count": "2"}}
    for index in (2, 0, 1):
        extract(build(**sections, extract={"workers": index % 2}), JobSplit(index=index, count=3))
    assert contents(url) == contents(small_cache)


def test_another_batch_size_is_accepted_and_said(
    build: Build, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may change the last bits of a float32, which is what the class of exactness allows."""
    assert grow(build(extract={"batch_size": 32})).units_published == 5
    assert "begun with batches of 16, this run uses 32" in " ".join(capsys.readouterr().err.split())
    report = verify(
        build(), VerifyRequest(url=str(cache), source=build().source.train, pixels=True, teacher=True, sample=0)
    )
    assert report.errors == 0


def test_libraries_that_change_no_number_are_no_matter(build: Build, cache: Path) -> None:
    path = cache / "manifest.json"
    body = unseal(path.read_bytes(), "x")
    fingerprint = open_cache(str(cache)).fingerprint
    body["versions"] |= {"numpy": "1.0", "zarr": "9.9", "python": "2.7", "torchvision": "0.1", "vkd_cache": "99"}
    path.write_bytes(seal(body))
    assert open_cache(str(cache)).fingerprint == fingerprint
    assert grow(build()).units_published == 5


# ---------------------------------------------------------------------------------------------------------- the table


def test_every_row_of_the_table_has_its_test() -> None:
    text = TABLE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    known = {
        node.name
        for path in TESTS.glob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    own = {
        node.name
        for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert named <= known
    assert own - {"test_every_row_of_the_table_has_its_test"} <= named
    table = text.partition("| change |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) > 20
    assert all("`test_" in row for row in table)
