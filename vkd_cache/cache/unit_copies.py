"""Files of units that lie behind a URL, read through local copies: every epoch but the first reads this machine's disk.

A newcomer's trap: what a unit's file is called it holds for ever, so a copy cannot be out of date; but a disk can fail,
so every copy is compared with the digest that the record has, each time it is read.
"""

import os
from collections.abc import Callable

import xxhash

from vkd_cache.local_copies import LocalCopies, Original


def read_copied(copies: LocalCopies, original: Original, fetch: Callable[[], bytes]) -> bytes:
    """The bytes of a file, from its copy, or fetched and copied.

    Args:
        copies: where copies are kept.
        original: the file; its version is the xxh3_128 of its bytes, hexadecimal.
        fetch: gives the right bytes or raises what the caller is to see.

    Raises:
        ConfigError, StorageError: copies cannot be kept.
    """
    for _ in range(2):  # a damaged copy is fetched once more
        with os.fdopen(copies.open(original, lambda target: target.write_bytes(fetch())), "rb") as file:
            data = file.read()
        if xxhash.xxh3_128_hexdigest(data) == original.version:
            return data
        copies.drop(original)
    return fetch()
