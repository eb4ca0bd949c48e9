"""Conversion: what extraction would have written, to the last byte; what is lost is said, and never taken back."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cache_samples import (
    make_columns,
    make_manifest,
    make_node,
    make_values,
    unit_file,
)
from convert_jobs import NUM_SHARDS, MakeConfig, assert_sound, content, do, few_digits
from extract_jobs import contents

from vkd_cache.cache.reader import open_cache
from vkd_cache.cache.units import UnitId, record_path
from vkd_cache.cache.writer import create_cache
from vkd_cache.cli import main
from vkd_cache.errors import CacheMismatchError, ConfigError, IncompleteCacheError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.convert import ConvertRequest, convert
from vkd_cache.stages.convert_plan import Wish
from vkd_cache.stages.extract import extract
from vkd_cache.views.recipe import Recipe

BLOCK = {"zarr": None, "webdataset": 7}
RECIPE = Recipe(name="own", size_px=224, mix_probability=1.0).to_json()


@pytest.fixture(scope="module")
def make(tiny_config: MakeConfig, digits_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    return few_digits(tiny_config, digits_tree, tmp_path_factory.mktemp("few") / "digits")


@pytest.fixture(scope="module")
def exact(make: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32 of every dense node. Only read."""
    url = tmp_path_factory.mktemp("exact") / "cache"
    assert extract(make(cache={"url": str(url)}), JobSplit()).exit_code == 0
    return url


