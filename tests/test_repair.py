"""`verify --repair` drops what is damaged and nothing else, and the same extraction makes the very same bytes again."""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cache_samples import make_columns, make_manifest, make_values, unit_file
from extract_jobs import contents
from repair_jobs import FIRST, SURVIVED, Watched, drop, drop_and_die, repair, repair_as_reader
from train_runs import pipeline, run_cli

from vkd_cache.cache.check import Fault, check_structure
from vkd_cache.cache.documents import seal, unseal
from vkd_cache.cache.local_storage import LocalStorage
from vkd_cache.cache.reader import Cache, open_cache
from vkd_cache.cache.repair import drop_unit
from vkd_cache.cache.storage import TEMPORARY
from vkd_cache.cache.units import UnitId, record_path
from vkd_cache.cache.writer import CacheWriter, create_cache
from vkd_cache.config import Config
from vkd_cache.errors import CacheError, CacheMismatchError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract
from vkd_cache.stages.verify import VerifyRequest, verify

Build = Callable[..., Config]
DAMAGE = frozenset({Fault.DAMAGE})
VICTIM = UnitId(shard=1, view=1)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["repair_jobs", "vkd_cache.stages.extract"])


@pytest.fixture
def cache(small_cache: Path, tmp_path: Path) -> Path:
    """A cache of one's own."""
    return shutil.copytree(small_cache, tmp_path / "cache")


def flip(path: Path, place: int = -40) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x20
    path.write_bytes(data)


def head_file(url: Path) -> Path:
    (path,) = url.glob("head-*.safetensors")
    return path


def another_cache(tmp_path: Path) -> Path:
    """Units of another cache under the same names."""
    writer = create_cache(str(tmp_path / "other"), make_manifest(dataset=DATASET))
    for shard in range(5):
        writer.publish(shard, 1, make_columns(7), {"pooled": make_values(7)})
    return tmp_path / "other"


DATASET = {"kind": "tar", "num_classes": 10, "shard_counts": [7] * 5, "shard_hashes": list("abcde")}
RECORD = record_path(VICTIM)
DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "unit flipped": lambda url, _: flip(unit_file(url, *VICTIM)),
    "unit cut short": lambda url, _: os.truncate(unit_file(url, *VICTIM), 1000),
    "unit missing": lambda url, _: unit_file(url, *VICTIM).unlink(),
    "unit of another": lambda url, _: shutil.copy(unit_file(url, 2, 1), unit_file(url, *VICTIM)),
    "record flipped": lambda url, _: flip(url / RECORD),
    "record that says it is newer": lambda url, _: flip(url / RECORD, _place_of_version(url)),
    "record empty": lambda url, _: (url / RECORD).write_bytes(b""),
    "record of another unit": lambda url, _: shutil.copy(url / record_path(UnitId(2, 1)), url / RECORD),
    "record of another cache": lambda url, tmp_path: shutil.copy(another_cache(tmp_path) / RECORD, url / RECORD),
    "head flipped": lambda url, _: flip(head_file(url)),
    "head missing": lambda url, _: head_file(url).unlink(),
}


def _place_of_version(url: Path) -> int:
    return (url / RECORD).read_bytes().index(b'"format_version": 1') + len('"format_version": ')


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_dropped_is_made_again_to_the_byte(
    tiny_config: Build, small_cache: Path, cache: Path, tmp_path: Path, damage: str
) -> None:
    DAMAGES[damage](cache, tmp_path)
    before = contents(cache)
    unrepaired = verify(Config(), VerifyRequest(url=str(cache)))
    assert (unrepaired.exit_code, unrepaired.repaired, contents(cache)) == (3, (), before)

    report = repair(cache)
    is_head = damage.startswith("head")
    where = head_file(small_cache).name if is_head else RECORD
    assert report.exit_code == 3
    assert [(entry.kind, entry.where) for entry in report.repaired] == [("head" if is_head else "unit", where)]
    assert ("the teacher's head" if is_head else "1 unit") in report.next_step
    assert f"`vkd-cache extract` with --cache {cache} again" in report.next_step
    gone = {where} if is_head else {RECORD, unit_file(small_cache, *VICTIM).relative_to(small_cache).as_posix()}
    assert contents(cache) == {path: data for path, data in contents(small_cache).items() if path not in gone}
    if not is_head:
        again = repair(cache)
        assert (again.exit_code, again.repaired, again.next_step) == (0, (), "Nothing to repair.")

    summary = extract(tiny_config(cache={"url": str(cache)}, views={"count": "2"}), JobSplit())
    assert (summary.units_published, summary.units_skipped) == ((0, 10) if is_head else (1, 9))
    assert contents(cache) == contents(small_cache)
    assert verify(Config(), VerifyRequest(url=str(cache))).exit_code == 0


