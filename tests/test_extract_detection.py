"""Extraction of a detector's tokens: what is stored, what no batch mate changes, and what does not fit is told."""

import dataclasses
import multiprocessing
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_samples import NUM_COCO_TRAIN
from conftest import PRELOAD
from detection_jobs import (
    NUM_CLASSES,
    SHARD_SIZE,
    change_annotations,
    detection_config,
    image_path,
    paint,
    write_detector,
)
from extract_jobs import contents, extract_alone

from vkd_cache.cache.reader import Unit, open_cache
from vkd_cache.cache.units import UnitId, keys_to_columns, record_path
from vkd_cache.cache.writer import CacheWriter
from vkd_cache.cli import main
from vkd_cache.config import Config, TeacherConfig
from vkd_cache.detection.canvas import NODES, PATCHES, CanvasBatch
from vkd_cache.detection.sampling import sample_places
from vkd_cache.errors import CacheMismatchError, ConfigError, SourceError, TeacherError
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import open_source
from vkd_cache.stages.extract import extract
from vkd_cache.stages.extract_size import view_bytes
from vkd_cache.stages.teaching import start_teacher
from vkd_cache.stages.verify import VerifyReport, VerifyRequest, verify
from vkd_cache.teachers import load_detector, load_teacher
from vkd_cache.tokens import Tokens
from vkd_cache.views.recipe import make_recipe

MakeConfig = Callable[..., Config]
NUM_SHARDS = NUM_COCO_TRAIN // SHARD_SIZE
NO_SPLIT = JobSplit()
BACKENDS = pytest.mark.parametrize("backend", ["zarr", "webdataset"])
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOAD)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("detector") / "teacher.pth")


@pytest.fixture(scope="module")
def exact(coco_tree: Path, detector: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tokens of one view as float32, by one uninterrupted run in batches of 4. Copy it before changing a file."""
    url = tmp_path_factory.mktemp("exact") / "cache"
    assert extract(detection_config(coco_tree, detector, url), NO_SPLIT).samples == NUM_COCO_TRAIN
    return url


@pytest.fixture
def make(coco_tree: Path, detector: Path, tmp_path: Path) -> MakeConfig:
    """`detection_config` with a cache in this test's folder; `root` for other data."""

    def build(root: Path = coco_tree, **sections: dict[str, object]) -> Config:
        return detection_config(root, detector, tmp_path / "cache", **sections)

    return build


@pytest.fixture
def tree(coco_tree: Path, tmp_path: Path) -> Path:
    """The training images, to be damaged."""
    return shutil.copytree(coco_tree, tmp_path / "coco")


def units_of(url: Path | str) -> list[Unit]:
    cache = open_cache(str(url))
    return [cache.read(*unit) for unit in cache.units]


def checked(config: Config, **request: object) -> VerifyReport:
    asked = {"pixels": True, "teacher": True, "sample": 0} | request
    return verify(config, VerifyRequest(url=config.cache.url, source=config.source.train, **asked))  # type: ignore[arg-type]


def errors(report: VerifyReport) -> list[str]:
    return [entry["message"] for entry in report.to_json()["findings"] if entry["kind"] == "error"]


def keys_of(root: Path, shard: int) -> tuple[str, ...]:
    return open_source(str(root), shard_size=SHARD_SIZE).shards[shard].keys


# ------------------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("zarr", "float32"), ("zarr", "bfloat16"), ("zarr", "auto"), ("webdataset", "float16"), ("webdataset", "int8")],
)
def test_every_storage_holds_what_the_teacher_says_and_verifies(
    make: MakeConfig, exact: Path, backend: str, dtype: str
) -> None:
    config = make(cache={"backend": backend, "dtype": dtype, "block_samples": 5})
    assert extract(config, NO_SPLIT).exit_code == 0
    manifest = open_cache(config.cache.url).manifest
    assert [spec.name for spec in manifest.nodes] == list(NODES)
    assert {spec.layout for spec in manifest.nodes} == {"tokens"}
    if dtype == "auto":
        assert all("standardised_error" in spec.measured for spec in manifest.nodes)
    for unit, reference in zip(units_of(config.cache.url), units_of(exact), strict=True):
        assert unit.keys == reference.keys
        assert np.array_equal(unit.columns["view_size"], reference.columns["view_size"])
        for name in NODES:
            stored, wanted = unit.tokens(name), reference.tokens(name)
            assert np.array_equal(stored.grid, wanted.grid)
            gap = (stored.dense().float() - wanted.dense()).abs()
            assert bool((gap <= unit.rounding(name) + 1e-6).all())
            assert torch.equal(stored.total, wanted.total)  # of what the teacher said, not of what it was rounded to
    report = checked(config)
    assert errors(report) == []
    assert {level.name: level.checked for level in report.levels} == {
        "files": NUM_SHARDS, "pixels": NUM_COCO_TRAIN, "teacher": NUM_COCO_TRAIN,
    }  # fmt: skip


