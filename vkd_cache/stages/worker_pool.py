"""Worker processes for tasks in order: each one on a line of its own, so that one that dies is noticed at once.

A newcomer's trap: nothing is shared between workers, and that is the point. Where all of them write into one pipe, as
torch's DataLoader has it, a worker that is killed in the middle of a message leaves half of it there, and the lock
that keeps the others from finishing it; the main process then waits for ever. Here a dead worker is the end of a file.
For the same reason workers end by themselves, at once, when the main process hangs up, exits or is killed.
"""

import contextlib
import errno
import gc
import itertools
import multiprocessing
import os
import queue
import resource
import signal
import socket
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch

from vkd_cache.errors import SourceError
from vkd_cache.stages.shared_blocks import BorrowedBlocks, Empty, LendingBlocks, Packed, Parcel, drained

Task = TypeVar("Task")
Result = TypeVar("Result")

TASKS_AHEAD = 2  # tasks that a worker has been given, counting the one it is at
PATIENCE_S = 5.0  # for what takes milliseconds: a killed process to be reaped, one that was hung up on to end
PRELOADED = ["vkd_cache.stages.rendering"]  # imported by the server, once; the workers that it forks have it


class _Failure(NamedTuple):
    """What a worker answers instead of a result."""

    error: Exception
    trace: str


class _Worker:
    """The main process' side of one worker: its process, and the line to it."""

    def __init__(self, work: Callable[[Any, Empty], Any], name: str) -> None:
        self._name = name
        self._lending, self._borrowed = LendingBlocks(), BorrowedBlocks()
        self._back: deque[int] = deque()  # blocks of tasks, which the thread that receives results hears of
        self._waiting = threading.Lock()  # two threads that wait for one process get its exit code wrong
        context = multiprocessing.get_context("forkserver")
        self._line, its_end = context.Pipe()
        self.process = context.Process(target=_work, args=(work, its_end), daemon=True)
        try:
            self.process.start()
        except (OSError, EOFError) as error:
            self._line.close()
            raise SourceError(
                f"{name}: a data worker process died while it was started ({type(error).__name__}). If it happens "
                f"again: use --workers 0 to see why. {_WHAT_TO_DO}"
            ) from error
        finally:
            its_end.close()  # or the line would not end when the worker does

    def send(self, task: object) -> None:
        """Give it a task; it takes tasks at any time, so this does not wait for results."""
        self._lending.returned(drained(self._back))
        packed = self._lending.pack(task)
        try:
            _send(self._line, self._borrowed.returned(), packed)
        except ConnectionError as error:
            raise self._death() from error

    def receive(self) -> Any:
        """The result of the task that comes next, in the order in which they were sent; waits for it.

        Raises:
            SourceError: the worker died.
            Exception: what its work raised.
        """
        try:
            returned, result = _received(self._line, self._borrowed)
            self._back.extend(returned)
        except EOFError as error:
            raise self._death() from error
        except SourceError:  # of this side
            raise
        except Exception as error:
            if not self._has_ended():  # it has, if this was half a message
                raise
            raise self._death() from error
        if isinstance(result, _Failure):
            result.error.add_note(f"In a data worker process:\n{result.trace}")
            raise result.error
        return result

    def _has_ended(self) -> bool:
        with self._waiting:
            self.process.join(PATIENCE_S)
            return self.process.exitcode is not None

    def _death(self) -> SourceError:
        cause = _cause_of(self.process.exitcode if self._has_ended() else None)
        return SourceError(f"{self._name}: a data worker process died{cause} {_WHAT_TO_DO}")

    def hang_up(self) -> None:
        """End the line on both sides: the worker leaves, and a thread that waits here is woken."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._line.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """After `hang_up`, when no thread uses the line any more."""
        self._line.close()
        if not self._has_ended():  # stopped, or deep in a system call
            self.process.kill()
        if self._has_ended():
            self.process.close()


def _send(line: Connection, returned: list[int], packed: Packed) -> None:
    """Send what was packed, and word of blocks that are not used here any more; see `_received`."""
    parcel, descriptors, message = packed
    try:
        line.send((returned, parcel))
        for descriptor in descriptors:
            send_handle(line, descriptor, None)
        line.send_bytes(message)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _received(line: Connection, blocks: BorrowedBlocks) -> tuple[list[int], Any]:
    """Word of own blocks that the other side does not use any more, and what it has sent."""
    returned, parcel = line.recv()
    descriptors = _received_descriptors(line, len(parcel.made))
    return returned, blocks.unpack(parcel, descriptors, line.recv_bytes())


def _received_descriptors(line: Connection, count: int) -> list[int]:
    """Descriptors that were sent.

    Raises:
        SourceError: this process may open no more files.
    """
    found: list[int] = []
    try:
        for _ in range(count):
            found.append(recv_handle(line))
    except (OSError, RuntimeError) as error:  # multiprocessing's for a message without the descriptor is the latter
        for descriptor in found:
            os.close(descriptor)
        if isinstance(error, OSError) and error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise SourceError(
            f"a data worker and the main process cannot share a batch: too many files are open (at most {limit} may "
            "be). Allow more (ulimit -n), or use fewer --workers."
        ) from error
    return found


_WHAT_TO_DO = "What is saved is intact: run the same command again to continue (train: with --resume auto)."


def _cause_of(exit_code: int | None) -> str:
    number = -exit_code if exit_code is not None else 0
    name = signal.Signals(number).name if number in set(signal.Signals) else ""
    if name == "SIGKILL":
        return " (SIGKILL). The usual cause is memory: use fewer --workers or a smaller --batch-size."
    return f" ({name or 'cause unknown'}). If it happens again: use fewer --workers, or --workers 0 to see why."


class WorkerPool(Generic[Task, Result]):
    """Processes that do `work`; a context manager.

    The order of results is that of the tasks, whichever worker is the fastest.
    """

    def __init__(
        self,
        work: Callable[[Task, Empty], Result],
        workers: int,
        *,
        name: str,
        finish: Callable[[Result], Result] | None,
    ) -> None:
        """
        Args:
            work: what a worker does with a task; each has a copy. Large arrays of the result that it gets from the
                second argument are not copied on their way.
            workers: number of processes, at least 1.
            name: what messages begin with.
            finish: what happens to a result here, in a thread of its own and ahead of whoever takes the results.
        """
        self._work = work
        self._count = workers
        self._name = name
        self._finish = finish
        self._workers: list[_Worker] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="results") if finish is not None else None

    def __enter__(self) -> Self:
        """Start the workers.

        Raises:
            SourceError: one was killed meanwhile.
        """
        try:
            with _signals_held_back():
                multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
                forkserver.ensure_running()  # before the first worker, for which it makes a folder: one for all of them
                while len(self._workers) < self._count:
                    self._workers.append(_Worker(self._work, self._name))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.hang_up()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        while self._workers:
            self._workers.pop().close()

    def results(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in the order of `tasks`, which are read a few ahead, in the caller's thread.

        Raises:
            SourceError: a worker died.
        """
        turns = itertools.cycle(self._workers)
        coming = (self._begin(next(turns), task) for task in tasks)
        under_way = deque(itertools.islice(coming, TASKS_AHEAD * self._count))
        while under_way:
            result = under_way.popleft()()
            under_way.extend(itertools.islice(coming, 1))
            yield result
            del result  # or it would stay while the next one is waited for

    def _begin(self, worker: _Worker, task: Task) -> Callable[[], Result]:
        """Send a task; what comes back waits for its result."""
        worker.send(task)
        if self._thread is None or self._finish is None:
            return worker.receive
        finish = self._finish
        return self._thread.submit(lambda: finish(worker.receive())).result


