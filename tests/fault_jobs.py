"""Jobs whose file system fails them: a full disk, a read-only one, one of somebody else, one that lacks things.

    python tests/fault_jobs.py

It imports everything once, reads one request a line (JSON: {"steps": [[command or place, argument, ...], ...], "said":
file}), does each in a fork, where mounts, limits and lost rights hurt nobody else, and answers a line. What the
commands said, and their exit codes, end up in the file.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kill_runs import fork

from vkd_cache.cli import main
from vkd_cache.stages import convert, extract, train, verify  # noqa: F401 - imported once, for all forks

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_CAPABILITY_VERSION = 0x20080522


def _own_mounts() -> None:
    """Mounts from here on are this process' own: as root, or in a user namespace where those are allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWNS | (0 if user == 0 else _CLONE_NEWUSER)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        for name, content in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(content)
    _mount("--make-rprivate", "/")


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def small_disk(folder: str, kilobytes: int) -> None:
    """A file system at `folder` that holds no more."""
    _own_mounts()
    _mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder)


def resize(folder: str, kilobytes: int) -> None:
    """The same one, with another size."""
    _mount("-o", f"remount,size={kilobytes}k", folder)


def read_only(folder: str) -> None:
    """The files of `folder`, which nobody can change."""
    _own_mounts()
    _mount("--bind", folder, folder)
    _mount("-o", "remount,bind,ro", folder)


def small_files(kilobytes: int) -> None:
    """No file may grow beyond this; 0: as large as they like."""
    limit = kilobytes * 1024 or resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def unprivileged() -> None:
    """Permissions count, for root too: all capabilities are given up."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, none = struct.pack("Ii", _CAPABILITY_VERSION, 0), struct.pack("6I", *[0] * 6)
    if libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def lacking() -> None:
    """Answers of the operating system as some network file systems have them."""

    def failing(code: int) -> Callable[..., Any]:
        def call(*arguments: object, **_: object) -> None:
            raise OSError(code, os.strerror(code), str(arguments[0]))

        return call

    sync, rename = os.fsync, os.replace

    def sync_files_only(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(handle)

    def rename_over_nothing(source: Any, target: Any, **_: object) -> None:
        if os.path.lexists(target):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(source), None, str(target))
        rename(source, target)

    os.link, os.fchmod, fcntl.flock = failing(errno.EPERM), failing(errno.EPERM), failing(errno.ENOLCK)
    os.fsync, os.replace = sync_files_only, rename_over_nothing


PLACES: dict[str, Callable[..., None]] = {
    place.__name__: place for place in (small_disk, resize, read_only, small_files, unprivileged, lacking)
}


def can_mount() -> bool:
    """Whether this machine lets us mount; if not, a limit on the size of files has to stand for a full disk."""

    def work() -> int:
        with contextlib.suppress(OSError, subprocess.CalledProcessError), tempfile.TemporaryDirectory() as folder:
            small_disk(folder, 64)
            subprocess.run(["umount", folder], check=True)
            return 0
        return 1

    return _result_of(work) == 0


def _result_of(work: Callable[[], int]) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])


def _do(steps: list[list[Any]], said: Path) -> int:
    """Commands and changes of place in order."""
    with said.open("w") as answers, tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 1)
        os.dup2(heard.fileno(), 2)
        found = []
        for name, *arguments in steps:
            if name in PLACES:
                PLACES[name](*arguments)
                continue
            start = os.lseek(heard.fileno(), 0, os.SEEK_END)
            try:
                main([name, *arguments])
            except SystemExit as done:
                code = done.code
            sys.stdout.flush()
            sys.stderr.flush()
            found.append([code, os.pread(heard.fileno(), 2**20, start).decode()])
        small_files(0)
        json.dump(found, answers)
    return 0


def serve() -> None:
    """Answer requests until there are no more."""
    sys.stdout.write(json.dumps({"can_mount": can_mount()}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        status = _result_of(lambda request=request: _do(request["steps"], Path(request["said"])))  # type: ignore[misc]
        sys.stdout.write(json.dumps({"status": status}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
