"""From what goes wrong to one message and an exit code.

A newcomer's trap: only what a user can cause becomes a message. Any other exception is a bug of ours and keeps its
traceback.
"""

import contextlib
import errno
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator

import click

from vkd_cache import console
from vkd_cache.errors import ConfigError, VkdCacheError
from vkd_cache.memory import is_out_of_memory

_COMPILER_LACKS = ("InvalidCxxCompiler", "TritonMissing")  # torch's own errors come wrapped, with these in their text
_SOCKET_NAME = 107  # bytes, Linux's limit
_SOCKET_SUFFIX = len("/pymp-xxxxxxxx/listener-xxxxxxxx")  # what multiprocessing adds to the folder


def guarded(command: Callable[[], int | None]) -> int:
    """The exit code of `command`; what a user can cause becomes one message, a bug of ours keeps its traceback."""
    with _warnings_as_lines():
        try:
            return command() or 0
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except (click.Abort, KeyboardInterrupt):
            # Under `python -m`, CPython ends by SIGINT instead of our exit code if the interrupt came while text was
            # executed (a dataclass being made by an import), until other text is.
            exec("")
            return _fail("interrupted.", 130)
        except ConfigError as error:
            return _fail(str(error), 2)
        except VkdCacheError as error:
            return _fail(str(error), 1)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return _fail(f"{where}{error.strerror or str(error) or type(error).__name__}{_advice(error)}", 1)
        except (MemoryError, RuntimeError) as error:
            if any(name in str(error) for name in _COMPILER_LACKS):
                return _fail(
                    "compile = true: torch.compile found no working compiler (C++ on a CPU, Triton on a GPU). Install "
                    "one, or set compile = false in [train] and [extract].",
                    1,
                )
            if not is_out_of_memory(error):
                raise
            return _fail(f"out of memory: {error or 'no more can be had'} Use a smaller --batch-size.", 1)


def _advice(error: OSError) -> str:
    """What to do about a file that cannot be read, written or made."""
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return ", where a folder is needed. Give another path."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ". What is complete is intact: make room, and run the same command again (train: --resume auto)."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ". Give another path, or have the right to use this one."
    if "AF_UNIX" in str(error):  # multiprocessing makes its sockets there
        folder = tempfile.gettempdir()
        return (
            f": the folder for temporary files is {folder!r}, {len(os.fsencode(folder))} bytes, and names of sockets "
            f"between processes have at most {_SOCKET_NAME}. Set TMPDIR to a path of at most "
            f"{_SOCKET_NAME - _SOCKET_SUFFIX}, /tmp say."
        )
    return ""


def _fail(message: str, code: int) -> int:
    click.echo(f"Error: {console.plain(message)}", err=True)
    return code


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show Python warnings as one line each, without a place in somebody's source code."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        console.warn(" ".join(str(message).split()))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
