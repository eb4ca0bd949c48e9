"""From what a user writes after `--source` to an opened source."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import braceexpand

from vkd_cache.errors import SourceError
from vkd_cache.local_copies import LocalCopies, open_copies
from vkd_cache.runtime import expand_home
from vkd_cache.sources.coco import CocoSource
from vkd_cache.sources.findings import first_few
from vkd_cache.sources.folder import FolderSource, class_folders, image_files
from vkd_cache.sources.keys import shown
from vkd_cache.sources.shard import Source
from vkd_cache.sources.tars import LocalTars, TarSource
from vkd_cache.urls import check_url, is_remote

_SPLITS = ("train", "val", "test")
_MAX_TARS = 2**20
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?")
_DEEPEST = 32  # braces within braces
_COCO_FOLDER = re.compile(r"(train|val)20\d\d")


def open_source(
    spec: str, *, split: str = "train", shard_size: int = 1024, copies: LocalCopies | None = None
) -> Source:
    """Open and index a data set.

    Args:
        spec: a folder of classes; a folder with train/ and val/; COCO's folder, with annotations/; a folder of tars;
            or one tar, or a brace or glob pattern of tars. Tars may lie behind a URL that fsspec knows.
        split: which of train/ and val/, or of COCO's splits, where the folder has them; without effect on the other
            forms.
        shard_size: samples per shard of a folder or COCO source; tar shards keep their own.
        copies: where tars from behind a URL are copied to (None: 100 GB in the user's own cache folder), and where the
            index of others is kept (None: it is not).

    Raises:
        SourceError: nothing is there, or the data set cannot be used as it is; see `docs/sources.md`.
        ConfigError: a URL that cannot be used, or carries credentials; a bound too small for the tars behind it.
        StorageError: a store that does not answer.
    """
    if not spec:
        raise SourceError("no source given, expected a folder of classes or a pattern of tars. Give --source.")
    if spec.startswith("pipe:"):
        raise SourceError(f"{spec}: commands are not run, expected a folder or a pattern of tars. Give --source.")
    if is_remote(spec):
        return _open_remote(spec, copies or open_copies())
    spec = spec.removeprefix("file://")
    root = Path(expand_home(spec))
    if root.is_dir():
        return _open_folder(root, spec, split, shard_size, copies)
    if ".tar" in spec:
        return TarSource(LocalTars(expand_pattern(spec), copies), location=spec)
    found = "a file that is not a .tar" if root.exists() else "nothing"
    raise SourceError(
        f"{spec}: found {found} there, expected a folder of classes (root/class/image.jpg), a folder with train/ and "
        "val/, COCO's folder (with annotations/), or a pattern of .tar shards. Check the path."
    )


def validation_beside(spec: str) -> str | None:
    """Where the validation split lies when only the training split is given: to be opened with `split="val"`.

    The folder itself when it holds train/ and val/, or COCO's annotations of a validation split; `val` beside a folder
    named train; None for anything else.
    """
    root = Path(expand_home(spec.removeprefix("file://")))
    if not spec or is_remote(spec) or not root.is_dir():
        return None
    if _is_coco_layout(root):
        return spec if _annotation_files(root, "val") else None
    if _is_split_layout(root) and (root / "val").is_dir():
        return spec
    beside = Path(os.path.abspath(root)).parent / "val"  # noqa: PTH100 - of the name given, not of a link's target
    return str(beside) if Path(os.path.abspath(root)).name == "train" and beside.is_dir() else None  # noqa: PTH100


def expand_pattern(pattern: str) -> list[str]:
    """The tars a pattern names: braces in their own order, and what each glob finds sorted.

    Raises:
        SourceError: a brace that is not closed, a tar that is missing or named twice, or a glob that finds nothing.
    """
    if Path(pattern).is_file():
        return [pattern]
    parts = _without_braces(pattern)
    paths = [path for part in parts for path in _expand_glob(expand_home(part))]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise SourceError(
            f"{pattern}: {len(missing)} of {len(paths)} tars are missing: {first_few(missing)}. Check the pattern, or "
            "copy what is missing: a run on part of a data set is never started silently."
        )
    _check_twice(pattern, paths)
    return paths


def _open_remote(spec: str, copies: LocalCopies) -> Source:
    from vkd_cache.sources.remote_tars import RemoteTars, remote_tar_urls

    check_url(spec, "source")
    urls = remote_tar_urls(_without_braces(spec))
    _check_twice(spec, urls)
    return TarSource(RemoteTars(urls, copies, location=spec), location=spec)


def _check_twice(pattern: str, tars: list[str]) -> None:
    twice = [path for path, count in Counter(tars).items() if count > 1]
    if twice:
        raise SourceError(f"{pattern}: names {len(twice)} tars twice: {first_few(twice)}. Name each once.")


def _without_braces(pattern: str) -> list[str]:
    if _num_named(pattern) > _MAX_TARS:
        raise SourceError(f"{shown(pattern)}: names more than {_MAX_TARS} tars. Check the braces.")
    try:
        return list(braceexpand.braceexpand(pattern))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{pattern}: braces do not match, expected for example train-{{000..146}}.tar.") from error


def _num_named(pattern: str) -> int:
    """At least as many as the tars that a pattern names: braceexpand makes them all, however many."""
    named, depth = 1, 0
    while named <= _MAX_TARS and (groups := _BRACES.findall(pattern)):
        depth += 1
        if depth > _DEEPEST:
            return _MAX_TARS + 1
        for group in groups:
            numbers = _NUMBERS.fullmatch(group)
            far = numbers is not None and max(map(len, numbers.groups())) > 18
            named *= _MAX_TARS + 1 if far else _num_between(numbers) if numbers else group.count(",") + 1
            if named > _MAX_TARS:
                break
        pattern = _BRACES.sub("", pattern)
    return named


def _num_between(numbers: re.Match[str]) -> int:
    return abs(int(numbers[2]) - int(numbers[1])) + 1


def _expand_glob(part: str) -> Iterator[str]:
    if Path(part).is_file() or not glob.has_magic(part):
        yield part
        return
    found = sorted(glob.glob(part, recursive=True))  # noqa: PTH207 - keeps the spelling that the user gave
    if not found:
        raise SourceError(
            f"{part}: the pattern matches no file. Check it, and quote it, so that the shell leaves it alone."
        )
    yield from found


def _open_folder(root: Path, spec: str, split: str, shard_size: int, copies: LocalCopies | None) -> Source:
    if _is_coco_layout(root):
        return _open_coco(root, spec, split, shard_size)
    if (root.absolute().parent / "annotations" / f"instances_{root.absolute().name}.json").is_file():
        raise SourceError(
            f"{spec}: one folder of images of a COCO layout, expected the folder above it, which holds annotations/. "
            f"Give {root.absolute().parent}."
        )
    class_names = None
    if _is_split_layout(root):
        folder = root / split
        if not folder.is_dir():
            there = [name for name in _SPLITS if (root / name).is_dir()]
            raise SourceError(
                f"{spec}: no {split}/ there, found {', '.join(f'{name}/' for name in there)}. Give the folder of the "
                "split itself, or add the missing one."
            )
        if split != "train" and (root / "train").is_dir():
            class_names = class_folders(root / "train") or None  # labels have to mean the same in both
        root = folder
    folders = class_folders(root)
    tars = sorted(str(path) for path in root.glob("*.tar") if not path.name.startswith("."))
    if tars and not folders:
        return TarSource(LocalTars(tars, copies), location=spec)
    return FolderSource(root, shard_size=shard_size, location=spec, class_names=class_names)


def _annotation_files(root: Path, split: str = "") -> list[Path]:
    return sorted((root / "annotations").glob(f"instances_{split}*.json"))


def _is_coco_layout(root: Path) -> bool:
    """Whether `root` has COCO's annotation files, or folders called like COCO's, which cannot be meant as classes."""
    return bool(_annotation_files(root)) or any(_COCO_FOLDER.fullmatch(name) for name in class_folders(root))


def _open_coco(root: Path, spec: str, split: str, shard_size: int) -> CocoSource:
    """The split whose annotation file is annotations/instances_<split><rest>.json, with images in <split><rest>/.

    Raises:
        SourceError: no such file, more than one, no folder for it, or anything that `CocoSource` raises.
    """
    found = _annotation_files(root, split)
    wanted = f"annotations/instances_{split}*.json"
    if not found:
        there = first_few([f"annotations/{path.name}" for path in _annotation_files(root)]) or "no annotation file"
        raise SourceError(
            f"{spec}: no {wanted} there, found {there}. Download COCO's annotations (annotations_trainval2017.zip), "
            "or write one for these images."
        )
    if len(found) > 1:
        names = first_few([path.name for path in found])
        raise SourceError(f"{spec}: {len(found)} files {wanted}: {names}, expected one. Move the others away.")
    images = root / found[0].stem.removeprefix("instances_")
    if not images.is_dir():
        raise SourceError(
            f"{spec}: annotations/{found[0].name} is there, but not the folder of its images, {images.name}/. "
            "Download or link it, or name the annotation file after the folder."
        )
    return CocoSource(found[0], images, shard_size=shard_size, location=spec)


def _is_split_layout(root: Path) -> bool:
    """Whether the folders in `root` are splits, not classes.

    Raises:
        SourceError: train/ and val/ beside other folders with images: which is meant cannot be told.
    """
    folders = class_folders(root)
    others = [name for name in folders if name not in _SPLITS]
    if "train" not in folders and "val" not in folders:
        return False
    if others and not ("train" in folders and "val" in folders):
        return False  # one class of many may well be called train
    with_images = [name for name in others if any(True for _ in image_files(root, name))]
    if with_images:
        raise SourceError(
            f"{root}: has train/ and val/, and other folders with images beside them ({first_few(with_images)}): are "
            "these splits or classes? Give the folder of the split itself, or move the others away."
        )
    return True
