"""Reading a cache: what is published, and one unit at a time.

A newcomer's trap: a unit is read whole (6-26 us per sample); reading it for a single row costs a thousand times that.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError

from vkd_cache.cache.arrays import Array
from vkd_cache.cache.codecs import decode_node, rounding_bound, stored_arrays, stored_rows
from vkd_cache.cache.documents import MAX_DOCUMENT_BYTES, unseal
from vkd_cache.cache.pixel_codecs import EncodedViews
from vkd_cache.cache.schema import Manifest, NodeSpec, UnitRecord
from vkd_cache.cache.storage import Storage, open_storage
from vkd_cache.cache.token_codecs import decode_tokens, tokens_rounding_bound
from vkd_cache.cache.unit_copies import read_copied
from vkd_cache.cache.units import (
    ColumnSpec,
    UnitId,
    check_columns,
    columns_of,
    keys_from_columns,
    record_path,
    unit_of_record,
    unit_path,
    unpack_unit,
)
from vkd_cache.errors import CacheFormatError, CacheMismatchError, CorruptCacheError, IncompleteCacheError
from vkd_cache.local_copies import LocalCopies, Original
from vkd_cache.stored_rows import StoredRows
from vkd_cache.tokens import Tokens
from vkd_cache.urls import is_remote
from vkd_cache.views.recipe import Recipe

MANIFEST_PATH = "manifest.json"
_MAX_HEAD_BYTES = 2**34  # a million classes of a teacher 4096 wide
_HEAD_AGAIN = "Restore it from a copy, or run `vkd-cache verify --repair` and then the same `vkd-cache extract` again."


class Unit:
    """One unit in memory, n rows: those of its source shard, in order, without broken images.

    Attributes:
        id: (shard, view).
        keys: n keys.
        rows: (n,) uint32 row in the source shard.
        columns: every column but the nodes', by name; arrays may be read-only. See docs/format.md.
    """

    def __init__(self, unit: UnitId, manifest: Manifest, arrays: Mapping[str, Array]) -> None:
        self.id = unit
        self.columns: dict[str, Array] = {name: array for name, array in arrays.items() if not name.startswith("node.")}
        self.keys = keys_from_columns(arrays)
        self.rows: npt.NDArray[np.uint32] = arrays["row"].astype(np.uint32, copy=False)
        self._manifest = manifest
        self._arrays = arrays

    def __len__(self) -> int:
        return len(self.keys)

    def node(self, name: str, rows: npt.NDArray[np.integer] | slice | None = None) -> torch.Tensor:
        """Values of a node.

        Args:
            name: one of the manifest's nodes.
            rows: positions in this unit (not in the source shard), in [0, n); None: all.

        Returns:
            (n, C) or (n, C, H, W): float16 and bfloat16 as stored, everything else float32.

        Raises:
            CacheFormatError: the cache has no such node, or it is one of tokens.
        """
        spec = self._spec(name, tokens=False)
        return decode_node(spec, self._stored(spec), rows)

    def stored(self, name: str, rows: npt.NDArray[np.integer] | slice | None = None) -> StoredRows:
        """The same as `node`, not decoded yet: what training joins and copies."""
        spec = self._spec(name, tokens=False)
        return stored_rows(spec, self._stored(spec), rows)

    @property
    def pixels(self) -> EncodedViews | None:
        """The n stored views, still encoded as the manifest's `pixels` says; None where the cache stores none."""
        return None if self._manifest.pixels is None else EncodedViews.of_columns(self.columns)

    def layout(self, name: str) -> str:
        """How a node is laid out: `tokens`, to be read by `tokens`, or one of the layouts that `node` reads.

        Raises:
            CacheFormatError: the cache has no such node.
        """
        return self._manifest.node(name).layout

    def tokens(self, name: str, rows: npt.NDArray[np.integer] | slice | None = None) -> Tokens:
        """Tokens of a node of layout `tokens`.

        Args:
            name: one of the manifest's nodes.
            rows: positions in this unit (not in the source shard), in [0, n); None: all.

        Returns:
            Tokens of these images in the precision that is stored; int8 with its scale, see `Tokens.dense`.

        Raises:
            CacheFormatError: the cache has no such node, or it is a dense one.
        """
        spec = self._spec(name, tokens=True)
        return decode_tokens(spec, self._stored(spec), rows)

    def rounding(self, name: str, rows: npt.NDArray[np.integer] | slice | None = None) -> torch.Tensor:
        """How far each value of a node may be from the teacher's, by its codec alone: float32.

        In the shape of `node(name, rows)`, or (T, C) for those of `tokens(name, rows)`.
        """
        spec = self._manifest.node(name)
        if spec.layout == "tokens":
            return tokens_rounding_bound(spec, self._stored(spec), rows)
        return rounding_bound(spec, self._stored(spec), rows)

    def _spec(self, name: str, *, tokens: bool) -> NodeSpec:
        spec = self._manifest.node(name)
        if (spec.layout == "tokens") != tokens:
            ask = "tokens" if spec.layout == "tokens" else "node"
            raise CacheFormatError(f"node '{name}': has layout {spec.layout}. Read it with {ask}('{name}').")
        return spec

    def _stored(self, spec: NodeSpec) -> dict[str, Array]:
        return {suffix: self._arrays[f"node.{spec.name}{suffix}"] for suffix in stored_arrays(spec)}


