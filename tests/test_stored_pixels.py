"""Stored views: what the teacher saw is in the cache, and training reads it instead of the images, to the last bit."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from cache_samples import make_columns, make_manifest, packs_exactly, unit_file
from cache_samples import replace_unit as replace_file
from conftest import SIDE_PX
from convert_jobs import assert_sound, content, do, few_digits
from detection_jobs import detection_config, write_detector
from extract_jobs import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from train_runs import assert_same_run

from vkd_cache.cache.documents import seal, unseal
from vkd_cache.cache.pixel_codecs import JPEG, LOSSLESS, EncodedViews, PixelSpec, decode_view, encode_view
from vkd_cache.cache.reader import MANIFEST_PATH, open_cache
from vkd_cache.cache.units import check_columns, pack_unit
from vkd_cache.config import Config
from vkd_cache.errors import CacheFormatError, CacheMismatchError, CorruptCacheError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.compare import compare
from vkd_cache.stages.extract import extract
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.run import prepare_run
from vkd_cache.stages.train import train
from vkd_cache.stages.verify import VerifyRequest, verify
from vkd_cache.views.render import pixel_digest

Build = Callable[..., Config]
SPECS = (PixelSpec(codec=JPEG, quality=90), PixelSpec(codec=LOSSLESS))
KINDS = ("jpeg", "lossless")


def view(height: int, width: int, seed: int) -> np.ndarray:
    """Something between noise and a gradient."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, height)[:, None, None] + np.zeros((height, width, 3))
    return (ramp + rng.integers(0, 56, (height, width, 3))).astype(np.uint8)


def decoded(data: bytes | memoryview, spec: PixelSpec, height: int, width: int) -> np.ndarray:
    out = np.empty((height, width, 3), np.uint8)
    decode_view(data, spec, out)
    return out


# --- codecs -------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_lossless_is(height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    data = encode_view(pixels, SPECS[1])
    assert np.array_equal(decoded(data, SPECS[1], height, width), pixels)
    assert np.array_equal(decoded(memoryview(data), SPECS[1], height, width), pixels)


def test_what_is_stored_of_a_view_can_be_read_by_anybody() -> None:
    """As docs/format.md says it, without our code."""
    pixels = view(24, 31, 1)
    from numcodecs.zstd import Zstd

    planes = np.frombuffer(Zstd().decode(encode_view(pixels, SPECS[1])), np.uint8).reshape(3, 24, 31)
    red, green, blue = np.cumsum(planes, axis=1, dtype=np.uint8)
    assert np.array_equal(np.stack([red + green, green, blue + green], axis=2), pixels)
    data = encode_view(pixels, SPECS[0])
    assert simplejpeg.decode_jpeg_header(data)[3] == "444"
    assert np.array_equal(simplejpeg.decode_jpeg(data), decoded(data, SPECS[0], 24, 31))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_bytes_of_anybody_decode_to_something_else(spec: PixelSpec) -> None:
    data = encode_view(view(32, 32, 2), spec)
    out = np.zeros((32, 32, 3), np.uint8)
    progressive = _progressive()
    for wrong in (b"", data[:1], data[:40], data[:-8], data[: len(data) // 2], b"\0" * 64, progressive,
                  encode_view(view(64, 64, 2), spec), encode_view(view(16, 32, 2), spec),
                  simplejpeg.encode_jpeg(view(32, 32, 2)[:, :, :1].copy(), colorspace="GRAY", colorsubsampling="Gray"),
                  encode_view(view(32, 32, 2), SPECS[1 - SPECS.index(spec)])):  # fmt: skip
        with pytest.raises(ValueError, match=r"JPEG|zstd|jpeg|Corrupt|Premature|size"):
            decode_view(wrong, spec, out)


def _progressive() -> bytes:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(view(32, 32, 2)).save(stream, "JPEG", progressive=True, subsampling=0)
    return stream.getvalue()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spec=st.sampled_from(SPECS))
