"""Where the bytes of a cache live: a local directory, or any URL that fsspec knows.

A newcomer's trap: a reader may list and read at any moment while others write, so a file appears whole or not at all.
Locally that is temporary file, fsync, rename, fsync of the directory; an object store's put is atomic by itself.
"""

import contextlib
import errno
import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

from vkd_cache.errors import CacheError, ConfigError
from vkd_cache.runtime import expand_home, sync_directory

# Temporary files have a folder of their own, so that no listing of units or records ever meets one.
TEMPORARY = ".incomplete"
_ATTEMPTS = 100


class Storage(Protocol):
    """Named blobs under one root. Paths are relative, with `/`. Picklable.

    Attributes:
        url: the root, as shown in messages.
    """

    url: str

    def put(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        """Store `data` whole or not at all; replaces, or with `exclusive` raises FileExistsError if it exists."""
        ...

    def get(self, path: str) -> bytes:
        """The bytes of `path`; FileNotFoundError if there is none."""
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

    def delete(self, path: str) -> None:
        """Remove `path` if it exists."""
        ...

    def prepare(self) -> None:
        """Make the root fit for writing, and remove what writers that died have left."""
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
    return RemoteStorage(url)


def _local(root: Path) -> "LocalStorage":
    for folder in (root, *root.parents):
        if folder.is_file():
            raise ConfigError(f"cache: {root}: {folder} is a file, expected a directory. Give another path.")
    return LocalStorage(root)


class LocalStorage:
    """Files below a directory of this machine, or of a network file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def put(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        """See `Storage.put`."""
        target = self.root / path
        self._make_directory(target.parent)
        for _ in range(_ATTEMPTS):
            handle, temporary = self._open_temporary()
            try:
                _write_all(handle, data)
                if exclusive:
                    os.link(temporary, target)
                    temporary.unlink()
                else:
                    temporary.replace(target)
            except FileNotFoundError:
                continue  # another writer took our file for a dead one's, between its creation and our lock
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            finally:
                os.close(handle)
            sync_directory(target.parent)
            return
        raise CacheError(f"{target}: could not be written: its temporary file was removed {_ATTEMPTS} times.")

    def get(self, path: str) -> bytes:
        """See `Storage.get`."""
        return (self.root / path).read_bytes()

    def exists(self, path: str) -> bool:
        """See `Storage.exists`."""
        return (self.root / path).is_file()

    def size(self, path: str) -> int:
        """See `Storage.size`."""
        return (self.root / path).stat().st_size

    def paths(self, prefix: str) -> list[str]:
        """See `Storage.paths`."""
        found: list[str] = []
        pending = [prefix]
        while pending:
            folder = pending.pop()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root / folder) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(path)
                    else:
                        found.append(path)
        return sorted(found)

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        (self.root / path).unlink(missing_ok=True)

    def prepare(self) -> None:
        """See `Storage.prepare`."""
        self._make_directory(self.root / TEMPORARY)
        for path in self.abandoned():
            self.delete(path)

    def abandoned(self) -> list[str]:
        """See `Storage.abandoned`. A living writer holds a lock on its file."""
        return [path for path in self.paths(TEMPORARY) if self._is_abandoned(self.root / path)]

    def _is_abandoned(self, temporary: Path) -> bool:
        try:
            handle = os.open(temporary, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                return False  # a file system without locks: better a stray file than a living writer's
            raise
        finally:
            os.close(handle)
        return True

    def _open_temporary(self) -> tuple[int, Path]:
        folder = self.root / TEMPORARY
        self._make_directory(folder)
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=folder)
        # mkstemp is for secrets: 0600. A cache is shared with the same people as the files around it.
        os.fchmod(handle, 0o666 & ~_umask(folder))
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        return handle, Path(name)

    def _make_directory(self, directory: Path) -> None:
        if directory.is_dir():
            return
        missing = [directory, *(parent for parent in directory.parents if not parent.exists())]
        directory.mkdir(parents=True, exist_ok=True)
        for made in missing:
            sync_directory(made.parent)


def _umask(folder: Path) -> int:
    # os.umask can only be read by changing it, which other threads would see: read it off a folder made under it
    return ~folder.stat().st_mode & 0o777


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
    os.fsync(handle)


class RemoteStorage:
    """Objects behind an fsspec URL."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._filesystem, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"cache: {url}: {error}. Give a directory, or a URL that fsspec knows.") from error
        self._root = self._root.rstrip("/")
        self.url = url.rstrip("/")

    def put(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        """See `Storage.put`. Exclusive only as far as the object store can refuse an existing name."""
        target = self._path(path)
        if not exclusive:
            self._filesystem.pipe_file(target, data)
            return
        self._filesystem.invalidate_cache()
        if self._filesystem.exists(target):
            raise FileExistsError(target)
        self._filesystem.pipe_file(target, data, mode="create")

    def get(self, path: str) -> bytes:
        """See `Storage.get`."""
        return bytes(self._filesystem.cat_file(self._path(path)))

    def exists(self, path: str) -> bool:
        """See `Storage.exists`."""
        self._filesystem.invalidate_cache()
        return bool(self._filesystem.isfile(self._path(path)))

    def size(self, path: str) -> int:
        """See `Storage.size`."""
        return int(self._filesystem.size(self._path(path)))

    def paths(self, prefix: str) -> list[str]:
        """See `Storage.paths`."""
        self._filesystem.invalidate_cache()
        folder = self._path(prefix) if prefix else self._root
        try:
            found: list[Any] = self._filesystem.find(folder)
        except FileNotFoundError:
            return []
        start = len(self._root) + 1
        return sorted(str(path)[start:] for path in found)

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self._path(path))

    def prepare(self) -> None:
        """See `Storage.prepare`: an object store needs nothing."""

    def abandoned(self) -> list[str]:
        """See `Storage.abandoned`: puts are atomic, so there are none."""
        return []

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"
