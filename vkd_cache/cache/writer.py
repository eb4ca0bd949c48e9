"""Writing a cache: an exclusive start, then units that are published one by one in any order by any process.

A newcomer's trap: two processes may publish the same unit at once. Files of units are named by their content, so the
same bytes are the same file, and of two different ones the record says which counts: the last one, or with `exclusive`
the first.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
import xxhash

from vkd_cache.cache.arrays import Array
from vkd_cache.cache.codecs import encode_node
from vkd_cache.cache.differences import manifest_differences
from vkd_cache.cache.documents import FORMAT_VERSION, seal
from vkd_cache.cache.reader import MANIFEST_PATH, Cache, read_manifest
from vkd_cache.cache.schema import Manifest, NodeSpec, UnitRecord
from vkd_cache.cache.storage import TEMPORARY, Storage, open_storage
from vkd_cache.cache.token_codecs import encode_tokens
from vkd_cache.cache.units import UnitId, check_columns, pack_unit, record_path, unit_path
from vkd_cache.errors import CacheError, CacheFormatError, CacheMismatchError
from vkd_cache.tokens import Tokens

_SHOWN_DIFFERENCES = 20


class CacheWriter:
    """An open cache that units can be published into; made by `create_cache`. Picklable.

    Attributes:
        cache: the same cache, for reading.
        leftovers: what writers that died had left, and was removed when the cache was opened: paths from its root.
    """

    def __init__(self, storage: Storage, manifest: Manifest, leftovers: Sequence[str] = ()) -> None:
        self.cache = Cache(storage, manifest)
        self.leftovers = tuple(leftovers)
        self._storage = storage

    @property
    def manifest(self) -> Manifest:
        """What the cache is made from, as it is stored."""
        return self.cache.manifest

    def published(self, view: int) -> frozenset[int]:
        """Shards of `view` that are published now."""
        return self.cache.published_shards(view)

    def publish(
        self,
        shard: int,
        view: int,
        columns: Mapping[str, Array],
        nodes: Mapping[str, torch.Tensor | Tokens],
        broken: Sequence[tuple[str, int, str]] = (),
        *,
        exclusive: bool = False,
    ) -> UnitRecord:
        """Encode and store one unit, then its record: after that, and only then, it is published.

        Args:
            shard: number of the shard.
            view: number of the view.
            columns: every column of `vkd_cache.cache.units.columns_of`, and `key_bytes`, `key_offsets`; n rows.
            nodes: (n, ...) values of every node of the manifest, any floating dtype, any device; where its layout is
                `tokens`, those of the n samples.
            broken: (key, row in the source shard, reason) of images without a row, in row order.
            exclusive: leave a unit alone that has been published meanwhile; else this one takes its place.

        Raises:
            CacheFormatError: columns or nodes that are not what the manifest and the format say.
            CacheError: values that the node's codec cannot hold.
            FileExistsError: exclusive, and another process has published the unit.
            CacheError: they cannot be written.
        """
        where = f"shard {shard} of view {view}"
        arrays = {**columns, **self._encode(nodes, where)}
        return self.publish_arrays(UnitId(shard, view), arrays, broken, exclusive=exclusive)

    def publish_arrays(
        self,
        unit: UnitId,
        arrays: Mapping[str, Array],
        broken: Sequence[tuple[str, int, str]] = (),
        origin: Mapping[str, Any] | None = None,
        *,
        exclusive: bool = False,
    ) -> UnitRecord:
        """`publish`, of nodes that are encoded already.

        Args:
            unit: which one.
            arrays: the columns, and the arrays of every node as its codec stores them.
            broken, exclusive: as for `publish`.
            origin: what the unit was converted from, for its record.

        Raises:
            CacheFormatError: arrays that are not what the manifest and the format say.
            FileExistsError, CacheError: as for `publish`.
        """
        num_samples = check_columns(arrays, self.manifest, f"shard {unit.shard} of view {unit.view}")
        data = pack_unit(arrays, self.manifest)
        digest = xxhash.xxh3_128_hexdigest(data)
        path = unit_path(unit, self.manifest.backend, digest)
        record = UnitRecord(
            shard=unit.shard,
            view=unit.view,
            num_samples=num_samples,
            broken=tuple(broken),
            files=((path, len(data), digest),),
            fingerprint=self.cache.fingerprint,
            origin=origin,
        )
        with writing(self.cache.url, f"shard {unit.shard} of view {unit.view}"):
            self._storage.put(path, data)
            # a file that loses is left lying: a third process with the same bytes may be about to name it in a record
            self._storage.put(record_path(unit), record.to_bytes(), exclusive=exclusive)
            if not self._storage.exists(path):  # a repair has just removed a damaged file of that name (see `repair`)
                self._storage.put(path, data)
        return record

    def write_run_log(self, name: str, data: bytes) -> None:
        """Store free-form bytes as `runs/<name>`: what a run was asked for and did. Not part of the cache's content."""
        with writing(self.cache.url, "the log of the run"):
            self._storage.put(f"runs/{name}", data)

    def _encode(self, nodes: Mapping[str, torch.Tensor | Tokens], where: str) -> dict[str, Array]:
        wanted = [spec.name for spec in self.manifest.nodes]
        if sorted(nodes) != sorted(wanted):
            raise CacheFormatError(f"{where}: found values of nodes {sorted(nodes)}, expected {sorted(wanted)}.")
        arrays = {}
        for spec in self.manifest.nodes:
            try:
                encoded = _encoded(nodes[spec.name], spec)
            except CacheFormatError as error:
                raise CacheFormatError(f"{where}: node '{spec.name}': {error}") from error
            except CacheError as error:
                raise CacheError(f"{where}: node '{spec.name}': {error}") from error
            arrays.update({f"node.{spec.name}{suffix}": array for suffix, array in encoded.items()})
        return arrays


