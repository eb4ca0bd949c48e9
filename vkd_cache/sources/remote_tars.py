"""Tars behind a URL that fsspec knows, such as `s3://bucket/train-{000..146}.tar`, read through local copies.

A tar is copied whole when it is first needed, once however many processes ask, and read like a local one. What it
holds is kept in a small file beside the copies, so that the next start asks for one answer a tar and copies nothing. A
disk can fail: nothing is believed of a copy that was not compared, and one that is damaged is fetched once more.
A newcomer's trap: the version of a tar is the one that was there at the start; another one later is an error.
"""

import contextlib
import fnmatch
import glob
import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from vkd_cache import console
from vkd_cache.errors import ConfigError, SourceError
from vkd_cache.local_copies import GB, LocalCopies, Original
from vkd_cache.remote import RemoteFiles, open_remote
from vkd_cache.sources.findings import Findings, first_few
from vkd_cache.sources.kept_index import (
    CHECKSUM_KIND,
    KEPT_KIND,
    KeptIndex,
    file_checksum,
    image_digests,
    tar_checksum,
)
from vkd_cache.sources.keys import shown
from vkd_cache.sources.tar_ahead import ReadAhead
from vkd_cache.sources.tar_index import TarIndex, index_tar
from vkd_cache.sources.tar_members import TarReader

_ASKING_THREADS = 16
_COPYING_THREADS = 4
_INDEXED_AHEAD = 64

_LOCAL_ONLY = (
    "Behind a URL only tars are read: s3://bucket/train-{000..146}.tar, s3://bucket/shards/*.tar, or a folder of them, "
    "s3://bucket/shards/, with a slash at its end. Copy anything else, or pack it into tars."
)


