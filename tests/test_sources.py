"""Sources: layouts, keys, order, identity, errors; on real folders, real tars and real images."""

import contextlib
import gzip
import io
import json
import multiprocessing
import os
import pickle
import random
import tarfile
import tempfile
import threading
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from vkd_cache.errors import ConfigError, SourceError
from vkd_cache.sources import (
    SingleClassShardWarning,
    Source,
    open_source,
    source_identity,
    validation_beside,
)
from vkd_cache.sources.findings import PassedOverWarning
from vkd_cache.sources.folder import FolderSource
from vkd_cache.sources.keys import PackedShards, hash_order, key_problem
from vkd_cache.sources.labels import parse_label
from vkd_cache.sources.tar_index import split_member_name
from vkd_cache.sources.tar_members import TarReader


def jpeg(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour % 256, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def make_tree(root: Path, files: Iterable[str]) -> Path:
    for position, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(position))
    return root


def make_tar(path: Path, members: Mapping[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def pairs(*labels: int, first: int = 0) -> dict[str, bytes]:
    """Members of samples first, first + 1, ... with these labels."""
    members: dict[str, bytes] = {}
    for number, label in enumerate(labels, start=first):
        members |= {f"{number:06d}.jpg": jpeg(number), f"{number:06d}.cls": str(label).encode()}
    return members


def error_of(spec: Path | str, **options: str) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(str(spec), **options)
    return str(caught.value)


def all_keys(source: Source) -> list[str]:
    return [key for shard in source.shards for key in shard.keys]


def labels_by_key(source: Source) -> dict[str, int]:
    return {key: int(label) for shard in source.shards for key, label in zip(shard.keys, shard.labels, strict=True)}


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_classes(tmp_path: Path) -> None:
    names = ["cat/1.jpg", "cat/2.JPEG", "bird/a.b.PNG", "bird/deep/er/3.WebP", "ant/1.Jpg"]
    make_tree(tmp_path, [*names, "cat/.hidden.jpg", ".git/x.jpg", "cat/.cache/y.jpg"])
    (tmp_path / "cat" / "notes.txt").write_text("ignored")
    (tmp_path / "LICENCE").write_text("ignored")
    source = open_source(str(tmp_path))
    assert (source.kind, source.location, source.num_classes) == ("folder", str(tmp_path), 3)
    assert source.class_names == ("ant", "bird", "cat")
    assert labels_by_key(source) == {"cat/1": 2, "cat/2": 2, "bird/a.b": 1, "bird/deep/er/3": 1, "ant/1": 0}
    files = {os.path.splitext(name)[0]: tmp_path / name for name in names}  # noqa: PTH122
    for number, shard in enumerate(source.shards):
        assert shard.labels.dtype == np.uint32
        for row, key in enumerate(shard.keys):
            assert source.read(number, row) == files[key].read_bytes()


def test_the_order_is_that_of_the_keys_hashes_cut_into_shards(tmp_path: Path) -> None:
    make_tree(tmp_path, [f"c{number % 5}/{number}.png" for number in range(103)])
    source = open_source(str(tmp_path), shard_size=25)
    assert [len(shard.keys) for shard in source.shards] == [25, 25, 25, 25, 3]
    assert [shard.name for shard in source.shards[:2]] == ["block-000000", "block-000001"]
    keys = [f"c{number % 5}/{number}" for number in range(103)]
    assert all_keys(source) == sorted(keys, key=lambda key: (xxhash.xxh3_64_intdigest(key.encode()), key))
    assert all(set(shard.labels.tolist()) == set(range(5)) for shard in source.shards[:4])


_LETTERS = st.characters(codec="utf-8", exclude_characters="/.", exclude_categories=["C"])
_NAMES = st.text(_LETTERS, min_size=1, max_size=6)


@given(
    files=st.lists(st.tuples(st.sampled_from("abc"), _NAMES), min_size=1, max_size=12, unique=True),
    shard_size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_identity_is_free_of_root_and_listing_order_and_covers_every_key_once(
    files: list[tuple[str, str]], shard_size: int, seed: int
) -> None:
    shuffled = random.Random(seed).sample(files, len(files))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        sources = [
            FolderSource(
                make_tree(Path(root) / below, [f"{folder}/{name}.jpg" for folder, name in order]),
                shard_size=shard_size,
            )
            for root, below, order in [(one, "x", files), (other, "y/z", shuffled)]
        ]
        identities = [source_identity(source) for source in sources]
        assert identities[0] == identities[1]
        assert identities[0].num_samples == len(files)
        keys = all_keys(sources[0])
        assert sorted(keys) == sorted(f"{folder}/{name}" for folder, name in files)
        assert all(len(shard.keys) <= shard_size for shard in sources[0].shards)


@given(
    labels=st.lists(st.integers(0, 9), min_size=2, max_size=8),
    change=st.integers(0, 7),
    cut=st.integers(1, 7),
)
@settings(deadline=None, max_examples=25)
def test_a_changed_label_key_order_or_cut_changes_the_identity(labels: list[int], change: int, cut: int) -> None:
    change, cut = change % len(labels), 1 + (cut - 1) % (len(labels) - 1)
    members = pairs(*labels)
    keys = sorted({name[:6] for name in members})
    swapped = [*keys[1:], keys[0]]
    variants: list[list[dict[str, bytes]]] = [
        [members],
        [members | {f"{keys[change]}.cls": b"10"}],
        [{name.replace(keys[change], "new"): data for name, data in members.items()}],
        [{f"{key}.{kind}": members[f"{key}.{kind}"] for key in swapped for kind in ("jpg", "cls")}],
        [dict(list(members.items())[: 2 * cut]), dict(list(members.items())[2 * cut :])],
    ]
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore", SingleClassShardWarning)
        seen = []
        for number, shards in enumerate(variants):
            folder = Path(root) / str(number)
            folder.mkdir()
            for position, shard in enumerate(shards):
                make_tar(folder / f"{position}.tar", shard)
            seen.append(source_identity(open_source(str(folder / "*.tar"))).shard_hashes)
    assert len(set(seen)) == len(seen)


def test_the_identity_is_as_documented(tmp_path: Path) -> None:
    source = open_source(str(make_tar(tmp_path / "a.tar", pairs(3, 1))))
    identity = source_identity(source)
    expected = xxhash.xxh3_128_hexdigest(b"000000\x00000001\x00" + b"\3\0\0\0\1\0\0\0")
    assert (identity.kind, identity.num_classes) == ("tar", 4)
    assert identity.shard_hashes == (expected,)
    assert identity.shard_counts == (2,)


def test_the_imagenet_layout_has_splits_that_share_their_labels(tmp_path: Path) -> None:
    make_tree(tmp_path, ["train/a/1.jpg", "train/b/2.jpg", "train/c/3.jpg", "val/c/4.jpg", "val/b/5.jpg", "test/9.jpg"])
    (tmp_path / "annotations").mkdir()
    train, val = open_source(str(tmp_path)), open_source(str(tmp_path), split="val")
    assert labels_by_key(train) == {"a/1": 0, "b/2": 1, "c/3": 2}
    assert labels_by_key(val) == {"c/4": 2, "b/5": 1}
    assert val.class_names == train.class_names
    assert source_identity(train) == source_identity(open_source(str(tmp_path / "train")))
    assert validation_beside(str(tmp_path)) == str(tmp_path)
    assert validation_beside(str(tmp_path / "train")) == str(tmp_path / "val")
    assert validation_beside(str(tmp_path / "val")) is None
    assert validation_beside("train-{0..3}.tar") is None
    make_tree(tmp_path, ["val/zebra/1.jpg"])
    message = error_of(tmp_path, split="val")
    assert "1 class folders that the training split does not have: zebra" in message


def test_a_class_called_train_is_a_class_and_doubtful_layouts_are_refused(tmp_path: Path) -> None:
    make_tree(tmp_path, ["train/1.jpg", "bus/1.jpg"])
    assert open_source(str(tmp_path)).class_names == ("bus", "train")
    make_tree(tmp_path, ["val/1.jpg"])
    message = error_of(tmp_path)
    assert "has train/ and val/, and other folders with images beside them (bus)" in message


def test_a_missing_split_names_what_is_there(tmp_path: Path) -> None:
    make_tree(tmp_path, ["train/a/1.jpg"])
    message = error_of(tmp_path, split="val")
    assert "no val/ there, found train/" in message
    assert validation_beside(str(tmp_path)) is None


def test_all_mistakes_of_a_folder_are_told_at_once_with_names_and_counts(tmp_path: Path) -> None:
    make_tree(tmp_path, ["a/1.jpg", "loose.jpg", "a/bad\nname.jpg"])
    for number in range(7):
        (tmp_path / f"empty{number}").mkdir()
    (tmp_path / "empty0" / "image.gif").write_bytes(b"GIF")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "a" / "circle.png").symlink_to(tmp_path / "a" / "circle.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    message = error_of(tmp_path)
    assert len(message.splitlines()) == 5
    assert all(line.startswith(f"{tmp_path}: ") for line in message.splitlines())
    assert "7 class folders without images (jpg, jpeg, png, webp): empty0, empty1, empty2, empty3, empty4 " in message
    assert "empty4 and 2 more. Every sub-folder is a class" in message
    assert "1 images outside any class folder: loose.jpg." in message
    assert r"1 files whose path cannot be a key: a/bad\nname.jpg (holds a control character)." in message
    assert "2 links to images that are not there: " in message
    assert "a/gone.png" in message
    assert "a/circle.png" in message
    assert "1 links to folders that contain themselves: a/up." in message


def test_a_key_that_appears_twice_is_named_with_both_suffixes(tmp_path: Path) -> None:
    make_tree(tmp_path, ["a/1.jpg", "a/1.PNG", "a/2.jpg", "b/1.jpg"])
    message = error_of(tmp_path)
    assert "1 keys that appear twice" in message
    assert "a/1 (.PNG and .jpg)" in message or "a/1 (.jpg and .PNG)" in message


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    store = make_tree(tmp_path / "store", ["x/1.jpg", "y.png"])
    root = make_tree(tmp_path / "root", ["b/0.jpg"])
    (root / "a").symlink_to(store / "x")
    (root / "b" / "7.png").symlink_to(store / "y.png")
    assert labels_by_key(open_source(str(root))) == {"a/1": 0, "b/0": 1, "b/7": 1}


@pytest.mark.parametrize(
    ("name", "text"),
    [("", "no source given"), ("s3://b/images", "found no name of a tar"), ("pipe:cat x.tar", "commands are not run")],
)
def test_specs_that_cannot_be_a_source(name: str, text: str) -> None:
    assert text in error_of(name)


def test_paths_that_hold_no_source(tmp_path: Path) -> None:
    assert "found nothing there, expected a folder of classes" in error_of(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "found a file that is not a .tar there" in error_of(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no class folders found, expected" in error_of(tmp_path / "empty")
    with pytest.raises(ConfigError, match="shard_size: found 0, expected at least 1"):
        open_source(str(make_tree(tmp_path / "tree", ["a/1.jpg"])), shard_size=0)


def test_the_home_folder_is_found_and_an_unknown_user_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline file, or a shell that knows no such user, hands the ~ on."""
    make_tree(tmp_path / "tree", ["a/1.jpg"])
    make_tar(tmp_path / "x.tar", pairs(1))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_source("~/tree").shards[0].keys == ("a/1",)
    assert len(open_source("~/x.tar").shards) == 1
    with pytest.raises(SourceError, match="~nobody-of-that-name/tree: found nothing there"):
        open_source("~nobody-of-that-name/tree")
    assert validation_beside("~nobody-of-that-name/train") is None


def test_a_file_that_vanishes_is_an_error_with_its_path(tmp_path: Path) -> None:
    source = open_source(str(make_tree(tmp_path, ["a/1.jpg"])))
    (tmp_path / "a" / "1.jpg").unlink()
    with pytest.raises(SourceError, match=r"a/1\.jpg: cannot be read \(No such file or directory\)"):
        source.read(0, 0)


@pytest.mark.parametrize("place", [(0, 1), (1, 0), (0, -1), (-1, 0)])
def test_rows_and_shards_outside_the_source_are_index_errors(tmp_path: Path, place: tuple[int, int]) -> None:
    make_tree(tmp_path / "tree", ["a/1.jpg"])
    for source in (
        open_source(str(tmp_path / "tree")),
        open_source(str(make_tar(tmp_path / "x.tar", pairs(1)))),
    ):
        with pytest.raises(IndexError):
            source.read(*place)


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("a/b", None),
        ("./a..b/ü", None),
        ("", "empty"),
        ("/etc/passwd", "an absolute path"),
        ("a/../b", "holds a '..' component"),
        ("..", "holds a '..' component"),
        ("a\0b", "holds a control character"),
        ("a\x85b", "holds a control character"),
        ("a\udcffb", "not valid UTF-8"),
        ("ü" * 512, None),
        ("ü" * 513, "1026 bytes long, at most 1024 are allowed"),
    ],
)
def test_hostile_keys(key: str, problem: str | None) -> None:
    assert key_problem(key) == problem


@given(st.lists(st.binary(max_size=3), max_size=30))
@settings(deadline=None, max_examples=60)
def test_every_pair_of_equal_keys_is_found(keys: list[bytes]) -> None:
    order, twins = hash_order(keys)
    assert sorted(order.tolist()) == list(range(len(keys)))
    assert all(keys[a] == keys[b] and a < b for a, b in twins)
    assert len(twins) == len(keys) - len(set(keys))


def test_shards_are_a_sequence(tmp_path: Path) -> None:
    keys = [[f"{shard}/{row}".encode() for row in range(2)] for shard in range(40)]
    shards = PackedShards([f"s{shard}" for shard in range(40)], keys, np.arange(80, dtype=np.uint32))
    assert len(shards) == 40
    assert shards[3] is shards[3]
    assert shards[-1].keys == ("39/0", "39/1")
    assert [shard.name for shard in shards[1:6:2]] == ["s1", "s3", "s5"]
    assert [shards[number].keys for number in range(40)] == [shard.keys for shard in shards]
    assert not shards[0].labels.flags.writeable
    with pytest.raises(IndexError):
        shards[40]


# --- tars -------------------------------------------------------------------------------------------------------------


def write_webdataset(path: Path, labels: list[int], start: int) -> None:
    with webdataset.TarWriter(str(path)) as sink:
        for number, label in enumerate(labels, start=start):
            image = np.full((8, 8, 3), number, dtype=np.uint8)
            sample = {"__key__": f"s/{number:04d}", "jpg": image, "txt": "a caption"}
            sink.write(sample | ({"cls": label} if number % 2 else {"json": {"label": label, "url": "x"}}))


def test_tars_of_webdataset_in_the_order_of_the_pattern(tmp_path: Path) -> None:
    for number in range(4):
        write_webdataset(tmp_path / f"t-{number:02d}.tar", [0, 2, 1, number], start=4 * number)
    glob, brace = open_source(str(tmp_path / "t-*.tar")), open_source(str(tmp_path / "t-{03,{00..02}}.tar"))
    folder = open_source(str(tmp_path))
    assert [shard.name for shard in glob.shards] == [f"t-{number:02d}.tar" for number in range(4)]
    assert [shard.name for shard in brace.shards] == ["t-03.tar", "t-00.tar", "t-01.tar", "t-02.tar"]
    assert source_identity(folder) == source_identity(glob)
    assert (glob.kind, glob.num_classes, glob.class_names) == ("tar", 4, None)
    assert glob.shards[3].labels.tolist() == [0, 2, 1, 3]
    for number, shard in enumerate(glob.shards):
        with (tmp_path / shard.name).open("rb") as stream:
            theirs = list(group_by_keys(tar_file_expander([{"url": shard.name, "stream": stream}])))
        assert list(shard.keys) == [sample["__key__"] for sample in theirs]
        assert [glob.read(number, row) for row in range(4)] == [sample["jpg"] for sample in theirs]


def test_images_of_a_tar_that_belong_to_no_sample_are_said(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        names = ["a.jpg", "a.cls", "b.jpg", "b.cls", "b.seg.png", "c.3.jpg", ".d.png", "._e.jpg"]
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(str(number).encode()))
    with pytest.warns(PassedOverWarning, match=r"2 image files that .*: c\.3\.jpg in t\.tar, \.d\.png in t"):
        source = open_source(str(path))
    assert source.shards[0].keys == ("a", "b")


@given(st.text("ab._/J", max_size=12))
@settings(deadline=None, max_examples=300)
@example("__meta__/a.jpg")
@example("__meta__")
@example("a/.hidden.jpg")
@example(".hidden.jpg")
@example("./a.b/c.D.e")
def test_member_names_split_as_webdataset_does(name: str) -> None:
    meta = tarfile.TarInfo(name)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(meta)
    archive.seek(0)
    found = [sample["fname"] for sample in tar_file_expander([{"url": "x", "stream": archive}]) if "fname" in sample]
    key, extension = base_plus_ext(found[0]) if found else (None, None)
    if name.endswith("/") or not name:  # a folder, and a member without a name
        return
    if "/." in name and key is not None and key.endswith("/"):
        key = None  # hidden in a folder: theirs is a sample called 'folder/', we ignore hidden files everywhere
    assert split_member_name(name) == (None if key is None else (key, extension.lower()))


@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=140).map(
            lambda name: f"d{'/x' * (len(name) // 2)}/{name.replace('/', '_')}.bin"
        ),
        max_size=5,
    ),
    sizes=st.lists(st.integers(0, 5000), min_size=5, max_size=5),
    tar_format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
@settings(deadline=None, max_examples=60)
def test_members_are_found_where_tarfile_finds_them(names: list[str], sizes: list[int], tar_format: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "x.tar"
        with tarfile.open(path, "w", format=tar_format) as archive:
            for name, size in zip(names, sizes, strict=False):
                info = tarfile.TarInfo(name)
                info.size = size
                archive.addfile(info, io.BytesIO(os.urandom(size)))
                folder, link = tarfile.TarInfo("folder"), tarfile.TarInfo("link.jpg")
                folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "t" * 120
                archive.addfile(folder)
                archive.addfile(link)
        with tarfile.open(path) as archive:
            expected = [(info.name, info.offset_data, info.size) for info in archive if info.isreg()]
        assert [tuple(member) for member in TarReader(str(path)).members()] == expected


def test_ustar_prefixes_and_names_beyond_them(tmp_path: Path) -> None:
    long = "/".join(["directory"] * 14)
    path = make_tar(tmp_path / "x.tar", {f"{long}/1.jpg": b"x"}, tarfile.USTAR_FORMAT)
    assert [member.name for member in TarReader(str(path)).members()] == [f"{long}/1.jpg"]


def test_sizes_beyond_eight_gibibytes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("big.bin")
        info.size = 9 << 30
        with path.open("wb") as file:
            header = info.tobuf(tar_format)
            file.write(header)
            file.seek(info.size, os.SEEK_CUR)  # a hole: nothing is stored
            file.write(tarfile.TarInfo("end.bin").tobuf() + bytes(1024))
        members = list(TarReader(str(path)).members())
        assert [(member.name, member.num_bytes) for member in members] == [("big.bin", 9 << 30), ("end.bin", 0)]


def test_what_a_tar_sample_may_hold(tmp_path: Path) -> None:
    members = {
        "__meta__/info.json": b"{}",
        "./a.JPG": b"1", "./a.CLS": b" 7\n", "./a.txt": b"ignored", "./a.seg.png": b"ignored",
        "b/c.cls": b"3", "b/c.webp": b"2",
        "d.json": b'{"cls": 2}', "d.png": b"3",
        "e.jpeg": b"4", "e.cls": b"5", "e.json": b'{"label": "a word"}',
        "only.txt": b"ignored", "noextension": b"ignored", "._f.jpg": b"ignored",
    }  # fmt: skip
    source = open_source(str(make_tar(tmp_path / "x.tar", members)))
    assert labels_by_key(source) == {"./a": 7, "b/c": 3, "d": 2, "e": 5}
    assert [source.read(0, row) for row in range(4)] == [b"1", b"2", b"3", b"4"]


def test_all_mistakes_of_all_tars_are_told_at_once(tmp_path: Path) -> None:
    doubtful = {"lonely.jpg": b"x", "label.cls": b"1", "two.jpg": b"x", "two.png": b"y"}
    make_tar(tmp_path / "0.tar", pairs(0, 1) | doubtful)
    doubtful = {"w.jpg": b"x", "w.cls": b"dog", "up/../v.jpg": b"", "up/../v.cls": b"1"}
    make_tar(tmp_path / "1.tar", pairs(1, 0, first=1) | doubtful)
    make_tar(tmp_path / "2.tar", {"readme.txt": b"nothing"})
    message = error_of(tmp_path / "*.tar")
    assert "1 samples with an image and no label: lonely in 0.tar." in message
    assert "1 samples with a label and no image (jpg, jpeg, png, webp): label in 0.tar." in message
    assert "1 samples with more than one member of a kind: two in 0.tar." in message
    assert "1 labels that are not a class index: w in 1.tar (.cls holds 'dog', not a class index)." in message
    assert "1 samples whose name cannot be a key: up/../v in 1.tar (holds a '..' component)." in message
    assert "1 tars without a sample: 2.tar." in message
    assert "1 keys that appear twice: 000001 (0.tar and 1.tar)." in message
    assert len(message.splitlines()) == 7


def test_members_of_a_sample_must_lie_together(tmp_path: Path) -> None:
    message = error_of(make_tar(tmp_path / "x.tar", {"a.jpg": b"x", "b.txt": b"", "a.cls": b"1"}))
    assert "no label: a in x.tar" in message
    assert "no image (jpg, jpeg, png, webp): a in x.tar" in message


@pytest.mark.parametrize(
    ("cls", "document", "found"),
    [
        (b"-1", None, ".cls holds '-1'"),
        (b"", None, ".cls holds ''"),
        (b"4294967296", None, ".cls holds '4294967296'"),
        (b"1.0", None, ".cls holds '1.0'"),
        (None, b"{", "not valid JSON"),
        (None, b"\xff", "not valid JSON"),
        (None, b"[" * 100_000, "not valid JSON"),
        (None, b"[3]", "neither label nor cls"),
        (None, b'{"caption": "x"}', "neither label nor cls"),
        (None, b'{"label": true}', ".json holds label True"),
        (None, b'{"label": "7"}', ".json holds label '7'"),
        (None, b'{"cls": -1}', ".json holds cls -1"),
        (b"3", b'{"label": 4}', ".cls says 3, .json says 4"),
    ],
)
def test_labels_that_are_none(cls: bytes | None, document: bytes | None, found: str) -> None:
    with pytest.raises(ValueError, match=found.replace("(", r"\(")):
        parse_label(cls, document)


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_labels_up_to_32_bits(label: int) -> None:
    text = str(label).encode()
    assert parse_label(text, None) == parse_label(None, json.dumps({"label": label}).encode()) == label
    assert parse_label(text, json.dumps({"cls": label}).encode()) == label


def test_files_that_are_no_tar(tmp_path: Path) -> None:
    good = make_tar(tmp_path / "good.tar", pairs(0, 1)).read_bytes()
    bad = tmp_path / "bad.tar"
    for data, text in [
        (b"", "not a tar archive (0 bytes without a valid first header)"),
        (b"hello", "not a tar archive (5 bytes"),
        (jpeg() * 10, "not a tar archive"),
        (gzip.compress(good), "compressed with gzip"),
        (good[:1600], "truncated: 1600 bytes, but the archive goes on behind byte 1536"),
        (good[:1100], "truncated: 1100 bytes, but the archive goes on behind byte 0 "),
        (good[:1500] + b"\1" * 1000 + good[2500:], "damaged: no member header at byte"),
    ]:
        bad.write_bytes(data)
        message = error_of(bad)
        assert message.startswith(f"{bad}: ")
        assert text in message


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_a_tar_cut_anywhere_before_its_end_mark_is_truncated(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = make_tar(Path(root) / "x.tar", pairs(0, 1))
        whole = path.read_bytes()
        end = max(member.offset + 512 for member in TarReader(str(path)).members())
        path.write_bytes(whole[: data.draw(st.integers(512, end + 511))])
        assert "truncated" in error_of(path)


def test_a_flipped_bit_in_a_header_is_noticed(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", pairs(0, 1))
    whole = path.read_bytes()
    starts = [member.offset - 512 for member in TarReader(str(path)).members()]
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        # the sum ignores a change of the blank or NUL behind its own digits
        place = rng.choice([*range(148), *range(156, 512)])
        damaged[rng.choice(starts) + place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        message = error_of(path)
        assert "not a tar archive" in message or "damaged" in message


@given(
    member=st.integers(0, 5),
    place=st.sampled_from([0, 124, 125, 135, 156, 345, 511]),
    data=st.binary(min_size=1, max_size=12),
)
@settings(deadline=None, max_examples=150)
@example(member=1, place=124, data=b"-0000001000\0")
@example(member=1, place=124, data=b"\x80" + b"\xff" * 11)
def test_a_header_that_lies_ends_in_a_source_error(member: int, place: int, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        long = {"x" * 120 + ".jpg": b"7", "x" * 120 + ".cls": b"7"}
        path = make_tar(Path(root) / "x.tar", pairs(0) | long | pairs(1, first=1), tarfile.PAX_FORMAT)
        content = bytearray(path.read_bytes())
        with tarfile.open(path) as archive:
            starts = [info.offset_data - 512 for info in archive]
        header = content[starts[member] : starts[member] + 512]
        header[place : place + len(data)] = data[: 512 - place]
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)  # so that only the lie is wrong
        content[starts[member] : starts[member] + 512] = header
        path.write_bytes(content)
        with warnings.catch_warnings(), contextlib.suppress(SourceError):
            warnings.simplefilter("ignore", SingleClassShardWarning)
            _read_all(open_source(str(path)))


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.major": "1"}
    path.write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    assert "member a.jpg is sparse" in error_of(path)


def test_patterns_that_name_missing_or_repeated_tars(tmp_path: Path) -> None:
    make_tar(tmp_path / "0.tar", pairs(0, 1))
    assert "7 of 8 tars are missing: " in error_of(tmp_path / "{0..7}.tar")
    assert "and 2 more. Check the pattern" in error_of(tmp_path / "{0..7}.tar")
    assert "names 1 tars twice" in error_of(tmp_path / "{0,0}.tar")
    assert "braces do not match" in error_of(tmp_path / "{0..7.tar")
    assert "the pattern matches no file" in error_of(tmp_path / "x*.tar")
    assert "1 of 1 tars are missing" in error_of(tmp_path / "1.tar")


def test_shards_of_one_class_warn_once_and_say_why(tmp_path: Path) -> None:
    for number in range(7):
        make_tar(tmp_path / f"{number}.tar", pairs(number, number, first=10 * number))
    make_tar(tmp_path / "mixed.tar", pairs(0, 1, first=100))
    make_tar(tmp_path / "one.tar", pairs(0, first=200))
    with pytest.warns(SingleClassShardWarning) as caught:
        open_source(str(tmp_path / "*.tar"))
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "7 of 9 tar shards hold one class only: 0.tar, 1.tar, 2.tar, 3.tar, 4.tar and 2 more." in message
    assert "Mixing partners and shuffling stay inside a shard" in message
    assert caught[0].filename == __file__


def test_a_tar_that_changes_after_indexing_is_noticed_at_the_next_read(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", pairs(0, 1))
    whole = path.read_bytes()
    source = open_source(str(path))
    assert source.read(0, 0) == jpeg(0)
    for changed in (whole + bytes(512), whole[:900]):
        path.write_bytes(changed)
        for reader in (source, pickle.loads(pickle.dumps(source))):
            with pytest.raises(SourceError, match=rf"has {len(changed)} bytes, and had {len(whole)} when"):
                reader.read(0, 0)
    path.unlink()
    with pytest.raises(SourceError, match="cannot be opened"):
        pickle.loads(pickle.dumps(source)).read(0, 0)


# --- processes and threads --------------------------------------------------------------------------------------------


def _read_all(source: Source) -> dict[str, bytes]:
    return {
        key: source.read(number, row)
        for number, shard in enumerate(source.shards)
        for row, key in enumerate(shard.keys)
    }


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_a_source_travels_to_other_processes_with_its_handles_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_method: str
) -> None:
    monkeypatch.chdir(tmp_path)  # relative names must keep their meaning
    make_tar(tmp_path / "x.tar", pairs(0, 1, 2, 1))
    make_tree(tmp_path / "tree", ["a/1.jpg", "b/2.png"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads of other tests
        with multiprocessing.get_context(start_method).Pool(1) as pool:
            for source in (open_source("x.tar"), open_source("tree")):
                here = _read_all(source)
                assert len(here) == source_identity(source).num_samples
                assert pool.apply(_read_all, (source,)) == here
                assert pool.apply(source_identity, (source,)) == source_identity(source)


def test_many_tars_are_read_by_many_threads_with_few_open_files(tmp_path: Path) -> None:
    for number in range(70):
        make_tar(tmp_path / f"{number:02d}.tar", pairs(0, 1, first=2 * number))
    source = open_source(str(tmp_path / "*.tar"))
    expected = _read_all(source)
    failures: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            shard, row = rng.randrange(70), rng.randrange(2)
            if source.read(shard, row) != expected[source.shards[shard].keys[row]]:
                failures.append(f"{shard}/{row}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    descriptors = Path("/proc/self/fd")
    if descriptors.is_dir():
        held = [os.path.realpath(link) for link in descriptors.iterdir()]
        assert sum(name.startswith(str(tmp_path)) for name in held) <= 40
