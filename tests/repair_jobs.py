"""What the tests of repairs run in processes of their own, and the watched storage that both sides use."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vkd_cache.cache.check import Fault
from vkd_cache.cache.local_storage import LocalStorage
from vkd_cache.cache.reader import Cache, open_cache
from vkd_cache.cache.repair import drop_unit
from vkd_cache.cache.units import UnitId
from vkd_cache.config import Config
from vkd_cache.errors import CacheError
from vkd_cache.guard import guarded
from vkd_cache.stages.verify import VerifyReport, VerifyRequest, verify

FIRST = UnitId(shard=0, view=0)
NOBODY = 65534
SURVIVED = 7  # exit code


class Watched(LocalStorage):
    """The real storage, with something that happens before its `number`-th call (from 0).

    Attributes:
        calls: so far.
    """

    def __init__(self, root: Path, number: int, happens: Callable[[], object]) -> None:
        super().__init__(root)
        self.calls = 0
        self._number = number
        self._happens = happens

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self._number + 1:
            self._happens()

    def get(self, path: str, **options: Any) -> bytes:
        self._count()
        return super().get(path, **options)

    def exists(self, path: str) -> bool:
        self._count()
        return super().exists(path)

    def put(self, path: str, data: bytes, **options: Any) -> None:
        self._count()
        super().put(path, data, **options)

    def paths(self, prefix: str) -> list[str]:
        self._count()
        return super().paths(prefix)

    def delete(self, path: str) -> None:
        self._count()
        super().delete(path)


def repair(url: Path | str) -> VerifyReport:
    """`vkd-cache verify --repair`, of the files alone."""
    return verify(Config(), VerifyRequest(url=str(url), repair=True))


def drop(cache: Cache) -> None:
    """Repair the first unit, if it is damaged."""
    drop_unit(cache, FIRST, frozenset({Fault.DAMAGE}))


def drop_and_die(root: Path, number: int) -> None:
    """Killed before the `number`-th call; else it ends with SURVIVED."""
    manifest = open_cache(str(root)).manifest
    storage = Watched(root, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
    drop(Cache(storage, manifest))
    os._exit(SURVIVED)


def repair_as_reader(url: Path, said: Path) -> None:
    """As a user who may write nowhere, root included; what it says goes to the file `said`."""
    with contextlib.suppress(CacheError, OSError):
        verify(Config(), VerifyRequest(url=str(url)))  # imports what is imported late: others may not read the library
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    os._exit(guarded(lambda: repair(url).exit_code))