def test_many_at_once(tiny_config: Build, small_cache: Path, cache: Path) -> None:
    """Every second unit, the head, and what a dead writer left; a living one's file stays."""
    for number, unit in enumerate(open_cache(str(cache)).units):
        if number % 2:
            flip(unit_file(cache, *unit) if number % 4 == 1 else cache / record_path(unit))
    head_file(cache).unlink()
    (cache / TEMPORARY / "dead.tmp").write_bytes(b"half")
    with (cache / TEMPORARY / "live.tmp").open("wb") as live:
        fcntl.flock(live, fcntl.LOCK_EX)
        report = repair(cache)
        assert [path.name for path in (cache / TEMPORARY).iterdir()] == ["live.tmp"]
    kinds = [entry.kind for entry in report.repaired]
    assert (kinds.count("unit"), kinds.count("head"), kinds.count("leftover")) == (5, 1, 1)
    assert report.next_step.startswith("Dropped 5 units and the teacher's head. Next: ")
    assert report.next_step.endswith("Removed 1 file of writers that died.")
    assert extract(tiny_config(cache={"url": str(cache)}, views={"count": "2"}), JobSplit()).units_published == 5
    assert contents(cache) == contents(small_cache)


def test_the_commands(small_cache: Path, tmp_path: Path, digits_tree: Path, teacher_file: Path) -> None:
    """As a user meets it: real processes, exit codes, one JSON document, and the pipeline in the advice."""
    cache = shutil.copytree(small_cache, tmp_path / "cache")
    flip(unit_file(cache, *VICTIM))
    manifest = open_cache(str(cache)).manifest
    settings = pipeline(
        tmp_path / "run",
        source={"train": str(digits_tree), "shard_size": 48},
        views={"size_px": 32, "seed": 5, "count": "2"},
        teacher={"name": manifest.teacher["name"], "weights": str(teacher_file)},
        cache={"url": str(cache), "dtype": "float16"},
        extract={"batch_size": 16, "workers": 0, "device": "cpu"},
    )
    student = ["--student", "test_vit", "--output", str(tmp_path / "student"), "--batch-size", "16", "--epochs", "2"]
    refused = run_cli(["train", settings, *student, "--workers", "0", "--device", "cpu"])
    assert refused.returncode == 1
    assert f"Error: {unit_file(cache, *VICTIM)}: found checksum" in refused.stderr
    assert "`vkd-cache verify --repair`" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = run_cli(["verify", settings, "--repair", "--json"])
    document = json.loads(done.stdout)
    assert done.returncode == 3, done.stderr
    assert [entry["where"] for entry in document["repaired"]] == [RECORD]
    assert "checksum" in document["repaired"][0]["reason"]
    assert document["next"] == f"Dropped 1 unit. Next: vkd-cache extract {settings}; it makes these and nothing else."
    assert f"dropped {RECORD}" in done.stderr
    assert run_cli(["extract", settings]).returncode == 0
    assert contents(cache) == contents(small_cache)
    assert verify(Config(), VerifyRequest(url=str(cache))).exit_code == 0


def test_nothing_is_dropped_for_another_source_or_teacher(
    tiny_config: Build, small_cache: Path, cache: Path, digits_tree: Path, tmp_path: Path
) -> None:
    tree = shutil.copytree(digits_tree, tmp_path / "digits")
    first, second = sorted((tree / "train" / "digit3").iterdir())[:2]
    first.write_bytes(second.read_bytes())
    config = tiny_config(source={"train": str(tree)})
    request = VerifyRequest(url=str(cache), source=str(tree), pixels=True, teacher=True, sample=0, repair=True)
    report = verify(config, request)
    assert (report.exit_code, report.repaired) == (3, ())
    assert report.levels[0].errors == 0
    assert report.levels[1].errors > 0
    assert "are not repaired: they mean another source, decoder or teacher" in report.next_step
    second.unlink()
    report = verify(config, request)
    assert [finding.where for finding in report.levels[0].findings] == ["manifest.json"] * 2
    assert report.repaired == ()
    assert "are not repaired" in report.next_step
    assert contents(cache) == contents(small_cache)


def test_a_manifest_is_not_repaired_but_made_again(tiny_config: Build, small_cache: Path, cache: Path) -> None:
    manifest = cache / "manifest.json"
    for data in (manifest.read_bytes()[:-9], manifest.read_bytes().replace(b'"seed": 5', b'"seed": 7')):
        manifest.write_bytes(data)
        with pytest.raises(CacheError, match=r"--repair cannot mend a manifest.*move it away and run the same"):
            repair(cache)
    manifest.rename(cache.parent / "manifest.bad")
    other = tiny_config(cache={"url": str(cache)}, views={"count": "2", "seed": 6})
    with pytest.raises(CacheMismatchError, match=r"found units without manifest\.json"):
        extract(other, JobSplit())
    assert not manifest.exists()
    summary = extract(tiny_config(cache={"url": str(cache)}, views={"count": "2"}), JobSplit())
    assert (summary.units_published, summary.units_skipped) == (0, 10)
    assert contents(cache) == contents(small_cache)


