"""Objects behind a URL that fsspec knows, such as `s3://bucket/folder`: bounded retries, whole puts, no stale listings.

A newcomer's trap: a request whose answer is lost may have been carried out. So everything here can be repeated, and an
exclusive put that finds its name taken compares the content before it says that somebody else was first. Retries live
here alone: botocore's and s3fs's own are off, unless the user's fsspec configuration asks for them, so that the bounds
in docs/storage.md are the real ones.
"""

import contextlib
import dataclasses
import os
import socket
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from vkd_cache.errors import ConfigError, StorageError
from vkd_cache.remote_faults import code_of, is_refusal, may_pass, said_by, status_of
from vkd_cache.urls import check_url, is_remote

__all__ = ["PATIENCE", "Patience", "RemoteFiles", "RemoteInfo", "check_url", "is_remote", "open_remote"]

_Result = TypeVar("_Result")
_DOWNLOAD_BYTES = 16 * 2**20  # one request of a download: what a lost connection costs at most, and the memory it takes
_PART_BYTES = 50 * 2**20  # an object on S3 that is twice as large is put in parts, and appears when all are there
_S3_PROTOCOLS = ("s3", "s3a")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a request is repeated.

    Attributes:
        first_attempts: attempts while this process has never had an answer from the store; a wrong endpoint is told
            within a minute.
        attempts: attempts once it has answered; an outage of minutes does not end a job of days.
        wait_s: wait before the second attempt; it doubles.
        longest_wait_s: no wait is longer.
    """

    first_attempts: int = 8
    attempts: int = 14
    wait_s: float = 0.2
    longest_wait_s: float = 30.0


PATIENCE = Patience()


@dataclasses.dataclass(frozen=True)
class RemoteInfo:
    """What a store says about an object without sending it.

    Attributes:
        num_bytes: its size.
        version: changes when the object does: its ETag, or its time of modification.
    """

    num_bytes: int
    version: str


def open_remote(url: str) -> "RemoteFiles":
    """The objects below `url`. Nothing is asked of the store yet.

    Raises:
        ConfigError: credentials in the URL, an unknown protocol, or one whose library is not installed.
    """
    check_url(url, "URL")
    protocol = url.partition("://")[0].lower()
    if "::" in protocol:
        raise ConfigError(f"{url}: found a chained URL, expected a plain one such as s3://bucket/folder.")
    import fsspec

    try:
        kind = fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        install = "pip install 'vkd-cache[s3]'" if protocol in _S3_PROTOCOLS else "give another URL"
        raise ConfigError(f"{url}: {error}: {install}.") from error
    root = str(kind._strip_protocol(url)).rstrip("/")
    if protocol in _S3_PROTOCOLS and not root.partition("/")[0]:
        raise ConfigError(f"{url}: found no bucket, expected s3://bucket/folder.")
    return RemoteFiles(url.rstrip("/"), root)


class RemoteFiles:
    """Objects below one URL. Paths are relative to it, with `/`. Picklable; its client is made where it is used.

    Every method raises FileNotFoundError, FileExistsError or PermissionError where it says so, and StorageError for
    anything else that is left after the last attempt, a missing bucket included.

    Attributes:
        url: the root, without a trailing slash.
    """

    def __init__(self, url: str, root: str) -> None:
        self.url = url
        self._root = root
        self._clients: dict[int, Any] = {}  # by process
        self._answered = self._bucket_exists = False
        # Waits differ between processes that were refused together: seeded by the host's name and the process.
        self._jitter = np.random.default_rng([zlib.crc32(socket.gethostname().encode()), os.getpid()])

    def __reduce__(self) -> tuple[type["RemoteFiles"], tuple[str, str]]:
        return RemoteFiles, (self.url, self._root)

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to `end` (None: to the end) of an object, fewer where it ends before.

        Raises:
            FileNotFoundError: there is none.
            PermissionError: the store refuses.
        """
        if end is not None and end <= start:
            return b""
        return self._repeated(path, lambda: self._read_once(path, start, end))

    def put(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        """Store an object whole or not at all; replaces one, or with `exclusive` refuses to.

        Raises:
            FileExistsError: `exclusive`, and there is one with other content.
            PermissionError: the store refuses.
        """

        def once() -> None:
            parts = {"chunksize": _PART_BYTES} if self._is_s3 else {}
            if not exclusive:
                self._filesystem.pipe_file(self._target(path), data, **parts)
                return
            try:
                self._filesystem.pipe_file(self._target(path), data, mode="create", **parts)
            except FileExistsError:
                # ours, if the answer was lost: aiohttp repeats a request by itself when a connection turns out dead
                if bytes(self._filesystem.cat_file(self._target(path))) != data:
                    raise

        self._repeated(path, once)

    def info(self, path: str) -> RemoteInfo:
        """Size and version of an object, by one request that does not send it.

        Raises:
            FileNotFoundError: there is none.
            PermissionError: the store refuses.
        """
        return self._repeated(path, lambda: self._info_once(path))

    def exists(self, path: str) -> bool:
        """Whether there is an object at `path`; PermissionError as `info`."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def paths(self, prefix: str) -> list[str]:
        """Sorted paths of all objects below the folder `prefix` ('' for all): one request per thousand of them."""
        folder = self._target(prefix)

        def once() -> list[str]:
            try:
                found = self._filesystem.find(folder)
            except FileNotFoundError as error:
                if code_of(error) == "NoSuchBucket":
                    raise
                return []
            return [str(path) for path in found]

        start = len(self._root) + 1
        listed = (path.lstrip("/") if not self._root.startswith("/") else path for path in self._repeated(prefix, once))
        # consoles make objects called `folder/`, and a prefix that is itself an object is not a folder
        return sorted(path[start:] for path in listed if not path.endswith("/") and path != folder)

    def delete(self, path: str) -> None:
        """Remove an object if it exists; PermissionError if the store refuses."""
        with contextlib.suppress(FileNotFoundError):
            self._repeated(path, lambda: self._filesystem.rm_file(self._target(path)))

    def download(self, path: str, target: Path) -> RemoteInfo:
        """Copy an object to the file `target`, by requests of 16 MiB; on any error `target` does not exist.

        Returns:
            Size and version of exactly what was copied: an object that changes meanwhile is copied again.

        Raises:
            FileNotFoundError: there is none.
            PermissionError: the store refuses.
            OSError: `target` cannot be written, such as a full disk.
        """
        try:
            for _ in range(3):
                info = self.info(path)
                with target.open("wb") as file:
                    while file.tell() < info.num_bytes:
                        start = file.tell()
                        block = self.read(path, start, min(start + _DOWNLOAD_BYTES, info.num_bytes))
                        if not block:
                            break
                        file.write(block)
                    copied = file.tell()
                if copied == info.num_bytes and self.info(path) == info:
                    return info
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        target.unlink(missing_ok=True)
        raise StorageError(
            f"{self._name(path)}: it changed while it was copied, three times. Wait until it is written."
        )

    @property
    def _filesystem(self) -> Any:
        # A forked process has no thread for its parent's event loop, and must neither share its sockets nor close them.
        if os.getpid() not in self._clients:
            self._clients[os.getpid()] = _new_filesystem(self.url)
        return self._clients[os.getpid()]

    @property
    def _is_s3(self) -> bool:
        return self.url.partition("://")[0].lower() in _S3_PROTOCOLS

    def _target(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _name(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    def _read_once(self, path: str, start: int, end: int | None) -> bytes:
        whole = start == 0 and end is None
        try:
            limits = {} if whole else {"start": start, "end": end}
            data = bytes(self._filesystem.cat_file(self._target(path), **limits))
        except OSError as error:
            if code_of(error) in ("InvalidRange", "416"):
                return b""
            raise
        if end is None or len(data) == end - start:
            return data
        if len(data) > end - start:  # a server without ranges sends everything
            return data[start:end]
        # S3 says how many bytes it sends, and fewer are an error already; of other servers we have to ask
        if not self._is_s3 and start + len(data) != self._info_once(path).num_bytes:
            raise TimeoutError(f"{len(data)} of {end - start} bytes arrived")
        return data

    def _info_once(self, path: str) -> RemoteInfo:
        found = self._described(self._target(path))
        size = found.get("size", found.get("ContentLength"))
        if found.get("type") == "directory" or size is None:
            raise FileNotFoundError(path)
        marks = ("ETag", "etag", "mtime", "LastModified", "Last-Modified", "updated", "last_modified", "created")
        version = next((str(found[mark]) for mark in marks if found.get(mark)), "")
        return RemoteInfo(int(size), version.strip('"'))

    def _described(self, target: str) -> dict[str, Any]:
        """What the store says about an object. On S3 that is one request, once the bucket is known to exist."""
        if self._bucket_exists and self._is_s3:
            bucket, key, _ = self._filesystem.split_path(target)
            return dict(self._filesystem.call_s3("head_object", Bucket=bucket, Key=key))
        try:
            found = dict(self._filesystem.info(target))  # s3fs lists too, where there is no such object
        except FileNotFoundError as error:
            self._bucket_exists = code_of(error) != "NoSuchBucket"
            raise
        self._bucket_exists = True
        return found

    def _repeated(self, path: str, once: Callable[[], _Result]) -> _Result:
        """What `once()` returns, repeated while what goes wrong may pass."""
        attempt = 0
        while True:
            try:
                result = once()
            except Exception as error:
                self._answered = self._answered or status_of(error) > 0
                if not may_pass(error):
                    self._raise(path, error)
                attempt += 1
                if attempt >= (PATIENCE.attempts if self._answered else PATIENCE.first_attempts):
                    raise StorageError(
                        f"{self._name(path)}: {said_by(error)}, {attempt} times. Check AWS_ENDPOINT_URL, "
                        "the network and the store; the same command goes on from what is published."
                    ) from error
            else:
                self._answered = True
                return result
            wait_s = min(PATIENCE.wait_s * 2 ** (attempt - 1), PATIENCE.longest_wait_s)
            time.sleep(wait_s * self._jitter.uniform(0.5, 1.0))

    def _raise(self, path: str, error: Exception) -> NoReturn:
        name = self._name(path)
        if code_of(error) == "NoSuchBucket":
            raise StorageError(f"{self.url}: there is no such bucket. Create it, or give another URL.") from error
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{name}: there is no such object") from error
        if isinstance(error, FileExistsError):
            raise FileExistsError(f"{name}: exists already") from error
        if is_refusal(error):
            raise PermissionError(
                f"{name}: the store refuses: {said_by(error)}. Check the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY) and that they may list the bucket and read, write and delete below the URL."
            ) from error
        settings = (OSError, ValueError, TypeError, KeyError)  # the last two: options in fsspec's configuration
        if isinstance(error, settings) or type(error).__module__.startswith(("botocore", "aiohttp")):
            raise StorageError(
                f"{name}: {said_by(error)}. Check the URL, the endpoint (AWS_ENDPOINT_URL) and fsspec's configuration."
            ) from error
        raise error


def _new_filesystem(url: str) -> Any:
    """A client of its own, without a cache of listings, and without retries that would multiply with ours."""
    import fsspec

    protocol = url.partition("://")[0].lower()
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol in _S3_PROTOCOLS:
        given: dict[str, Any] = {}  # options here win over the user's configuration, so they start from it
        for name in _S3_PROTOCOLS:
            given |= fsspec.config.conf.get(name, {})
        once = {"retries": {"mode": "standard", "total_max_attempts": 1}}
        if isinstance(given.get("config_kwargs", {}), dict):
            options["config_kwargs"] = once | given.get("config_kwargs", {})
        if "max_concurrency" not in given:
            options["max_concurrency"] = 1  # reading is one request, not a question for the size and then some
    filesystem = fsspec.filesystem(protocol, **options)
    if protocol in _S3_PROTOCOLS:
        filesystem.retries = 1
    return filesystem