class Cache:
    """An open cache; made by `open_cache`. Picklable, and cheap to send to a worker process.

    Attributes:
        url: where it is.
        manifest: what it was made from.
        fingerprint: hexadecimal SHA-256 of the part of the manifest that must match.
    """

    def __init__(self, storage: Storage, manifest: Manifest, copies: LocalCopies | None = None) -> None:
        """`copies`: where unit files are kept once they have been read; None: nowhere."""
        self.url = storage.url
        self._copies = copies
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint()
        self.storage = storage

    @property
    def recipe(self) -> Recipe:
        """How its views were planned.

        Raises:
            CacheFormatError: not a recipe that this release knows.
        """
        try:
            return Recipe.from_json(self.manifest.recipe)
        except CacheFormatError as error:
            raise CacheFormatError(f"{self.url}/{MANIFEST_PATH}: {error}") from error

    @property
    def columns(self) -> dict[str, ColumnSpec]:
        """Dtype and shape per row of every column of a unit but the keys and the nodes."""
        return columns_of(self.manifest)

    @property
    def units(self) -> tuple[UnitId, ...]:
        """Every published unit, by view and shard: `cache.read(unit)`. Lists the cache anew."""
        published = sorted(self.published().items())
        return tuple(UnitId(shard, view) for view, shards in published for shard in sorted(shards))

    def published(self) -> dict[int, frozenset[int]]:
        """Published shards by view, found by listing alone; a view without any is absent."""
        return self._listed("records")

    def published_shards(self, view: int) -> frozenset[int]:
        """Published shards of one view, found by listing alone."""
        return self._listed(f"records/view-{view:04d}").get(view, frozenset())

    def is_published(self, unit: UnitId) -> bool:
        """Whether a unit is published now: one look at its record's name, nothing is read."""
        return self.storage.exists(record_path(unit))

    def _listed(self, folder: str) -> dict[int, frozenset[int]]:
        shards: dict[int, set[int]] = {}
        for path in self.storage.paths(folder):
            unit = unit_of_record(path)
            if unit is not None:
                shards.setdefault(unit.view, set()).add(unit.shard)
        return {view: frozenset(found) for view, found in sorted(shards.items())}

    def complete_views(self, num_shards: int | None = None) -> int:
        """Number V such that views 0..V-1 have all their shards published; `num_shards` defaults to the data set's."""
        wanted = frozenset(range(self.manifest.num_shards if num_shards is None else num_shards))
        published = self.published()
        view = 0
        while published.get(view, frozenset()) >= wanted and view in published:
            view += 1
        return view

    def record(self, shard: int, view: int) -> UnitRecord:
        """The record of a published unit.

        Raises:
            IncompleteCacheError: the unit is not published.
            CacheFormatError, CorruptCacheError: its record is not one, or was changed.
            CacheMismatchError: the record belongs to another cache.
        """
        path = record_path(UnitId(shard, view))
        where = f"{self.url}/{path}"
        try:
            data = self.storage.get(path, most_bytes=MAX_DOCUMENT_BYTES)
        except FileNotFoundError as error:
            raise IncompleteCacheError(
                f"{self.url}: shard {shard} of view {view} is not published. Run the same `vkd-cache extract` again "
                "to finish the cache."
            ) from error
        record = UnitRecord.from_bytes(data, where)
        self._check_paths(record, where)
        if (record.shard, record.view) != (shard, view):
            raise CorruptCacheError(
                f"{where}: found the record of shard {record.shard}, view {record.view}. Delete it and extract again."
            )
        if record.fingerprint != self.fingerprint:
            raise CacheMismatchError(
                f"{where}: found a unit of a cache with fingerprint {record.fingerprint[:16]}, expected "
                f"{self.fingerprint[:16]}. Files of two caches were mixed: delete this one and extract again."
            )
        return record

    def _check_paths(self, record: UnitRecord, where: str) -> None:
        """Let a record name its own unit's file and nothing else in the file system."""
        unit, backend = UnitId(record.shard, record.view), self.manifest.backend
        expected = [unit_path(unit, backend, digest) for _, _, digest in record.files]
        found = [path for path, _, _ in record.files]
        if len(expected) != 1 or found != expected:
            raise CacheFormatError(
                f"{where}: files: found {found[:3]}, expected one file called {expected[:1]}. Delete it and extract "
                "again."
            )

    def read(self, unit: tuple[int, int] | int, view: int = 0, *, verify: bool = True) -> Unit:
        """One unit, whole.

        Args:
            unit: (shard, view), as in `units`, or the number of the shard.
            view: number of the view, where `unit` is a shard.
            verify: compare size and checksum with the record before anything is parsed (about 0.3 us per sample).

        Raises:
            IncompleteCacheError: the unit is not published.
            CorruptCacheError: its bytes are not those that were published.
            CacheFormatError: they are, but not what the format says.
        """
        unit_id = UnitId(*unit) if isinstance(unit, tuple) else UnitId(unit, view)
        return Unit(unit_id, self.manifest, self.read_arrays(self.record(*unit_id), verify=verify))

    def read_arrays(self, record: UnitRecord, *, verify: bool = True) -> dict[str, Array]:
        """Every array of a unit as it is stored, by name; errors as `read`."""
        data = self.read_file(record, verify=verify)
        where = f"{self.url}/{record.files[0][0]}"
        try:
            arrays = unpack_unit(data, self.manifest)
        except CacheFormatError as error:
            raise CacheFormatError(f"{where}: {error}") from error
        num_rows = check_columns(arrays, self.manifest, where)
        if num_rows != record.num_samples:
            raise CorruptCacheError(f"{where}: found {num_rows} rows, the record says {record.num_samples}.")
        return arrays

    def read_file(self, record: UnitRecord, *, verify: bool = True) -> bytes:
        """The bytes of a unit's file, compared with its record.

        Raises:
            CorruptCacheError: the file is missing or not what was published.
        """
        path, size, digest = record.files[0]
        if self._copies is None:
            return self._stored_file(record, verify=verify)
        original = Original(f"{self.url}/{path}", size, digest)
        return read_copied(self._copies, original, lambda: self._stored_file(record, verify=True))

    def _stored_file(self, record: UnitRecord, *, verify: bool) -> bytes:
        path, size, digest = record.files[0]
        where = f"{self.url}/{path}"
        unit_record = record_path(UnitId(record.shard, record.view))
        what_to_do = (
            f"Delete its record ({unit_record}), or run `vkd-cache verify --repair`, and then the same `vkd-cache "
            "extract` again."
        )
        try:
            data = self.storage.get(path, most_bytes=size + 1)  # one more shows that it is not the same
        except FileNotFoundError as error:
            raise CorruptCacheError(f"{where}: missing, but its record says it was published. {what_to_do}") from error
        if len(data) != size:
            raise CorruptCacheError(f"{where}: found {len(data)} bytes, the record says {size}. {what_to_do}")
        if verify and (found := xxhash.xxh3_128_hexdigest(data)) != digest:
            raise CorruptCacheError(f"{where}: found checksum {found}, the record says {digest}. {what_to_do}")
        return data

    def head(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The teacher's linear head, `weight` (K, C) and `bias` (K,) float32: logits = pooled @ weight.T + bias.

        Raises:
            CorruptCacheError: it is missing or not what the manifest says.
        """
        if self.manifest.head is None:
            return None
        where = f"{self.url}/{self.manifest.head['file']}"
        data = self.head_file()
        try:
            tensors = safetensors.torch.load(data)
            weight, bias = tensors["weight"], tensors["bias"]
        except (SafetensorError, KeyError) as error:
            raise CacheFormatError(f"{where}: expected tensors 'weight' and 'bias' ({error}).") from error
        self._check_head(weight, bias, where)
        return weight, bias

    def _check_head(self, weight: torch.Tensor, bias: torch.Tensor, where: str) -> None:
        """Compare a head with the features that it turns into logits."""
        widths = [node.shape for node in self.manifest.nodes if node.name == "pooled"]
        fits = weight.ndim == 2 and bias.shape == weight.shape[:1] and weight.dtype == bias.dtype == torch.float32
        if not fits or (widths and weight.shape[1:] != widths[0]):
            raise CacheFormatError(
                f"{where}: found weight {tuple(weight.shape)} {weight.dtype}, bias {tuple(bias.shape)} {bias.dtype}, "
                f"expected float32 (classes, {widths[0][0] if widths else 'width'}) and (classes,)."
            )

    def head_file(self) -> bytes:
        """The bytes of the head's file; none without a head. Errors as `head`."""
        if self.manifest.head is None:
            return b""
        where = f"{self.url}/{self.manifest.head['file']}"
        try:
            data = self.storage.get(self.manifest.head["file"], most_bytes=_MAX_HEAD_BYTES)
        except FileNotFoundError as error:
            raise CorruptCacheError(f"{where}: the teacher's head is missing. {_HEAD_AGAIN}") from error
        digest = hashlib.sha256(data).hexdigest()
        if digest != self.manifest.head["sha256"]:
            raise CorruptCacheError(
                f"{where}: found SHA-256 {digest}, the manifest says {self.manifest.head['sha256']}. {_HEAD_AGAIN}"
            )
        return data


def find_cache(url: str, *, copies: LocalCopies | None = None) -> Cache | None:
    """The cache at `url`, or None if there is none; errors as `open_cache` if there is something else."""
    storage = open_storage(url)
    return _opened(storage, copies) if storage.exists(MANIFEST_PATH) else None


def open_cache(url: str, *, copies: LocalCopies | None = None) -> Cache:
    """Open the cache at `url` (a directory or an fsspec URL) for reading.

    Args:
        url: where it is.
        copies: of a cache behind a URL, keeps copies of the unit files that are read; None: each is read anew.

    Raises:
        CacheFormatError: there is no cache, or it has a format that this release does not know.
        CorruptCacheError: its manifest was changed.
    """
    return _opened(open_storage(url), copies)


def _opened(storage: Storage, copies: LocalCopies | None) -> Cache:
    return Cache(storage, read_manifest(storage), copies if is_remote(storage.url) else None)


def read_manifest(storage: Storage) -> Manifest:
    """The manifest of the cache in `storage`; errors as `open_cache`."""
    where = f"{storage.url}/{MANIFEST_PATH}"
    try:
        data = storage.get(MANIFEST_PATH, most_bytes=MAX_DOCUMENT_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheFormatError(
            f"{storage.url}: found no {MANIFEST_PATH}, expected a cache. Make one with `vkd-cache extract`."
        ) from error
    return Manifest.from_json(unseal(data, where), where)