def test_a_manifest_that_was_replaced_costs_no_unit(cache: Path, small_cache: Path, tmp_path: Path) -> None:
    """All units are of another cache: not they are wrong."""
    (cache / "manifest.json").write_bytes((another_cache(tmp_path) / "manifest.json").read_bytes())
    before = contents(cache)
    report = repair(cache)
    assert (report.errors, report.repaired) == (10, ())
    assert "Kept 10 units of another cache, for not one belongs to manifest.json" in report.next_step
    assert contents(cache) == before
    shutil.copy(small_cache / "manifest.json", cache)
    assert repair(cache).exit_code == 0


def test_what_is_only_newer_is_kept(cache: Path) -> None:
    body = unseal((cache / RECORD).read_bytes(), "record")
    (cache / RECORD).write_bytes(seal(body | {"format_version": 3}))
    before = contents(cache)
    report = repair(cache)
    assert (report.exit_code, report.repaired) == (3, ())
    (finding,) = (finding for finding in report.levels[0].findings if finding.is_error)
    assert "Upgrade vkd-cache" in finding.message
    assert "newer format version" in report.next_step
    assert contents(cache) == before


def test_units_of_a_conversion_are_converted_again(tmp_path: Path) -> None:
    writer = create_cache(str(tmp_path), make_manifest())
    for shard in range(3):
        arrays = {**make_columns(7), "node.pooled": make_values(7).half().numpy()}
        writer.publish_arrays(UnitId(shard, 0), arrays, origin={"fingerprint": "ab" * 32})
    flip(unit_file(tmp_path, 1))
    assert f"Next: the same `vkd-cache convert` into {tmp_path} again" in repair(tmp_path).next_step


# ------------------------------------------------------------------------------------------------ at the same time


def publish(cache: Cache, seed: int = 0) -> None:
    CacheWriter(cache.storage, cache.manifest).publish(0, 0, make_columns(7), {"pooled": make_values(7, seed=seed)})


@pytest.mark.parametrize("seed", [0, 1])  # the same bytes again, and others
@pytest.mark.parametrize("damage", ["unit", "record"])
def test_published_again_while_it_is_repaired(tmp_path: Path, seed: int, damage: str) -> None:
    """Whenever a whole publication falls into a repair: never a record without its file."""
    number, survived = 0, 0
    while True:
        root = tmp_path / f"{number}"
        plain = create_cache(str(root), make_manifest()).cache
        publish(plain)
        flip(unit_file(root, 0) if damage == "unit" else root / record_path(FIRST))
        storage = Watched(root, number, lambda cache=plain: publish(cache, seed))
        dropped = drop_unit(Cache(storage, plain.manifest), FIRST, DAMAGE)
        if storage.calls <= number:
            break
        number += 1
        published = bool(plain.units)
        assert published == (dropped is None)
        assert [finding for finding in check_structure(plain) if finding.is_error] == []
        survived += published
    assert number > 5
    assert survived >= number - 2, "lost between a look and a deletion, and only there"


@pytest.mark.parametrize("damage", ["unit", "record"])
def test_repaired_while_it_is_published_again(tmp_path: Path, damage: str) -> None:
    """Whenever a whole repair falls into a publication, of the same bytes under the same name."""
    number = 0
    while True:
        root = tmp_path / f"{number}"
        plain = create_cache(str(root), make_manifest()).cache
        publish(plain)
        flip(unit_file(root, 0) if damage == "unit" else root / record_path(FIRST))
        storage = Watched(root, number, lambda cache=plain: drop(cache))
        publish(Cache(storage, plain.manifest))
        if storage.calls <= number:
            break
        number += 1
        assert plain.read(0, 0).node("pooled").shape == (7, 5)
        assert [finding for finding in check_structure(plain) if finding.is_error] == []
    assert number == 3


def test_a_disk_that_spoils_everything_ends_a_repair(tmp_path: Path) -> None:
    plain = create_cache(str(tmp_path), make_manifest()).cache
    publish(plain)

    class Spoilt(LocalStorage):
        def delete(self, path: str) -> None:
            super().delete(path)
            publish(plain)
            flip(unit_file(tmp_path, 0))

    flip(unit_file(tmp_path, 0))
    with pytest.raises(CacheError, match=r"was dropped 10 times, and each time published again and damaged"):
        drop(Cache(Spoilt(tmp_path), plain.manifest))