def test_damage_raises_a_value_error_or_gives_pixels(seed: int, spec: PixelSpec) -> None:
    """The digest tells the latter; nothing else may happen."""
    rng = np.random.default_rng(seed)
    data = bytearray(encode_view(view(32, 24, seed % 100), spec))
    for _ in range(int(rng.integers(1, 5))):
        data[int(rng.integers(0, len(data)))] = int(rng.integers(0, 256))
    out = np.zeros((32, 24, 3), np.uint8)
    try:
        decode_view(bytes(data[: int(rng.integers(0, len(data) + 1))]), spec, out)
    except ValueError:
        return


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 300), max_size=9), seed=st.integers(0, 99))
def test_views_of_a_unit_are_packed_exactly(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    views = EncodedViews.joined([rng.bytes(size) for size in sizes])
    assert [len(views[place]) for place in range(len(views))] == sizes
    for backend in ("zarr", "webdataset"):
        manifest = make_manifest(pixels=SPECS[0], nodes=(), backend=backend)
        columns = make_columns(len(sizes), seed=seed) | views.to_columns()
        found = packs_exactly(columns, manifest)
        check_columns(found, manifest, "here")
        assert np.array_equal(EncodedViews.of_columns(found).content, views.content)
        if len(views.content) > 64:  # never compressed again
            assert views.content.tobytes() in pack_unit(columns, dataclasses.replace(manifest, block_samples=99))


def test_a_manifest_without_stored_views_is_as_it_was() -> None:
    plain, stored = make_manifest(), make_manifest(pixels=SPECS[0])
    assert "pixels" not in plain.to_json() and "pixels" not in plain.fingerprinted()
    assert plain.fingerprint() != stored.fingerprint() != make_manifest(pixels=SPECS[1]).fingerprint()
    for spec in SPECS:
        assert PixelSpec.from_json(spec.to_json(), "m") == spec
    for body in ({}, {"codec": "png"}, {"codec": "jpeg"}, [], {"codec": "jpeg", "quality": 0, "subsampling": "4:4:4"},
                 {"codec": "jpeg", "quality": 90, "subsampling": "4:2:0"}):  # fmt: skip
        with pytest.raises(CacheFormatError, match="pixels"):
            PixelSpec.from_json(body, "m")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixels_offsets", np.array([0, 4, 4, 9], np.uint32)),  # a view without bytes
        ("pixels_offsets", np.array([0, 4, 6], np.uint32)),
        ("pixels_offsets", np.array([0, 4, 6, 10], np.uint32)),
        ("pixels_offsets", np.array([1, 4, 6, 9], np.uint32)),
        ("pixels_offsets", np.array([0, 4, 6, 9], np.int64)),
        ("pixels", np.zeros((9, 1), np.uint8)),
        ("pixels", np.zeros(9, np.int8)),
        ("pixels", None),
    ],
)
def test_columns_that_do_not_fit_are_refused(name: str, value: np.ndarray | None) -> None:
    columns = make_columns(3) | {"pixels": np.zeros(9, np.uint8), "pixels_offsets": np.array([0, 4, 6, 9], np.uint32)}
    manifest = make_manifest(pixels=SPECS[0], nodes=())
    check_columns(columns, manifest, "here")
    changed = {key: column for key, column in columns.items() if key != name} | ({} if value is None else {name: value})
    with pytest.raises(CacheFormatError, match=f"here: column '{name}'"):
        check_columns(changed, manifest, "here")


