"""A cache in a directory of this machine, or of a network file system.

A newcomer's trap: a reader may list and read at any moment while others write, so a file appears whole or not at all:
temporary file, fsync, rename, fsync of the directory. Network file systems lack some of it (locks, hard links, modes,
syncing of directories, renaming over a file) or show a new file late: then the next best thing is done, and nothing
that is published ever rests on what is lacking.
"""

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vkd_cache.cache.storage import TEMPORARY
from vkd_cache.errors import CacheError, CorruptCacheError
from vkd_cache.runtime import LACKING, replace_file, sync_directory

_ATTEMPTS = 100
# A file that must be there is looked for again after these times: NFS may hide a new one for a while. A cache that has
# lost many files is not waited for at each: after so many waits, no more.
_LOOK_AGAIN_S = (0.0, 0.05, 0.2, 1.0)
_WAITS = 4


class LocalStorage:
    """Files below a directory of this machine, or of a network file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)
        self._waits = _WAITS

    def put(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        """See `Storage.put`."""
        target = self._place(path)
        self._make_directory(target.parent)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder is where a file has to go", str(target))
        for _ in range(_ATTEMPTS):
            handle, temporary = self._open_temporary()
            try:
                _write_all(handle, data)
                (_create if exclusive else replace_file)(temporary, target)
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

    def get(self, path: str, *, most_bytes: int | None = None) -> bytes:
        """See `Storage.get`."""
        place = self.root / path
        if path.startswith("units/"):
            self._await(place)  # a record has named it
        with open(_open_plain(place), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if most_bytes is not None and status.st_size > most_bytes:
                raise CorruptCacheError(
                    f"{place}: found {status.st_size} bytes, at most {most_bytes} can be right. Restore it from a copy."
                )
            try:
                return file.readall()
            except MemoryError as error:
                raise CacheError(f"{place}: {status.st_size} bytes are more than there is memory for.") from error

    def exists(self, path: str) -> bool:
        """See `Storage.exists`."""
        return (self.root / path).is_file()

    def size(self, path: str) -> int:
        """See `Storage.size`."""
        return (self.root / path).stat().st_size

    def paths(self, prefix: str) -> list[str]:
        """See `Storage.paths`."""
        return sorted(path for path, entry in self._walk(prefix) if not entry.is_dir(follow_symlinks=False))

    def _walk(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Everything below a folder, folders too, by its path from the root; links are not followed."""
        pending = [prefix]
        while pending:
            folder = pending.pop()
            for entry in self._entries(folder):
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)
                yield path, entry

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """What is in a folder; nothing where there is none, or something else."""
        try:
            with os.scandir(self.root / folder) as entries:
                return list(entries)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return []
            raise

    def obstacles(self, kind_of: Callable[[str], str]) -> list[str]:
        """See `Storage.obstacles`. A link to a folder is one for reading, and no obstacle."""
        found = []
        for path, entry in self._walk(""):
            wanted = kind_of(path)
            is_folder = entry.is_dir(follow_symlinks=False)
            if (wanted == "file" and is_folder) or (wanted == "folder" and not Path(entry.path).is_dir()):
                found.append(path)
        return sorted(found)

    def delete_empty(self, path: str) -> bool:
        """See `Storage.delete_empty`."""
        place = self._place(path)
        with contextlib.suppress(FileNotFoundError):
            if place.is_dir() and not place.is_symlink():
                try:
                    place.rmdir()
                except OSError as error:
                    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                        return False
                    raise
            elif place.is_symlink() or not place.stat().st_size:
                place.unlink()
            else:
                return False
        return True

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        self._place(path).unlink(missing_ok=True)

    def prepare(self) -> list[str]:
        """See `Storage.prepare`."""
        self._make_directory(self.root / TEMPORARY)
        removed = []
        for path in self.abandoned():
            with contextlib.suppress(FileNotFoundError):  # a job that starts at the same time removes, and counts, some
                self._place(path).unlink()
                removed.append(path)
        return removed

    def abandoned(self) -> list[str]:
        """See `Storage.abandoned`. A living writer holds a lock on its file."""
        self._place(f"{TEMPORARY}/any")
        return [path for path in self.paths(TEMPORARY) if self._is_abandoned(self.root / path)]

    def _is_abandoned(self, temporary: Path) -> bool:
        try:
            handle = os.open(temporary, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                return False  # a link or a device: nothing that a writer of ours has left
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in LACKING:
                return False  # a file system without locks: better a stray file than a living writer's
            raise
        finally:
            os.close(handle)
        return True

    def _open_temporary(self) -> tuple[int, Path]:
        folder = self._place(f"{TEMPORARY}/any").parent
        self._make_directory(folder)
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=folder)
        # mkstemp is for secrets: 0600. A cache is shared with the same people as the files around it.
        with contextlib.suppress(OSError):
            os.fchmod(handle, 0o666 & ~_umask(folder))
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        return handle, Path(name)

    def _await(self, place: Path) -> None:
        """Wait for a file that another machine has written: listing its folder makes NFS ask the server again."""
        if place.exists() or not self._waits:
            return
        for pause_s in _LOOK_AGAIN_S:
            time.sleep(pause_s)
            with contextlib.suppress(OSError), os.scandir(place.parent) as entries:
                next(entries, None)
            if place.exists():
                return
        self._waits -= 1

    def _place(self, path: str) -> Path:
        """Where to write or remove `path`: below the root, and through no link, which could lead anywhere.

        Raises:
            CacheError: a folder on the way is a link.
        """
        place = self.root
        for name in path.split("/")[:-1]:
            place = place / name
            if place.is_symlink():
                raise CacheError(
                    f"{place}: is a link to {str(place.readlink())!r}: nothing is written or removed through links "
                    "inside a cache. Replace it by the folder itself, or give another --cache."
                )
        return self.root / path

    def _make_directory(self, directory: Path) -> None:
        if directory.is_dir():
            return
        missing = [directory, *(parent for parent in directory.parents if not parent.exists())]
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # elsewhere this says that another writer was first
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory)) from error
        for made in missing:
            sync_directory(made.parent)