def test_the_grid_follows_the_view_and_sums_are_of_all_tokens(exact: Path, detector: Path) -> None:
    teacher = load_detector(_teacher(detector), nodes=NODES, num_classes=NUM_CLASSES)
    for unit in units_of(exact):
        for row, size in enumerate(unit.columns["view_size"].astype(np.int64)):
            canvas = tuple((-(-size // 32) * 32).tolist())
            counts = teacher.token_counts(size[None], canvas)
            for name in NODES:
                tokens = unit.tokens(name, np.array([row]))
                assert tokens.counts.tolist() == counts[name].tolist() == [len(tokens.values)]
                exactly = tokens.values.double()
                torch.testing.assert_close(tokens.total[0], exactly.sum(0).float())
                torch.testing.assert_close(tokens.squares[0], exactly.square().sum(0).float())


@pytest.mark.parametrize(("backend", "dtype"), [("zarr", "int8"), ("webdataset", "float32")])
def test_sampled_tokens_are_rows_of_the_full_cache_with_its_sums(
    make: MakeConfig, exact: Path, tmp_path: Path, backend: str, dtype: str
) -> None:
    config = make(cache={"backend": backend, "dtype": dtype, "tokens": 0.1})
    extract(config, NO_SPLIT)
    full = exact
    if dtype != "float32":
        full = tmp_path / "full"
        extract(make(cache={"dtype": dtype, "url": str(full)}), NO_SPLIT)
    for unit, whole in zip(units_of(config.cache.url), units_of(full), strict=True):
        for name in NODES:
            stored, everything = unit.tokens(name), whole.tokens(name)
            assert np.array_equal(stored.grid, everything.grid)
            assert torch.equal(stored.total, everything.total)
            assert torch.equal(stored.squares, everything.squares)
            assert torch.equal(stored.values, everything.values[torch.from_numpy(stored.places())])
            assert stored.kept.tolist() == [
                max(1, -(-int(count) // 10)) if name in PATCHES else count for count in stored.counts
            ]
            if name in PATCHES:
                start, count = stored.offsets[1], int(stored.counts[1])
                planned = sample_places(5, unit.keys[1], 0, name, count, 0.1)
                assert stored.index is not None
                assert np.array_equal(stored.index[start : start + len(planned)], planned)
    assert errors(checked(config)) == []


def test_a_choice_of_nodes_and_a_later_view(make: MakeConfig, exact: Path) -> None:
    nodes = {"nodes": ("patch_3", "neck_det")}
    extract(make(cache=nodes), NO_SPLIT)
    config = make(cache=nodes, views={"count": "2"})
    summary = extract(config, NO_SPLIT)
    assert (summary.units_published, summary.units_skipped) == (NUM_SHARDS, NUM_SHARDS)
    first, later = units_of(config.cache.url)[0], units_of(config.cache.url)[NUM_SHARDS]
    assert torch.equal(first.tokens("neck_det").values, units_of(exact)[0].tokens("neck_det").values)
    assert not np.array_equal(first.columns["view_size"], later.columns["view_size"])
    assert errors(checked(config)) == []


# ------------------------------------------------------------------------------------------- no batch mate, no accident


def test_batch_sizes_agree(make: MakeConfig, tmp_path: Path) -> None:
    configs = [make(extract={"batch_size": size}, cache={"url": str(tmp_path / str(size))}) for size in (2, 6)]
    for config in configs:
        extract(config, NO_SPLIT)
    for one, other in zip(*(units_of(config.cache.url) for config in configs), strict=True):
        for name in NODES:
            torch.testing.assert_close(one.tokens(name).values, other.tokens(name).values, rtol=1e-4, atol=1e-4)


def test_other_images_in_the_batch_change_no_bit(make: MakeConfig, exact: Path, tree: Path) -> None:
    """Every second image of a shard is painted over; what is stored of the others stays the same, bit for bit."""
    painted = {key for shard in range(NUM_SHARDS) for key in keys_of(tree, shard)[::2]}
    for number, key in enumerate(sorted(painted)):
        paint(tree, key, ("white", "black", "red")[number % 3])
    config = make(tree)
    extract(config, NO_SPLIT)
    for unit, reference in zip(units_of(config.cache.url), units_of(exact), strict=True):
        rows = np.array([row for row, key in enumerate(unit.keys) if key not in painted])
        for name in NODES:
            assert torch.equal(unit.tokens(name, rows).values, reference.tokens(name, rows).values)
            assert not torch.equal(unit.tokens(name, rows - 1).values, reference.tokens(name, rows - 1).values)


def test_fewer_images_in_the_data_set_change_nothing_that_counts(make: MakeConfig, exact: Path, tree: Path) -> None:
    """Batches are put together anew; the kernels may then add in another order, but no more."""
    gone = {int(key) for shard in range(NUM_SHARDS) for key in keys_of(tree, shard)[1::3]}

    def remove(document: dict[str, list[dict[str, int]]]) -> None:
        document["images"] = [image for image in document["images"] if image["id"] not in gone]
        document["annotations"] = [box for box in document["annotations"] if box["image_id"] not in gone]

    change_annotations(tree, remove)
    config = make(tree)
    extract(config, NO_SPLIT)
    everything = {key: (unit, row) for unit in units_of(exact) for row, key in enumerate(unit.keys)}
    for unit in units_of(config.cache.url):
        for row, key in enumerate(unit.keys):
            reference, place = everything[key]
            for name in NODES:
                found, wanted = unit.tokens(name, np.array([row])), reference.tokens(name, np.array([place]))
                torch.testing.assert_close(found.values, wanted.values, rtol=1e-4, atol=1e-4)


def test_a_batch_of_several_canvases_is_run_one_canvas_at_a_time(detector: Path) -> None:
    teacher = load_detector(_teacher(detector), nodes=("patch_1", "body_det"), num_classes=NUM_CLASSES)
    config = Config().extract
    rng = torch.Generator().manual_seed(0)
    view_size = np.array([(96, 128), (64, 90), (128, 96), (96, 100), (60, 96)], np.int64)
    canvas = -(-view_size // 32) * 32
    images = torch.zeros(5, 3, 128, 128)
    for image, (height, width) in zip(images, view_size.tolist(), strict=True):
        image[:, :height, :width] = torch.rand(3, height, width, generator=rng)
    batch = CanvasBatch(images=images, view_size=view_size, canvas=canvas)
    for padded in (True, False):
        run = start_teacher(teacher, dataclasses.replace(config, batch_size=2), torch.device("cpu"), padded=padded)
        together = run(batch)
        for row in range(5):
            alone = run(CanvasBatch(images=images[row : row + 1], view_size=view_size[[row]], canvas=canvas[[row]]))
            for name, tokens in alone.items():
                found = together[name].select([row])
                assert np.array_equal(found.grid, tokens.grid)
                torch.testing.assert_close(found.values, tokens.values, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(found.total, tokens.total, rtol=1e-4, atol=1e-3)


@BACKENDS
def test_killed_and_resumed_or_shared_it_is_the_same_cache(
    make: MakeConfig, tmp_path: Path, backend: str
) -> None:
    cache = {"backend": backend, "dtype": "int8", "tokens": 0.25}
    whole = make(cache=cache | {"url": str(tmp_path / "whole")}, views={"count": "2"})
    extract(whole, NO_SPLIT)
    config = make(cache=cache, views={"count": "2"})
    url, said = tmp_path / "cache", tmp_path / "said"
    process = CONTEXT.Process(target=extract_alone, args=(config, NO_SPLIT, said))
    process.start()
    until = time.monotonic() + 60.0
    while not list(url.glob("records/*/*.json")) and process.exitcode is None:
        assert time.monotonic() < until, "waited in vain"
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    published = contents(url).items()
    assert published < contents(tmp_path / "whole").items()
    workers = [
        CONTEXT.Process(target=extract_alone, args=(config, JobSplit(index=index, count=2), said)) for index in (1, 0)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60.0)
    assert [worker.exitcode for worker in workers] == [0, 0], said.read_text()
    assert contents(url) == contents(tmp_path / "whole")


def test_data_workers_and_order_of_units_change_nothing(make: MakeConfig, exact: Path, tmp_path: Path) -> None:
    config = make(extract={"workers": 2})
    for index in (2, 0, 1):
        extract(config, JobSplit(index=index, count=3))
    assert contents(tmp_path / "cache") == contents(exact)
    (tmp_path / "cache" / record_path(UnitId(1, 0))).unlink()
    assert extract(config, NO_SPLIT).units_published == 1
    assert contents(tmp_path / "cache") == contents(exact)


# ------------------------------------------------------------------------------------------------------- broken images


@BACKENDS
def test_broken_images_and_other_sizes_are_recorded(make: MakeConfig, exact: Path, tree: Path, backend: str) -> None:
    keys = keys_of(tree, 0)
    image_path(tree, keys[2]).write_bytes(b"no image")
    paint(tree, keys[5], "red", size=(33, 44))
    ruined = keys_of(tree, 1)
    for key in ruined:
        image_path(tree, key).write_bytes(b"")
    config = make(tree, cache={"backend": backend, "tokens": 0.5})
    summary = extract(config, NO_SPLIT)
    assert summary.exit_code == 0
    reasons = dict(summary.broken)
    assert set(reasons) == {keys[2], keys[5], *ruined}
    assert re.search(r"33x44 pixels, \d+x\d+ in the annotation file", reasons[keys[5]])
    unit, whole = units_of(config.cache.url)[0], units_of(exact)[0]
    kept = np.array([row for row in range(len(keys)) if row not in (2, 5)])
    assert unit.rows.tolist() == kept.tolist()
    for name in NODES:
        places = torch.from_numpy(unit.tokens(name).places())
        assert torch.equal(unit.tokens(name).values, whole.tokens(name, kept).values[places])
    assert len(units_of(config.cache.url)[1]) == 0
    assert errors(checked(config)) == []
    with pytest.raises(SourceError, match=r"image of key '\d+' is broken.*without --strict"):
        extract(make(tree, extract={"strict": True}, cache={"url": config.cache.url + "-strict"}), NO_SPLIT)


def test_a_teacher_without_finite_numbers_is_refused(make: MakeConfig, tmp_path: Path, detector: Path) -> None:
    state = torch.load(detector, weights_only=True)["model"]
    state["input_proj.0.0.bias"][3] = float("nan")
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(TeacherError, match="not finite"):
        extract(make(teacher={"weights": str(tmp_path / "bad.pth")}), NO_SPLIT)
    state["input_proj.0.0.bias"][3] = 0.0
    state["input_proj.0.1.weight"][:] = 1e6  # more than float16 can hold
    torch.save(state, tmp_path / "large.pth")
    summary = extract(make(teacher={"weights": str(tmp_path / "large.pth")}, cache={"dtype": "float16"}), NO_SPLIT)
    assert summary.exit_code == 3
    assert len(summary.units_failed) == NUM_SHARDS
    assert "node 'patch_1' is not finite for 8 samples" in summary.units_failed[0]


# -------------------------------------------------------------------------------------------------- what does not fit


def _teacher(weights: Path, name: str = "test_vidt", **more: int) -> TeacherConfig:
    return TeacherConfig(name=name, weights=str(weights), **more)


MISFITS: dict[str, tuple[dict[str, dict[str, object]], str]] = {
    "node": ({"cache": {"nodes": ("pooled", "patch_1")}}, r"\[cache\] nodes: found pooled, .*COCO.* patch_1, patch_2"),
    "dtype": ({"cache": {"dtype": "uint8"}}, r"\[cache\] dtype: found 'uint8', .*int8"),
    "classifier": ({"teacher": {"name": "test_resnet"}}, r"\[teacher\] name: found 'test_resnet'.*expected a detector"),
    "recipe": ({"views": {"recipe": "vkd"}}, r"found the view recipe 'vkd'.*vidt"),
    "share": ({"cache": {"nodes": ("neck_det",), "tokens": 0.5}}, r"\[cache\] tokens: found 0.5, .*patch_1, patch_2"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_settings_of_the_other_task_are_refused(make: MakeConfig, tmp_path: Path, case: str) -> None:
    sections, message = MISFITS[case]
    with pytest.raises(ConfigError, match=message):
        extract(make(**sections), NO_SPLIT)
    assert not (tmp_path / "cache").exists()


def test_a_detector_on_a_folder_of_classes_is_refused_with_all_that_is_wrong(
    make: MakeConfig, digits_tree: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        extract(make(digits_tree, cache={"nodes": ("patch_1",), "tokens": 0.5}), NO_SPLIT)
    teacher, nodes, recipe = str(caught.value).splitlines()
    assert "found 'test_vidt'" in teacher
    assert "expected a classification network" in teacher
    assert "[cache] nodes: found patch_1" in nodes
    assert "found the view recipe 'vidt'" in recipe


def test_detectors_that_cannot_be_had(detector: Path, tmp_path: Path) -> None:
    def refused(message: str, config: TeacherConfig, nodes: tuple[str, ...] = NODES) -> None:
        with pytest.raises(TeacherError, match=message):
            load_teacher(config, nodes=nodes, num_classes=NUM_CLASSES, view_px=128)

    refused("found 'vidt_swin_nanno'.*did you mean 'vidt_swin_nano'", _teacher(detector, "vidt_swin_nanno"))
    refused("weights is empty.*random weights", TeacherConfig(name="test_vidt"))
    refused(r"input_px: found 64", _teacher(detector, input_px=64))
    refused("nodes: found .'pooled'.*patch_1", _teacher(detector), ("pooled",))
    refused(r"teacher\.pth.*test_vidt\b", _teacher(detector, "test_vidt2"))  # names the body that the file fits
    refused(r"teacher\.pth.*11.*7", _teacher(detector, num_classes=7))
    torch.save({"model": {"conv.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    refused(r"other\.pth", _teacher(tmp_path / "other.pth"))


@pytest.mark.parametrize("head", ["cross_scale_fusion", "iou_aware", "token_label"])
def test_optional_parts_are_known_by_the_file(tmp_path: Path, head: str) -> None:
    path = write_detector(tmp_path / "teacher.pth", num_classes=5, **{head: True})
    torch.manual_seed(1)
    before = torch.get_rng_state()
    teacher = load_detector(_teacher(path), nodes=("patch_1",), num_classes=NUM_CLASSES)
    assert torch.equal(before, torch.get_rng_state())
    assert teacher.identity["num_classes"] == 5
    assert not teacher.train().training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert (teacher.head, teacher.node_shapes) == (None, {"patch_1": (64,)})


def test_a_cache_of_other_annotations_or_another_share_is_refused(make: MakeConfig, tree: Path) -> None:
    extract(make(tree, cache={"tokens": 0.5}), NO_SPLIT)
    with pytest.raises(CacheMismatchError, match=r"nodes\.patch_1\.tokens: 0\.5 in the cache, 0\.25 asked for"):
        extract(make(tree, cache={"tokens": 0.25}), NO_SPLIT, dry_run=True)
    change_annotations(tree, lambda document: document["annotations"][0].update(category_id=10))
    with pytest.raises(CacheMismatchError, match=r"dataset\.\w+.*in the cache, .* asked for"):
        extract(make(tree, cache={"tokens": 0.5}), NO_SPLIT)
    report = checked(make(tree, cache={"tokens": 0.5}))
    assert report.exit_code == 3
    assert any("dataset" in message for message in errors(report))


# --------------------------------------------------------------------------------------------- dry run, and the command


@pytest.mark.parametrize("cache", [{"dtype": "float16"}, {"dtype": "int8", "tokens": 0.2}], ids=["all", "sampled"])
def test_the_estimate_of_bytes_is_what_is_stored(make: MakeConfig, cache: dict[str, object]) -> None:
    config = make(cache=cache)
    extract(config, NO_SPLIT)
    source, recipe = open_source(config.source.train, shard_size=SHARD_SIZE), make_recipe(config.views)
    teacher = load_detector(config.teacher, nodes=NODES, num_classes=NUM_CLASSES)
    specs = open_cache(config.cache.url).manifest.nodes
    stored = 0
    for unit in units_of(config.cache.url):
        for name in NODES:
            tokens = unit.tokens(name)
            stored += sum(tensor.nbytes for tensor in (tokens.values, tokens.total, tokens.squares))
            stored += 0 if tokens.scale is None else tokens.scale.nbytes
            stored += 0 if tokens.index is None else 4 * len(tokens.index)
            stored += (4 + 4) * len(tokens)  # offset and grid
    assert NUM_COCO_TRAIN * view_bytes(specs, source, recipe, config.views.seed, teacher) == pytest.approx(stored)


def test_the_command_line_end_to_end(
    coco_tree: Path, detector: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline = tmp_path / "job.toml"
    pipeline.write_text(
        '[source]\nshard_size = 8\n[views]\nrecipe = "vidt"\nscales = [96, 112]\nmax_size_px = 192\n'
        'crop_scales = [80]\ncrop_min_px = 48\ncrop_max_px = 80\ncanvas_multiple_px = 32\n'
        '[cache]\nnodes = ["patch_2", "neck_det"]\ntokens = 0.5\n'
    )
    source = ["--source", str(coco_tree), "--workers", "0", "--device", "cpu"]
    teacher = ["--teacher", "test_vidt", "--teacher-weights", str(detector)]
    command = ["extract", str(pipeline), "--cache", str(tmp_path / "cache"), "--batch-size", "4", *source, *teacher]
    assert run_cli([*command, "--dry-run"]) == 0
    assert "24 images" in capfd.readouterr().out
    assert not (tmp_path / "cache").exists()
    assert run_cli(command) == 0
    check = ["verify", str(tmp_path / "cache"), *source, "--pixels", "--teacher", "--teacher-weights", str(detector)]
    assert run_cli(check) == 0
    assert run_cli([*command, "--dtype", "uint8"]) == 2
    assert "Error: [cache] dtype: found 'uint8'" in capfd.readouterr().err


def run_cli(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


# ------------------------------------------------------------------------------------------------- verify finds damage


def test_verify_finds_a_changed_token_a_changed_sum_and_other_places(make: MakeConfig) -> None:
    config = make(cache={"tokens": 0.5, "dtype": "float16"})
    extract(config, NO_SPLIT)
    cache = open_cache(config.cache.url)
    unit = cache.read(0, 0)

    def after(change: Callable[[dict[str, Tokens]], None], **levels: bool) -> list[str]:
        columns = {name: np.array(values) for name, values in unit.columns.items()} | keys_to_columns(unit.keys)
        nodes = {name: unit.tokens(name).select(range(len(unit))) for name in NODES}
        change(nodes)
        CacheWriter(cache.storage, cache.manifest).publish(0, 0, columns, nodes)
        return errors(checked(config, **levels))

    def one_token(nodes: dict[str, Tokens]) -> None:
        nodes["patch_2"].values[7] += 0.01

    def one_sum(nodes: dict[str, Tokens]) -> None:
        nodes["patch_3"].squares[2, 5] *= 1.2

    def other_places(nodes: dict[str, Tokens]) -> None:
        tokens = nodes["patch_1"]
        assert tokens.index is not None
        index = tokens.index.copy()
        missing = np.setdiff1d(np.arange(tokens.counts[0]), index[: tokens.kept[0]])
        index[: tokens.kept[0]] = np.sort(np.append(index[1 : tokens.kept[0]], missing[0]))
        nodes["patch_1"] = dataclasses.replace(tokens, index=index)

    assert "node 'patch_2' of key" in after(one_token, pixels=False)[0]
    assert "node 'patch_3' of key" in after(one_sum, pixels=False)[0]
    assert "node 'patch_1' holds other tokens" in after(other_places, teacher=False)[0]
