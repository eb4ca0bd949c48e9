"""Local copies of objects behind URLs: one folder with a bound, shared by any number of threads, processes and jobs.

The bound is of everything in the folder: copies at rest, small documents kept beside them, and the whole size of each
object that is being fetched, reserved before its first byte is asked for. Room is made by removing what was used
longest ago. A newcomer's trap: a copy may be removed by anybody at any moment, so `open` hands out an open file, which
stays readable; its space is free when it is closed.

    <folder>/copies/<name>         whole copies; the time of modification is that of the last use
    <folder>/lasting/<name>        documents: cheap to keep, dear to make again; removed a month later than copies are
    <folder>/fetching/<name>/      `lock`, held by who fetches, as long as the bytes reserved; `data`, what has come
    <folder>/space.lock            held while room is made
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from vkd_cache.errors import ConfigError, StorageError
from vkd_cache.runtime import expand_home, user_cache_folder, write_atomic

GB = 10**9
DEFAULT_GB = 100.0

_FULL = (errno.ENOSPC, errno.EDQUOT)
_LASTING_NS = 30 * 24 * 3600 * 10**9
_LOOK_AGAIN_S = 0.02


@dataclasses.dataclass(frozen=True)
class Original:
    """One version of a remote object.

    Attributes:
        url: of the object.
        num_bytes: its size.
        version: what changes when the object does: its ETag, or a digest of its content.
    """

    url: str
    num_bytes: int
    version: str

    @property
    def name(self) -> str:
        """A file name that no other version of any other object has."""
        text = f"{self.url}\0{self.num_bytes}\0{self.version}"
        return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogateescape"))


class LocalCopies:
    """Copies below `folder`, of at most `max_bytes` together. Picklable; the folder is made when it is first needed.

    Jobs with different bounds may share a folder: each keeps to its own when it fetches.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def open(self, original: Original, fetch: Callable[[Path], object]) -> int:
        """A copy of `original` as an open file descriptor, to be closed by the caller.

        Args:
            original: what is wanted.
            fetch: writes the object to the path it is given; called only if there is no copy, and by one of all that
                want it at the same time, while the others wait. What it raises goes to the caller.

        Raises:
            ConfigError: the object alone is larger than the bound.
            StorageError: the folder cannot be used, its disk is full, or what was fetched has another size.
        """
        return self._open(self.folder / "copies" / original.name, original, fetch)

    def touch(self, original: Original) -> None:
        """Let the copy of `original`, if there is one, be the last to be removed: it is still in use."""
        with self._own_errors(), contextlib.suppress(FileNotFoundError):
            _touch(self.folder / "copies" / original.name)

    def drop(self, original: Original) -> None:
        """Remove the copy of `original`, if there is one: it is damaged."""
        with self._own_errors():
            (self.folder / "copies" / original.name).unlink(missing_ok=True)

    def keep(self, original: Original, kind: str, data: bytes) -> None:
        """Keep a small document about `original`, in place of an older one, unless the bound has no room.

        Raises:
            StorageError: as `open`.
        """
        document = Original(original.url, len(data), original.version)
        with self._own_errors():
            self._document(original, kind).unlink(missing_ok=True)  # it may be damaged
        if len(data) <= self.max_bytes:
            os.close(self._open(self._document(original, kind), document, lambda target: target.write_bytes(data)))

    def note(self, original: Original, kind: str, data: bytes) -> None:
        """As `keep`, for a few bytes that must be there before a copy is: called by what fetches it.

        They count from the next time that room is made; reserved now, they might wait for the very copy's own room.
        """
        document = self._document(original, kind)
        with self._own_errors():
            document.parent.mkdir(exist_ok=True)
            document.write_bytes(data)

    def keep_if_room(self, original: Original, kind: str, data: bytes, *, at_most: int) -> None:
        """As `keep`, if there is room beside all that is there: nothing is removed for it, and nobody waited for.

        Args:
            original, kind, data: as there.
            at_most: documents of this kind that are kept; those used longest ago go.

        Raises:
            StorageError: the folder cannot be used, or its disk is full.
        """
        document = self._document(original, kind)
        with self._own_errors():
            document.parent.mkdir(parents=True, exist_ok=True)
            # what blocks: somebody makes room, or waits for it
            with contextlib.suppress(BlockingIOError), self._space(fcntl.LOCK_EX | fcntl.LOCK_NB):
                alike = [file for file in _files(document.parent) if file[2].suffix == document.suffix]
                others = sorted(file for file in alike if file[2] != document)
                for _, _, path in others[: max(0, len(others) - at_most + 1)]:
                    path.unlink(missing_ok=True)
                fetching, at_rest = self._taken()
                if fetching + sum(size for _, size, _ in at_rest) + len(data) <= self.max_bytes:
                    write_atomic(document, data)

    def kept(self, original: Original, kind: str) -> bytes | None:
        """The document of this kind about `original`; None if there is none (any more)."""
        path = self._document(original, kind)
        with self._own_errors():
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                return None
            _mark_used(path)
        return data

    def room_bytes(self) -> int:
        """The bound without what documents take."""
        with self._own_errors():
            return self.max_bytes - sum(size for _, size, _ in _files(self.folder / "lasting"))

    def _taken(self, but: Path | None = None) -> tuple[int, list[tuple[int, int, Path]]]:
        """Bytes reserved for what is being fetched, without the place `but`, and the files at rest, see `_files`."""
        # fetches first: what is published between the two lists is counted twice, never not at all
        reserved = 0
        with contextlib.suppress(FileNotFoundError):
            reserved = sum(_reserved_bytes(place) for place in (self.folder / "fetching").iterdir() if place != but)
        return reserved, sorted([*_files(self.folder / "copies"), *_files(self.folder / "lasting", _LASTING_NS)])

    @contextlib.contextmanager
    def _space(self, operation: int) -> Iterator[None]:
        """Hold the lock on what lies in the folder.

        Raises:
            BlockingIOError: somebody else holds it, and `operation` is not to wait.
        """
        lock = os.open(self.folder / "space.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, operation)
            yield
        finally:
            os.close(lock)

    def _document(self, original: Original, kind: str) -> Path:
        return self.folder / "lasting" / f"{original.name}.{kind}"

    def _open(self, target: Path, original: Original, fetch: Callable[[Path], object]) -> int:
        if original.num_bytes > self.max_bytes:
            raise ConfigError(
                f"[source] local_gb: found {self.max_bytes / GB:g}, but {original.url} alone has "
                f"{original.num_bytes / GB:.3g} GB, and is copied whole. Set local_gb higher."
            )
        place = self.folder / "fetching" / target.name
        while True:
            with self._own_errors():
                handle = _opened(target, original.num_bytes)
                if handle is not None:
                    return handle
                lock = _claim(place)
            if lock is None:
                continue
            try:
                with self._own_errors():
                    handle = _opened(target, original.num_bytes)  # by whoever we have waited for
                return self._fetched(target, original, fetch, place, lock) if handle is None else handle
            finally:
                _release(place, lock)

    def _fetched(
        self, target: Path, original: Original, fetch: Callable[[Path], object], place: Path, lock: int
    ) -> int:
        data = place / "data"
        with self._own_errors():
            self._reserve(place, lock, original.num_bytes)
        try:
            fetch(data)
        except OSError as error:
            if error.errno in _FULL:
                raise self._full(error) from error
            raise
        with self._own_errors():
            handle = os.open(data, os.O_RDONLY)
            try:
                found = os.fstat(handle).st_size
                if found != original.num_bytes:
                    raise StorageError(
                        f"{original.url}: {found} bytes arrived, expected {original.num_bytes}. Try again when nothing "
                        "writes to it any more."
                    )
                os.fsync(handle)  # or a power cut leaves a whole copy of zeros
                target.parent.mkdir(exist_ok=True)
                _touch(data)  # from the next line on, others may remove it
                data.rename(target)
            except BaseException:
                os.close(handle)
                raise
        return handle

    def _reserve(self, place: Path, lock: int, num_bytes: int) -> None:
        """Make room for `num_bytes`, and write down that they are ours. Waits for others' fetches where it has to."""
        with self._space(fcntl.LOCK_EX):  # those that come later wait behind us, so nobody waits for ever
            while not self._make_room(place, num_bytes):
                time.sleep(_LOOK_AGAIN_S)
            os.ftruncate(lock, num_bytes)

    def _make_room(self, place: Path, num_bytes: int) -> bool:
        """Remove what was used longest ago, until `num_bytes` fit; False if others' fetches leave no room."""
        fetching, at_rest = self._taken(but=place)
        excess = fetching + sum(size for _, size, _ in at_rest) + num_bytes - self.max_bytes
        now = time.time_ns()
        for used, size, path in at_rest:
            if excess <= 0 or (fetching and used > now):  # rather wait for a copy than lose a document
                break
            path.unlink(missing_ok=True)
            excess -= size
        return excess <= 0

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise self._full(error) from error
            raise StorageError(
                f"{self.folder}: local copies cannot be kept there ({error.strerror or error}). Give a folder on a "
                "local disk that you may write to: [source] local_dir."
            ) from error

    def _full(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self.folder}: the disk is full ({error.strerror}), and the local copies there are within their bound of "
            f"{self.max_bytes / GB:g} GB. Free space, set [source] local_gb lower, or give another local_dir."
        )


