"""Whether a new cache may be made in a place: not in its own source, and not among somebody's files.

A newcomer's trap: a folder without a manifest may be a cache all the same, one whose manifest was lost; so what a cache
consists of is no obstacle.
"""

import contextlib
import os
from pathlib import Path

from vkd_cache.cache.reader import MANIFEST_PATH, Cache, find_cache
from vkd_cache.cache.units import kind_of
from vkd_cache.errors import CacheError, ConfigError
from vkd_cache.runtime import expand_home
from vkd_cache.urls import is_remote

_SHOWN = 3


def refuse_overlap(source: str, target: str) -> None:
    """Let a conversion not write into the cache that it reads, nor around it.

    Raises:
        ConfigError: one is the other, or is inside of it.
    """
    places = [source, target]
    if not any(map(is_remote, places)):
        places = [str(_folder(place).resolve()) for place in places]
    first, second = (f"{place.rstrip('/')}/" for place in places)
    if first == second:
        raise ConfigError(
            f"{target}: is the cache that is to be converted, and that one is only read. Give another TARGET."
        )
    if second.startswith(first):
        raise ConfigError(f"{target}: is inside of the cache that is to be converted. Give another TARGET.")
    if first.startswith(second):
        raise ConfigError(f"{target}: holds the cache that is to be converted ({source}). Give another TARGET.")


def find_target(url: str, option: str) -> Cache | None:
    """The cache at `url`; None where one may be begun.

    Args:
        url, option: see `refuse_foreign_folder`.

    Raises:
        CacheError: neither.
    """
    cache = find_cache(url)
    if cache is None:
        refuse_foreign_folder(url, option)
    return cache


def refuse_foreign_folder(url: str, option: str) -> None:
    """Let no cache be scattered among other files; looks at the top of a local folder alone.

    Args:
        url: of the cache that is to be made.
        option: what gives another one, such as "--cache".

    Raises:
        CacheError: something is there that is neither a cache nor part of one.
    """
    if is_remote(url):
        return
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(_folder(url)) as entries:
        names = sorted(entry.name for entry in entries)
    strange = [name for name in names if not (kind_of(name) or name.startswith(".") or name == "lost+found")]
    if not strange or MANIFEST_PATH in names:
        return
    shown = ", ".join(strange[:_SHOWN]) + (", ..." if len(strange) > _SHOWN else "")
    raise CacheError(
        f"{url}: holds other things ({shown}), expected an empty folder or a cache. Give another {option}."
    )


def _folder(url: str) -> Path:
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    return Path(expand_home(url))
