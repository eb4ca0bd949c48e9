"""Where the bytes of a cache live: a local directory, or any URL that fsspec knows.

A newcomer's trap: a reader may list and read at any moment while others write, so a file appears whole or not at all.
Locally that is temporary file, fsync, rename, fsync of the directory; an object store's put is atomic by itself.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from vkd_cache.errors import ConfigError
from vkd_cache.runtime import expand_home

# Temporary files have a folder of their own, so that no listing of units or records ever meets one.
TEMPORARY = ".incomplete"


class Storage(Protocol):
    """Named blobs under one root. Paths are relative, with `/`. Picklable.

    Attributes:
        url: the root, as shown in messages.
    """

    url: str

    def put(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        """Store `data` whole or not at all; replaces, or with `exclusive` raises FileExistsError if it exists.

        Over a network, where an answer may be lost, an exclusive put finds the same content to be its own.
        """
        ...

    def get(self, path: str, *, most_bytes: int | None = None) -> bytes:
        """The bytes of `path`; FileNotFoundError if there is none.

        More than `most_bytes` are refused with a CorruptCacheError before they take memory: a file with holes costs
        nothing and claims any size.
        """
        ...

    def exists(self, path: str) -> bool:
        """Whether `path` is a file."""
        ...

    def size(self, path: str) -> int:
        """Bytes of `path`; FileNotFoundError if there is none."""
        ...

    def paths(self, prefix: str) -> list[str]:
        """Sorted paths of all files below the folder `prefix` ('' for all); empty if it does not exist."""
        ...

    def obstacles(self, kind_of: Callable[[str], str]) -> list[str]:
        """Sorted paths of folders where `kind_of(path)` is `file`, and of what is none where it is `folder`."""
        ...

    def delete_empty(self, path: str) -> bool:
        """Remove an empty folder, an empty file or a link; False if there is something in it, which stays."""
        ...

    def delete(self, path: str) -> None:
        """Remove `path` if it exists."""
        ...

    def prepare(self) -> list[str]:
        """Make the root fit for writing, and remove what writers that died have left: their paths."""
        ...

    def abandoned(self) -> list[str]:
        """Temporary files whose writer is dead."""
        ...


def open_storage(url: str) -> Storage:
    """The storage at `url`: a local path (a leading `~` is the home folder), or an fsspec URL such as `s3://bucket/cache`.

    Raises:
        ConfigError: an empty URL, a path through a file, or a protocol that fsspec does not know or has no library for.
    """
    if not url:
        raise ConfigError("cache: found an empty URL, expected a directory or an fsspec URL. Give --cache.")
    if "://" not in url:
        return _local(Path(expand_home(url)))
    if url.startswith("file://"):
        return _local(Path(url.removeprefix("file://")))
    from vkd_cache.cache.remote_storage import RemoteStorage

    return RemoteStorage(url)


def _local(root: Path) -> Storage:
    from vkd_cache.cache.local_storage import LocalStorage

    for folder in (root, *root.parents):
        if folder.is_file():
            raise ConfigError(f"cache: {root}: {folder} is a file, expected a directory. Give another path.")
    return LocalStorage(root)
