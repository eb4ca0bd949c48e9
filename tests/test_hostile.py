"""A cache, a data set or a file of weights from a stranger runs no code, writes nowhere else and takes no memory."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_samples import make_manifest, replace_unit, unit_file
from conftest import SHARD_SIZE
from hostile_samples import Payload, document_of, files_below, rewrite_manifest
from train_runs import pipeline

from vkd_cache.cache.documents import seal
from vkd_cache.cache.reader import open_cache
from vkd_cache.cache.units import UnitId, record_path
from vkd_cache.cache.zarr_backend import pack
from vkd_cache.cli import main
from vkd_cache.config import Config
from vkd_cache.errors import (
    CacheError,
    CacheFormatError,
    CheckpointError,
    CorruptCacheError,
    SourceError,
    TeacherError,
    VkdCacheError,
)
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import open_source
from vkd_cache.stages.extract import extract
from vkd_cache.stages.saved_student import load_student
from vkd_cache.stages.verify import VerifyRequest, verify
from vkd_cache.weights import read_weights_file

MakeConfig = Callable[..., Config]
Say = Callable[..., tuple[int, str]]
RECORD = record_path(UnitId(0, 0))


@pytest.fixture
def cache(small_cache: Path, tmp_path: Path) -> Path:
    """A cache of one's own."""
    return shutil.copytree(small_cache, tmp_path / "cache")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command: its exit code, and all that it said."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return run


# ------------------------------------------------------------------------------------------------ no code is run


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module on this machine that a stranger knows of; importing it, and calling it, leaves a mark."""
    folder = tmp_path / "code"
    folder.mkdir()
    marker = tmp_path / "marker"
    (folder / "known_to_strangers.py").write_text(
        f"import pathlib, timm\npathlib.Path({str(marker)!r}).touch()\n"
        "def teacher():\n    return timm.create_model('test_resnet', num_classes=10)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "known_to_strangers", raising=False)
    return marker


@pytest.mark.parametrize("name", ["known_to_strangers:teacher", "known_to_strangers:missing"])
def test_a_manifest_names_code_and_only_the_user_can_say_yes(
    cache: Path, tiny_config: MakeConfig, evil: Path, name: str
) -> None:
    config = tiny_config(teacher={"name": ""})
    rewrite_manifest(cache, lambda body: body["teacher"].update(name=name))
    request = VerifyRequest(url=str(cache), source=config.source.train, pixels=True, teacher=True, sample=4)
    with pytest.raises(TeacherError, match=f"--teacher-name {name}"):
        verify(config, request)
    with pytest.raises(TeacherError, match=f"--teacher-name {name}"):  # another name is no yes either
        verify(tiny_config(), request)
    assert not evil.exists()


def test_the_commands_run_none_of_a_cache_s_code(
    cache: Path, tiny_config: MakeConfig, evil: Path, say: Say
) -> None:
    config = tiny_config()
    rewrite_manifest(cache, lambda body: body["teacher"].update(name="known_to_strangers:teacher"))
    images, output = config.source.train, cache.parent / "run"
    run_file = pipeline(
        cache.parent, source={"train": images}, cache={"url": str(cache)}, student={"name": "test_vit"},
        train={"epochs": 1, "batch_size": 64, "workers": 0, "device": "cpu", "output": str(output), "eval_every": 0},
    )  # fmt: skip
    commands: dict[str, list[str]] = {
        "train": [run_file],
        "eval": ["--cache", str(cache), "--device", "cpu"],
        "verify": [str(cache), "--source", images, "--teacher", "--sample", "4", "--device", "cpu"],
    }
    done = {name: say(name, *arguments) for name, arguments in commands.items()}
    assert {name: code for name, (code, _) in done.items()} == {"train": 0, "eval": 0, "verify": 1}, done
    assert "name it yourself: --teacher-name known_to_strangers:teacher" in done["verify"][1]
    assert not evil.exists()
    code, text = say("verify", *commands["verify"], "--teacher-name", "known_to_strangers:teacher")
    assert evil.exists(), text  # the user said so; its weights are others, and that is found
    assert code == 3
    assert "weights_sha256" in text


@pytest.mark.parametrize("kind", ["pt", "legacy", "nested", "pickle", "array"])
def test_weights_are_read_without_running_them(tmp_path: Path, tiny_config: MakeConfig, kind: str) -> None:
    path, marker = tmp_path / "weights.pt", tmp_path / "marker"
    payload = Payload(marker)
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"model": payload}))
    elif kind == "array":
        torch.save({"model": np.array([payload], object)}, path)
    else:
        content = {"config": {"student": payload}} if kind == "nested" else {"model": payload}
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    for error in (CheckpointError, TeacherError):
        with pytest.raises(error):
            read_weights_file(path, error)
    with pytest.raises(CheckpointError):
        load_student(str(path), tiny_config(), 10)
    assert not marker.exists()


def test_units_hold_no_objects(tmp_path: Path, small_cache: Path) -> None:
    marker = tmp_path / "marker"
    for backend in ("zarr", "webdataset"):
        root = tmp_path / backend
        shutil.copytree(small_cache, root)
        rewrite_manifest(root, lambda body, backend=backend: body.update(backend=backend, block_samples=64))  # type: ignore[misc]
        for hostile in (_object_array(marker), _pickle_member(marker), _pickle_codec()):
            record = root / RECORD
            body = document_of(record)
            suffix = ".zip" if backend == "zarr" else ".tar"
            old = root / body["files"][0]["path"]
            body["files"][0]["path"] = str(Path(body["files"][0]["path"]).with_suffix(suffix))
            record.write_bytes(seal(body))
            if not (root / body["files"][0]["path"]).exists():
                old.rename(root / body["files"][0]["path"])
            replace_unit(root, hostile)
            with pytest.raises(CacheFormatError):
                open_cache(str(root)).read(0, 0)
    assert not marker.exists()


def _tar_of(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def _object_array(marker: Path) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Payload(marker)], object), allow_pickle=True)
    return _tar_of({"000000.row.npy": stream.getvalue()})


def _pickle_member(marker: Path) -> bytes:
    return _tar_of({"000000.row.pyd": pickle.dumps(Payload(marker))})


def _pickle_codec() -> bytes:
    """A unit whose metadata asks for another codec, as zarr's own reader would look up by name."""
    data = pack({"row": np.arange(5, dtype=np.uint32)}, make_manifest())
    return data.replace(b'"name": "zstd"', b'"name": "pick"')