def open_copies(local_dir: str = "", local_gb: float = DEFAULT_GB) -> LocalCopies:
    """The copies in `local_dir` (empty: a folder of this user's), of at most `local_gb` x 10^9 bytes."""
    folder = Path(expand_home(local_dir)).absolute() if local_dir else user_cache_folder() / "copies"
    return LocalCopies(folder, int(local_gb * GB))


def _opened(path: Path, num_bytes: int) -> int | None:
    """A whole copy, open and marked as used now; None if there is none."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(handle).st_size != num_bytes:
        os.close(handle)
        path.unlink(missing_ok=True)
        return None
    _mark_used(path)
    return handle


def _mark_used(path: Path) -> None:
    """As far as may be: it is gone meanwhile, or somebody else's, and all that is lost is that it was used."""
    with contextlib.suppress(OSError):
        _touch(path)


def _touch(path: Path) -> None:
    now = time.time_ns()  # the kernel's own "now" is a few milliseconds coarse
    os.utime(path, ns=(now, now))


def _files(folder: Path, later_ns: int = 0) -> Iterator[tuple[int, int, Path]]:
    """(time of last use plus `later_ns`, size, path) of every file in `folder`."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat(follow_symlinks=False)
                yield stat.st_mtime_ns + later_ns, stat.st_size, Path(entry.path)


def _claim(place: Path) -> int | None:
    """Wait until this is the only one that fetches into `place`; None if the place was cleared away meanwhile."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.mkdir(exist_ok=True)
        lock = os.open(place / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except (FileNotFoundError, FileExistsError):  # it went while we looked at it
        if place.is_file():
            raise
        return None
    if not _locked(place, lock, fcntl.LOCK_EX):
        return None
    os.ftruncate(lock, 0)  # what a dead process had reserved, or others would wait for us while we wait for them
    (place / "data").unlink(missing_ok=True)
    return lock


def _locked(place: Path, lock: int, operation: int) -> bool:
    """Lock the open file `lock`, which is closed if it is not the lock of `place` any more, or somebody else has it."""
    try:
        fcntl.flock(lock, operation)
        mine, there = os.fstat(lock), (place / "lock").stat()
        if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
            return True
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return False


def _release(place: Path, lock: int) -> None:
    """Clear away a place whose lock is held. In this order: the lock's file gone, somebody else may begin there."""
    (place / "data").unlink(missing_ok=True)
    (place / "lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        place.rmdir()
    os.close(lock)


def _reserved_bytes(place: Path) -> int:
    """Bytes that a living process has reserved for `place`; what a dead one has left is cleared away."""
    try:
        lock = os.open(place / "lock", os.O_RDWR)
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            place.rmdir()
        return 0
    if _locked(place, lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
        _release(place, lock)
        return 0
    try:
        return (place / "lock").stat().st_size
    except FileNotFoundError:
        return 0  # published, or given up
