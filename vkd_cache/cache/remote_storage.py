"""A cache behind a URL that fsspec knows, such as `s3://bucket/cache`: a put is atomic by itself."""

from collections.abc import Callable

from vkd_cache.errors import CorruptCacheError
from vkd_cache.remote import RemoteFiles, open_remote


class RemoteStorage:
    """Objects behind an fsspec URL.

    Attributes:
        url: the root, as shown in messages.
        files: the same objects, for a reader that keeps copies.
    """

    def __init__(self, url: str) -> None:
        self.files: RemoteFiles = open_remote(url)
        self.url = self.files.url

    def put(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        """See `Storage.put`. Exclusive: the same content may be there already, since an answer may have been lost."""
        self.files.put(path, data, exclusive=exclusive)

    def get(self, path: str, *, most_bytes: int | None = None) -> bytes:
        """See `Storage.get`: one request."""
        if most_bytes is None:
            return self.files.read(path)
        data = self.files.read(path, 0, most_bytes + 1)
        if len(data) > most_bytes:
            raise CorruptCacheError(
                f"{self.url}/{path}: found more than {most_bytes} bytes, the most it may have. Restore it from a copy."
            )
        return data

    def exists(self, path: str) -> bool:
        """See `Storage.exists`."""
        return self.files.exists(path)

    def size(self, path: str) -> int:
        """See `Storage.size`: one request."""
        return self.files.info(path).num_bytes

    def paths(self, prefix: str) -> list[str]:
        """See `Storage.paths`: one request per thousand objects."""
        return self.files.paths(prefix)

    def obstacles(self, kind_of: Callable[[str], str]) -> list[str]:
        """See `Storage.obstacles`: an object store has no folders, so there are none."""
        return []

    def delete_empty(self, path: str) -> bool:
        """See `Storage.delete_empty`: what is not there is gone."""
        return not self.files.exists(path)

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        self.files.delete(path)

    def prepare(self) -> list[str]:
        """See `Storage.prepare`: an object store needs nothing."""
        return []

    def abandoned(self) -> list[str]:
        """See `Storage.abandoned`: puts are atomic, so there are none."""
        return []
