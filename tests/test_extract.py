"""Extraction in one process: what is stored, what is left alone, and whom an error stops."""

import dataclasses
import itertools
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import extract_jobs
import numpy as np
import pytest
import torch
from cache_samples import unit_file
from conftest import NUM_TRAIN, SHARD_SIZE
from extract_jobs import contents
from PIL import Image

from vkd_cache.cache.reader import Cache, open_cache
from vkd_cache.cache.schema import NodeSpec
from vkd_cache.cache.units import UnitId, record_path
from vkd_cache.cache.writer import create_cache
from vkd_cache.config import Config
from vkd_cache.errors import CacheError, CacheMismatchError, ConfigError, SourceError, TeacherError
from vkd_cache.runtime import JobSplit, job_split
from vkd_cache.sources import open_source
from vkd_cache.stages.extract import extract
from vkd_cache.stages.extract_job import ExtractSummary
from vkd_cache.stages.rendering import Renderer
from vkd_cache.stages.units import UnitAssembly, unit_tasks
from vkd_cache.views.recipe import make_recipe

MakeConfig = Callable[..., Config]
NUM_SHARDS = 5
SLURM = ("ID", "MIN", "MAX", "COUNT")


@pytest.fixture
def tree(digits_tree: Path, tmp_path: Path) -> Path:
    """The training digits, to be damaged."""
    return shutil.copytree(digits_tree / "train", tmp_path / "digits")