@pytest.fixture(scope="module")
def half(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as float16."""
    url = tmp_path_factory.mktemp("half") / "cache"
    do(exact, url, dtype="float16")
    return url


# ---- what extraction would have written ----


@pytest.mark.parametrize(
    ("dtype", "backend", "measured_on"),
    [
        ("float16", "zarr", 256),
        ("bfloat16", "webdataset", 256),
        ("uint8", "zarr", 5),
        ("int8", "webdataset", 256),
        ("auto", "zarr", 256),
        ("auto", "webdataset", 5),
    ],
)
def test_from_float32_it_is_what_extraction_writes(
    make: MakeConfig,
    exact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    backend: str,
    measured_on: int,
) -> None:
    """To the last byte, what was measured included: on the same samples, also where these are not all of a unit."""
    monkeypatch.setattr("vkd_cache.cache.codecs._MEASURED_SAMPLES", measured_on)
    extract(make(cache={"url": str(tmp_path / "direct"), "dtype": dtype, "backend": backend}), JobSplit())
    summary = do(exact, tmp_path / "converted", dtype=dtype, backend=backend, block_samples=BLOCK[backend])
    assert summary.units_converted == 2 * NUM_SHARDS and summary.exit_code == 0
    assert content(tmp_path / "converted") == content(tmp_path / "direct")
    for unit in open_cache(str(tmp_path / "direct")).units:
        one, other = (open_cache(str(tmp_path / name)).record(*unit) for name in ("direct", "converted"))
        assert dataclasses.replace(other, origin=None) == one


def test_extraction_goes_on_where_conversion_ended(make: MakeConfig, exact: Path, tmp_path: Path) -> None:
    before = contents(exact)
    do(exact, tmp_path / "grown", dtype="auto")
    for name in ("grown", "direct"):
        config = make(cache={"url": str(tmp_path / name), "dtype": "auto"}, views={"count": "3"})
        summary = extract(config, JobSplit())
        assert summary.units_published == (NUM_SHARDS if name == "grown" else 3 * NUM_SHARDS)
    assert content(tmp_path / "grown") == content(tmp_path / "direct")
    assert_sound(make(), tmp_path / "grown", teacher=True)
    assert contents(exact) == before


def test_the_record_says_what_a_unit_came_from(exact: Path, half: Path, tmp_path: Path) -> None:
    do(half, tmp_path / "again", backend="webdataset")
    for source, target in ((exact, half), (half, tmp_path / "again")):
        old, new = open_cache(str(source)), open_cache(str(target))
        assert new.units == old.units
        for unit in new.units:
            record = old.record(*unit)
            came_from = {"shard": unit.shard, "view": unit.view, "xxh3_128": record.files[0][2]}
            assert new.record(*unit).origin == {"fingerprint": old.fingerprint, "units": [came_from]}
            assert new.record(*unit).broken == record.broken
    assert not (tmp_path / "again" / "runs").joinpath("origin").exists()
    text = "".join(path.read_text() for path in (tmp_path / "again" / "records").rglob("*.json"))
    assert str(tmp_path) not in text and "20" + "26" not in text


def test_backends_back_and_forth_give_the_first_cache(half: Path, exact: Path, tmp_path: Path) -> None:
    eight = tmp_path / "eight"
    do(exact, eight, dtype="auto")
    for number, source in enumerate((half, eight)):
        there, back = tmp_path / f"there{number}", tmp_path / f"back{number}"
        do(source, there, backend="webdataset", block_samples=5)
        do(there, back, backend="zarr")
        assert content(back) == content(source)
        assert open_cache(str(there)).manifest.block_samples == 5
        assert do(source, there, backend="webdataset").units_to_convert == 0  # and blocks stay as they are


def test_same_command_resumes_another_one_is_refused(exact: Path, tmp_path: Path) -> None:
    url = tmp_path / "cache"
    assert do(exact, url, dtype="auto", views="0:1").units_converted == NUM_SHARDS
    before = {path: (url / path).stat().st_mtime_ns for path in contents(url)}
    summary = do(exact, url, dtype="auto")
    assert (summary.units_converted, summary.units_skipped) == (NUM_SHARDS, NUM_SHARDS)
    assert {path: (url / path).stat().st_mtime_ns for path in before} == before
    with pytest.raises(CacheMismatchError, match=r"nodes\.pooled\.codec: 'sqrt_uint8' in the cache, 'float16' asked"):
        do(exact, url, dtype="float16")
    with pytest.raises(CacheMismatchError, match="backend"):
        do(exact, url, dtype="auto", backend="webdataset")


def test_shares_and_dry_run(exact: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = tmp_path / "cache"
    dry = convert(
        ConvertRequest(source=str(exact), target=str(url), wish=Wish(dtype="float16")), JobSplit(), dry_run=True
    )
    assert not url.exists() and dry.units_converted == 0
    assert "pooled float32 -> float16" in capsys.readouterr().out
    done = [do(exact, url, dtype="float16", worker=(index, 3)).units_converted for index in (2, 0, 1)]
    assert sum(done) == 2 * NUM_SHARDS and max(done) == 4
    assert contents(url) == contents(half)


# ---- what is lost does not come back ----


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ("auto", "float16", "node 'pooled': sqrt_uint8 to float16"),
        ("int8", "uint8", "node 'pooled': token_int8 to sqrt_uint8"),
        ("float16", "float32", "node 'pooled': float16 to float32"),
        ("bfloat16", "float16", "node 'pooled': bfloat16 to float16"),
    ],
)
def test_a_step_backwards_is_refused_unless_forced(
    make: MakeConfig, exact: Path, tmp_path: Path, first: str, second: str, what: str
) -> None:
    do(exact, tmp_path / "first", dtype=first)
    with pytest.raises(ConfigError) as refused:
        do(tmp_path / "first", tmp_path / "second", dtype=second)
    assert what in str(refused.value) and "--force" in str(refused.value)
    assert not (tmp_path / "second").exists()
    do(tmp_path / "first", tmp_path / "second", dtype=second, force=True)
    source, target = (open_cache(str(tmp_path / name)) for name in ("first", "second"))
    for old, new in zip(source.manifest.nodes, target.manifest.nodes, strict=True):
        changed = new.codec != old.codec
        assert new.passed == ((old.codec,) if changed else ())
    for unit in source.units[:3]:
        before, after = source.read(unit).node("pooled").float(), target.read(unit).node("pooled").float()
        assert ((after - before).abs() <= target.read(unit).rounding("pooled")).all()
    with pytest.raises(CacheMismatchError, match="passed"):
        extract(make(cache={"url": str(tmp_path / "second"), "dtype": second}), JobSplit())
    assert_sound(make(), tmp_path / "second", teacher=True, sample=30)


def test_eight_bits_of_float16_are_said_to_be_such(make: MakeConfig, half: Path, exact: Path, tmp_path: Path) -> None:
    do(half, tmp_path / "twice", dtype="int8")
    do(exact, tmp_path / "once", dtype="int8")
    twice, once = open_cache(str(tmp_path / "twice")), open_cache(str(tmp_path / "once"))
    assert {spec.passed for spec in twice.manifest.nodes} == {("float16",)}
    assert twice.fingerprint != once.fingerprint
    with pytest.raises(CacheMismatchError, match=r"nodes\.logits\.passed: \['float16'\] in the cache, None asked for"):
        extract(make(cache={"url": str(tmp_path / "twice"), "dtype": "int8"}), JobSplit())
    assert_sound(make(), tmp_path / "twice", teacher=True, sample=30)


def test_same_codec_under_another_dtype_is_no_loss(exact: Path, half: Path, tmp_path: Path) -> None:
    """`auto` that came out as 8 bits, asked for as 8 bits: the values stay, and so does what is said of them."""
    do(exact, tmp_path / "auto", dtype="auto")
    do(exact, tmp_path / "direct", dtype="uint8")
    do(tmp_path / "auto", tmp_path / "named", dtype="uint8")
    assert content(tmp_path / "named") == content(tmp_path / "direct")


# ---- what goes wrong ----


def test_damaged_units_are_named_and_the_others_converted(
    exact: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(exact, tmp_path / "source")
    bad, gone = unit_file(source, 1, 0), unit_file(source, 2, 1)
    data = bytearray(bad.read_bytes())
    data[len(data) // 2] ^= 1
    bad.write_bytes(data)
    gone.unlink()
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(source), str(tmp_path / "target"), "--dtype", "float16", "--json"])
    assert ended.value.code == 3
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report["units_converted"] == 2 * NUM_SHARDS - 2
    assert [message.split(":")[0] for message in report["units_failed"]] == ["shard 1, view 0", "shard 2, view 1"]
    assert bad.name in said.err and "found checksum" in said.err and gone.name in said.err
    for path in (bad, gone):
        shutil.copy(exact / path.relative_to(source), path)
    assert do(source, tmp_path / "target", dtype="float16").units_converted == 2
    assert contents(tmp_path / "target") == contents(half)


def test_values_that_do_not_fit_fail_their_unit(tmp_path: Path) -> None:
    manifest = make_manifest(nodes=(make_node("float32"),), recipe=RECIPE)
    writer = create_cache(str(tmp_path / "source"), manifest)
    for shard in range(3):
        values = make_values(7, seed=shard)
        values[3, 2] = 1e5 if shard == 1 else 1.0
        writer.publish(shard, 0, make_columns(7, seed=shard), {"pooled": values})
    summary = do(tmp_path / "source", tmp_path / "target", dtype="float16")
    assert summary.exit_code == 3 and summary.units_converted == 2
    assert "shard 1 of view 0: node 'pooled': float16: found 100000 in row 3" in summary.units_failed[0]


def test_an_unfinished_source_is_converted_as_it_grows(
    make: MakeConfig, exact: Path, half: Path, tmp_path: Path
) -> None:
    source, target = shutil.copytree(exact, tmp_path / "source"), tmp_path / "target"
    record = source / record_path(UnitId(3, 1))
    kept = record.read_bytes()
    record.unlink()
    summary = do(source, target, dtype="float16")
    assert (summary.units_converted, summary.units_waiting, summary.exit_code) == (9, 1, 0)
    record.write_bytes(kept)
    assert do(source, target, dtype="float16").units_converted == 1
    assert contents(target) == contents(half)
    shutil.rmtree(source / "records")
    with pytest.raises(IncompleteCacheError, match="no sample that --dtype auto could be measured on"):
        do(source, tmp_path / "measured", dtype="auto")


def test_the_source_is_never_the_target(exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(exact)
    monkeypatch.chdir(exact.parent)
    before = contents(exact)
    for target in (str(exact), f"{exact}/", f"file://{exact}", str(tmp_path / "link"), exact.name, f"{exact}/units/.."):
        with pytest.raises(ConfigError, match="only read"):
            convert(ConvertRequest(source=str(exact), target=target), JobSplit())
    for target, message in ((exact / "nested", "is inside of"), (exact.parent, "holds the cache")):
        with pytest.raises(ConfigError, match=message):
            do(exact, target, dtype="float16")
    assert contents(exact) == before


def test_options_that_say_nothing_are_refused(exact: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="zarr backend has no blocks"):
        do(exact, tmp_path / "cache", block_samples=5)
    for arguments, code in (
        (["convert", str(exact)], 2),
        (["convert", str(tmp_path / "none"), str(tmp_path / "x")], 2),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code


def test_no_teacher_and_no_timm(exact: Path, tmp_path: Path) -> None:
    """The images are not needed either: the source's folder is not given."""
    script = (
        "import sys\n"
        "from vkd_cache.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as ended:\n"
        "    assert ended.code == 0, ended.code\n"
        "assert 'torch' in sys.modules and 'timm' not in sys.modules and 'torchvision' not in sys.modules\n"
    )
    arguments = ["convert", str(exact), str(tmp_path / "cache"), "--dtype", "auto", "--backend", "webdataset"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "10 units converted" in done.stderr and "pooled float32 -> sqrt_uint8" in done.stderr