def test_killed_before_any_of_its_steps(tmp_path: Path) -> None:
    """The unit is published and damaged, or not published: never a record without the file that it names."""
    codes: list[int | None] = []
    while SURVIVED not in codes and len(codes) < 30:
        root = tmp_path / f"{len(codes)}"
        cache = create_cache(str(root), make_manifest()).cache
        publish(cache)
        whole = contents(root)
        flip(unit_file(root, 0))
        worker = CONTEXT.Process(target=drop_and_die, args=(root, len(codes)))
        worker.start()
        worker.join()
        codes.append(worker.exitcode)
        if cache.units:
            assert unit_file(root, 0).exists()
        repair(root)
        assert cache.units == ()
        publish(cache)
        assert contents(root) == whole
    assert len(codes) > 4
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [SURVIVED]


# ----------------------------------------------------------------------------------------- where nothing can be written


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="vkd-cache-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def as_reader(url: Path, tmp_path: Path) -> tuple[int | None, str]:
    said = tmp_path / "said"
    worker = CONTEXT.Process(target=repair_as_reader, args=(url, said))
    worker.start()
    worker.join()
    return worker.exitcode, said.read_text(encoding="utf-8")


def test_a_cache_that_is_only_to_be_read(shared: Path, tmp_path: Path) -> None:
    cache = shared / "cache"
    writer = create_cache(str(cache), make_manifest())
    publish(writer.cache)
    folders = [cache, *(path for path in cache.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    assert as_reader(cache, tmp_path)[0] == 0
    flip(unit_file(cache, 0))
    before = contents(cache)
    code, said = as_reader(cache, tmp_path)
    for folder in folders:
        folder.chmod(0o755)
    assert code == 1
    assert record_path(FIRST) in said
    assert "ermission" in said or "ead-only" in said
    assert "Traceback" not in said
    assert contents(cache) == before


def test_what_cannot_be_read_is_not_taken_for_damaged(shared: Path, tmp_path: Path) -> None:
    """Files of somebody else in folders where everybody may delete."""
    cache = shared / "cache"
    writer = create_cache(str(cache), make_manifest())
    for shard in range(3):
        writer.publish(shard, 0, make_columns(7), {"pooled": make_values(7)})
    for folder in (cache, *(path for path in cache.rglob("*") if path.is_dir())):
        folder.chmod(0o777)
    before = contents(cache)
    victims = [unit_file(cache, 1), cache / record_path(UnitId(2, 0)), cache / "manifest.json"]
    for path in victims[:2]:
        path.chmod(0)
    code, said = as_reader(cache, tmp_path)
    assert code == 3
    assert "dropped" not in said
    victims[2].chmod(0)
    assert as_reader(cache, tmp_path)[0] == 1
    for path in victims:
        path.chmod(0o644)
    assert contents(cache) == before
    assert repair(cache).exit_code == 0


def test_rows_that_contradict_each_other_are_dropped_too(tmp_path: Path) -> None:
    """A unit whose checksums are right and whose content is impossible."""
    writer = create_cache(str(tmp_path), make_manifest())
    columns = make_columns(7)
    columns["label"] = np.full(7, 77, np.uint32)
    writer.publish(0, 0, columns, {"pooled": make_values(7)})
    writer.publish(5, 0, make_columns(7), {"pooled": make_values(7)})
    writer.publish(1, 0, make_columns(7), {"pooled": make_values(7)})
    report = repair(tmp_path)
    assert [entry.where for entry in report.repaired] == [record_path(FIRST), record_path(UnitId(5, 0))]
    assert writer.cache.units == (UnitId(1, 0),)


def test_a_cache_behind_a_url(tmp_path: Path) -> None:
    """No files, no locks, no leftovers: objects that are put and deleted."""
    writer = create_cache(f"memory://{tmp_path.name}/cache", make_manifest())
    for shard in range(3):
        writer.publish(shard, 0, make_columns(7), {"pooled": make_values(7)})
    cache = writer.cache
    path = cache.record(1, 0).files[0][0]
    good, record = cache.storage.get(path), cache.storage.get(record_path(UnitId(1, 0)))
    cache.storage.put(path, good[:-1] + b"\1")
    report = repair(cache.url)
    assert [entry.where for entry in report.repaired] == [record_path(UnitId(1, 0))]
    assert not cache.storage.exists(path)
    assert repair(cache.url).exit_code == 0
    writer.publish(1, 0, make_columns(7), {"pooled": make_values(7)})
    assert (cache.storage.get(path), cache.storage.get(record_path(UnitId(1, 0)))) == (good, record)
