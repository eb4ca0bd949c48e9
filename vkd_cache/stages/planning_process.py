"""Work in a process of its own: its peak memory and its start are then those of a real command.

A newcomer would measure one thing after the other in one process: its largest resident size never falls again, and its
libraries are loaded only once.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from vkd_cache import console
from vkd_cache.errors import VkdCacheError
from vkd_cache.memory import is_out_of_memory
from vkd_cache.runtime import peak_memory_bytes

Request = TypeVar("Request")
Found = TypeVar("Found")

START_METHOD = "spawn"  # a new interpreter, as a command has: its start takes as long
_PATIENCE_S = 5.0  # for what takes milliseconds: a process that has answered, or was told to end


def in_own_process(work: Callable[[Request, float], Found], request: Request, what: str) -> Found:
    """What `work` returns for `request` and the moment, by `time.monotonic`, at which its process was started.

    Args:
        work: a function of a module.
        request: its argument.
        what: is measured, for messages.

    Raises:
        MemoryError: there was not enough memory, on the GPU or here.
        VkdCacheError: what the work raised; or the process ended by itself.
        Exception: anything else that the work raised.
    """
    context: Any = multiprocessing.get_context(START_METHOD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, work, request, time.monotonic()))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join(_PATIENCE_S)
        raise _death(what, process.exitcode) from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join(_PATIENCE_S)
        process.kill()
        process.join()
        receiver.close()
    if isinstance(answer, Exception):
        if is_out_of_memory(answer):
            raise MemoryError(f"{what}: {(str(answer).splitlines() or ['no more memory can be had'])[0]}")
        raise answer
    found: Found = answer
    return found


def _death(what: str, exit_code: int | None) -> Exception:
    if exit_code == -signal.SIGKILL:
        return MemoryError(f"{what}: the process that measured it was killed, as the system does without memory.")
    return VkdCacheError(
        f"plan: the process that measured {what} ended early (exit code {exit_code}). Its own messages are above; the "
        "command that it stands for will say more."
    )


def _serve(line: Connection, work: Callable[[Any, float], Any], request: Any, started: float) -> None:
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of a group, and the parent ends this one
    signal.signal(signal.SIGTERM, _leave)  # as it does so: what has to be removed is removed
    console.set_quiet(True)
    warnings.simplefilter("ignore")  # the commands themselves will say it
    try:
        answer = work(request, started)
    except Exception as error:  # noqa: BLE001 - raised again by the process that asked
        answer = error
    line.send(answer)
    line.close()


def _leave(*_: object) -> None:
    raise SystemExit(1)


def _end_with(parent: Any) -> None:
    """A measurement for a process that was killed is for nobody."""
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a closed terminal, end what is enclosed as Ctrl-C does, and what is temporary is removed.

    SIGHUP stays ignored where it is (nohup).
    """
    if threading.current_thread() is not threading.main_thread():  # others may not set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Memory:
    """Peak memory of this process, so far.

    Attributes:
        host_bytes: resident size, without that of data workers.
        gpu_bytes: allocated on the GPU; 0 without one.
    """

    def __init__(self, device: torch.device) -> None:
        self.host_bytes = peak_memory_bytes()
        self.gpu_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def wait_for(device: torch.device) -> float:
    """`time.monotonic()` when `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
