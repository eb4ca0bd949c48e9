"""Verification: a sound cache passes at every level, and each kind of damage is found by the level meant for it."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from cache_samples import unit_file
from conftest import NUM_TRAIN
from hypothesis import given, settings
from PIL import Image

from vkd_cache.cache.codecs import CODEC_ARRAYS, decode_node, encode_node, rounding_bound
from vkd_cache.cache.reader import Unit, open_cache
from vkd_cache.cache.schema import UNIT_SCALED, NodeSpec
from vkd_cache.cache.units import UnitId, keys_to_columns, record_path
from vkd_cache.cache.writer import CacheWriter
from vkd_cache.cli import main
from vkd_cache.config import Config
from vkd_cache.errors import CacheFormatError, ConfigError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract
from vkd_cache.stages.verify import VerifyReport, VerifyRequest, verify
from vkd_cache.stages.verify_sample import MAX_FINDINGS, choose_rows

MakeConfig = Callable[..., Config]
Change = Callable[[dict[str, np.ndarray], dict[str, torch.Tensor]], None]


@pytest.fixture
def cache(small_cache: Path, tmp_path: Path) -> Path:
    """A cache of one's own."""
    return shutil.copytree(small_cache, tmp_path / "cache")


def check(config: Config, url: Path, **request: object) -> VerifyReport:
    asked = {"pixels": True, "teacher": True, "sample": 0} | request
    return verify(config, VerifyRequest(url=str(url), source=config.source.train, **asked))  # type: ignore[arg-type]


def errors(report: VerifyReport, level: str) -> list[str]:
    found = report.to_json()["findings"]
    return [entry["message"] for entry in found if entry["kind"] == "error" and entry["level"] == level]


def replace_unit(url: Path, unit_id: UnitId, change: Change) -> None:
    """Publish a unit again with other contents: its checksums are right, what it says is not."""
    cache = open_cache(str(url))
    unit: Unit = cache.read(*unit_id)
    columns = {name: np.array(values) for name, values in unit.columns.items()} | keys_to_columns(unit.keys)
    nodes = {spec.name: unit.node(spec.name).clone() for spec in cache.manifest.nodes}
    change(columns, nodes)
    CacheWriter(cache.storage, cache.manifest).publish(*unit_id, columns, nodes, cache.record(*unit_id).broken)


def test_a_sound_cache_passes_every_level(tiny_config: MakeConfig, cache: Path) -> None:
    report = check(tiny_config(), cache)
    assert report.exit_code == 0
    assert report.to_json()["findings"] == []
    assert report.samples == 2 * NUM_TRAIN
    assert {level.name: level.checked for level in report.levels} == {
        "files": 10,
        "pixels": 2 * NUM_TRAIN,
        "teacher": 2 * NUM_TRAIN,
    }
    assert 0 < report.levels[2].measured["pooled_error"] < 2**-10


def test_files_alone_need_no_source(cache: Path) -> None:
    report = verify(Config(), VerifyRequest(url=str(cache)))
    assert [level.name for level in report.levels] == ["files"]
    assert report.exit_code == 0
    with pytest.raises(ConfigError, match="give --source"):
        verify(Config(), VerifyRequest(url=str(cache), pixels=True))
    with pytest.raises(CacheFormatError, match=r"manifest\.json"):
        verify(Config(), VerifyRequest(url=str(cache / "units")))


def test_a_sample_is_drawn_over_all_units(tiny_config: MakeConfig, cache: Path) -> None:
    report = check(tiny_config(), cache, sample=9)
    assert [level.checked for level in report.levels] == [10, 9, 9]
    counts = {UnitId(shard, view): 48 for view in range(3) for shard in range(5)}
    chosen = choose_rows(counts, 400, seed=1)
    assert sum(map(len, chosen.values())) == 400
    assert chosen.keys() == counts.keys()
    assert all(len(np.unique(rows)) == len(rows) and rows.max() < 48 for rows in chosen.values())
    again = choose_rows(counts, 400, seed=1)
    assert all(np.array_equal(again[unit], rows) for unit, rows in chosen.items())


