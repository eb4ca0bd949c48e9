"""Runs of the real program that are killed: a small process that has imported everything once forks one for each.

    python tests/kill_server.py

Jobs come as lines of JSON on its input, `Job` by fields; the process id of each, and its exit code, go out as lines.
A newcomer's trap: a forked process is as real as any other. It runs the command line, is killed by the kernel, and what
it had not written is lost.
"""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

PATIENCE_S = 240.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the program.

    Attributes:
        arguments: of the command line.
        said: the file that its messages are appended to.
        output: the folder whose files count, as an absolute path.
        kill_at: which time that it opens a file of `output` for writing, or renames or removes one, it dies of; from 1
            on, 0: of none.
        half: at that time it may still write `HALF_BYTES` bytes, and dies in the middle of the write that exceeds them.
        counted: the file that the number of such times is written to, at the end.
    """

    arguments: tuple[str, ...]
    said: str
    output: str
    kill_at: int = 0
    half: bool = False
    counted: str = ""


HALF_BYTES = 300  # less than every file of a run has


class Counter:
    """An audit hook that counts what a job does to its files, and kills it at one of them."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.events = 0

    def __call__(self, event: str, arguments: Sequence[Any]) -> None:
        if event not in ("open", "os.rename", "os.remove") or not self._concerns(event, arguments):
            return
        self.events += 1
        if self.events == self._job.kill_at:
            if self._job.half and event == "open":
                resource.setrlimit(resource.RLIMIT_FSIZE, (HALF_BYTES, resource.RLIM_INFINITY))
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    def _concerns(self, event: str, arguments: Sequence[Any]) -> bool:
        if not str(arguments[0]).startswith(self._job.output):
            return False
        return event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))


def run(job: Job) -> None:
    """In the forked process, which this ends."""
    import torch

    from vkd_cache import cli

    torch.set_num_threads(1)
    os.setsid()
    said = os.open(job.said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(said, number)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it: a limit would be an error, and no death
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    counter = Counter(job)
    sys.addaudithook(counter)
    code: Any = 1
    try:
        cli.main(list(job.arguments))
    except SystemExit as left:
        code = left.code
    finally:
        sys.stderr.flush()
        if job.counted:
            Path(job.counted).write_text(str(counter.events))
        os._exit(code if isinstance(code, int) else 1)


def serve() -> None:
    """Run jobs until there are no more."""
    import timm  # noqa: F401 - what a run imports, so that those forked have it

    from vkd_cache.stages import evaluate, train  # noqa: F401

    for line in sys.stdin:
        job = Job(**json.loads(line))
        pid = os.fork()
        if pid == 0:
            run(job)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class KillServer:
    """The side that asks: one job at a time; a context manager."""

    def __enter__(self) -> Self:
        command = [sys.executable, str(Path(__file__).resolve())]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._input.close()
        self._output.close()
        if self._process.wait(PATIENCE_S) and error is None:
            raise RuntimeError("the server of jobs did not end well")

    @property
    def _input(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _output(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    def start(self, job: Job) -> int:
        """Begin a job; its process id, which is that of its session and group, too."""
        print(json.dumps(dataclasses.asdict(job)), file=self._input, flush=True)
        return int(self._output.readline())

    def wait(self) -> int:
        """The exit code of the job under way, or minus the signal that it died of."""
        return int(self._output.readline())


if __name__ == "__main__":
    serve()
