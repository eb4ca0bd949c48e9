"""What an extraction is going to write: the manifest, with the codecs that are decided by measuring.

A newcomer's trap: with dtype `auto` (or `uint8`, which comes signed or not) the codecs depend on the teacher's values.
They are decided once, by whoever starts the cache, always on its first unit; every later run takes those of the cache.
"""

import dataclasses

import torch

from vkd_cache import console
from vkd_cache.cache.codecs import resolve_codec
from vkd_cache.cache.reader import Cache, find_cache
from vkd_cache.cache.schema import CODEC_BYTES, Manifest, NodeSpec
from vkd_cache.cache.units import UnitId
from vkd_cache.cache.writer import check_same, describe_head
from vkd_cache.config import Config
from vkd_cache.errors import SourceError, TeacherError, VkdCacheError
from vkd_cache.runtime import library_versions
from vkd_cache.sources import Source, source_identity
from vkd_cache.stages.rendering import Renderer
from vkd_cache.stages.teaching import TeacherRun, taught_batches
from vkd_cache.stages.transfer import mixed_images
from vkd_cache.stages.units import unit_tasks
from vkd_cache.views.recipe import Recipe

PROBE_SAMPLES = 256  # of the first unit: enough for a stable loss effect, and seconds on a CPU


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """One extraction, resolved: what goes into its manifest."""

    config: Config
    source: Source
    recipe: Recipe
    run: TeacherRun

    def manifest(self, existing: Cache | None) -> Manifest:
        """The manifest that this run would write; runs the teacher only where codecs have to be measured.

        Raises:
            SourceError, TeacherError: no image to measure on, or no finite features.
        """
        nodes = self._known_nodes(existing)
        if nodes is None:
            measured = self._measured_nodes()
            # another worker may have started the cache meanwhile
            nodes = self._known_nodes(find_cache(self.config.cache.url)) or measured
        return self._manifest(nodes)

    def show(self, existing: Cache | None, units: list[UnitId], todo: list[UnitId]) -> None:
        """Say what would be done; nothing is written, and no image is read.

        Raises:
            CacheMismatchError: the cache that is there was made from something else.
        """
        nodes = self._known_nodes(existing)
        if existing is not None and nodes is not None:
            wanted = Manifest.from_json(self._manifest(nodes).to_json())
            check_same(existing.url, existing.manifest, wanted)
        config, numerics = self.config, self.run.numerics()
        num_images = sum(len(shard.keys) for shard in self.source.shards)
        samples = sum(len(self.source.shards[unit.shard].keys) for unit in todo)
        autocast = "" if numerics["autocast"] == "off" else f", autocast {numerics['autocast']}"
        rows = [
            ("source", f"{self.source.location} ({self.source.kind}): {num_images} images, "
                       f"{self.source.num_classes} classes, {len(self.source.shards)} shards"),
            ("views", f"{config.views.count or 1} of recipe {self.recipe.name} at {self.recipe.size_px} px"),
            ("teacher", f"{config.teacher.name} on {self.run.device}{autocast}, batches of {self.run.batch_size}"),
            ("nodes", self._nodes_text(nodes)),
            ("cache", f"{config.cache.url} ({config.cache.backend}), " + ("exists" if existing else "new")),
            ("units to make", f"{len(todo)} of this worker's {len(units)}"),
            ("views to render", str(samples)),
            ("bytes before compression", self._bytes_text(nodes, samples)),
        ]  # fmt: skip
        console.show_table("extract, dry run: nothing is written", ("what", "value"), rows)

    def _manifest(self, nodes: tuple[NodeSpec, ...]) -> Manifest:
        config = self.config
        return Manifest(
            dataset=source_identity(self.source).to_json(),
            recipe=self.recipe.to_json(),
            seed=config.views.seed,
            nodes=nodes,
            teacher=self.run.teacher.identity,
            head=describe_head(self.run.teacher.head_tensors())[0],
            numerics=self.run.numerics(),
            versions=library_versions(),
            backend=config.cache.backend,
            block_samples=config.cache.block_samples if config.cache.backend == "webdataset" else 0,
        )

    def _known_nodes(self, existing: Cache | None) -> tuple[NodeSpec, ...] | None:
        """The nodes as far as they are decided without the teacher's values; None: they have to be measured."""
        dtype = self.config.cache.dtype
        stored = {spec.name: spec for spec in existing.manifest.nodes} if existing is not None else {}
        nodes = []
        for name, shape in self.run.teacher.node_shapes.items():
            spec = stored.get(name)
            if spec is not None and spec.dtype == dtype:
                nodes.append(dataclasses.replace(spec, shape=shape))
            elif dtype not in ("auto", "uint8"):
                nodes.append(resolve_codec(name, dtype, torch.zeros(1, *shape)))
            elif existing is not None:  # refused anyway for its dtype: no need to find out the codec
                plain = resolve_codec(name, "float32", torch.zeros(1, *shape))
                codec = spec.codec if spec is not None else plain.codec
                nodes.append(dataclasses.replace(plain, dtype=dtype, codec=codec))
            else:
                return None
        return tuple(nodes)

    def _measured_nodes(self) -> tuple[NodeSpec, ...]:
        nodes = self._probe()
        head = self.run.teacher.head_tensors()
        dtype = self.config.cache.dtype
        return tuple(
            resolve_codec(name, dtype, values, head if name == "pooled" else None) for name, values in nodes.items()
        )

    def _probe(self) -> dict[str, torch.Tensor]:
        """Node values (n, ...) of the first samples of the first unit that has any, n <= PROBE_SAMPLES or a batch.

        Always from shard 0 and view 0 on, whatever this worker's share is, so that all workers decide alike. Broken
        images, unreadable files and features that are not finite are left out: the units they belong to will tell.
        """
        seed = self.config.views.seed
        renderer = Renderer(self.source, self.recipe, seed)
        why: VkdCacheError | None = None
        for shard in range(len(self.source.shards)):
            found: list[dict[str, torch.Tensor]] = []
            count = 0
            tasks = unit_tasks(self.source, self.recipe, seed, UnitId(shard, 0), self.run.batch_size)
            for batch, pixels in taught_batches(renderer, tasks, 0, self.run):
                why = why or batch.error
                if batch.error is not None or not batch.ok.any():
                    continue
                outputs = {name: values.cpu() for name, values in self.run(mixed_images(pixels, batch.mix)).items()}
                keep = torch.from_numpy(batch.ok)
                for values in outputs.values():
                    keep = keep & torch.isfinite(values).flatten(1).all(1)
                if not keep.any():
                    why = why or TeacherError(
                        f"{self.config.teacher.name}: gives features that are not finite. Under float16 autocast "
                        "values overflow at 65504: use [extract] autocast = 'bfloat16' or 'off'."
                    )
                    continue
                found.append({name: values[keep] for name, values in outputs.items()})
                count += int(keep.sum())
                if count >= PROBE_SAMPLES:
                    break
            if found:
                return {name: torch.cat([values[name] for values in found]) for name in found[0]}
        raise why or SourceError(f"{self.source.location}: not one of its images can be decoded.")

    def _nodes_text(self, nodes: tuple[NodeSpec, ...] | None) -> str:
        shapes = self.run.teacher.node_shapes
        codecs = {spec.name: spec.codec for spec in nodes or ()}
        dtype = self.config.cache.dtype
        undecided = "auto: measured on the first unit" if dtype == "auto" else dtype
        return ", ".join(
            f"{name} {'x'.join(map(str, shape))} as {codecs.get(name, undecided)}" for name, shape in shapes.items()
        )

    def _bytes_text(self, nodes: tuple[NodeSpec, ...] | None, samples: int) -> str:
        if nodes is not None:
            return f"{samples * sum(spec.sample_bytes for spec in nodes) / 1e6:.1f} MB"
        values = samples * sum(torch.Size(shape).numel() for shape in self.run.teacher.node_shapes.values())
        smallest, largest = values * CODEC_BYTES["sqrt_uint8"], values * CODEC_BYTES["float32"]
        if self.config.cache.dtype == "uint8":
            return f"{smallest / 1e6:.1f} MB"
        return f"{smallest / 1e6:.1f} to {largest / 1e6:.1f} MB"
