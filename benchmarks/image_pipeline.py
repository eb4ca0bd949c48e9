"""What an image costs on the CPU, from its file to 8-bit pixels and to normalised floats, beside torchvision and PIL.

    python benchmarks/image_pipeline.py --output benchmarks/results/image_pipeline.json

Same files, same recipe, one process, one thread, CPU time. `vkd` and `fast` draw the same views; torchvision's are of
the same distribution. With a GPU in the machine the 8-bit pixels are what leaves the CPU; without, the floats are what
a network takes. For detection, whole images with a short side of 800 pixels, the long one at most 1333.
"""

import argparse
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import data
import detection_data
import numpy as np
import torch
from harness import Report, Stopwatch, Target, interleave, parse, parser, require, scratch_folder
from PIL import Image, ImageFilter
from torchvision import transforms

from vkd_cache.cli import guarded
from vkd_cache.config import ViewsConfig
from vkd_cache.sources import Source, open_source
from vkd_cache.stages.rendering import RenderedBatch, Renderer, RenderTask
from vkd_cache.stages.transfer import mixed_images
from vkd_cache.views.blend import colour_rows
from vkd_cache.views.decode import decode_image, decode_pixels
from vkd_cache.views.plan import plan_view
from vkd_cache.views.recipe import Recipe, make_recipe
from vkd_cache.views.render import image_size, pixel_digest, render_view

TINY = {"images": 12, "size_px": 32, "detection_images": 8, "detection_px": 64, "batch_size": 4, "repetitions": 2}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LONG_SIDE = 1333 / 800  # of the bound on a detection view's long side and its short side
SHARD_SIZE = 128
Kinds = Mapping[str, Callable[[], float]]


def main() -> int:
    """Run the benchmark."""
    made = parser("CPU time of an image: ours with recipes vkd and fast, torchvision's on PIL images.", repetitions=7)
    made.add_argument("--images", type=int, default=256, help="JPEG files of 500x375")
    made.add_argument("--size-px", type=int, default=224, help="side of a view")
    made.add_argument("--batch-size", type=int, default=32, help="images made into one batch")
    made.add_argument("--detection-images", type=int, default=32, help="JPEG files of COCO's common sizes")
    made.add_argument("--detection-px", type=int, default=800, help="short side of a detection view")
    options = parse(made, TINY)
    report = Report("image_pipeline", options)
    torch.set_num_threads(1)  # waiting threads would be counted
    with scratch_folder(options) as folder:
        total = data.make_photos(folder / "photos", options.images, seed=options.seed)
        report.facts["mean JPEG bytes"] = round(total / options.images)
        measure_views(options, folder / "photos", report)
        root = Path(detection_data.write_coco(folder / "coco", options.detection_images, seed=options.seed))
        measure_detection(options, root, report)
    report.finish(options.output)
    return 0


def measure_views(options: argparse.Namespace, photos: Path, report: Report) -> None:
    """Square views under vkd and fast, whole and stage by stage, beside torchvision's."""
    source = open_source(str(photos), shard_size=SHARD_SIZE)
    theirs = Theirs(sorted(photos.rglob("*.jpg")), torchvision_vkd(options.size_px), options.batch_size)
    kinds = {"torchvision, 8-bit": theirs.to_pixels, "torchvision, float": theirs.to_floats}
    stages: dict[str, Callable[[], float]] = {}
    for name in ("vkd", "fast"):
        recipe = make_recipe(ViewsConfig(recipe=name, size_px=options.size_px))
        ours = Ours(source, recipe, options)
        kinds |= {f"{name}, 8-bit": ours.to_pixels, f"{name}, float": ours.to_floats}
        stages |= {f"{name}: {stage}": measure for stage, measure in Stages(source, recipe, options.seed).kinds.items()}
    report.measure("us/image", interleave("image pipeline", kinds, options.repetitions))
    for name in ("vkd", "fast"):
        for end in ("8-bit", "float"):
            target = Target(bound=0.5) if name == "fast" else None
            report.ratio(f"{name} / torchvision, {end}", f"{name}, {end}", f"torchvision, {end}", target)
    report.measure("us/image", interleave("stages", stages, options.repetitions))


def measure_detection(options: argparse.Namespace, root: Path, report: Report) -> None:
    """Detection views under vidt and fast_detection, beside torchvision's."""
    source = open_source(str(root), split="train", shard_size=SHARD_SIZE)
    paths = sorted((root / "train2017").glob("*.jpg"))
    side_px, long_px = options.detection_px, round(options.detection_px * LONG_SIDE)
    theirs = Theirs(paths, torchvision_detection(side_px, long_px), batch_size=1)
    kinds = {"torchvision detection, 8-bit": theirs.to_pixels, "torchvision detection, float": theirs.to_floats}
    for name in ("vidt", "fast_detection"):
        views = ViewsConfig(recipe=name, scales=(side_px,), max_size_px=long_px, crop_scales=(), canvas_multiple_px=32)
        ours = Ours(source, make_recipe(views), argparse.Namespace(**vars(options) | {"batch_size": 1}))
        kinds |= {f"{name}, 8-bit": ours.to_pixels, f"{name}, float": ours.to_floats}
    report.measure("us/image", interleave("detection", kinds, options.repetitions))
    for name in ("vidt", "fast_detection"):
        for end in ("8-bit", "float"):
            target = Target(bound=0.5) if name == "fast_detection" else None
            report.ratio(f"{name} / torchvision, {end}", f"{name}, {end}", f"torchvision detection, {end}", target)