def _open_plain(place: Path) -> int:
    """A handle of a file, to read.

    Raises:
        CorruptCacheError: something else is there: a folder, a pipe, a link to nothing, or a file for a folder.
        OSError: it cannot be opened.
    """
    cure = "Restore it from a copy, or run `vkd-cache verify --repair`."
    try:
        # without waiting: a pipe in a stranger's cache may have nobody at its other end
        handle = os.open(place, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP or (error.errno == errno.ENOENT and place.is_symlink()):
            raise CorruptCacheError(f"{place}: is a link that leads nowhere, expected a plain file. {cure}") from error
        if error.errno == errno.ENOTDIR:
            raise CorruptCacheError(f"{place}: a file is where one of its folders should be. {cure}") from error
        raise
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    found = "is a folder" if stat.S_ISDIR(mode) else "is no plain file"
    raise CorruptCacheError(f"{place}: {found}, expected a plain file. {cure}")


def _umask(folder: Path) -> int:
    # os.umask can only be read by changing it, which other threads would see: read it off a folder made under it
    return ~folder.stat().st_mode & 0o777


def _create(temporary: Path, target: Path) -> None:
    """Make `target` of a finished temporary file, or raise FileExistsError: a hard link is the only step that can."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        if not target.samefile(temporary):  # else NFS has sent our own request twice
            raise
    except OSError as error:
        if error.errno not in LACKING:
            raise
        # Without hard links two first writers may both pass here. Both then read what is there, and what was written
        # for the one that lost carries another fingerprint, which every reader refuses.
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        temporary.replace(target)
        return
    temporary.unlink()


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
    os.fsync(handle)
