"""Made data for the benchmarks: JPEG files cut from two real photographs, units of a cache, whole caches.

A newcomer's trap: the features here come from no network. Their shape, type and distribution are like pooled
activations after a ReLU (never negative, dense near zero, every channel of its own scale), which is all that storage
and reading can notice.

Shape legend: n samples, C channels.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from packing import jpeg
from PIL import Image, ImageEnhance

from vkd_cache.cache.pixel_codecs import PixelSpec
from vkd_cache.cache.schema import Manifest, NodeSpec
from vkd_cache.cache.units import UnitId, keys_to_columns
from vkd_cache.cache.writer import CacheWriter, create_cache
from vkd_cache.errors import ConfigError
from vkd_cache.runtime import library_versions
from vkd_cache.sources import Source, source_identity
from vkd_cache.stages.rendering import RenderedBatch, Renderer, RenderTask, render_loader
from vkd_cache.stages.shared_blocks import Empty
from vkd_cache.stages.stored_pixels import StoredPixels
from vkd_cache.stages.units import UnitAssembly, unit_tasks
from vkd_cache.views.mixing import plan_mixing
from vkd_cache.views.params import params_to_columns
from vkd_cache.views.plan import plan_view
from vkd_cache.views.recipe import Recipe

PHOTO_PX = (500, 375)  # width, height: the most common size in ImageNet
JPEG_QUALITY = 98  # files of about 100 kB; those of ImageNet have 110 kB on average
NUM_CLASSES = 8
CODECS = {
    "float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "uint8": "sqrt_uint8", "uint4": "sqrt_uint4",
}  # fmt: skip


def make_photos(folder: Path, count: int, *, seed: int) -> int:
    """Write `count` JPEG files as a folder of classes.

    Returns:
        Bytes of all files.

    Raises:
        ConfigError: scikit-learn, whose wheel holds the photographs, is not installed.
    """
    total = 0
    for number, content in enumerate(photos(count, seed=seed)):
        path = folder / f"class_{number % NUM_CLASSES}" / f"photo_{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        total += len(content)
    return total


def photos(count: int, *, seed: int, sizes_px: Sequence[tuple[int, int]] = (PHOTO_PX,)) -> Iterator[bytes]:
    """JPEG files: cuts of two photographs, mirrored and exposed at random, of the sizes (width, height) in turn;
    errors as `make_photos`."""
    photographs = _photographs()
    rng = np.random.default_rng([seed, 1])
    for number in range(count):
        picture = photographs[number % len(photographs)]
        size = sizes_px[number % len(sizes_px)]
        height = int(rng.integers(picture.height // 2, picture.height + 1))
        width = min(picture.width, round(height * size[0] / size[1]))
        left = int(rng.integers(0, picture.width - width + 1))
        top = int(rng.integers(0, picture.height - height + 1))
        cut = picture.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
        if rng.random() < 0.5:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        yield jpeg(ImageEnhance.Brightness(cut).enhance(0.8 + 0.4 * float(rng.random())), JPEG_QUALITY)


def _photographs() -> list[Image.Image]:
    try:
        folder = resources.files("sklearn.datasets.images")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "scikit-learn is not installed, and its wheel holds the photographs that the benchmarks cut up. Install "
            "vkd-cache[demo]."
        ) from error
    pictures = []
    for name in ("china.jpg", "flower.jpg"):
        with folder.joinpath(name).open("rb") as file:
            pictures.append(Image.open(file).convert("RGB"))
    return pictures


def pooled_features(count: int, width: int, *, seed: int) -> torch.Tensor:
    """(n, C) float16 values like pooled activations: gamma distributed, channel scales spread log-normally."""
    rng = np.random.default_rng([seed, 2])
    scale = np.exp(rng.standard_normal(width, np.float32))
    values = rng.standard_gamma(0.6, (count, width), np.float32) * scale * np.float32(0.1)
    return torch.from_numpy(values).to(torch.float16)


def unit_columns(recipe: Recipe, keys: Sequence[str], *, seed: int) -> dict[str, npt.NDArray[np.generic]]:
    """The columns of one unit as extraction writes them, of photographs that nobody rendered: three in five as large as
    most of ImageNet's, the others of any size."""
    rng = np.random.default_rng([seed, 3])
    sizes = [PHOTO_PX if rng.random() < 0.6 else tuple(rng.integers(200, 900, 2).tolist()) for _ in keys]
    params = [plan_view(recipe, seed, k, 0, width_px=w, height_px=h) for k, (w, h) in zip(keys, sizes, strict=True)]
    mix = plan_mixing(recipe, seed, keys, 0)
    count = len(keys)
    return {
        **keys_to_columns(keys),
        **params_to_columns(params, recipe.max_ops),
        "row": np.arange(count, dtype=np.uint32),
        "label": rng.integers(0, 1000, count).astype(np.uint32),
        "digest": rng.integers(0, 2**64, count, np.uint64),
        "partner": mix.partner,
        "mix_kind": mix.kind,
        "mix_lambda": mix.lam,
        "mix_box": mix.box,
    }


