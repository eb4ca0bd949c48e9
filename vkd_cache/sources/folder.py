"""A folder of classes as a source: `root/<class>/.../<image>`, cut into shards in the order of the keys' hashes.

The order of the files on disk never matters. Shards are blocks of a fixed pseudo-random order, so that each holds all
kinds of samples: mixing partners and shuffling live inside a shard.
"""

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from vkd_cache.errors import BrokenImageError, ConfigError, SourceError
from vkd_cache.sources.findings import Findings, Problem
from vkd_cache.sources.keys import PackedShards, hash_order, key_problem, shown
from vkd_cache.sources.shard import Shard

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
MAX_IMAGE_BYTES = 2**30

_EMPTY_CLASS = Problem(
    "class folders without images (jpg, jpeg, png, webp)",
    "Every sub-folder is a class: remove the empty ones, or fill them.",
)
_LOOSE = Problem("images outside any class folder", "Move each into the folder of its class.")
_TWICE = Problem(
    "keys that appear twice (the key is the path without its suffix)", "Rename or remove one file of each pair."
)
_BAD_KEY = Problem("files whose path cannot be a key", "Rename them.")
_DANGLING = Problem("links to images that are not there", "Restore what they point to, or remove them.")
_LOOP = Problem("links to folders that contain themselves", "Remove them.")
_UNKNOWN_CLASS = Problem(
    "class folders that the training split does not have", "Labels would not agree between the splits: rename them."
)


