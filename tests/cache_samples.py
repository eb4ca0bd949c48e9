"""Small units and manifests, drawn from a seed, for the tests of the cache."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from vkd_cache.cache.codecs import Array
from vkd_cache.cache.reader import open_cache
from vkd_cache.cache.schema import Manifest, NodeSpec
from vkd_cache.cache.units import UnitId, keys_to_columns, pack_unit, record_path, unit_path, unpack_unit
from vkd_cache.tokens import Tokens

NUM_SHARDS = 3
SHARD_COUNT = 7


def unit_file(root: Path, shard: int, view: int = 0) -> Path:
    """The file of a published unit."""
    return root / open_cache(str(root)).record(shard, view).files[0][0]


def replace_unit(root: Path, data: bytes, shard: int = 0, view: int = 0) -> None:
    """Publish other bytes as a unit's file: with the record, name and checksum that belong to them."""
    cache = open_cache(str(root))
    digest = xxhash.xxh3_128_hexdigest(data)
    path = unit_path(UnitId(shard, view), cache.manifest.backend, digest)
    record = dataclasses.replace(cache.record(shard, view), files=((path, len(data), digest),))
    unit_file(root, shard, view).unlink()
    (root / path).write_bytes(data)
    (root / record_path(UnitId(shard, view))).write_bytes(record.to_bytes())


def make_manifest(**changes: Any) -> Manifest:
    """A manifest of 3 shards of 7 samples, one pooled node of 5 channels."""
    fields: dict[str, Any] = {
        "dataset": {
            "kind": "tar",
            "num_classes": 10,
            "shard_counts": [SHARD_COUNT] * NUM_SHARDS,
            "shard_hashes": ["a1", "b2", "c3"],
        },
        "recipe": {"name": "vkd", "size_px": 224, "scale": [0.08, 1.0]},
        "seed": 17,
        "nodes": (make_node("float16"),),
        "teacher": {"name": "regnety_160", "weights_sha256": "3f2a", "mean": [0.5, 0.5, 0.5]},
        "head": None,
        "numerics": {"device": "cpu", "autocast": "off", "batch_size": 64},
        "versions": {"torch": "2.5.0", "timm": "1.0.15", "pillow": "11.0", "libjpeg": "3.0", "numpy": "2.0"},
        "backend": "zarr",
        "block_samples": 0,
    } | changes
    if fields["backend"] == "webdataset" and "block_samples" not in changes:
        fields["block_samples"] = 3
    return Manifest(**fields)


def make_node(codec: str, name: str = "pooled", shape: tuple[int, ...] = (5,)) -> NodeSpec:
    """A node of a given codec; feature maps have three sizes."""
    layout = "feature_map" if len(shape) == 3 else "logits" if name == "logits" else "pooled"
    dtype = {"sqrt_uint4": "uint4"}.get(codec, "uint8" if codec.endswith("int8") else codec)
    return NodeSpec(name=name, layout=layout, shape=shape, dtype=dtype, codec=codec)


def make_columns(num_rows: int, *, seed: int = 0, num_ops: int = 2) -> dict[str, np.ndarray]:
    """Columns of rows 0..num_rows-1, mixed in pairs; an odd last row is alone."""
    rng = np.random.default_rng(seed)
    rows = np.arange(num_rows, dtype=np.uint32)
    partner = rows ^ np.uint32(1)
    if num_rows % 2:
        partner[-1] = rows[-1]
    pair = rows // 2
    alone = partner == rows
    return {
        **keys_to_columns([f"class_{row % 3}/{seed}-é{row}" for row in range(num_rows)]),
        "row": rows,
        "label": rng.integers(0, 10, num_rows).astype(np.uint32),
        "digest": rng.integers(0, 2**64, num_rows, np.uint64),
        "seed": rng.integers(0, 2**64, num_rows, np.uint64),
        "source_size": rng.integers(1, 5000, (num_rows, 2)).astype(np.uint32),
        "crop": rng.integers(0, 5000, (num_rows, 4)).astype(np.uint32),
        "flip": rng.integers(0, 2, num_rows).astype(np.uint8),
        "op_id": rng.integers(0, 20, (num_rows, num_ops)).astype(np.uint8),
        "op_value": rng.standard_normal((num_rows, num_ops)).astype(np.float32),
        "erase": rng.integers(0, 224, (num_rows, 4)).astype(np.uint16),
        "partner": partner,
        "mix_kind": np.where(alone, 0, 1 + pair % 2).astype(np.uint8),
        "mix_lambda": np.where(alone, 1.0, 1.0 / (2.0 + pair)).astype(np.float32),
        "mix_box": np.where(alone[:, None], 0, np.stack([pair] * 4, 1)).astype(np.uint16),
    }


def make_values(num_rows: int, shape: tuple[int, ...] = (5,), *, seed: int = 0) -> torch.Tensor:
    """Values like those after a ReLU: half of a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((num_rows, *shape), generator=generator).abs()


def make_token_node(codec: str, name: str = "patch_1", width: int = 5, tokens: float = 1.0) -> NodeSpec:
    """A node of tokens of a given codec."""
    dtype = "int8" if codec == "token_int8" else codec
    return NodeSpec(name=name, layout="tokens", shape=(width,), dtype=dtype, codec=codec, tokens=tokens)


def make_tokens(grid: Any, width: int = 5, *, share: float = 1.0, seed: int = 0) -> Tokens:
    """Normal tokens of images with these (height, width) grids, all of them or a sample."""
    sizes = np.array(grid, np.int64).reshape(-1, 2)
    counts = sizes[:, 0] * sizes[:, 1]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(int(counts.sum()), width, generator=generator)
    parts = values.split(counts.tolist())
    ends = np.concatenate([[0], np.cumsum(counts)])
    tokens = Tokens(
        values=values,
        grid=sizes,
        offsets=ends.astype(np.int64),
        total=torch.stack([part.sum(0) for part in parts]) if parts else torch.zeros(0, width),
        squares=torch.stack([part.square().sum(0) for part in parts]) if parts else torch.zeros(0, width),
    )
    if share == 1:
        return tokens
    rng = np.random.default_rng(seed)
    places = [np.sort(rng.permutation(count)[: max(1, math.ceil(share * count))]) for count in counts.tolist()]
    kept = np.array([len(part) for part in places], np.int64)
    return tokens.sampled(np.concatenate([np.zeros(0, np.int64), *places]), kept)


def make_detection_columns(num_rows: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Columns of unmixed detection views, with their sizes."""
    columns = make_columns(num_rows, seed=seed, num_ops=0)
    rng = np.random.default_rng(seed)
    return columns | {
        "label": rng.integers(0, 2**32, num_rows).astype(np.uint32),
        "view_size": rng.integers(1, 1333, (num_rows, 2)).astype(np.uint16),
        "partner": columns["row"],
        "mix_kind": np.zeros(num_rows, np.uint8),
        "mix_lambda": np.ones(num_rows, np.float32),
        "mix_box": np.zeros((num_rows, 4), np.uint16),
    }


def packs_exactly(columns: dict[str, Array], manifest: Manifest) -> dict[str, Array]:
    """What comes out of a packed unit, once it is what went in and the bytes do not depend on the columns' order."""
    data = pack_unit(columns, manifest)
    assert data == pack_unit(dict(reversed(columns.items())), manifest)
    found = unpack_unit(data, manifest)
    assert found.keys() == columns.keys()
    for name, column in columns.items():
        assert found[name].dtype == column.dtype
        np.testing.assert_array_equal(found[name], column)
    return found