def test_a_flipped_byte_is_found_by_its_checksum(tiny_config: MakeConfig, cache: Path) -> None:
    path = unit_file(cache, 1, 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    report = check(tiny_config(), cache, teacher=False)
    assert report.exit_code == 3
    assert "checksum" in errors(report, "files")[0]
    assert report.levels[1].checked == 2 * NUM_TRAIN - 48  # the damaged unit is left out, the others are not


def test_a_changed_pixel_is_found_by_its_digest(
    tiny_config: MakeConfig, cache: Path, digits_tree: Path, tmp_path: Path
) -> None:
    tree = shutil.copytree(digits_tree, tmp_path / "digits")
    victim = sorted((tree / "train" / "digit3").iterdir())[0]
    with Image.open(victim) as image:
        size = image.size
    Image.new("RGB", size, "red").save(victim, "JPEG")
    report = check(tiny_config(source={"train": str(tree)}), cache, teacher=False)
    found = errors(report, "pixels")
    assert report.exit_code == 3
    assert len(found) == 2  # one view each
    assert f"digit3/{victim.stem}" in found[0]
    assert "when the cache was made" in found[0]
    assert "Pillow" in found[0]


def test_views_around_an_image_of_another_size_are_still_checked(
    tiny_config: MakeConfig, cache: Path, digits_tree: Path, tmp_path: Path
) -> None:
    tree = shutil.copytree(digits_tree, tmp_path / "digits")
    files = sorted((tree / "train" / "digit3").iterdir())
    Image.new("RGB", (99, 77)).save(files[0], "JPEG")
    files[1].write_bytes(b"no image")
    report = check(tiny_config(source={"train": str(tree)}), cache, teacher=False)
    found = errors(report, "pixels")
    assert sorted("99x77" in message for message in found) == [False, False, True, True]
    assert sum("the teacher saw it whole" in message for message in found) == 2
    assert report.levels[1].checked == 2 * NUM_TRAIN
    report = check(tiny_config(source={"train": str(tree)}), cache, pixels=False)
    assert "cannot be replayed" in errors(report, "teacher")[0]


@pytest.mark.parametrize("name", ["seed", "crop", "mix_lambda", "label"])
def test_what_does_not_come_from_the_seed_is_found(tiny_config: MakeConfig, cache: Path, name: str) -> None:
    def change(columns: dict[str, np.ndarray], _: dict[str, torch.Tensor]) -> None:
        if name == "mix_lambda":  # on both sides of a pair, so that only the plan can tell
            row = int(np.flatnonzero(columns["mix_kind"])[0])
            columns[name][[row, columns["partner"][row]]] += 0.01
        elif name == "label":
            columns[name][0] = (columns[name][0] + 1) % 10
        else:
            columns[name][0] ^= np.uint64(1) if name == "seed" else np.uint32(1)

    replace_unit(cache, UnitId(2, 1), change)
    report = check(tiny_config(), cache, teacher=False)
    found = errors(report, "pixels")
    assert errors(report, "files") == []
    assert len(found) == (2 if name == "crop" else 1)  # another crop is another digest as well
    expected = {"seed": "plans", "crop": "not those of the plan", "mix_lambda": "2 rows differ", "label": "labels"}
    assert expected[name] in found[-1]


def test_a_changed_feature_is_found_by_the_teacher(tiny_config: MakeConfig, cache: Path) -> None:
    def change(_: dict[str, np.ndarray], nodes: dict[str, torch.Tensor]) -> None:
        nodes["pooled"][5] *= 1.01

    replace_unit(cache, UnitId(0, 0), change)
    report = check(tiny_config(), cache)
    assert errors(report, "files") == errors(report, "pixels") == []
    found = errors(report, "teacher")
    assert len(found) == 1
    assert open_cache(str(cache)).read(0, 0).keys[5] in found[0]
    assert "codec float16" in found[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_every_dtype_passes_within_its_tolerance(tiny_config: MakeConfig, tmp_path: Path, dtype: str) -> None:
    config = tiny_config(cache={"url": str(tmp_path / "cache"), "dtype": dtype, "nodes": ("pooled", "logits")})
    assert extract(config, JobSplit()).exit_code == 0
    report = check(config, tmp_path / "cache", sample=30)
    assert report.to_json()["findings"] == []
    assert report.levels[2].checked == 30
    assert report.levels[2].measured.keys() == {"pooled_error", "logits_error"}


def test_the_teacher_is_found_from_the_manifest_and_must_have_its_weights(
    tiny_config: MakeConfig, cache: Path, teacher_file: Path, tmp_path: Path
) -> None:
    nameless = tiny_config(teacher={"name": ""})
    assert check(nameless, cache, pixels=False, sample=5).exit_code == 0
    state = torch.load(teacher_file, weights_only=True)
    state = {name: value + 1e-3 if value.is_floating_point() else value for name, value in state.items()}
    torch.save(state, tmp_path / "other.pt")
    report = check(tiny_config(teacher={"weights": str(tmp_path / "other.pt")}), cache, pixels=False)
    (message,) = errors(report, "teacher")
    assert message.startswith("teacher.weights_sha256: found '")
    assert open_cache(str(cache)).manifest.teacher["weights_sha256"] in message
    assert report.levels[1].checked == 0


def test_another_source_is_refused(tiny_config: MakeConfig, cache: Path, digits_tree: Path) -> None:
    report = check(tiny_config(source={"train": str(digits_tree / "val")}), cache)
    assert report.exit_code == 3
    assert [level.name for level in report.levels] == ["files"]
    assert any("dataset.shard_hashes" in message for message in errors(report, "files"))


def test_broken_images_must_still_be_broken(tiny_config: MakeConfig, digits_tree: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(digits_tree, tmp_path / "digits")
    victims = sorted((tree / "train" / "digit4").iterdir())[:3]
    whole = victims[0].read_bytes()
    for victim in victims:
        victim.write_bytes(b"\xff\xd8\xff no more")
    config = tiny_config(source={"train": str(tree)}, cache={"url": str(tmp_path / "cache")})
    assert extract(config, JobSplit()).exit_code == 0
    report = check(config, tmp_path / "cache")
    assert report.to_json()["findings"] == []
    assert (report.samples, report.broken) == (NUM_TRAIN - 3, 3)
    assert [level.checked for level in report.levels] == [5, NUM_TRAIN, NUM_TRAIN - 3]
    victims[0].write_bytes(whole)
    (message,) = errors(check(config, tmp_path / "cache", teacher=False), "pixels")
    assert victims[0].stem in message
    assert "recorded as broken" in message


def test_what_is_not_published_is_a_note(tiny_config: MakeConfig, cache: Path) -> None:
    (cache / record_path(UnitId(3, 1))).unlink()
    report = check(tiny_config(), cache, teacher=False, sample=20)
    assert report.exit_code == 0
    notes = [entry["message"] for entry in report.to_json()["findings"]]
    assert any("view 1: 4 of 5 units are published" in message for message in notes)


def test_findings_are_counted_beyond_those_kept(tiny_config: MakeConfig, cache: Path) -> None:
    def change(columns: dict[str, np.ndarray], _: dict[str, torch.Tensor]) -> None:
        columns["digest"] ^= np.uint64(1)

    for shard in range(2):
        replace_unit(cache, UnitId(shard, 0), change)
    report = check(tiny_config(), cache, teacher=False)
    assert report.errors == 96
    assert len(errors(report, "pixels")) == MAX_FINDINGS


def test_worker_processes_find_the_same(tiny_config: MakeConfig, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for level in ("pixels", "teacher"):
        monkeypatch.setattr(f"vkd_cache.stages.verify_{level}.FEW_VIEWS", 0)
    report = check(tiny_config(extract={"workers": 1}), cache)
    assert report.to_json()["findings"] == []
    assert [level.checked for level in report.levels[1:]] == [2 * NUM_TRAIN] * 2


def test_the_command_says_it_with_its_exit_code(
    cache: Path, digits_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(cache), "--source", str(digits_tree), "--pixels", "--sample", "8", "--json"]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    document = json.loads(capsys.readouterr().out)
    assert done.value.code == 0
    assert document["verdict"] == "sound"
    assert document["levels"]["pixels"]["checked"] == 8
    unit_file(cache, 0, 0).unlink()
    with pytest.raises(SystemExit) as done:
        main(["verify", str(cache)])
    assert done.value.code == 3
    said = "".join(letter for letter in capsys.readouterr().out if letter.isalnum())  # a table breaks lines anywhere
    assert "missingbutitsrecordsaysitwaspublished" in said


FLOATS = st.floats(0, 6e4, width=32)


@settings(deadline=None, max_examples=40)
@given(
    codec=st.sampled_from(sorted(CODEC_ARRAYS)),
    rows=st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=6),
    negative=st.booleans(),
)
def test_no_value_leaves_its_rounding_bound(codec: str, rows: list[list[float]], negative: bool) -> None:
    values = torch.tensor(rows)
    if negative and codec not in UNIT_SCALED:
        values = -values
    spec = NodeSpec(name="pooled", layout="pooled", shape=(3,), dtype="float32", codec=codec)
    arrays = encode_node(values, codec)
    for chosen in (None, np.arange(len(rows))[::-1].copy()):
        expected = values if chosen is None else values[torch.from_numpy(chosen)]
        stored = decode_node(spec, arrays, chosen).float()
        bound = rounding_bound(spec, arrays, chosen)
        assert bound.shape == expected.shape
        assert ((stored - expected).abs() <= bound * (1 + 1e-5) + 1e-6 * expected.abs()).all()


def test_the_request_has_the_command_lines_default() -> None:
    assert {field.name: field.default for field in dataclasses.fields(VerifyRequest)}["sample"] == 64