# --- in the worker --------------------------------------------------------------------------------------------------


def _work(work: Callable[[Any, Empty], Any], line: Connection) -> None:
    """What a worker process does until the main process hangs up."""
    # both often go to a whole group of processes, and the main one decides when workers stop: see _signals_held_back
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    torch.set_num_threads(1)
    gc.freeze()  # or the collector writes to the pages that are shared with the server: a copy of 44 MiB a worker
    tasks: queue.SimpleQueue[tuple[list[int], Any]] = queue.SimpleQueue()
    lending, borrowed = LendingBlocks(), BorrowedBlocks()
    for target, arguments in ((_take_tasks, (line, borrowed, tasks)), (_exit_when_told, ())):
        threading.Thread(target=target, args=arguments, daemon=True, name=target.__name__).start()
    while True:
        returned, task = tasks.get()
        lending.returned(returned)
        packed = _answer(work, task, lending)
        del task  # and with it goes its block
        try:
            _send(line, borrowed.returned(), packed)
        except ConnectionError:
            os._exit(0)


def _answer(work: Callable[[Any, Empty], Any], task: object, blocks: LendingBlocks) -> Packed:
    """The message with the result of `task`, or with what went wrong."""
    try:
        if isinstance(task, SourceError):  # it could not be taken
            raise task
        return blocks.pack(work(task, blocks.empty))
    except Exception as error:  # noqa: BLE001 - raised again in the main process
        trace = traceback.format_exc()
        try:
            packed = blocks.pack(_Failure(error, trace))
            BorrowedBlocks().unpack(Parcel((), (), ()), (), packed.message)
        except Exception:  # noqa: BLE001 - an error that cannot travel; what it says does
            packed = blocks.pack(_Failure(RuntimeError(f"{type(error).__name__}: {error}"), trace))
        return packed


def _take_tasks(
    line: Connection, blocks: BorrowedBlocks, tasks: "queue.SimpleQueue[tuple[list[int], Any]]"
) -> None:
    """Take tasks as they come, so that the main process never waits to get rid of one; leave when there are no more."""
    try:
        while True:
            tasks.put(_received(line, blocks))
    except SourceError as error:
        tasks.put(([], error))
    except (OSError, EOFError):  # the main process has hung up, or is gone
        os._exit(0)
    except Exception:  # noqa: BLE001 - whatever it is: a worker that takes no tasks would be waited for
        traceback.print_exc()
        os._exit(1)


def _exit_when_told() -> None:
    # how an exiting main process ends its workers; from anybody else the signal was meant for the main process
    main_process: BaseProcess | None = multiprocessing.parent_process()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != (main_process.pid if main_process else 0):
        pass
    os._exit(1)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started meanwhile do not end by SIGINT or SIGTERM; this one receives what came at the end.

    Both often go to a whole process group (Ctrl-C, batch systems), and the main process decides when workers stop: it
    may need batches for a step to be finished.
    """
    resource_tracker.ensure_running()  # starting it later would let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