class Ours:
    """Our pipeline over all images of a source; each method gives CPU microseconds per image."""

    def __init__(self, source: Source, recipe: Recipe, options: argparse.Namespace) -> None:
        self._renderer = Renderer(source, recipe, options.seed)
        self._batch_size = options.batch_size
        self._rows = [(shard, row) for shard, held in enumerate(source.shards) for row in range(len(held.keys))]

    def to_pixels(self) -> float:
        """Read, decode, plan, render, digest, columns: what a worker hands over."""
        with Stopwatch() as watch:
            for batch in self._batches():
                require(batch.error is None and not batch.broken, "pipeline: a photograph could not be rendered")
        return 1e6 * watch.cpu_s / len(self._rows)

    def to_floats(self) -> float:
        """The same, then what the device does: convert, colour, normalise; in place, as nobody needs the images."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        with Stopwatch() as watch:
            for batch in self._batches():
                mixed_images(batch.pixels, None, batch.colour).sub_(mean).div_(std)
        return 1e6 * watch.cpu_s / len(self._rows)

    def _batches(self) -> Iterator[RenderedBatch]:
        for start in range(0, len(self._rows), self._batch_size):
            shard, row = np.array(self._rows[start : start + self._batch_size]).T
            yield self._renderer[RenderTask(tag=None, shard=shard, row=row, view=0)]


class Stages:
    """The stages of a worker one by one, over the same images."""

    def __init__(self, source: Source, recipe: Recipe, seed: int) -> None:
        self._recipe = recipe
        self._places = [(shard, row, key) for shard, held in enumerate(source.shards)
                        for row, key in enumerate(held.keys)]  # fmt: skip
        self._files = [source.read(shard, row) for shard, row, _ in self._places]
        decode = decode_pixels if recipe.fast else decode_image
        self._images = [decode(file) for file in self._files[:SHARD_SIZE]]
        keys = [key for _, _, key in self._places[:SHARD_SIZE]]

        def plan(number: int) -> object:
            width, height = image_size(self._images[number])
            return plan_view(recipe, seed, keys[number], 0, width_px=width, height_px=height)

        params = [plan_view(recipe, seed, key, 0, width_px=image_size(image)[0], height_px=image_size(image)[1])
                  for key, image in zip(keys, self._images, strict=True)]  # fmt: skip
        views = [render_view(image, view, recipe) for image, view in zip(self._images, params, strict=True)]
        stages: dict[str, Callable[[int], object]] = {
            "read": lambda number: source.read(*self._places[number][:2]),
            "decode": lambda number: decode(self._files[number]),
            "plan": plan,
            "render": lambda number: render_view(self._images[number], params[number], recipe),
            "digest": lambda number: pixel_digest(views[number]),
        }
        if recipe.colour_kernel == "affine":
            stages["colour map"] = lambda number: colour_rows(views[number][None], [params[number].ops])
        self.kinds: Kinds = {name: self._timed(stage, len(views)) for name, stage in stages.items()}

    @staticmethod
    def _timed(stage: Callable[[int], object], count: int) -> Callable[[], float]:
        def measure() -> float:
            with Stopwatch() as watch:
                for number in range(count):
                    stage(number)
            return 1e6 * watch.cpu_s / count

        return measure


class Theirs:
    """torchvision's pipeline on PIL images; each method gives CPU microseconds per image."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], Image.Image], batch_size: int) -> None:
        self._paths = paths
        self._transform = transform
        self._batch_size = batch_size
        self._to_pixels = transforms.PILToTensor()
        self._to_floats = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def to_pixels(self) -> float:
        """Read, decode, transform, stack."""
        return self._timed(self._to_pixels)

    def to_floats(self) -> float:
        """The same with floats, normalised."""
        return self._timed(self._to_floats)

    def _timed(self, finish: Callable[[Image.Image], torch.Tensor]) -> float:
        with Stopwatch() as watch:
            for start in range(0, len(self._paths), self._batch_size):
                paths = self._paths[start : start + self._batch_size]
                torch.stack([finish(self._transform(pil_image(path))) for path in paths])
        return 1e6 * watch.cpu_s / len(self._paths)


def pil_image(path: Path) -> Image.Image:
    """As torchvision's ImageFolder loads it."""
    return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")


class PilBlur:
    """Gaussian blur of a radius drawn from [0.1, 2], by PIL."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))


def torchvision_vkd(size_px: int) -> Callable[[Image.Image], Image.Image]:
    """The vkd recipe, without mixing, as torchvision's transforms."""
    one_of_three = [transforms.Grayscale(num_output_channels=3), transforms.RandomSolarize(128, p=1.0), PilBlur()]
    bicubic = transforms.InterpolationMode.BICUBIC
    made: Callable[[Image.Image], Image.Image] = transforms.Compose(
        [
            transforms.RandomResizedCrop(size_px, scale=(0.08, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.RandomChoice(one_of_three),
            transforms.ColorJitter(0.3, 0.3, 0.3),
        ]
    )
    return made


def torchvision_detection(side_px: int, long_px: int) -> Callable[[Image.Image], Image.Image]:
    """Resize and flip, as for a detector."""
    made: Callable[[Image.Image], Image.Image] = transforms.Compose(
        [transforms.Resize(side_px, max_size=long_px), transforms.RandomHorizontalFlip()]
    )
    return made


if __name__ == "__main__":
    sys.exit(guarded(main))