# --- extraction and training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build(tiny_config: Build, digits_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """61 digits in five shards, five of them broken."""
    return few_digits(tiny_config, digits_tree, tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def caches(build: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two views of the same digits: without pixels, as JPEGs, and losslessly in the other backend."""
    root = tmp_path_factory.mktemp("caches")
    backends = {"none": "zarr", "jpeg": "zarr", "lossless": "webdataset"}
    for kind, backend in backends.items():
        cache = {"url": str(root / kind), "pixels": kind, "backend": backend, "nodes": ("pooled", "logits")}
        assert extract(build(cache=cache), JobSplit()).exit_code == 0
    return {kind: root / kind for kind in backends}


def fed(config: Config) -> Iterator[FedBatch]:
    run = prepare_run(config, JobSplit())
    with run.feed(run.supply(live=False)) as feed:
        yield from feed.batches(epoch=0, step=0, workers=config.train.workers)


def reading(build: Build, url: Path, output: Path, tree: Path | None = None, **options: Any) -> Config:
    source = {} if tree is None else {"train": str(tree)}
    train_options = {"epochs": 2, "output": str(output), "batch_size": 16, "eval_every": 0} | options
    return build(source=source, cache={"url": str(url)}, train=train_options, views={})


@pytest.fixture
def junk(build: Build, tmp_path: Path) -> Path:
    """The data set with every image's content gone: its files are listed as before."""
    tree = Path(shutil.copytree(build().source.train, tmp_path / "junk"))
    for path in tree.rglob("*.jpg"):
        path.write_bytes(b"no image any more")
    return tree


@pytest.mark.parametrize("kind", KINDS)
def test_training_never_opens_an_image(
    build: Build, caches: dict[str, Path], junk: Path, tmp_path: Path, kind: str
) -> None:
    """Neither from images that are as they were nor from junk is anything else learnt; digests are checked."""
    for name, tree in (("whole", None), ("junk", junk)):
        train(reading(build, caches[kind], tmp_path / name, tree, workers=int(tree is not None)), JobSplit())
    assert_same_run(tmp_path / "whole", tmp_path / "junk", free=("source",))


def test_an_image_is_needed_where_nothing_is_stored(
    build: Build, caches: dict[str, Path], junk: Path, tmp_path: Path
) -> None:
    with pytest.raises(CorruptCacheError, match="is broken"):
        train(reading(build, caches["none"], tmp_path / "out", junk), JobSplit())


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_digest_and_student_see_the_stored_pixels(
    build: Build, caches: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    cache, plain = open_cache(str(caches[kind])), open_cache(str(caches["none"]))
    assert cache.manifest.pixels is not None
    assert ("simplejpeg" in cache.manifest.versions) == (kind == "jpeg")
    same: list[bool] = []
    for unit in (cache.read(*unit) for unit in cache.units):
        other = plain.read(*unit.id)
        assert unit.pixels is not None and len(unit.pixels) == len(unit)
        for row in range(len(unit)):
            pixels = decoded(unit.pixels[row], cache.manifest.pixels, SIDE_PX, SIDE_PX)
            assert pixel_digest(pixels) == unit.columns["digest"][row]
        same.append(np.array_equal(unit.columns["digest"], other.columns["digest"]))
        assert torch.equal(unit.node("pooled"), other.node("pooled")) == same[-1]
    assert all(same) if kind == "lossless" else not any(same)
    digests = {unit.id: dict(zip(unit.rows.tolist(), unit.columns["digest"].tolist(), strict=True))
               for unit in map(cache.read, cache.units)}  # fmt: skip
    for batch in fed(reading(build, caches[kind], tmp_path)):
        for place, (shard, row) in enumerate(zip(batch.rendered.shard, batch.rendered.row, strict=True)):
            assert pixel_digest(batch.pixels[place].numpy()) == digests[int(shard), batch.rendered.view][int(row)]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_workers_change_no_byte(build: Build, caches: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """A share of the units now, the others with other workers later, and more views than at first."""
    manifest = open_cache(str(caches[kind])).manifest
    cache = {"url": str(tmp_path / "cache"), "pixels": kind, "backend": manifest.backend, "nodes": ("pooled", "logits")}
    extract(build(cache=cache, views={"count": "1"}), JobSplit(index=1, count=3))
    extract(build(cache=cache, extract={"workers": 2}), JobSplit())
    assert contents(tmp_path / "cache") == contents(caches[kind])
    with pytest.raises(CacheMismatchError, match=r"pixels"):
        extract(build(cache=cache | {"pixels": "none"}), JobSplit())
    if kind == "jpeg":
        with pytest.raises(CacheMismatchError, match=r"pixels\.quality: 90 in the cache, 91 asked for"):
            extract(build(cache=cache | {"pixels_quality": 91}), JobSplit())


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_keeps_the_pixels(build: Build, caches: dict[str, Path], tmp_path: Path, kind: str) -> None:
    source = caches[kind]
    manifest = open_cache(str(source)).manifest
    other = "webdataset" if manifest.backend == "zarr" else "zarr"
    blocks = {"block_samples": 7} if other == "webdataset" else {}
    assert do(source, tmp_path / "there", backend=other, dtype="float16", **blocks).exit_code == 0
    assert_sound(build(), tmp_path / "there")
    direct = {"url": str(tmp_path / "direct"), "pixels": kind, "backend": other, "dtype": "float16",
              "nodes": ("pooled", "logits")}  # fmt: skip
    extract(build(cache=direct), JobSplit())
    assert content(tmp_path / "there") == content(tmp_path / "direct")
    images = build().source.train
    assert do(source, tmp_path / "joined", shard_size=26, images=images).exit_code == 0
    assert_sound(build(), tmp_path / "joined")
    first, joined = open_cache(str(source)).read(1, 0), open_cache(str(tmp_path / "joined")).read(0, 0)
    assert first.pixels is not None and joined.pixels is not None
    for row, key in enumerate(first.keys):
        assert joined.pixels[joined.keys.index(key)] == first.pixels[row]


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_reads_stored_views_without_us(caches: dict[str, Path], kind: str) -> None:
    page = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
    section = page.split("## Read stored pixels without us\n")[1]
    theirs: dict[str, Any] = {}
    exec(section.split("```python\n")[1].split("```")[0], theirs)
    cache = open_cache(str(caches[kind]))
    unit = cache.read(1, 0)
    document = json.loads((caches[kind] / MANIFEST_PATH).read_text(encoding="utf-8"))
    for row in range(len(unit)):
        assert pixel_digest(theirs["view_of"](unit.columns, document, row)) == unit.columns["digest"][row]


def test_a_live_teacher_sees_the_same(build: Build, caches: dict[str, Path], junk: Path, tmp_path: Path) -> None:
    """Beside the cache it is shown the stored views; without one, what an extraction would have stored."""
    config = reading(build, caches["jpeg"], tmp_path / "compare", junk)
    report = compare(config, steps=2)
    assert report.within_bound and max(report.lockstep["total"]) < 1e-5
    digests = {unit.id.shard: dict(zip(unit.rows.tolist(), unit.columns["digest"].tolist(), strict=True))
               for unit in map(open_cache(str(caches["jpeg"])).read, open_cache(str(caches["jpeg"])).units)
               if unit.id.view == 0}  # fmt: skip
    cache = {"url": str(tmp_path / "none"), "pixels": "jpeg"}
    live = {"live_teacher": True, "output": str(tmp_path / "live"), "epochs": 1}
    run = prepare_run(build(cache=cache, train=live, views={"count": "1"}), JobSplit())
    with run.feed(run.supply(live=True)) as feed:
        for batch in feed.batches(epoch=0, step=0, workers=0):
            rendered = batch.rendered
            for shard, row, digest in zip(rendered.shard, rendered.row, rendered.columns["digest"], strict=True):
                assert digest == digests[int(shard)][int(row)]


def test_a_recipe_whose_colours_the_device_maps(build: Build, junk: Path, tmp_path: Path) -> None:
    """What is left to the device after decoding depends on the stored pixels, too."""
    url = tmp_path / "cache"
    config = build(cache={"url": str(url), "pixels": "jpeg"}, views={"recipe": "fast", "count": "1"})
    assert extract(config, JobSplit()).exit_code == 0
    assert_sound(config, url, teacher=True)
    batch = next(iter(fed(reading(build, url, tmp_path / "out", junk))))
    assert batch.rendered.colour is not None


# --- damage -------------------------------------------------------------------------------------------------------


def change_view(url: Path, change: Callable[[bytearray], object]) -> str:
    """Change the first stored view of a unit and publish that, with the checksum that belongs to it; its key."""
    cache = open_cache(str(url))
    unit, arrays = cache.read(0, 0), dict(cache.read_arrays(cache.record(0, 0)))
    assert unit.pixels is not None
    views = [bytes(unit.pixels[row]) for row in range(len(unit))]
    data = bytearray(views[0])
    change(data)
    arrays |= EncodedViews.joined([bytes(data), *views[1:]]).to_columns()
    replace_file(url, pack_unit(arrays, cache.manifest))
    return unit.keys[0]


def cut(data: bytearray) -> None:
    del data[len(data) // 2 :]


def flip(data: bytearray) -> None:
    data[len(data) * 3 // 4] ^= 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [cut, flip])
def test_other_bytes_with_the_right_checksum_are_caught(
    build: Build, caches: dict[str, Path], tmp_path: Path, kind: str, change: Callable[[bytearray], object]
) -> None:
    url = Path(shutil.copytree(caches[kind], tmp_path / "cache"))
    key = change_view(url, change)
    with pytest.raises(CorruptCacheError, match=f"stored pixels of view 0 of key '{key}'.*vkd-cache verify"):
        list(fed(reading(build, url, tmp_path)))
    request = VerifyRequest(url=str(url), source=build().source.train, pixels=True, sample=0)
    findings = verify(build(), request).to_json()["findings"]
    assert [entry["level"] for entry in findings] == ["pixels"]
    assert f"'{key}'" in findings[0]["message"]


def test_a_flipped_byte_of_the_file_is_caught_without_digests(
    build: Build, caches: dict[str, Path], tmp_path: Path
) -> None:
    url = Path(shutil.copytree(caches["jpeg"], tmp_path / "cache"))
    path = unit_file(url, 0, 0)
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xd8\xff\xe0") + 400
    data[start] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCacheError, match="checksum"):
        list(fed(reading(build, url, tmp_path, digest_check=0.0)))
    request = VerifyRequest(url=str(url), repair=True)
    assert verify(build(), request).exit_code == 3
    cache = {"url": str(url), "pixels": "jpeg", "nodes": ("pooled", "logits")}
    extract(build(cache=cache), JobSplit())
    assert contents(url) == contents(caches["jpeg"])


def test_a_manifest_that_lies_about_the_codec(build: Build, caches: dict[str, Path], tmp_path: Path) -> None:
    url = Path(shutil.copytree(caches["jpeg"], tmp_path / "cache"))
    path = url / MANIFEST_PATH
    path.write_bytes(seal(unseal(path.read_bytes(), "m") | {"pixels": {"codec": "delta_zstd"}}))
    with pytest.raises(CacheMismatchError, match="fingerprint"):
        list(fed(reading(build, url, tmp_path)))
    assert json.loads(path.read_text())["pixels"] == {"codec": "delta_zstd"}


def test_verify_finds_an_image_that_renders_otherwise(
    build: Build, caches: dict[str, Path], junk: Path, tmp_path: Path
) -> None:
    """Stored pixels are sound, and the level says all the same that the source is another one now."""
    request = VerifyRequest(url=str(caches["jpeg"]), source=str(junk), pixels=True, teacher=True, sample=0)
    report = verify(build(), request)
    levels = {level.name: level.errors for level in report.levels}
    assert levels["files"] == levels["teacher"] == 0 and levels["pixels"] > 0
    assert all("broken" in entry["message"] for entry in report.to_json()["findings"])


# --- detection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_views_of_detection_are_stored_at_their_own_size(coco_tree: Path, tmp_path: Path, kind: str) -> None:
    root = Path(shutil.copytree(coco_tree, tmp_path / "coco"))
    weights = write_detector(tmp_path / "teacher.pt")
    url = tmp_path / "cache"
    config = detection_config(root, weights, url, cache={"url": str(url), "pixels": kind, "nodes": ("neck_det",)})
    assert extract(config, JobSplit()).exit_code == 0
    assert_sound(config, url)
    for path in (root / "train2017").glob("*.jpg"):
        path.write_bytes(b"no image any more")
    reader = dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, name="test_vidt"),
        train=dataclasses.replace(
            config.train, output=str(tmp_path / "out"), batch_size=4, workers=0, device="cpu", epochs=1
        ),
    )
    cache, num = open_cache(str(url)), 0
    digests = {key: digest for unit in map(cache.read, cache.units)
               for key, digest in zip(unit.keys, unit.columns["digest"].tolist(), strict=True)}  # fmt: skip
    run = prepare_run(reader, JobSplit())
    with run.feed(run.supply(live=False)) as feed:
        for batch in feed.batches(epoch=0, step=0, workers=0):
            sizes = batch.rendered.view_size
            assert sizes is not None and batch.rendered.boxes is not None
            for place, (height, width) in enumerate(sizes.tolist()):
                key = run.source.shards[int(batch.rendered.shard[place])].keys[int(batch.rendered.row[place])]
                assert pixel_digest(batch.pixels[place, :height, :width].numpy()) == digests[key]
                assert not batch.pixels[place, height:].any() and not batch.pixels[place, :, width:].any()
                num += 1
    assert num >= len(digests) - 4