def _encoded(values: torch.Tensor | Tokens, spec: NodeSpec) -> dict[str, Array]:
    if isinstance(values, Tokens) != (spec.layout == "tokens"):
        raise CacheFormatError(f"found a {type(values).__name__}, expected values of layout {spec.layout}.")
    return encode_tokens(values, spec) if isinstance(values, Tokens) else encode_node(values, spec.codec)


def create_cache(url: str, manifest: Manifest, head: Mapping[str, torch.Tensor] | None = None) -> CacheWriter:
    """Start the cache at `url`, or join the one that is there, if it is made from the same things.

    Several processes may call this at once: one manifest wins, the others compare theirs with it.

    Args:
        url: directory or fsspec URL.
        manifest: what this run makes the cache from; `head` in it is filled in here.
        head: `weight` (K, C) and `bias` (K,) of the teacher's linear head, where logits are linear in `pooled`.

    Raises:
        CacheMismatchError: the cache there was made from something else; lists the fields with both values. Or units
            are there that belong to another manifest than this one, which was lost.
        CacheFormatError: what is there is not a cache, or `manifest` is not one.
    """
    described, head_bytes = describe_head(head)
    return start_cache(url, dataclasses.replace(manifest, head=described), head_bytes)


def start_cache(url: str, manifest: Manifest, head_file: bytes) -> CacheWriter:
    """`create_cache`, of a manifest whose `head` entry says what is in `head_file`; errors as there."""
    storage = open_storage(url)
    wanted = Manifest.from_json(manifest.to_json(), f"{url}: new manifest")
    with writing(storage.url, "a cache"):
        leftovers = storage.prepare()
        if not storage.exists(MANIFEST_PATH):
            wanted = _as_units_are(storage, wanted)
            if wanted.head is not None:
                storage.put(wanted.head["file"], head_file)
            with contextlib.suppress(FileExistsError):  # another process was first; what it wrote is compared below
                storage.put(MANIFEST_PATH, seal(wanted.to_json()), exclusive=True)
    existing = read_manifest(storage)
    check_same(storage.url, existing, wanted)
    if wanted.head is not None and not storage.exists(wanted.head["file"]):  # lost, or dropped by a repair
        with writing(storage.url, "the teacher's head"):
            storage.put(wanted.head["file"], head_file)
    return CacheWriter(storage, existing, leftovers)


@contextlib.contextmanager
def writing(url: str, what: str) -> Iterator[None]:
    """Say of which cache it is that `what` cannot be written, and what to do; for writing into it.

    Raises:
        CacheError: in place of an OSError, but for a FileExistsError, which is an answer.
    """
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        place = f": {error.filename}" if error.filename and TEMPORARY not in str(error.filename) else ""
        raise CacheError(
            f"{url}: {what} cannot be written ({error.strerror or error}{place}). Nothing half-written is left: mend "
            "that, and run the same command again."
        ) from error


def _as_units_are(storage: Storage, wanted: Manifest) -> Manifest:
    """`wanted` in the version of the units that are there: where a manifest was lost, the same one takes its place.

    Raises:
        CacheMismatchError: units of another one.
    """
    versions = [dataclasses.replace(wanted, format_version=version) for version in range(FORMAT_VERSION, 0, -1)]
    for unit in Cache(storage, wanted).units:
        mismatch: CacheMismatchError | None = None
        for manifest in versions:
            try:
                Cache(storage, manifest).record(*unit)
            except CacheMismatchError as error:
                mismatch = mismatch or error
            except CacheError:
                mismatch = None  # damaged: says nothing
                break
            else:
                return manifest
        if mismatch is not None:
            raise CacheMismatchError(
                f"{storage.url}: found units without {MANIFEST_PATH}, and this run would not make the one that they "
                f"belong to ({mismatch}). Restore {MANIFEST_PATH}, use the same settings, data and library versions as "
                "before, or another --cache."
            ) from mismatch
    return wanted


def describe_head(head: Mapping[str, torch.Tensor] | None) -> tuple[dict[str, Any] | None, bytes]:
    """The manifest's `head` entry and the bytes of the head's file; (None, b"") without a head.

    The file's name carries its content's hash, so that a process that loses the race for the manifest cannot have
    replaced the winner's head.
    """
    if head is None:
        return None, b""
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in sorted(head.items())}
    data: bytes = safetensors.torch.save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    return {"file": f"head-{digest[:16]}.safetensors", "sha256": digest}, data


def check_same(url: str, existing: Manifest, wanted: Manifest) -> None:
    """Compare the fingerprinted parts of two manifests; the version of the format is the existing one's to choose.

    Raises:
        CacheMismatchError: they differ; lists the fields with both values.
    """
    wanted = dataclasses.replace(wanted, format_version=existing.format_version)
    differences = manifest_differences(existing, wanted)
    if not differences:
        return
    lines = [f"  {path}: {_shown(old)} in the cache, {_shown(new)} asked for" for path, old, new in differences]
    if len(lines) > _SHOWN_DIFFERENCES:
        lines[_SHOWN_DIFFERENCES:] = [f"  and {len(lines) - _SHOWN_DIFFERENCES} more fields"]
    converted = any(path.endswith(".passed") for path, _, _ in differences)
    raise CacheMismatchError(
        f"{url}: made from something else than this run asks for:\n" + "\n".join(lines) + "\n"
        + ("Its values were converted from a lossy type (passed), which no teacher's are. " if converted else "")
        + "Use another cache, or the same settings, data and library versions."
    )


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)) and (len(value) > 8 or any(len(str(entry)) >= 32 for entry in value)):
        return f"{len(value)} entries"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