class FolderSource:
    """A folder of classes, scanned once. Labels are positions in the sorted list of class folders.

    Attributes:
        kind, location, num_classes, class_names, shards: see `Source`.
    """

    kind: str = "folder"

    def __init__(
        self,
        root: Path,
        *,
        shard_size: int = 1024,
        location: str | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Scan `root`.

        Args:
            root: the folder that holds one folder a class.
            shard_size: samples per shard, at least 1; the last shard may hold fewer.
            location: what the user gave, for messages.
            class_names: the classes of the training split, when this is another one. Classes may then be missing
                here, and no other may appear. By default the sorted names of the folders.

        Raises:
            SourceError: no images, or anything that `docs/sources.md` lists; all mistakes in one message.
            ConfigError: shard_size is not positive.
        """
        if shard_size < 1:
            raise ConfigError(f"shard_size: found {shard_size}, expected at least 1 (the default is 1024).")
        self.location = str(root) if location is None else location
        self._root = str(root.absolute())  # abspath() would take "link/.." for nothing
        folders = class_folders(root)
        if not folders:
            raise SourceError(
                f"{root}: no class folders found, expected {root}/<class>/<image>. Give the folder that holds "
                "one folder for each class, or a pattern of .tar shards."
            )
        self.class_names: tuple[str, ...] | None = tuple(class_names if class_names is not None else folders)
        self.num_classes = len(self.class_names)
        keys, labels, suffixes = self._scan(root, folders, self.class_names)
        self._arrange(keys, labels, suffixes, shard_size)

    def read(self, shard: int, row: int) -> bytes:
        """The encoded image of sample `row` of shard `shard`; see `Source`."""
        suffix = self._suffixes[self._suffix_ids[self._packed.sample(shard, row)]]
        key = self.shards[shard].keys[row]
        return read_image(f"{self._root}/{key}{suffix}", self.location)

    def _scan(self, root: Path, folders: Sequence[str], names: Sequence[str]) -> "_Columns":
        findings = Findings(str(root))
        labels_of = {name: label for label, name in enumerate(names)}
        keys: list[bytes] = []
        labels, suffixes = array("I"), []
        known_suffixes: dict[str, str] = {}  # one string object for each spelling
        for name in folders:
            if name not in labels_of:
                findings.add(_UNKNOWN_CLASS, name)
                continue
            num_before, any_image = len(keys), False
            for key, suffix in image_files(root, name, findings):
                any_image = True
                problem = key_problem(key)
                if problem:
                    findings.add(_BAD_KEY, f"{shown(key + suffix)} ({problem})")
                    continue
                keys.append(key.encode("utf-8"))
                suffixes.append(known_suffixes.setdefault(suffix, suffix))
            labels.extend([labels_of[name]] * (len(keys) - num_before))
            if not any_image:
                findings.add(_EMPTY_CLASS, name)
        for name in _loose_images(root):
            findings.add(_LOOSE, name)
        findings.raise_any()
        return keys, labels, suffixes

    def _arrange(self, keys: list[bytes], labels: "array[int]", suffixes: list[str], shard_size: int) -> None:
        """Put the samples into the order of their hashes and cut it into shards."""
        order, twins = hash_order(keys)
        findings = Findings(self.location)
        for one, other in twins:
            findings.add(_TWICE, f"{shown(keys[one].decode())} ({suffixes[one]} and {suffixes[other]})")
        findings.raise_any()
        self._suffixes = tuple(sorted(set(suffixes)))  # 48 spellings of four extensions at most
        ids = {suffix: position for position, suffix in enumerate(self._suffixes)}
        self._suffix_ids = np.fromiter((ids[suffix] for suffix in suffixes), dtype=np.uint8)[order]
        cuts = range(0, len(keys), shard_size)
        self._packed = PackedShards(
            [f"block-{number:06d}" for number in range(len(cuts))],
            ([keys[position] for position in order[cut : cut + shard_size]] for cut in cuts),
            np.asarray(labels, dtype=np.uint32)[order],
        )
        self.shards: Sequence[Shard] = self._packed


_Columns = tuple[list[bytes], "array[int]", list[str]]


def read_image(path: str, location: str) -> bytes:
    """The bytes of a file that was there when `location` was scanned.

    Raises:
        SourceError: it is there no more, or cannot be read.
        BrokenImageError: it is far too large to be an image.
    """
    try:
        # no Path: each interns the names in it, and millions of them swell the interpreter's table of such strings
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            check_image_bytes(os.fstat(file.fileno()).st_size)
            return file.readall()
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read ({error.strerror}); it was there when {location} was scanned. "
            "Restore it, and start again: samples are never dropped silently."
        ) from error


def check_image_bytes(num_bytes: int) -> None:
    """Refuse what no decoder would take, before it is read: a sparse file may claim more than there is memory.

    Raises:
        BrokenImageError: more than MAX_IMAGE_BYTES.
    """
    if num_bytes > MAX_IMAGE_BYTES:
        raise BrokenImageError(f"file of more than {MAX_IMAGE_BYTES} bytes")


def file_names(folder: Path) -> set[str]:
    """Names of the files in `folder`, and of links to files.

    Raises:
        SourceError: `folder` cannot be listed.
    """
    with _listing(str(folder)) as entries:
        return {entry.name for entry in entries if _is_file(entry)}


def class_folders(root: Path) -> list[str]:
    """Sorted names of the folders in `root` that are not hidden.

    Raises:
        SourceError: `root` cannot be listed.
    """
    with _listing(str(root)) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))


def image_files(root: Path, folder: str, findings: Findings | None = None) -> Iterator[tuple[str, str]]:
    """(key, suffix) of every image under `root/folder`, at any depth, in the disk's order; hidden entries are skipped.

    No file is looked at by itself: a directory's listing says what is a file, unless it is a link.
    """
    pending = [folder]
    while pending:
        prefix = pending.pop()
        with _listing(f"{root}/{prefix}") as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                stem, dot, extension = entry.name.rpartition(".")
                is_image = dot and extension.lower() in IMAGE_EXTENSIONS
                if is_image and _is_file(entry):
                    yield f"{prefix}/{stem}", f".{extension}"
                elif _is_folder(entry):
                    if not (entry.is_symlink() and _is_loop(entry)):
                        pending.append(f"{prefix}/{entry.name}")
                    elif findings:
                        findings.add(_LOOP, f"{prefix}/{entry.name}")
                elif is_image and entry.is_symlink() and findings:
                    findings.add(_DANGLING, f"{prefix}/{entry.name}")


def _loose_images(root: Path) -> list[str]:
    with _listing(str(root)) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and entry.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
            and _is_file(entry)
        )


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads in a circle
        return False


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_loop(link: "os.DirEntry[str]") -> bool:
    target = os.path.realpath(link.path)
    here = os.path.realpath(Path(link.path).parent)
    return f"{here}/".startswith(f"{target.rstrip('/')}/")


def _listing(folder: str) -> "AbstractContextManager[Iterator[os.DirEntry[str]]]":
    try:
        return os.scandir(folder)
    except OSError as error:
        raise SourceError(
            f"{shown(folder)}: the folder cannot be listed ({error.strerror}). Check that it is there and readable."
        ) from error