def imagenet_keys(count: int) -> list[str]:
    """Keys as a folder of ImageNet gives them, in no order of classes: `n01440764/n01440764_10026`."""
    rng = np.random.default_rng(4)
    classes = rng.integers(1_440_764, 15_075_141, 1000)[rng.integers(0, 1000, count)]
    numbers = rng.permutation(max(30_000, count))[:count]
    return [f"n{synset:08d}/n{synset:08d}_{number}" for synset, number in zip(classes, numbers, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How a made node is stored: channels, type, container; and how the views are."""

    width: int
    dtype: str
    backend: str
    pixels: PixelSpec | None = None


def make_manifest(recipe: Recipe, dataset: dict[str, object], form: Form) -> Manifest:
    """A manifest of a cache with one pooled node."""
    node = NodeSpec(
        name="pooled", layout="pooled", shape=(form.width,), dtype=form.dtype, codec=CODECS[form.dtype]
    )
    return Manifest(
        dataset=dataset,
        recipe=recipe.to_json(),
        seed=0,
        nodes=(node,),
        teacher={"name": "made features", "width": form.width},
        head=None,
        numerics={"device": "cpu", "autocast": "off", "batch_size": 64},
        versions=library_versions(),
        backend=form.backend,
        block_samples=1024 if form.backend == "webdataset" else 0,
        pixels=form.pixels,
    )


def unit_store(url: str, recipe: Recipe, form: Form, *, units: int, count: int) -> CacheWriter:
    """An empty cache of `units` shards of `count` samples, to publish into."""
    dataset: dict[str, object] = {
        "kind": "made",
        "num_classes": 1000,
        "shard_counts": [count] * units,
        "shard_hashes": [f"{unit:032x}" for unit in range(units)],
    }
    return create_cache(url, make_manifest(recipe, dataset, form))


def make_cache(url: str, source: Source, recipe: Recipe, form: Form, *, workers: int) -> CacheWriter:
    """A cache of one view of `source`, rendered, so that digests can be checked; the features are made."""
    manifest = make_manifest(recipe, source_identity(source).to_json(), form)
    writer = create_cache(url, manifest)
    units = [UnitId(shard, 0) for shard in range(len(source.shards))]
    tasks = [task for unit in units for task in unit_tasks(source, recipe, manifest.seed, unit, 64)]
    assembly: UnitAssembly | None = None
    renderer = Renderer(source, recipe, manifest.seed, stored=StoredPixels.of_cache(writer.cache))
    rendered = render_loader(renderer, tasks, workers=workers)
    for number, batch in enumerate(rendered):
        unit, last = batch.tag
        assembly = assembly or UnitAssembly(source, unit)
        assembly.add(batch, {"pooled": pooled_features(len(batch.row), form.width, seed=number)})
        if last:
            writer.publish(*unit, *assembly.finish())
            assembly = None
    return writer


def random_weights(name: str, path: Path, *, seed: int, num_classes: int = 1000) -> str:
    """Write the seeded random weights of a timm model as a safetensors file, and return its path: a teacher that
    teaches nothing costs as much as one that does."""
    import timm  # seconds that only teachers are worth

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=num_classes)
    safetensors.torch.save_file(model.state_dict(), path)
    return str(path)


class BlankRenderer(Renderer):
    """Renders nothing: what is left of a feed is order and mixing, and with a cache reading, decoding and joining."""

    def render(self, task: RenderTask, empty: Empty) -> RenderedBatch:
        count = len(task.row)
        return RenderedBatch(
            tag=task.tag, shard=task.shard, row=task.row, view=task.view, pixels=torch.empty(0),
            label=torch.zeros(count, dtype=torch.int64), ok=np.ones(count, np.bool_), broken=[], mix=task.mix,
            columns={},
        )  # fmt: skip
