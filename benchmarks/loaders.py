"""Loaders of training images, ours and others', that end with the same product from the same files.

Every kind gives (b, 3, S, S) float32 batches, normalised, or (b, 3, S, S) bytes: crops of the same distribution, the
same flips and colours, no mixing. A newcomer's trap: others finish floats in their workers; ours gives 8-bit pixels to
the main process, where a GPU would finish them, and without one they are finished there, in one thread, and counted.

Shape legend: b images of a batch, S side in pixels.
"""

import dataclasses
import importlib
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import data
import torch
import webdataset
from image_pipeline import MEAN, STD, torchvision_vkd
from packing import pack_samples
from PIL import Image
from torch.utils.data import DataLoader, Sampler
from torchvision import io as torchvision_io
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from vkd_cache.cache.reader import Cache
from vkd_cache.config import ViewsConfig
from vkd_cache.sources import Source, open_source
from vkd_cache.stages.feed import Feed, Schedule
from vkd_cache.stages.rendering import Renderer
from vkd_cache.stages.transfer import mixed_images
from vkd_cache.stages.unit_views import CachedViews, PlannedViews, Views
from vkd_cache.views.blend import normalise
from vkd_cache.views.recipe import Recipe, make_recipe

PREFETCH = 2  # batches ahead of each worker: ours, and the default of the others
OPEN_SHARDS = 8
SHUFFLE_BUFFER = 256
CHUNK_BYTES = "4MB"
RECIPES = ("vkd", "fast")
Batches = Iterator[torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to load, and how.

    Attributes:
        folder: of `make_files`.
        size_px: side of a view.
        batch_size: images of a batch, of one process.
        epochs: passes, without a pause in between.
        floats: normalised floats instead of bytes.
        seed: of orders.
        width, dtype: of the cached node.
    """

    folder: Path
    size_px: int
    batch_size: int
    epochs: int
    floats: bool
    seed: int
    width: int
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """Which share of the work a process has: `workers` of its own, and every `world`-th part."""

    workers: int
    rank: int = 0
    world: int = 1


Loader = Callable[[Job, Share], Batches]


def make_files(job: Job, *, images: int, shard_size: int, tars: int) -> dict[str, str]:
    """Make the files of every kind: photographs, caches of them, tars, chunks; without tars no chunks either.

    Returns:
        What can be said of each library that takes part; of litdata also when it does not.
    """
    data.make_photos(job.folder / "photos", images, seed=job.seed)
    source = photos(job, shard_size)
    form = data.Form(width=job.width, dtype=job.dtype, backend="zarr")
    for name in RECIPES:
        data.make_cache(str(job.folder / f"cache-{name}"), source, recipe_of(job, name), form, workers=2)
    if not tars:
        return {}
    (job.folder / "tars").mkdir()
    files = sorted((job.folder / "photos").rglob("*.jpg"))
    for number in range(tars):
        own = files[number::tars]
        samples = [(path.stem, path.read_bytes(), int(path.parent.name.rpartition("_")[2])) for path in own]
        pack_samples(job.folder / "tars" / f"{number:04d}.tar", samples)
    return {"webdataset": webdataset.__version__, "litdata": _make_chunks(job, files)}


def _make_chunks(job: Job, files: list[Path]) -> str:
    try:
        litdata = importlib.import_module("litdata")
    except ImportError:
        return "left out: not installed"
    cache = importlib.import_module("litdata.streaming").Cache(str(job.folder / "chunks"), chunk_bytes=CHUNK_BYTES)
    for number, path in enumerate(files):
        cache[number] = {"image": path.read_bytes(), "label": int(path.parent.name.rpartition("_")[2])}
    cache.done()
    cache.merge()
    return str(litdata.__version__)


def photos(job: Job, shard_size: int) -> Source:
    """The photographs as a source of ours."""
    return open_source(str(job.folder / "photos"), shard_size=shard_size)


def recipe_of(job: Job, name: str) -> Recipe:
    """One of our recipes, at the job's size."""
    return make_recipe(ViewsConfig(recipe=name, size_px=job.size_px))


# --- ours -----------------------------------------------------------------------------------------------------------


def ours(source: Source, recipe: Recipe, cache: Cache | None) -> Loader:
    """Our feed: views replayed from a cache, with its features joined; or planned on the spot, images only."""

    def batches(job: Job, share: Share) -> Batches:
        views: Views = PlannedViews(source, recipe, 0, [0]) if cache is None else CachedViews(cache, source, [0])
        schedule = Schedule(
            epochs=job.epochs, batch_size=job.batch_size, seed=job.seed, open_shards=OPEN_SHARDS,
            rank=share.rank, world=share.world, digest_check=0.0 if cache is None else 0.1,
        )  # fmt: skip
        with Feed(Renderer(source, recipe, 0), views, schedule, () if cache is None else ("pooled",)) as feed:
            for batch in feed.batches(epoch=0, step=0, workers=share.workers):
                if job.floats:
                    yield normalise(mixed_images(batch.pixels, None, batch.rendered.colour), MEAN, STD)
                else:
                    yield batch.pixels.permute(0, 3, 1, 2)

    return batches


# --- others ---------------------------------------------------------------------------------------------------------


class Epochs(Sampler[int]):
    """This process' share of several shuffled passes, as one."""

    def __init__(self, count: int, job: Job, share: Share) -> None:
        generator = torch.Generator().manual_seed(job.seed)
        passes = [torch.randperm(count, generator=generator)[share.rank :: share.world] for _ in range(job.epochs)]
        self._order = torch.cat(passes).tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


def torchvision_pil(job: Job, share: Share) -> Batches:
    """ImageFolder and DataLoader, transforms on PIL images: what most training scripts have."""
    return _image_folder(ImageFolder(job.folder / "photos", transform=pil_transform(job)), job, share)


def torchvision_tensors(job: Job, share: Share) -> Batches:
    """The same with torchvision's own decoder and its second transforms on 8-bit tensors."""
    return _image_folder(
        ImageFolder(job.folder / "photos", transform=tensor_transform(job), loader=_decoded), job, share
    )


def _decoded(path: str) -> torch.Tensor:
    return torchvision_io.decode_image(torchvision_io.read_file(path), mode=torchvision_io.ImageReadMode.RGB)


def _image_folder(dataset: ImageFolder, job: Job, share: Share) -> Batches:
    loader = DataLoader(
        dataset, batch_size=job.batch_size, sampler=Epochs(len(dataset), job, share), num_workers=share.workers,
        prefetch_factor=PREFETCH, persistent_workers=True, drop_last=True,
    )  # fmt: skip
    for images, _ in loader:
        yield images


def webdataset_tars(job: Job, share: Share) -> Batches:
    """WebDataset's own reading, decoding and loader, torchvision's transforms on PIL images."""
    transform = pil_transform(job)
    urls = sorted(str(path) for path in (job.folder / "tars").glob("*.tar"))[share.rank :: share.world]
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False, seed=job.seed)
    samples = samples.repeat(job.epochs).shuffle(SHUFFLE_BUFFER).decode("pil").to_tuple("jpg", "cls")
    batches = samples.map_tuple(transform, _same).batched(job.batch_size, partial=False)
    loader = webdataset.WebLoader(
        batches, batch_size=None, num_workers=share.workers, prefetch_factor=PREFETCH, persistent_workers=True
    )
    for images, _ in loader:
        yield images


