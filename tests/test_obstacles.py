"""Folders where a cache has files and the other way round: found, removed where nothing is in them, and named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_samples import unit_file
from extract_jobs import contents
from repair_jobs import FIRST, repair

from vkd_cache.cache.units import kind_of, record_path
from vkd_cache.config import Config
from vkd_cache.errors import CacheError, CacheFormatError, CorruptCacheError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract
from vkd_cache.stages.verify import VerifyReport, VerifyRequest, verify

Build = Callable[..., Config]
RECORD = record_path(FIRST)


def check(url: Path) -> VerifyReport:
    return verify(Config(), VerifyRequest(url=str(url)))


def messages(report: VerifyReport) -> list[str]:
    return [f"{entry['kind']} {entry['where']}: {entry['message']}" for entry in report.to_json()["findings"]]


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def to_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


CHANGES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None]]] = {
    f"{what.__name__} {name}": (place, what)
    for name, place in (("record", lambda url: url / RECORD), ("unit", lambda url: unit_file(url, *FIRST)))
    for what in (to_folder, to_loop, to_nothing)
} | {
    "to_file units": (lambda url: url / "units", to_file),
    "to_file records": (lambda url: url / "records", to_file),
    "to_file view": (lambda url: url / "units" / "view-0000", to_file),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_of_the_wrong_kind_is_made_again(
    tiny_config: Build, small_cache: Path, tmp_path: Path, change: str
) -> None:
    cache = shutil.copytree(small_cache, tmp_path / "cache")
    place, what = CHANGES[change]
    what(place(cache))
    found = check(cache)
    assert found.exit_code == 3, messages(found)
    where = place(small_cache).relative_to(small_cache).as_posix()
    assert any(line.startswith("error") and where in line for line in messages(found))
    assert not any("Errno" in line or " 6:" in line for line in messages(found))

    assert repair(cache).exit_code == 3
    assert check(cache).exit_code == 0
    extract(tiny_config(cache={"url": str(cache)}, views={"count": "2"}), JobSplit())
    assert contents(cache) == contents(small_cache)


@pytest.mark.parametrize("name", [RECORD, "unit"])
def test_what_is_in_a_folder_is_nobodys_to_remove(
    tiny_config: Build, small_cache: Path, tmp_path: Path, name: str
) -> None:
    cache = shutil.copytree(small_cache, tmp_path / "cache")
    place = unit_file(cache, *FIRST) if name == "unit" else cache / name
    to_folder(place)
    (place / "mine").write_text("precious")
    report = repair(cache)
    assert report.exit_code == 3
    assert f"Kept {place}, in which there is something: move it away." in report.next_step
    assert (place / "mine").read_text() == "precious"
    assert check(cache).exit_code == 3
    with pytest.raises(CacheError, match=f"a folder is where a file has to go: {place}"):
        extract(tiny_config(cache={"url": str(cache)}, views={"count": "2"}), JobSplit())


def test_a_file_with_something_in_it_stays(tiny_config: Build, small_cache: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(small_cache, tmp_path / "cache")
    to_file(cache / "units")
    (cache / "units").write_text("precious")
    assert f"Kept {cache / 'units'}, in which" in repair(cache).next_step
    with pytest.raises(CacheError, match=f"Not a directory: {cache / 'units'}"):
        extract(tiny_config(cache={"url": str(cache)}, views={"count": "2"}), JobSplit())


def test_a_manifest_that_is_a_folder(tiny_config: Build, small_cache: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(small_cache, tmp_path / "cache")
    to_folder(cache / "manifest.json")
    with pytest.raises(CorruptCacheError, match=r"manifest\.json: is a folder, expected a plain file"):
        check(cache)
    with pytest.raises((CacheError, CacheFormatError), match=r"manifest\.json"):
        extract(tiny_config(cache={"url": str(cache)}, views={"count": "2"}), JobSplit())


def test_a_link_to_a_folder_is_read_through(small_cache: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(small_cache, tmp_path / "cache")
    (cache / "units").rename(tmp_path / "elsewhere")
    (cache / "units").symlink_to(tmp_path / "elsewhere")
    assert check(cache).exit_code == 0


def test_every_path_of_a_cache_has_its_kind(small_cache: Path) -> None:
    for path in small_cache.rglob("*"):
        relative = path.relative_to(small_cache).as_posix()
        expected = "folder" if path.is_dir() else "file"
        assert kind_of(relative) == ("" if relative.startswith("runs/") else expected), relative


def test_an_empty_cache_and_lost_views_are_noted(small_cache: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(small_cache, tmp_path / "cache")
    shutil.rmtree(cache / "records" / "view-0000")
    report = check(cache)
    assert report.exit_code == 0
    assert "note manifest.json: view 0: no unit is published, though view 1 has some." in messages(report)
    shutil.rmtree(cache / "records")
    report = check(cache)
    assert report.exit_code == 0
    assert "note manifest.json: no unit is published." in messages(report)
