"""What an extraction is going to write: the manifest, with the codecs that are decided by measuring.

A newcomer's trap: with dtype `auto` (or `uint8`, which comes signed or not) the codecs depend on the teacher's values.
They are decided once, by whoever starts the cache, always on its first unit; every later run takes those of the cache.
"""

import dataclasses
from collections.abc import Sequence

import torch

from vkd_cache import console
from vkd_cache.cache.codecs import resolve_codec
from vkd_cache.cache.reader import Cache, find_cache
from vkd_cache.cache.schema import BLOCK_SAMPLES, BY_VALUE, Manifest, NodeSpec
from vkd_cache.cache.units import UnitId
from vkd_cache.cache.writer import check_same, describe_head
from vkd_cache.config import Config
from vkd_cache.runtime import library_versions
from vkd_cache.sources import Source, source_identity
from vkd_cache.stages.extract_checks import share_of
from vkd_cache.stages.extract_probe import probe_teacher
from vkd_cache.stages.extract_size import view_bytes
from vkd_cache.stages.stored_pixels import StoredPixels, wanted_spec
from vkd_cache.stages.teaching import TeacherRun, memory_told
from vkd_cache.teachers import DetectionTeacher
from vkd_cache.tokens import Tokens, tokens_from_sequences
from vkd_cache.views.recipe import Recipe


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
        return self._manifest(nodes, existing)

    def show(self, existing: Cache | None, units: list[UnitId], todo: list[UnitId]) -> None:
        """Say what would be done; nothing is written, and no image is read.

        Raises:
            CacheMismatchError: the cache that is there was made from something else.
        """
        nodes = self._known_nodes(existing)
        if existing is not None and nodes is not None:
            wanted = Manifest.from_json(self._manifest(nodes, existing).to_json())
            check_same(existing.url, existing.manifest, wanted)
        config, numerics = self.config, self.run.numerics()
        size = self.run.batch_size or "the size that trials find the fastest"
        num_images = sum(len(shard.keys) for shard in self.source.shards)
        samples = sum(len(self.source.shards[unit.shard].keys) for unit in todo)
        autocast = "" if numerics["autocast"] == "off" else f", autocast {numerics['autocast']}"
        rows = [
            ("source", f"{self.source.location} ({self.source.kind}): {num_images} images, "
                       f"{self.source.num_classes} classes, {len(self.source.shards)} shards"),
            ("views", f"{config.views.count or 1} of recipe {self.recipe.name} at {self._size_text()} px"),
            ("teacher", f"{config.teacher.name} on {self.run.device}{autocast}, batches of {size}"),
            ("nodes", self._nodes_text(nodes)),
            ("cache", f"{config.cache.url} ({config.cache.backend}), " + ("exists" if existing else "new")),
            ("units to make", f"{len(todo)} of this worker's {len(units)}"),
            ("views to render", str(samples)),
            ("bytes before compression", self._bytes_text(nodes, samples)),
            ("stored pixels", str(wanted_spec(config.cache) or "none")),
        ]  # fmt: skip
        console.show_table("extract, dry run: nothing is written", ("what", "value"), rows)

    def _manifest(self, nodes: tuple[NodeSpec, ...], existing: Cache | None) -> Manifest:
        config, spec = self.config, wanted_spec(self.config.cache)
        block = config.cache.block_samples or (existing.manifest.block_samples if existing else 0) or BLOCK_SAMPLES
        return Manifest(
            dataset=source_identity(self.source).to_json(),
            recipe=self.recipe.to_json(),
            seed=config.views.seed,
            nodes=nodes,
            teacher=self.run.teacher.identity,
            head=describe_head(self.run.teacher.head_tensors())[0],
            numerics=self.run.numerics(),
            versions=library_versions(*self.recipe.libraries, *(spec.libraries if spec is not None else ())),
            backend=config.cache.backend,
            block_samples=block if config.cache.backend == "webdataset" else 0,
            pixels=spec,
        )

    def _known_nodes(self, existing: Cache | None) -> tuple[NodeSpec, ...] | None:
        """The nodes as far as they are decided without the teacher's values; None: they have to be measured."""
        dtype = self.config.cache.dtype
        stored = {spec.name: spec for spec in existing.manifest.nodes} if existing is not None else {}
        nodes = []
        for name, shape in self.run.teacher.node_shapes.items():
            spec = stored.get(name)
            if spec is not None and spec.dtype == dtype:
                # values that came another way (by conversion) and the teacher's own do not belong together
                share = share_of(name, self.config.cache)
                nodes.append(dataclasses.replace(spec, shape=shape, tokens=share, passed=()))
            elif dtype not in BY_VALUE:
                nodes.append(self._spec(name, dtype))
            elif existing is not None:  # refused anyway for its dtype: no need to find out the codec
                plain = self._spec(name, "float32")
                codec = spec.codec if spec is not None else plain.codec
                nodes.append(dataclasses.replace(plain, dtype=dtype, codec=codec))
            else:
                return None
        return tuple(nodes)

    @property
    def stored(self) -> StoredPixels | None:
        """How the views are to be stored."""
        return StoredPixels.wanted(self.config.cache)

    def _measured_nodes(self) -> tuple[NodeSpec, ...]:
        cache = self.config.cache
        with memory_told(self.run):
            nodes = probe_teacher(self.source, self.recipe, self.config.views.seed, self.run, self.stored)
        head = self.run.teacher.head_tensors()
        return tuple(
            resolve_codec(name, cache.dtype, values, head if name == "pooled" else None, share_of(name, cache))
            for name, values in nodes.items()
        )

    def _spec(self, name: str, dtype: str) -> NodeSpec:
        """A node whose codec does not depend on its values."""
        values = self._no_values(self.run.teacher.node_shapes[name])
        return resolve_codec(name, dtype, values, fraction=share_of(name, self.config.cache))

    def _no_values(self, shape: tuple[int, ...]) -> torch.Tensor | Tokens:
        """Stands for values of a node where only their shape counts."""
        if not isinstance(self.run.teacher, DetectionTeacher):
            return torch.zeros(1, *shape)
        return tokens_from_sequences(torch.zeros(1, 1, *shape), (1, 1))

    def _size_text(self) -> str:
        scales = self.recipe.detection.scales if self.recipe.detection is not None else (self.recipe.size_px,)
        return f"{min(scales)} to {max(scales)}" if len(scales) > 1 else str(scales[0])

    def _nodes_text(self, nodes: tuple[NodeSpec, ...] | None) -> str:
        shapes = self.run.teacher.node_shapes
        codecs = {spec.name: spec.codec for spec in nodes or ()}
        dtype = self.config.cache.dtype
        undecided = "auto: measured on the first unit" if dtype == "auto" else dtype
        shares = {name: share_of(name, self.config.cache) for name in shapes}
        return ", ".join(
            f"{name} {'x'.join(map(str, shape))} as {codecs.get(name, undecided)}"
            + (f" ({100 * shares[name]:g} % of its tokens)" if shares[name] < 1 else "")
            for name, shape in shapes.items()
        )

    def _bytes_text(self, nodes: tuple[NodeSpec, ...] | None, samples: int) -> str:
        if nodes is not None:
            return f"{samples * self._view_bytes(nodes) / 1e6:.1f} MB"
        largest = [self._spec(name, "float32") for name in self.run.teacher.node_shapes]
        dense = "sqrt_uint4" if self.config.cache.dtype == "uint4" else "sqrt_uint8"
        smallest = [
            dataclasses.replace(spec, codec="token_int8" if spec.layout == "tokens" else dense) for spec in largest
        ]
        least, most = (samples * self._view_bytes(specs) / 1e6 for specs in (smallest, largest))
        return f"{least:.1f} MB" if self.config.cache.dtype != "auto" else f"{least:.1f} to {most:.1f} MB"

    def _view_bytes(self, specs: Sequence[NodeSpec]) -> float:
        return view_bytes(specs, self.source, self.recipe, self.config.views.seed, self.run.teacher)