def _same(label: int) -> int:
    return label


class _ChunkTransform:
    """litdata's samples hold JPEG files, which are decoded as ImageFolder does."""

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self._transform = transform

    def __call__(self, sample: dict[str, Any]) -> torch.Tensor:
        return self._transform(Image.open(io.BytesIO(sample["image"])).convert("RGB"))


def litdata_chunks(job: Job, share: Share) -> Batches:
    """litdata's streaming data set and loader, torchvision's transforms on PIL images; one process alone."""
    litdata = importlib.import_module("litdata")
    dataset = litdata.StreamingDataset(
        str(job.folder / "chunks"), shuffle=True, seed=job.seed, transform=_ChunkTransform(pil_transform(job))
    )
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=job.batch_size, num_workers=share.workers, prefetch_factor=PREFETCH,
        persistent_workers=True, drop_last=True,
    )  # fmt: skip
    for _ in range(job.epochs):
        yield from loader


def pil_transform(job: Job) -> Callable[[Image.Image], torch.Tensor]:
    """The vkd recipe in torchvision's transforms, on PIL images."""
    end = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)] if job.floats else [transforms.PILToTensor()]
    made: Callable[[Image.Image], torch.Tensor] = transforms.Compose([torchvision_vkd(job.size_px), *end])
    return made


def tensor_transform(job: Job) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same in torchvision's second transforms, on 8-bit tensors."""
    blur = v2.GaussianBlur(9, sigma=(0.1, 2.0))
    one_of_three = [v2.Grayscale(num_output_channels=3), v2.RandomSolarize(128, p=1.0), blur]
    bicubic = transforms.InterpolationMode.BICUBIC
    steps: list[Any] = [
        v2.RandomResizedCrop(job.size_px, scale=(0.08, 1.0), interpolation=bicubic, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomChoice(one_of_three),
        v2.ColorJitter(0.3, 0.3, 0.3),
    ]
    if job.floats:
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    made: Callable[[torch.Tensor], torch.Tensor] = v2.Compose(steps)
    return made


OTHERS: Mapping[str, Loader] = {
    "torchvision, PIL": torchvision_pil,
    "torchvision, tensors": torchvision_tensors,
    "webdataset": webdataset_tars,
    "litdata": litdata_chunks,
}