class RemoteTars:
    """Tars behind URLs; see `Tars`."""

    def __init__(self, urls: Sequence[str], copies: LocalCopies, *, location: str) -> None:
        """Ask the store for the size and version of each; `location` is what the user gave.

        Raises:
            ConfigError: a URL that cannot be used, or a tar that is larger than all copies may be.
            SourceError: tars that are missing, or may not be read.
            StorageError: the store does not answer.
        """
        self._copies = copies
        self._location = location
        folders = {url: url.rpartition("/")[0] for url in urls}
        self._folders: dict[str, RemoteFiles] = {folder: open_remote(folder) for folder in set(folders.values())}
        self.names: Sequence[str] = tuple(url.rpartition("/")[2] for url in urls)
        self._places = tuple(folders[url] for url in urls)
        self._originals = self._ask(urls)
        self._digests: list[npt.NDArray[np.uint64]] = []  # of the images of each tar
        self._fetched: set[int] = set()  # tars that this job has copied, as opposed to copies that it has found
        self._before: frozenset[int] = frozenset()
        self._ahead: ReadAhead | None = None

    def _ask(self, urls: Sequence[str]) -> tuple[Original, ...]:
        def ask(shard: int) -> Original | None:
            try:
                info = self._folders[self._places[shard]].info(self.names[shard])
            except FileNotFoundError:
                return None
            except PermissionError as error:
                raise SourceError(str(error)) from error
            return Original(urls[shard], info.num_bytes, info.version)

        with ThreadPoolExecutor(_ASKING_THREADS, thread_name_prefix="ask") as pool:
            answers = list(pool.map(ask, range(len(urls))))
        missing = [url for url, answer in zip(urls, answers, strict=True) if answer is None]
        if missing:
            raise SourceError(
                f"{self._location}: {len(missing)} of {len(urls)} tars are missing: {first_few(missing)}. Check the "
                "bucket and the pattern, or upload what is missing: a run on part of a data set is never started "
                "silently."
            )
        originals = tuple(answer for answer in answers if answer is not None)
        self._check_room([max(range(len(urls)), key=lambda shard: originals[shard].num_bytes)], originals, "one has")
        return originals

    def indexes(self, findings: Findings) -> Iterator[TarIndex]:
        """See `Tars`: from what was kept, or else from a copy."""
        self._digests.clear()
        known = [self._kept_index(original) for original in self._originals]
        todo = deque(shard for shard, kept in enumerate(known) if kept is None)
        nothing_to_do = contextlib.nullcontext(console.Progress("", 0, ""))
        with console.track("copy and index", len(todo), "tars") if todo else nothing_to_do as progress:
            for shard, original in enumerate(self._originals):
                is_new = bool(todo) and todo[0] == shard
                if is_new:
                    self.read_ahead([shard], list(itertools.islice(todo, 1, 1 + _INDEXED_AHEAD)))
                    todo.popleft()
                # maybe kept by another rank by now
                kept = known[shard] or self._kept_index(original) or self._new_index(shard, findings)
                self._digests.append(kept.digests)
                yield kept.samples
                if is_new:
                    progress.advance()

    def _kept_index(self, original: Original) -> KeptIndex | None:
        data = self._copies.kept(original, KEPT_KIND)
        return None if data is None else KeptIndex.from_bytes(data, original.num_bytes)

    def _new_index(self, shard: int, findings: Findings) -> KeptIndex:
        reader = self._whole(shard)
        if shard not in self._fetched and not self._can_be_indexed(shard, reader):
            reader = self.replace(shard, reader)  # the store's tar is blamed only for what has just come from there
        before = findings.total
        index = index_tar(reader, self.names[shard], findings)
        kept = KeptIndex(index, image_digests(reader, index))
        if findings.total == before:
            self._copies.keep(self._originals[shard], KEPT_KIND, kept.to_bytes())
        return kept

    def _can_be_indexed(self, shard: int, reader: TarReader) -> bool:
        try:
            index_tar(reader, self.names[shard], Findings(self._location))
        except SourceError:
            return False
        return True

    def _whole(self, shard: int) -> TarReader:
        """As `open`, of a copy that has the checksum of what was fetched."""
        original = self._originals[shard]
        for _ in range(2):  # a damaged copy is fetched once more
            reader = self.open(shard)
            with contextlib.suppress(SourceError):  # it cannot be read
                if tar_checksum(reader) == self._copies.kept(original, CHECKSUM_KIND):
                    return reader
            self._drop(shard, reader)
        raise SourceError(
            f"{original.url}: its local copy in {self._copies.folder} was damaged, and so is another that was fetched "
            "just now: other bytes are read there than were written. The tar itself is not at fault. Check that disk "
            "and the memory, or give a folder on another disk: [source] local_dir."
        )

    def _drop(self, shard: int, reader: TarReader) -> None:
        """Remove the damaged copy that `reader` has open, but none that somebody has fetched in its place."""
        if not reader.is_removed():
            self._copies.drop(self._originals[shard])

    def open(self, shard: int) -> TarReader:
        """See `Tars`.

        Raises:
            SourceError: it is there no more, or has changed.
            StorageError: the store does not answer, or the folder of copies cannot be used.
        """
        handle = self._copies.open(self._originals[shard], lambda target: self._copy(shard, target))
        return TarReader(self._originals[shard].url, handle)

    def fits(self, shard: int, row: int, data: bytes) -> bool:
        """See `Tars`."""
        return xxhash.xxh3_64_intdigest(data) == int(self._digests[shard][row])

    def replace(self, shard: int, reader: TarReader) -> TarReader:
        """See `Tars`: drops that copy, and fetches another.

        Raises:
            SourceError: it is there no more, or has changed; or the other copy is damaged, too.
            StorageError: the store does not answer, or the folder of copies cannot be used.
        """
        self._drop(shard, reader)
        return self._whole(shard)

    def _copy(self, shard: int, target: Path) -> None:
        original = self._originals[shard]
        try:
            info = self._folders[self._places[shard]].download(self.names[shard], target)
        except FileNotFoundError as error:
            raise SourceError(
                f"{original.url}: the tar is there no more; it was when this job began. Upload it again."
            ) from error
        except PermissionError as error:
            raise SourceError(str(error)) from error
        if (info.num_bytes, info.version) != (original.num_bytes, original.version):
            raise SourceError(
                f"{original.url}: has {info.num_bytes} bytes and version {shown(info.version)}, and had "
                f"{original.num_bytes} and {shown(original.version)} when this job began: the tar was changed in "
                "between. Start again when nothing writes to it any more."
            )
        self._copies.note(original, CHECKSUM_KIND, file_checksum(target))
        self._fetched.add(shard)

    def read_ahead(self, now: Sequence[int], soon: Sequence[int]) -> None:
        """See `Tars`. As many of `soon` as leave room for what is read now, and for what was until this moment."""
        self._check_room(now, self._originals, "those that are shuffled together ([train] open_shards) have")
        in_use = self._before | frozenset(now)
        self._before = frozenset(now)
        for shard in in_use:
            self._copies.touch(self._originals[shard])
        left = self._copies.room_bytes() - sum(self._originals[shard].num_bytes for shard in in_use)
        wanted = list(now)
        for shard in dict.fromkeys(soon):
            if shard not in in_use:
                left -= self._originals[shard].num_bytes
            if left < 0:
                break
            wanted.append(shard)
        if self._ahead is None:
            self._ahead = ReadAhead(self._have, _COPYING_THREADS)
        self._ahead.want(wanted)

    def _have(self, shard: int) -> None:
        os.close(self._copies.open(self._originals[shard], lambda target: self._copy(shard, target)))

    def _check_room(self, shards: Sequence[int], originals: Sequence[Original], what: str) -> None:
        num_bytes = sum(originals[shard].num_bytes for shard in shards)
        if num_bytes > self._copies.max_bytes:
            raise ConfigError(
                f"[source] local_gb: found {self._copies.max_bytes / GB:g}, but of the tars of {self._location} {what} "
                f"{num_bytes / GB:.3g} GB, and tars are copied whole. Set local_gb higher: to twice that, so that the "
                "next ones can be copied meanwhile."
            )

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_ahead": None}


def remote_tar_urls(parts: Sequence[str]) -> list[str]:
    """The URLs of tars that `parts`, URLs without braces, stand for: a tar, a pattern of names, or a folder.

    Raises:
        ConfigError: a URL that cannot be used.
        SourceError: anything but tars, or nothing that fits.
        StorageError: the store does not answer.
    """
    return [url for part in parts for url in _expand(part)]


def _expand(part: str) -> list[str]:
    folder, _, name = part.rpartition("/")
    if folder.endswith((":/", ":")) or glob.has_magic(folder):
        raise SourceError(f"{part}: found a pattern of folders, or no folder. {_LOCAL_ONLY}")
    if not name or glob.has_magic(name):
        return _listed(part, folder, name or "*.tar")
    if not name.endswith(".tar"):
        raise SourceError(f"{part}: found no name of a tar. {_LOCAL_ONLY}")
    return [part]


def _listed(part: str, folder: str, pattern: str) -> list[str]:
    """What a pattern of names finds in one folder, by one listing, sorted."""
    try:
        paths = open_remote(folder).paths("")
    except PermissionError as error:
        raise SourceError(str(error)) from error
    names = [path for path in paths if "/" not in path and not path.startswith(".")]
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern) and name.endswith(".tar")]
    if not found:
        there = first_few(paths[:6]) or "nothing"
        raise SourceError(f"{part}: found no tar there, but {there}. {_LOCAL_ONLY}")
    return [f"{folder}/{name}" for name in found]
