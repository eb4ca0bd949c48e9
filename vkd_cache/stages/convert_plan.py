"""What a conversion is going to write: the target's manifest, and whether its codecs may be reached.

    float32 -> any        what extraction in that dtype would have written, to the last byte
    to fewer bytes        another loss on top of the first: allowed, and `passed` says so
    anything else         would pretend a precision that is lost: refused unless forced, and `passed` says so
    the same codec        the stored bytes, copied

A newcomer's trap: whether float16 lost anything depends on what the teacher gave, which no cache tells of each node;
so float16 always counts as a loss.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from vkd_cache.cache.codecs import enough_to_measure, resolve_codec
from vkd_cache.cache.documents import FORMAT_VERSION
from vkd_cache.cache.reader import Cache, find_cache
from vkd_cache.cache.schema import BLOCK_SAMPLES, BY_VALUE, CODEC_BYTES, UNIT_SCALED, Manifest, NodeSpec
from vkd_cache.cache.units import UnitId, by_view, is_detection, keys_from_columns
from vkd_cache.errors import ConfigError, IncompleteCacheError
from vkd_cache.stages.convert_cut import Cut
from vkd_cache.stages.convert_units import Part, SourceUnits, broken_rows, node_values, unit_columns
from vkd_cache.tokens import Tokens
from vkd_cache.views.mixing import pair_slots, plan_mixing
from vkd_cache.views.recipe import Recipe
from vkd_cache.views.sizes import canvas_of

_EXACT = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """What is asked of the target; None: as the source has it.

    Attributes:
        backend: `zarr` or `webdataset`.
        dtype: of all nodes, one of `vkd_cache.cache.schema.DTYPES`.
        block_samples: per tar member of the webdataset backend.
        force: take steps that pretend precision.
    """

    backend: str | None = None
    dtype: str | None = None
    block_samples: int | None = None
    force: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertPlan:
    """One conversion, resolved.

    Attributes:
        source: what is converted.
        url: of the target.
        cut: of the target's shards.
        units: of the target that the source has all parts of.
        wish: what is asked for.
    """

    source: Cache
    url: str
    cut: Cut
    units: tuple[UnitId, ...]
    wish: Wish

    def manifest(self) -> Manifest:
        """The target's manifest.

        Raises:
            ConfigError: a step that pretends precision; names every node.
            IncompleteCacheError: nothing is published that a codec could be measured on.
        """
        manifest, target = self.source.manifest, find_cache(self.url)
        backend = self.wish.backend or manifest.backend
        block_samples = 0
        if backend == "webdataset":
            there = target.manifest.block_samples if target is not None else 0
            block_samples = self.wish.block_samples or manifest.block_samples or there or BLOCK_SAMPLES
        elif self.wish.block_samples:
            raise ConfigError(
                "--block-samples: the zarr backend has no blocks. Give --backend webdataset, or leave it out."
            )
        nodes = tuple(self._nodes())
        if not self.wish.force:
            refuse_pretence(manifest.nodes, nodes, self.source.url)
        return dataclasses.replace(
            manifest,
            dataset=self.cut.dataset,
            nodes=nodes,
            backend=backend,
            block_samples=block_samples,
            format_version=target.manifest.format_version if target is not None else FORMAT_VERSION,
        )

    def _nodes(self) -> Iterator[NodeSpec]:
        measured: dict[str, NodeSpec] = {}
        for spec in self.source.manifest.nodes:
            wanted = self.wish.dtype or spec.dtype
            if wanted == spec.dtype:
                found = spec
            elif wanted in BY_VALUE:
                measured = measured or self._decided(wanted) or self._measured(wanted)
                decided = measured[spec.name]
                found = dataclasses.replace(spec, dtype=wanted, codec=decided.codec, measured=decided.measured)
            else:
                codec = {"int8": "token_int8"}.get(wanted, wanted)
                found = dataclasses.replace(spec, dtype=wanted, codec=codec, measured={})
            anew = self.cut.is_new and found.codec in UNIT_SCALED  # its scales are of a unit
            yield dataclasses.replace(found, passed=_passed(spec, found.codec, anew=anew))

    def _decided(self, dtype: str) -> dict[str, NodeSpec]:
        """The nodes of the target that is there, where it was asked for the same; it knows what was measured."""
        target = find_cache(self.url)
        names = [spec.name for spec in self.source.manifest.nodes]
        if target is None or [(spec.name, spec.dtype) for spec in target.manifest.nodes] != [(n, dtype) for n in names]:
            return {}
        return {spec.name: spec for spec in target.manifest.nodes}

    def _measured(self, dtype: str) -> dict[str, NodeSpec]:
        """The nodes with codecs measured on the first unit, on the samples that extraction takes for it."""
        manifest, reader = self.source.manifest, SourceUnits(self.source)
        head = self.source.head()
        tensors = None if head is None else {"weight": head[0], "bias": head[1]}
        for unit in sorted(self.units, key=by_view):
            parts = reader.parts(self.cut.pieces[unit.shard], unit.view)
            values = {spec.name: node_values(parts, spec) for spec in manifest.nodes}
            counts = sum(found.counts for found in values.values() if isinstance(found, Tokens))
            rows = _first_rows(parts, manifest, counts, view=unit.view)
            if len(rows):
                chosen = {name: found.select(rows) if isinstance(found, Tokens) else found[rows.copy()]
                          for name, found in values.items()}  # fmt: skip
                return {
                    spec.name: resolve_codec(
                        spec.name, dtype, chosen[spec.name], tensors if spec.name == "pooled" else None, spec.tokens
                    )
                    for spec in manifest.nodes
                }
        raise IncompleteCacheError(
            f"{self.source.url}: holds no sample that --dtype {dtype} could be measured on. Finish it with vkd-cache "
            "extract, or give another --dtype."
        )


def _passed(spec: NodeSpec, codec: str, *, anew: bool) -> tuple[str, ...]:
    """Lossy codecs that the values have gone through once they are stored as `codec`."""
    if spec.codec == _EXACT or (codec == spec.codec and not anew):
        return spec.passed
    return (*spec.passed, spec.codec)


def refuse_pretence(source: tuple[NodeSpec, ...], target: tuple[NodeSpec, ...], url: str) -> None:
    """Refuse codecs that promise more than the source's values still hold.

    Raises:
        ConfigError: names every such node, from, to, and what to do.
    """
    steps = [
        f"  node '{old.name}': {old.codec} to {new.codec}" + (" in other shards" if new.codec == old.codec else "")
        for old, new in zip(source, target, strict=True)
        if new.passed != old.passed and CODEC_BYTES[new.codec] >= CODEC_BYTES[old.codec]
    ]
    if steps:
        raise ConfigError(
            f"{url}: what was rounded away does not come back:\n" + "\n".join(steps) + "\n"
            "Keep the codec, choose one of fewer bytes, or extract again with the teacher. With --force the values are "
            "converted as they are, and the target says what they went through."
        )


def _first_rows(
    parts: list[Part], manifest: Manifest, tokens: npt.NDArray[np.int64] | int, *, view: int
) -> npt.NDArray[np.int64]:
    """Places in the unit of the samples that extraction would have measured codecs on, in its order.

    That is the teacher's first batches: mixed pairs first, views of detection by canvas. (Of a unit of detection with
    broken images, whose canvas nobody stored, a few may be others.)

    Args:
        parts: of the unit.
        manifest: of the source.
        tokens: (n,) tokens of all nodes of each sample, stored or not; 0 where there are none.
        view: number of the view.
    """
    columns = unit_columns(parts, manifest)
    rows = columns["row"].astype(np.int64)
    batch_size = max(1, int(manifest.numerics.get("batch_size", 1)))
    taken: list[npt.NDArray[np.int64]] = []
    for group in _groups(parts, manifest, columns, view):
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            taken.append(np.searchsorted(rows, batch[np.isin(batch, rows)]))
            places = np.concatenate(taken)
            if enough_to_measure(len(places), int(tokens[places].sum()) if isinstance(tokens, np.ndarray) else 0):
                return places
    return np.concatenate([np.empty(0, np.int64), *taken])


def _groups(
    parts: list[Part], manifest: Manifest, columns: Mapping[str, npt.NDArray[np.generic]], view: int
) -> list[npt.NDArray[np.int64]]:
    """Rows of the shard in the order in which an extraction visits them; a batch never spans two groups."""
    recipe = Recipe.from_json(manifest.recipe)
    rows = columns["row"].astype(np.int64)
    if is_detection(manifest) and recipe.detection is not None:
        multiple_px = recipe.detection.canvas_multiple_px
        canvases = [canvas_of((int(h), int(w)), multiple_px) for h, w in columns["view_size"].tolist()]
        distinct = sorted(set(canvases))
        return [rows[[canvas == other for other in canvases]] for canvas in distinct]
    keys = dict(zip(rows.tolist(), keys_from_columns(columns), strict=True))
    keys |= {row: key for key, row, _ in broken_rows(parts)}
    slots = pair_slots(plan_mixing(recipe, manifest.seed, [keys[row] for row in range(len(keys))], view)).reshape(-1)
    return [slots[slots >= 0]]