def test_members_of_a_source_that_would_run_are_passed_over(
    tmp_path: Path, digits: dict[str, list[tuple[bytes, int]]], tiny_config: MakeConfig
) -> None:
    marker, source = tmp_path / "marker", tmp_path / "a.tar"
    members: dict[str, bytes] = {}
    for number, (data, label) in enumerate(digits["train"][:4]):
        members |= {f"{number}.jpg": data, f"{number}.cls": str(label).encode()}
        members |= {f"{number}.{suffix}": pickle.dumps(Payload(marker)) for suffix in ("pyd", "pickle", "pth", "npy")}
    source.write_bytes(_tar_of(members))
    config = tiny_config(source={"train": str(source)}, cache={"url": str(tmp_path / "cache")})
    assert extract(config, JobSplit()).exit_code == 0
    assert not marker.exists()


# -------------------------------------------------------------------------------------- nothing is written elsewhere

ODD_KEYS = [
    "a b", "é/ü/ß", "🦊", "x" * 300, "c:\\windows", "$(touch x)", "-rf", "~root", "%2e%2e%2fx", "\u202ekey", "./here",
    "a//b",
]  # fmt: skip
WRONG_KEYS = ["../x", "a/../../x", "/etc/x", "..", "a\nb", "a\x1b[2J", "x" * 1100]


def test_keys_are_names_and_no_paths(
    tmp_path: Path, digits: dict[str, list[tuple[bytes, int]]], tiny_config: MakeConfig
) -> None:
    inside = tmp_path / "work"
    inside.mkdir()
    members: dict[str, bytes] = {}
    for key, (data, label) in zip(ODD_KEYS, digits["train"], strict=False):
        members |= {f"{key}.jpg": data, f"{key}.cls": str(label).encode()}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    (tmp_path / "a.tar").write_bytes(stream.getvalue())
    before = files_below(tmp_path)
    config = tiny_config(source={"train": str(tmp_path / "a.tar")}, cache={"url": str(inside / "cache")})
    assert extract(config, JobSplit()).exit_code == 0
    written = files_below(tmp_path).keys() - before.keys()
    assert all(path.startswith(str(inside)) for path in written)
    assert open_cache(str(inside / "cache")).read(0, 0).keys == ODD_KEYS
    request = VerifyRequest(url=str(inside / "cache"), source=config.source.train, pixels=True)
    assert verify(config, request).exit_code == 0


@pytest.mark.parametrize("key", WRONG_KEYS)
@pytest.mark.parametrize("kind", ["member", "link"])
def test_keys_that_lead_out_are_refused(tmp_path: Path, key: str, kind: str) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for suffix, content in (("jpg", b"x"), ("cls", b"3")):
            entry = tarfile.TarInfo(f"{key}.{suffix}")
            entry.size = len(content)
            if kind == "link":
                entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, "/etc/passwd", 0
            archive.addfile(entry, io.BytesIO(content))
    tar = tmp_path / "1" / "2" / "3" / "a.tar"
    tar.parent.mkdir(parents=True)
    tar.write_bytes(stream.getvalue())
    with pytest.raises(SourceError):
        open_source(str(tar))
    assert list(files_below(tmp_path)) == [str(tar)] and tar.read_bytes() == stream.getvalue()


