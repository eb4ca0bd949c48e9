"""What a cache says about itself: its manifest, its nodes and one record per published unit.

A newcomer's trap: nothing here may depend on the time, the machine or how the job was split, because two extractions
of the same thing have to end in the same bytes. How many views there are is what the records say, not the manifest.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

from vkd_cache.cache.documents import (
    FIRST_VERSION,
    FORMAT_VERSION,
    Fields,
    canonical,
    check_version,
    seal,
    unseal,
)
from vkd_cache.cache.pixel_codecs import PixelSpec
from vkd_cache.errors import CacheFormatError

LAYOUTS = ("pooled", "logits", "feature_map", "tokens")
DTYPES = ("auto", "float32", "float16", "bfloat16", "uint8", "uint4", "int8")
BY_VALUE = ("auto", "uint8", "uint4")  # dtypes whose codec depends on the values, if only on their signs
CODEC_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "sqrt_uint8": 1, "sqrt_uint4": 0.5, "token_int8": 1}
CODECS = tuple(CODEC_BYTES)
UNIT_SCALED = ("sqrt_uint8", "sqrt_uint4")  # by channel, over all rows of a unit
BACKENDS = ("zarr", "webdataset")

# Libraries whose version changes a pixel or a feature; the others are noted and may differ.
FINGERPRINTED_VERSIONS = ("libjpeg", "pillow", "simplejpeg", "timm", "torch")

# Far beyond any network, small enough that a hostile manifest cannot ask for absurd memory.
MAX_ELEMENTS = 2**28
MAX_WIDTHS = {"pooled": 2**16, "tokens": 2**16, "logits": 2**20}  # a student has a projector as wide as its teacher
MAX_BLOCK_SAMPLES = 2**20
BLOCK_SAMPLES = 1024  # where nobody asks for another number
MAX_SHARDS = 2**20
NODE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeSpec:
    """A tapped teacher output and how it is stored.

    Attributes:
        name: lower-case letters, digits and `_`; columns `node.<name>` and, for integer codecs, `node.<name>.scale`.
        layout: `pooled` (C,), `logits` (K,), `feature_map` (C, H, W), or ragged `tokens` (C,).
        shape: of one sample; of one token.
        dtype: what the user asked for.
        codec: how it is stored; see `vkd_cache.cache.codecs`.
        tokens: share of each image's tokens that is stored, in (0, 1]; 1.0 for the other layouts.
        passed: lossy codecs that the values went through before this one, in order, by conversion of a cache.
        measured: effect of the codec on the first unit, by name, for dtypes `auto` and `uint4`; not in the fingerprint.
    """

    name: str
    layout: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    tokens: float = 1.0
    passed: tuple[str, ...] = ()
    measured: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample before compression; what a unit stores once is not counted, and neither are tokens."""
        if self.layout == "tokens":  # offset, grid, sum, sum of squares
            return 4 + 4 + 8 * self.shape[0]
        return self._value_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one stored token; 0 for the other layouts."""
        if self.layout != "tokens":
            return 0
        return self._value_bytes + (4 if self.tokens < 1 else 0)

    @property
    def _value_bytes(self) -> int:
        places = math.prod(self.shape[1:])
        values = math.ceil(self.shape[0] * CODEC_BYTES[self.codec]) * places
        return values + 4 * places if self.codec == "token_int8" else values

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        body: dict[str, Any] = {
            "name": self.name,
            "layout": self.layout,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "codec": self.codec,
            "measured": dict(self.measured),
        }
        if self.layout == "tokens":
            body["tokens"] = float(self.tokens)
        if self.passed:
            body["passed"] = list(self.passed)
        return body

    @classmethod
    def from_json(cls, body: object, where: str, path: str = "node.") -> "NodeSpec":
        """Inverse of `to_json`.

        Raises:
            CacheFormatError: a field is missing, of the wrong type or out of range.
        """
        fields = Fields(body, where, path)
        name = fields.text("name")
        if not NODE_NAME.fullmatch(name):
            raise fields.refuse("name", "a name of lower-case letters, digits and '_', at most 64 characters")
        layout = fields.text("layout", LAYOUTS)
        shape = fields.wholes("shape", 1, MAX_ELEMENTS)
        num_axes = 3 if layout == "feature_map" else 1
        most = MAX_WIDTHS.get(layout, MAX_ELEMENTS)
        if len(shape) != num_axes or math.prod(shape) > most:
            raise fields.refuse("shape", f"{num_axes} sizes with a product of at most {most}")
        measured = fields.object("measured") if "measured" in fields.body else {}
        if not all(isinstance(value, (int, float)) for value in measured.values()):
            raise fields.refuse("measured", "numbers by name")
        codec = fields.text("codec", CODECS)
        if layout == "tokens" and codec in UNIT_SCALED:
            raise fields.refuse("codec", f"none of {', '.join(UNIT_SCALED)}, whose scales belong to dense channels")
        return cls(
            name=name,
            layout=layout,
            shape=shape,
            dtype=fields.text("dtype", DTYPES),
            codec=codec,
            tokens=_checked_share(fields) if layout == "tokens" else 1.0,
            passed=_checked_passed(fields),
            measured=measured,
        )


def _checked_passed(fields: Fields) -> tuple[str, ...]:
    passed = fields.entries("passed", 16) if "passed" in fields.body else []
    if not all(codec in CODECS for codec in passed):
        raise fields.refuse("passed", f"a list of {', '.join(CODECS)}")
    return tuple(passed)


def _checked_share(fields: Fields) -> float:
    share = fields.body.get("tokens")
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise fields.refuse("tokens", "a number above 0 and at most 1")
    return float(share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a cache was made from. Everything in it is plain JSON.

    Attributes:
        dataset: `kind`, `num_classes`, `shard_counts`, `shard_hashes` of the source's identity.
        recipe: the view recipe.
        seed: the cache seed, in [0, 2**63).
        nodes: what is stored per sample.
        teacher: the teacher's identity.
        head: `file` and `sha256` of the stored linear head, or None.
        numerics: device type, autocast dtype, TF32, memory format and batch size of the teacher's run.
        versions: of the libraries; only those of FINGERPRINTED_VERSIONS have to match.
        backend: `zarr` or `webdataset`.
        block_samples: samples per tar member of the webdataset backend; 0 with zarr, which has no blocks.
        pixels: how the views' pixels are stored beside the nodes; None, and then not in the JSON form: not at all.
        format_version: from 2 on the columns of a unit but those of its nodes are packed.
    """

    dataset: dict[str, Any]
    recipe: dict[str, Any]
    seed: int
    nodes: tuple[NodeSpec, ...]
    teacher: dict[str, Any]
    head: dict[str, Any] | None
    numerics: dict[str, Any]
    versions: dict[str, str]
    backend: str = "zarr"
    block_samples: int = 0
    pixels: PixelSpec | None = None
    format_version: int = FORMAT_VERSION

    @property
    def packs_columns(self) -> bool:
        """Whether the columns that describe the rows of a unit are packed in one array."""
        return self.format_version >= 2

    @property
    def num_shards(self) -> int:
        """Shards of the data set."""
        return len(self.dataset["shard_counts"])

    def node(self, name: str) -> NodeSpec:
        """The node called `name`.

        Raises:
            CacheFormatError: there is none; the message lists those there are.
        """
        for spec in self.nodes:
            if spec.name == name:
                return spec
        raise CacheFormatError(
            f"node '{name}' is not in this cache: found {', '.join(spec.name for spec in self.nodes)}. "
            "Ask for one of these, or extract the node into another cache."
        )

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        body = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "pixels"}
        body |= {"pixels": self.pixels.to_json()} if self.pixels is not None else {}
        return {**body, "nodes": [spec.to_json() for spec in self.nodes]}

    @classmethod
    def from_json(cls, body: object, where: str = "manifest.json") -> "Manifest":
        """Inverse of `to_json`; unknown fields are tolerated.

        Raises:
            CacheFormatError: another format version, or a field that is missing, of the wrong type or out of range.
        """
        fields = Fields(body, where)
        check_version(fields.body, where)
        entries = fields.entries("nodes", 1024)
        nodes = tuple(NodeSpec.from_json(entry, where, f"nodes[{i}].") for i, entry in enumerate(entries))
        if not nodes or len({spec.name for spec in nodes}) != len(nodes):
            raise fields.refuse("nodes", "at least one node, each with its own name")
        return cls(
            dataset=_checked_dataset(fields.object("dataset"), where),
            recipe=fields.object("recipe"),
            seed=fields.whole("seed"),
            nodes=nodes,
            teacher=fields.object("teacher"),
            head=_checked_head(fields, where),
            numerics=fields.object("numerics"),
            versions=_checked_versions(fields),
            backend=fields.text("backend", BACKENDS),
            block_samples=_checked_block(fields),
            pixels=PixelSpec.from_json(fields.body["pixels"], where) if "pixels" in fields.body else None,
            format_version=fields.whole("format_version", FIRST_VERSION, FORMAT_VERSION),
        )

    def fingerprinted(self) -> dict[str, Any]:
        """The part of the manifest that has to match for units to belong together."""
        body = self.to_json()
        body["nodes"] = {
            spec.name: {key: value for key, value in spec.to_json().items() if key not in ("name", "measured")}
            for spec in self.nodes
        }
        body["node_order"] = [spec.name for spec in self.nodes]
        body["numerics"] = {name: value for name, value in self.numerics.items() if name != "batch_size"}
        body["versions"] = {name: value for name, value in self.versions.items() if name in FINGERPRINTED_VERSIONS}
        return body

    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of the canonical bytes of `fingerprinted()`."""
        return hashlib.sha256(canonical(self.fingerprinted())).hexdigest()


def _checked_dataset(dataset: dict[str, Any], where: str) -> dict[str, Any]:
    fields = Fields(dataset, where, "dataset.")
    fields.text("kind")
    fields.whole("num_classes", 1, 2**32 - 1)
    counts = fields.wholes("shard_counts", 0, 2**32 - 1)
    hashes = fields.entries("shard_hashes", MAX_SHARDS)
    if len(hashes) != len(counts) or not all(isinstance(entry, str) for entry in hashes):
        raise fields.refuse("shard_hashes", f"{len(counts)} strings, one for each of shard_counts")
    return dataset


def _checked_block(fields: Fields) -> int:
    smallest = 0 if fields.text("backend") == "zarr" else 1
    return fields.whole("block_samples", smallest, MAX_BLOCK_SAMPLES)


def _checked_versions(fields: Fields) -> dict[str, str]:
    versions = fields.object("versions")
    if not all(isinstance(version, str) for version in versions.values()):
        raise fields.refuse("versions", "a string for each library")
    return versions


def _checked_head(fields: Fields, where: str) -> dict[str, Any] | None:
    if fields.body.get("head") is None:
        return None
    head = Fields(fields.object("head"), where, "head.")
    if not re.fullmatch(r"head-[0-9a-f]{16}\.safetensors", head.text("file")):
        raise head.refuse("file", "head-<16 hexadecimal digits>.safetensors")
    if not re.fullmatch(r"[0-9a-f]{64}", head.text("sha256")):
        raise head.refuse("sha256", "64 hexadecimal digits")
    return head.body


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """One published unit (shard, view): it is published when its record exists, and not before.

    Attributes:
        shard: number of the shard, from 0.
        view: number of the view, from 0.
        num_samples: rows stored, broken images not counted.
        broken: (key, row in the source shard, reason) of each image that could not be decoded, in row order.
        files: (path from the cache's root, bytes, xxh3_128 hexadecimal) of every file of the unit.
        fingerprint: of the cache's manifest.
        origin: what the unit was converted from, JSON values, see docs/format.md; None: the teacher made it.
    """

    shard: int
    view: int
    num_samples: int
    broken: tuple[tuple[str, int, str], ...]
    files: tuple[tuple[str, int, str], ...]
    fingerprint: str
    origin: Mapping[str, Any] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the unit's files."""
        return sum(size for _, size, _ in self.files)

    @property
    def planned_in(self) -> tuple[int, ...]:
        """Samples, broken ones included, of each group of rows that mixing was planned in; empty: all rows are one."""
        return tuple(self.origin.get("planned_in", ())) if self.origin is not None else ()

    def to_bytes(self) -> bytes:
        """As the document that is stored."""
        return seal(
            {
                "format_version": FIRST_VERSION,  # nothing in a record has changed since
                "shard": self.shard,
                "view": self.view,
                "num_samples": self.num_samples,
                "broken": [{"key": key, "row": row, "reason": reason} for key, row, reason in self.broken],
                "files": [{"path": path, "bytes": size, "xxh3_128": digest} for path, size, digest in self.files],
                "fingerprint": self.fingerprint,
                **({"origin": dict(self.origin)} if self.origin is not None else {}),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "UnitRecord":
        """Inverse of `to_bytes`; unknown fields are tolerated.

        Raises:
            CacheFormatError: not a record, or one of another format version.
            CorruptCacheError: changed since it was written.
        """
        fields = Fields(unseal(data, where), where)
        return cls(
            shard=fields.whole("shard"),
            view=fields.whole("view"),
            num_samples=fields.whole("num_samples", 0, 2**32 - 1),
            broken=tuple(
                _entry(entry, where, f"broken[{index}].", ("key", "row", "reason"))
                for index, entry in enumerate(fields.entries("broken"))
            ),
            files=tuple(
                _file_entry(entry, where, f"files[{index}].")
                for index, entry in enumerate(fields.entries("files"))
            ),
            fingerprint=fields.text("fingerprint"),
            origin=_checked_origin(fields),
        )


def _checked_origin(fields: Fields) -> dict[str, Any] | None:
    if "origin" not in fields.body:
        return None
    origin = Fields(fields.object("origin"), fields.where, "origin.")
    if "planned_in" in origin.body:
        origin.wholes("planned_in", 1, 2**32 - 1)
    return origin.body


def _file_entry(body: Any, where: str, path: str) -> tuple[str, int, str]:
    entry = _entry(body, where, path, ("path", "bytes", "xxh3_128"))
    if not re.fullmatch(r"[0-9a-f]{32}", entry[2]):  # it becomes part of a path
        raise Fields(body, where, path).refuse("xxh3_128", "32 hexadecimal digits")
    return entry


def _entry(body: Any, where: str, path: str, names: tuple[str, str, str]) -> tuple[str, int, str]:
    fields = Fields(body, where, path)
    return fields.text(names[0]), fields.whole(names[1]), fields.text(names[2])
