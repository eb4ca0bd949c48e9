"""A cache behind a URL that fsspec knows, such as `s3://bucket/cache`: a put is atomic by itself."""

import contextlib
from typing import Any

from vkd_cache.errors import ConfigError


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

    def prepare(self) -> list[str]:
        """See `Storage.prepare`: an object store needs nothing."""
        return []

    def abandoned(self) -> list[str]:
        """See `Storage.abandoned`: puts are atomic, so there are none."""
        return []

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"