@pytest.mark.parametrize("path", ["../../outside", "/etc/passwd", "units/../../outside", "units/view-0000/x", "a\0b"])
def test_a_record_names_its_own_file_only(cache: Path, path: str) -> None:
    record = cache / RECORD
    body = document_of(record)
    for digest in (body["files"][0]["xxh3_128"], "../" * 10 + "ab", "0" * 32):
        body["files"] = [{"path": path, "bytes": 1, "xxh3_128": digest}]
        record.write_bytes(seal(body))
        with pytest.raises(CacheFormatError):
            open_cache(str(cache)).read(0, 0)


@pytest.mark.parametrize("head", ["../head.safetensors", "/etc/passwd", "head-0123456789abcdef.safetensors/../x", "\0"])
def test_a_manifest_names_no_path(cache: Path, head: str) -> None:
    body = document_of(cache / "manifest.json")
    body["head"] = {"file": head, "sha256": "0" * 64}
    (cache / "manifest.json").write_bytes(seal(body))
    with pytest.raises(CacheFormatError, match=r"head\.file"):
        open_cache(str(cache))


@pytest.mark.parametrize("link", ["units", "records", ".incomplete", "units/view-0002", "records/view-0002", "runs"])
def test_nothing_is_written_or_removed_through_a_link(cache: Path, tiny_config: MakeConfig, link: str) -> None:
    outside = cache.parent / "outside"
    if (cache / link).exists():
        shutil.move(cache / link, outside)
    outside.mkdir(exist_ok=True)
    (outside / "precious.tmp").write_bytes(b"mine")
    (cache / link).parent.mkdir(exist_ok=True)
    (cache / link).symlink_to(outside, target_is_directory=True)
    before = files_below(outside)
    with pytest.raises(CacheError, match=r"is a link to .*outside"):
        extract(tiny_config(cache={"url": str(cache)}, views={"count": "3"}), JobSplit())
    assert files_below(outside) == before


def test_a_link_is_replaced_and_not_followed(cache: Path, tiny_config: MakeConfig) -> None:
    """A file's name may be taken by a link to something precious."""
    precious = cache.parent / "precious"
    precious.write_bytes(b"mine")
    record = cache / "records" / "view-0001" / "shard-000000.json"
    record.unlink()
    record.symlink_to(precious)
    (cache / ".incomplete").mkdir(exist_ok=True)
    (cache / ".incomplete" / "x.tmp").symlink_to(precious)
    with pytest.raises(VkdCacheError):
        open_cache(str(cache)).read(0, 1)
    extract(tiny_config(cache={"url": str(cache)}, views={"count": "3"}), JobSplit())
    assert precious.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["manifest.json", RECORD, "unit"])
def test_pipes_and_devices_are_no_files(cache: Path, name: str) -> None:
    path = unit_file(cache, 0) if name == "unit" else cache / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CorruptCacheError, match="no plain file"):
        open_cache(str(cache)).read(0, 0)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(CorruptCacheError, match="no plain file"):
        open_cache(str(cache)).read(0, 0)


def test_messages_hold_nothing_that_a_terminal_would_obey(cache: Path, tiny_config: MakeConfig, say: Say) -> None:
    name = "\x1b]0;owned\x07\x1b[2J\ud800\u202e"
    rewrite_manifest(cache, lambda body: body["teacher"].update(name=name))
    code, text = say("eval", "--cache", str(cache), "--device", "cpu")
    assert code == 0, text
    assert r"\x1b]0;owned\x07\x1b[2J\ud800\u202e" in text
    assert not set(text) & set(name) - set(" 0;owned2J[]")
    rewrite_manifest(cache, lambda body: body["recipe"].update(name=name, size_px=0))
    code, text = say("verify", str(cache), "--source", tiny_config().source.train, "--pixels")
    assert code == 1
    assert not set(text) & set(name) - set(" 0;owned2J[]")


# ------------------------------------------------------------------------------------------------- no memory is taken


def test_bombs_take_no_memory(tmp_path: Path, small_cache: Path, digits_tree: Path) -> None:
    """Each of them in one process that may take 768 MiB more than it has: a bomb that goes off is no error of ours."""
    script = Path(__file__).with_name("hostile_bombs.py")
    shutil.copytree(small_cache, tmp_path / "cache")
    command = [sys.executable, str(script), str(tmp_path), str(digits_tree), str(SHARD_SIZE)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    assert len(outcome) > 25
    assert {name: text for name, text in outcome.items() if not text.startswith("refused")} == {}