@pytest.fixture
def make(tiny_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """`tiny_config` with a cache in this test's folder."""

    def build(**sections: dict[str, object]) -> Config:
        cache = {"url": str(tmp_path / "cache")} | sections.pop("cache", {})
        return tiny_config(cache=cache, **sections)

    return build


def run(config: Config, split: JobSplit = JobSplit()) -> ExtractSummary:  # noqa: B008 - frozen
    return extract(config, split)


def opened(config: Config) -> Cache:
    return open_cache(config.cache.url)


def path_of(tree: Path, key: str) -> Path:
    return tree / f"{key}.jpg"


def keys_of(config: Config, shard: int) -> tuple[str, ...]:
    return open_source(config.source.train, shard_size=config.source.shard_size).shards[shard].keys


def whiten(tree: Path, key: str) -> None:
    with Image.open(path_of(tree, key)) as image:
        size = image.size
    Image.new("RGB", size, "white").save(path_of(tree, key), "JPEG")


def ruin(folder: Path) -> None:
    """Make every image of a folder impossible to decode, its size and name unchanged."""
    for path in folder.rglob("*.jpg"):
        path.write_bytes(bytes(len(path.read_bytes())))


# ---------------------------------------------------------------------------------------------- any way, the same cache


@pytest.fixture(scope="module")
def reference(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The cache of two views by backend, made by one uninterrupted run."""
    found = {}
    for backend in ("zarr", "webdataset"):
        url = tmp_path_factory.mktemp("reference") / "cache"
        run(tiny_config(cache={"url": str(url), "backend": backend, "dtype": "auto"}, views={"count": "2"}))
        found[backend] = contents(url)
    return found


BACKENDS = pytest.mark.parametrize("backend", ["zarr", "webdataset"])


@BACKENDS
def test_shares_in_any_order_give_the_same_bytes(
    make: MakeConfig, tmp_path: Path, backend: str, reference: dict[str, dict[str, bytes]]
) -> None:
    config = make(cache={"backend": backend, "dtype": "auto"}, views={"count": "2"})
    published = [run(config, JobSplit(index=index, count=4)).units_published for index in (2, 0, 3, 1)]
    assert published == [2, 3, 2, 3]
    assert contents(tmp_path / "cache") == reference[backend]


@BACKENDS
def test_views_added_later_give_the_same_bytes(
    make: MakeConfig, tmp_path: Path, backend: str, reference: dict[str, dict[str, bytes]]
) -> None:
    config = make(cache={"backend": backend, "dtype": "auto"}, views={"count": "1:2"})
    assert run(config).units_published == NUM_SHARDS
    assert opened(config).published() == {1: frozenset(range(NUM_SHARDS))}
    summary = run(make(cache={"backend": backend, "dtype": "auto"}, views={"count": "2"}))
    assert (summary.units_published, summary.units_skipped) == (NUM_SHARDS, NUM_SHARDS)
    assert contents(tmp_path / "cache") == reference[backend]


@pytest.mark.parametrize(
    "environments",
    [
        [{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} for rank in (0, 1)],
        [
            {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in zip(SLURM, task, strict=True)}
            for task in ((5, 1, 5, 3), (1, 1, 5, 3), (3, 1, 5, 3))
        ],
    ],
    ids=["torchrun", "slurm"],
)
def test_shares_from_the_environment(
    make: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environments: list[dict[str, str]],
    reference: dict[str, dict[str, bytes]],
) -> None:
    published = 0
    for environment in environments:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        published += run(make(cache={"dtype": "auto"}, views={"count": "2"}), job_split()).units_published
    assert published == 2 * NUM_SHARDS
    assert contents(tmp_path / "cache") == reference["zarr"]


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_same_bytes(
    make: MakeConfig, tmp_path: Path, workers: int, reference: dict[str, dict[str, bytes]]
) -> None:
    run(make(extract={"workers": workers}, cache={"dtype": "auto"}, views={"count": "2"}))
    assert contents(tmp_path / "cache") == reference["zarr"]


def test_tars_and_a_batch_larger_than_a_shard(make: MakeConfig, digits_tars: Path) -> None:
    source = {"train": str(digits_tars / "train-{00000..00004}.tar")}
    small = make(source=source, cache={"dtype": "float32"})
    large = make(source=source, cache={"dtype": "float32", "url": small.cache.url + "-2"}, extract={"batch_size": 128})
    assert run(small).samples == run(large).samples == NUM_TRAIN
    for shard in range(NUM_SHARDS):
        one, other = opened(small).read(shard, 0), opened(large).read(shard, 0)
        assert one.keys == other.keys
        assert np.array_equal(one.columns["digest"], other.columns["digest"])
        torch.testing.assert_close(one.node("pooled"), other.node("pooled"), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- resuming


def test_a_finished_job_reads_no_image_and_runs_no_teacher(make: MakeConfig, tree: Path, tmp_path: Path) -> None:
    config = make(
        source={"train": str(tree)}, teacher={"name": "extract_jobs:colours", "weights": ""}, cache={"dtype": "auto"}
    )
    run(config)
    before = contents(tmp_path / "cache")
    ruin(tree)
    extract_jobs.FORWARDS.clear()
    summary = run(config)
    assert (summary.units_published, summary.units_skipped, summary.exit_code) == (0, NUM_SHARDS, 0)
    assert config.extract.batch_size not in extract_jobs.FORWARDS  # the head's check on four images of noise is all
    assert contents(tmp_path / "cache") == before


def test_a_resumed_job_decodes_nothing_that_is_published(make: MakeConfig, tree: Path, tmp_path: Path) -> None:
    config = make(source={"train": str(tree)}, views={"count": "2"}, cache={"dtype": "auto"})
    run(config)
    before = contents(tmp_path / "cache")
    unit_file(tmp_path / "cache", 3, 1).write_bytes(b"half a unit")
    for unit in (UnitId(3, 0), UnitId(3, 1)):
        (tmp_path / "cache" / record_path(unit)).unlink()
    kept = {key: path_of(tree, key).read_bytes() for key in keys_of(config, 3)}
    ruin(tree)
    for key, data in kept.items():
        path_of(tree, key).write_bytes(data)
    summary = run(config)
    assert (summary.units_published, summary.units_skipped, summary.broken) == (2, 2 * NUM_SHARDS - 2, ())
    assert contents(tmp_path / "cache") == before


CHANGES: dict[str, tuple[dict[str, dict[str, object]], str]] = {
    "seed": ({"views": {"seed": 6}}, "seed: 5 in the cache, 6 asked for"),
    "recipe": ({"views": {"recipe": "none"}}, "recipe.name: 'vkd' in the cache, 'none' asked for"),
    "size": ({"views": {"size_px": 40}}, "recipe.size_px: 32 in the cache, 40 asked for"),
    "mixing": ({"views": {"mix_probability": 0.5}}, "recipe.mix_probability: 1.0 in the cache, 0.5 asked for"),
    "dtype": ({"cache": {"dtype": "bfloat16"}}, "nodes.pooled.dtype: 'float16' in the cache, 'bfloat16' asked for"),
    "auto": ({"cache": {"dtype": "auto"}}, "nodes.pooled.dtype: 'float16' in the cache, 'auto' asked for"),
    "uint8": ({"cache": {"dtype": "uint8"}}, "nodes.pooled.dtype: 'float16' in the cache, 'uint8' asked for"),
    "nodes": ({"cache": {"nodes": ("pooled", "logits")}}, "nodes.logits: None in the cache, {"),
    "backend": ({"cache": {"backend": "webdataset"}}, "backend: 'zarr' in the cache, 'webdataset' asked for"),
    "shards": ({"source": {"shard_size": 50}}, "dataset.shard_counts[0]: 48 in the cache, 50 asked for"),
    "autocast": ({"extract": {"autocast": "bfloat16"}}, "numerics.autocast: 'off' in the cache, 'bfloat16' asked for"),
    "layout": ({"extract": {"channels_last": True}}, "numerics.channels_last: False in the cache, True asked for"),
    "input": ({"teacher": {"input_px": 48}}, "teacher.input_px: 32 in the cache, 48 asked for"),
    "teacher": (
        {"teacher": {"name": "extract_jobs:colours", "weights": ""}},
        "teacher.name: 'test_resnet' in the cache, 'extract_jobs:colours' asked for",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_of_the_fingerprint_is_refused(
    make: MakeConfig, small_cache: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(small_cache, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    changes, expected = CHANGES[name]
    with pytest.raises(CacheMismatchError) as refused:
        run(make(**changes))
    assert expected in str(refused.value)
    assert "Use another cache" in str(refused.value)
    assert contents(tmp_path / "cache") == before


def test_other_weights_images_and_libraries_are_refused(
    make: MakeConfig, small_cache: Path, tree: Path, teacher_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_cache, tmp_path / "cache")
    state = torch.load(teacher_file, weights_only=True)
    state["fc.bias"] += 1
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(CacheMismatchError, match=r"teacher\.weights_sha256: '\w+' in the cache, '\w+' asked for"):
        run(make(teacher={"weights": str(tmp_path / "other.pt")}))
    path_of(tree, keys_of(make(), 0)[0]).unlink()
    with pytest.raises(CacheMismatchError, match=r"dataset\.shard_hashes\[0\]: '\w+' in the cache, '\w+' asked for"):
        run(make(source={"train": str(tree)}))
    manifest = opened(make()).manifest
    old = dataclasses.replace(manifest, versions=manifest.versions | {"pillow": "1.0", "numpy": "1.0"})
    create_cache(str(tmp_path / "old"), old)
    with pytest.raises(CacheMismatchError, match=r"versions\.pillow: '1\.0' in the cache, '[\d.]+' asked") as refused:
        run(make(cache={"url": str(tmp_path / "old")}))
    assert "versions.numpy" not in str(refused.value)


def test_a_cache_keeps_its_blocks_and_its_version(make: MakeConfig, tmp_path: Path) -> None:
    """Where nobody asks for others: those of a cache that an older release began."""
    blocks = {"backend": "webdataset", "dtype": "uint8"}
    run(make(cache=blocks | {"block_samples": 20}))
    made = opened(make()).manifest
    create_cache(str(tmp_path / "old"), dataclasses.replace(made, format_version=1), opened_head(make()))
    old = {"url": str(tmp_path / "old")} | blocks
    assert run(make(cache=old)).units_published == NUM_SHARDS
    assert opened(make(cache=old)).manifest == dataclasses.replace(made, format_version=1)
    with pytest.raises(CacheMismatchError, match="block_samples: 20 in the cache, 21 asked for"):
        run(make(cache=old | {"block_samples": 21}))


def opened_head(config: Config) -> dict[str, torch.Tensor]:
    return dict(zip(("weight", "bias"), opened(config).head() or (), strict=True))


# ---------------------------------------------------------------------------------------------------- dtypes and nodes


def test_auto_is_decided_alike_by_every_worker_and_recorded(make: MakeConfig, tmp_path: Path) -> None:
    documents = []
    for index in (0, 3):
        config = make(cache={"dtype": "auto", "url": str(tmp_path / f"cache-{index}")}, views={"count": "2"})
        run(config, JobSplit(index=index, count=4))
        documents.append((tmp_path / f"cache-{index}" / "manifest.json").read_bytes())
    assert documents[0] == documents[1]
    (node,) = opened(config).manifest.nodes
    assert (node.dtype, node.codec) == ("auto", "sqrt_uint8")
    assert node.measured.keys() == {"layer_norm_error", "feature_loss_change", "logit_loss_change"}
    assert 0 < node.measured["layer_norm_error"] < 0.01


def test_codecs_of_the_cache_are_kept_and_others_refused_without_measuring(
    make: MakeConfig, tree: Path
) -> None:
    config = make(source={"train": str(tree)}, cache={"dtype": "auto"})
    run(config, JobSplit(index=0, count=2))
    ruin(tree)
    extract_jobs.FORWARDS.clear()
    with pytest.raises(CacheMismatchError) as refused:  # measuring would have found nothing to decode
        run(make(source={"train": str(tree)}, cache={"dtype": "uint8"}))
    assert str(refused.value).count(" asked for") == 1
    assert run(config).exit_code == 0
    assert opened(config).manifest.nodes[0].dtype == "auto"


def test_dtypes_and_nodes_store_what_the_teacher_gives(make: MakeConfig, tmp_path: Path) -> None:
    nodes = ("pooled", "logits", "feature_map")
    codecs = {
        "float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "uint8": "sqrt_uint8",
        "uint4": "sqrt_uint4",
    }  # fmt: skip
    found = {}
    for dtype, codec in codecs.items():
        config = make(cache={"dtype": dtype, "nodes": nodes, "url": str(tmp_path / dtype)})
        run(config, JobSplit(index=0, count=NUM_SHARDS))
        manifest = opened(config).manifest
        assert [(node.name, node.dtype) for node in manifest.nodes] == [(name, dtype) for name in nodes]
        assert manifest.node("pooled").codec == codec
        assert manifest.node("logits").codec == ("token_int8" if dtype in ("uint8", "uint4") else codec)
        found[dtype] = opened(config).read(0, 0)
    exact = found["float32"]
    head = opened(config).head()
    assert head is not None
    torch.testing.assert_close(
        torch.nn.functional.linear(exact.node("pooled"), *head), exact.node("logits"), rtol=1e-4, atol=1e-4
    )
    assert exact.node("feature_map").ndim == 4
    torch.testing.assert_close(exact.node("feature_map").mean((2, 3)), exact.node("pooled"), rtol=1e-4, atol=1e-4)
    for dtype, name in itertools.product(codecs, nodes):
        difference = (found[dtype].node(name).float() - exact.node(name)).abs()
        assert (difference <= found[dtype].rounding(name) * 1.001 + 1e-6).all(), (dtype, name)


@pytest.mark.parametrize("autocast", ["float16", "bfloat16"])
def test_autocast_is_near_and_its_own_cache(make: MakeConfig, tmp_path: Path, autocast: str) -> None:
    plain = make(cache={"dtype": "float32"})
    cast = make(cache={"dtype": "float32", "url": str(tmp_path / "cast")}, extract={"autocast": autocast})
    run(plain, JobSplit(index=0, count=NUM_SHARDS))
    run(cast, JobSplit(index=0, count=NUM_SHARDS))
    one, other = (opened(config).read(0, 0).node("pooled") for config in (plain, cast))
    assert 0 < float((one - other).norm() / one.norm()) < 0.05


def test_logits_are_stored_where_no_matrix_gives_them(make: MakeConfig) -> None:
    config = make(teacher={"name": "extract_jobs:curved", "weights": ""}, cache={"dtype": "float32"})
    run(config, JobSplit(index=0, count=NUM_SHARDS))
    cache = opened(config)
    assert [node.name for node in cache.manifest.nodes] == ["pooled", "logits"]
    assert cache.manifest.head is None
    assert float(cache.read(0, 0).node("logits").abs().max()) <= 1.0


def test_a_teacher_with_another_input_sees_resized_views(make: MakeConfig, tmp_path: Path) -> None:
    config = make(teacher={"input_px": 48}, cache={"nodes": ("feature_map",)})
    run(config, JobSplit(index=0, count=NUM_SHARDS))
    native = make(cache={"nodes": ("feature_map",), "url": str(tmp_path / "native")})
    run(native, JobSplit(index=0, count=NUM_SHARDS))
    large, small = opened(config).manifest, opened(native).manifest
    assert (large.teacher["input_px"], small.teacher["input_px"]) == (48, 32)
    assert large.nodes[0].shape[1] > small.nodes[0].shape[1]
    one, other = opened(config).read(0, 0), opened(native).read(0, 0)
    assert np.array_equal(one.columns["digest"], other.columns["digest"])  # the views are the same


# -------------------------------------------------------------------------------------------------------- broken images


def test_a_broken_image_is_recorded_and_its_partner_unmixed(make: MakeConfig, tree: Path, tmp_path: Path) -> None:
    config = make(source={"train": str(tree)}, views={"count": "2"})
    run(config)
    whole = opened(config).read(1, 0)
    at = int(np.flatnonzero(whole.columns["mix_kind"])[3])
    key, partner = whole.keys[at], int(whole.columns["partner"][at])
    path_of(tree, key).write_bytes(b"\xff\xd8\xff torn")
    damaged = make(source={"train": str(tree)}, views={"count": "2"}, cache={"url": str(tmp_path / "damaged")})
    summary = run(damaged)
    assert (summary.exit_code, summary.samples) == (0, 2 * (NUM_TRAIN - 1))
    assert summary.broken == ((key, "JPEG data is truncated or damaged"),) or "JPEG" in summary.broken[0][1]
    record, unit = opened(damaged).record(1, 0), opened(damaged).read(1, 0)
    assert record.broken == ((key, at, summary.broken[0][1]),)
    assert key not in unit.keys
    alone = unit.keys.index(whole.keys[partner])
    assert unit.columns["partner"][alone] == partner
    assert (unit.columns["mix_kind"][alone], unit.columns["mix_lambda"][alone]) == (0, 1.0)
    others = [row for row in range(len(whole)) if row not in (at, partner)]
    for name, values in whole.columns.items():
        if name not in ("key_bytes", "key_offsets"):
            kept = np.flatnonzero(unit.rows != partner)
            assert np.array_equal(unit.columns[name][kept], values[others]), name
    assert torch.equal(unit.node("pooled")[np.flatnonzero(unit.rows != partner)], whole.node("pooled")[others])
    assert not torch.equal(unit.node("pooled")[alone], whole.node("pooled")[partner])


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_a_shard_of_broken_images_is_an_empty_unit(make: MakeConfig, tree: Path, dtype: str) -> None:
    config = make(source={"train": str(tree)}, cache={"dtype": dtype, "nodes": ("pooled", "feature_map")})
    for key in keys_of(config, 0):
        path_of(tree, key).write_bytes(b"")
    summary = run(config)
    assert (summary.exit_code, summary.units_published, len(summary.broken)) == (0, NUM_SHARDS, SHARD_SIZE)
    record, unit = opened(config).record(0, 0), opened(config).read(0, 0)
    assert (record.num_samples, len(record.broken), len(unit)) == (0, SHARD_SIZE, 0)
    assert unit.node("pooled").shape[0] == 0
    assert [row for _, row, _ in record.broken] == list(range(SHARD_SIZE))


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (2, 0)])
def test_images_that_break_between_views_are_no_broken_images(
    make: MakeConfig, tree: Path, first: int, second: int
) -> None:
    """A mount that is gone for an hour must not be recorded for good, whichever view was made before."""
    before, config = (
        make(source={"train": str(tree)}, views={"count": f"{view}:{view + 1}"}) for view in (first, second)
    )
    keys = keys_of(config, 1)
    path_of(tree, keys[2]).write_bytes(b"")  # from the beginning
    assert list(dict(run(before).broken)) == [keys[2]]
    whole = {key: path_of(tree, key).read_bytes() for key in keys[3:6]}
    for key in whole:
        path_of(tree, key).write_bytes(b"")
    summary = run(config)
    assert (summary.exit_code, summary.units_published) == (3, NUM_SHARDS - 1)
    (said,) = summary.units_failed
    assert said.startswith(f"shard 1, view {second}: 3 images cannot be decoded any more")
    assert f"'{keys[3]}': empty file" in said
    assert summary.broken == ()  # nothing was recorded
    for key, data in whole.items():
        path_of(tree, key).write_bytes(data)
    again = run(config)
    assert (again.units_published, list(dict(again.broken))) == (1, [keys[2]])
    assert opened(config).record(1, second).num_samples == len(keys) - 1


def test_nothing_but_broken_images_is_an_error_where_codecs_are_measured(make: MakeConfig, tree: Path) -> None:
    ruin(tree)
    with pytest.raises(SourceError, match="not one of its images can be decoded"):
        run(make(source={"train": str(tree)}, cache={"dtype": "auto"}))


def test_strict_stops_at_the_first_broken_image(make: MakeConfig, tree: Path) -> None:
    config = make(source={"train": str(tree)}, extract={"strict": True})
    key = keys_of(config, 2)[7]
    path_of(tree, key).write_bytes(b"not an image")
    with pytest.raises(SourceError, match=f"image of key '{key}' is broken: not a JPEG"):
        run(config)
    assert opened(config).published().get(0, frozenset()) <= {0, 1}


def test_a_teacher_of_other_classes_is_remarked(
    make: MakeConfig, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(make())
    assert "logits cannot teach" not in capsys.readouterr().err
    shutil.rmtree(max(tree.iterdir()))
    run(make(source={"train": str(tree)}, cache={"url": str(tree.parent / "other")}))
    assert "has 10 classes" in (said := capsys.readouterr().err) and "has 9" in said


def test_the_summary_counts_broken_images_once(
    make: MakeConfig, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(source={"train": str(tree)}, views={"count": "3"})
    keys = keys_of(config, 2)[:2]
    for key in keys:
        path_of(tree, key).write_bytes(b"")
    summary = run(config)
    assert summary.broken == tuple((key, "empty file") for key in sorted(keys))
    assert "2 broken images were recorded and skipped: " in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- units that fail


def white_config(make: MakeConfig, tree: Path, teacher: str, dtype: str) -> tuple[Config, str]:
    """One white image in shard 3, no mixing; the key of that image."""
    config = make(
        source={"train": str(tree)},
        views={"recipe": "crop_flip", "count": "2"},
        teacher={"name": f"extract_jobs:{teacher}", "weights": ""},
        cache={"dtype": dtype},
    )
    key = keys_of(config, 3)[20]
    whiten(tree, key)
    return config, key


@pytest.mark.parametrize(
    ("teacher", "dtype", "reason"),
    [
        ("blinded_by_white", "float32", "is not finite for 1 samples"),
        ("blinded_by_white", "auto", "is not finite for 1 samples"),
        ("large_on_white", "float16", "is not finite for 1 samples"),
        ("negative_on_white", "uint8", "is negative, which codec sqrt_uint8 cannot hold, for 1 samples"),
    ],
)
def test_features_that_cannot_be_stored_fail_their_unit_alone(
    make: MakeConfig, tree: Path, teacher: str, dtype: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, key = white_config(make, tree, teacher, dtype)
    summary = run(config)
    assert summary.exit_code == 3
    assert summary.units_published == 2 * NUM_SHARDS - 2
    for view, message in enumerate(summary.units_failed):
        assert message.startswith(f"shard 3, view {view}: node 'pooled' {reason}, first key '{key}'.")
    assert 3 not in opened(config).published()[0] | opened(config).published()[1]
    assert "2 units failed. The same command again makes what is missing." in capsys.readouterr().err
    assert run(config).units_skipped == 2 * NUM_SHARDS - 2


def test_features_that_are_never_finite_are_an_error_where_codecs_are_measured(make: MakeConfig, tree: Path) -> None:
    config, _ = white_config(make, tree, "blinded_by_white", "auto")
    for shard in range(NUM_SHARDS):
        for key in keys_of(config, shard):
            whiten(tree, key)
    with pytest.raises(TeacherError, match="not finite"):
        run(config)


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_a_file_that_vanishes_fails_its_unit_alone(make: MakeConfig, tree: Path, dtype: str) -> None:
    config = make(
        source={"train": str(tree)}, teacher={"name": "extract_jobs:colours", "weights": ""}, cache={"dtype": dtype}
    )
    key = keys_of(config, 0)[5]
    data = path_of(tree, key).read_bytes()
    extract_jobs.VANISHING.append(path_of(tree, key))
    try:
        summary = run(config)
    finally:
        extract_jobs.VANISHING.clear()
    assert (summary.exit_code, summary.units_published) == (3, NUM_SHARDS - 1)
    assert summary.units_failed[0].startswith("shard 0, view 0: ")
    assert f"{key}.jpg: cannot be read" in summary.units_failed[0]
    path_of(tree, key).write_bytes(data)
    again = run(config)
    assert (again.exit_code, again.units_published, again.units_skipped) == (0, 1, NUM_SHARDS - 1)


def test_a_cache_that_cannot_be_written_stops_the_job(make: MakeConfig, tmp_path: Path) -> None:
    config = make(views={"count": "50"}, teacher={"name": "extract_jobs:colours", "weights": ""})
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "units").write_text("in the way")
    extract_jobs.FORWARDS.clear()
    with pytest.raises(CacheError, match="shard 0 of view 0 cannot be written"):
        run(config)
    assert len(extract_jobs.FORWARDS) < 60  # of 13 batches a view: it stopped in one of the first views
    assert opened(config).published() == {}


# --------------------------------------------------------------------------------------------- what is said and written


def test_a_dry_run_reads_no_image_and_writes_nothing(
    make: MakeConfig, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(
        source={"train": str(tree)},
        teacher={"name": "extract_jobs:colours", "weights": ""},
        cache={"dtype": "auto"},
        views={"count": "3"},
    )
    ruin(tree)
    extract_jobs.FORWARDS.clear()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    summary = extract(config, JobSplit(index=1, count=2), dry_run=True)
    assert summary == dataclasses.replace(ExtractSummary(), seconds=summary.seconds)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert config.extract.batch_size not in extract_jobs.FORWARDS
    table = capsys.readouterr().out
    for text in ("nothing is written", "203 images", "7 of this worker's 7", "pooled 15 as auto: measured", "new"):
        assert text in table


def test_a_dry_run_on_a_cache_says_what_is_missing_or_why_not(
    make: MakeConfig, small_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small_cache, tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert extract(make(views={"count": "3"}), JobSplit(), dry_run=True).units_skipped == 2 * NUM_SHARDS
    assert "5 of this worker's 15" in capsys.readouterr().out
    with pytest.raises(CacheMismatchError, match="seed: 5 in the cache, 9 asked for"):
        extract(make(views={"seed": 9}), JobSplit(), dry_run=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_leaves_its_configuration_versions_and_fingerprint(make: MakeConfig, tmp_path: Path) -> None:
    config = make()
    summary = run(config, JobSplit(index=1, count=2))
    (path,) = (tmp_path / "cache" / "runs").iterdir()
    document = json.loads(path.read_text())
    assert path.name.endswith("-1of2.json")
    assert document["config"]["views"]["seed"] == 5
    assert document["config"]["cache"]["url"] == str(tmp_path / "cache")
    assert document["fingerprint"] == opened(config).fingerprint
    assert {"torch", "timm", "pillow", "libjpeg", "vkd_cache"} <= document["versions"].keys()
    assert document["summary"]["units_published"] == summary.units_published == 2
    assert document["summary"]["samples"] == summary.samples


def test_progress_says_how_fast_how_much_and_where_time_goes(
    make: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run(make())
    said = capsys.readouterr().err
    assert "images/s" in said
    for text in ("data ", "teacher ", "write ", "% | ", " MB", "5 units published, 0 were there, 0 failed"):
        assert text in said


def test_all_mistakes_of_a_configuration_at_once(make: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        run(make(extract={"batch_size": 15}, views={"count": "4:4"}, teacher={"name": ""}))
    for text in ("batch_size: found 15, expected an even number", "found '4:4'", "[teacher] name is empty"):
        assert text in str(refused.value)
    assert not (tmp_path / "cache").exists()


def test_another_batch_size_is_allowed_and_said(make: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run(make(), JobSplit(index=0, count=2))
    run(make(extract={"batch_size": 32}), JobSplit(index=1, count=2))
    assert "begun with batches of 16, this run uses 32" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("codec", ["float16", "bfloat16", "float32"])
def test_a_unit_in_the_making_keeps_neither_pixels_nor_wide_floats(make: MakeConfig, codec: str) -> None:
    config = make()
    source = open_source(config.source.train, shard_size=SHARD_SIZE)
    recipe = make_recipe(config.views)
    node = NodeSpec(name="map", layout="feature_map", shape=(3, 4, 4), dtype=codec, codec=codec)
    assembly = UnitAssembly(source, UnitId(0, 0), [node])
    pixels = []
    for task in unit_tasks(source, recipe, 5, UnitId(0, 0), 16):
        batch = Renderer(source, recipe, 5)[task]
        values = batch.row.astype(np.float32)[:, None, None, None] + np.zeros((1, 3, 4, 4), np.float32)
        pixels += [weakref.ref(batch.pixels), weakref.ref(batch.label)]
        assembly.add(batch, {"map": torch.from_numpy(values)})
        del batch
    assert [reference() for reference in pixels] == [None] * len(pixels)
    columns, nodes, _ = assembly.finish()
    assert nodes["map"].dtype == getattr(torch, codec)
    assert nodes["map"][:, 0, 0, 0].tolist() == columns["row"].tolist() == list(range(SHARD_SIZE))
