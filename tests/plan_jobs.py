"""What processes that a plan starts do in its tests: a module that takes no time to import."""

import os


def answers(request: str, started: float) -> tuple[str, int]:
    """What was sent, and where it arrived."""
    del started
    return request, os.getpid()


def fails(request: Exception, started: float) -> None:
    """Raise what was sent."""
    raise request


def dies(request: int, started: float) -> None:
    """End by a signal."""
    os.kill(os.getpid(), request)


def leaves(request: int, started: float) -> None:
    """Exit with a code."""
    os._exit(request)
