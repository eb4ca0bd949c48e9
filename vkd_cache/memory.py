"""How much memory there is, and which errors say that there is none.

A newcomer's trap: torch tells of a CPU's memory by a plain RuntimeError, and of a GPU's in several ways; and a
container may use less than the machine has.
"""

import os
import re
from pathlib import Path

_SAID_BY_TORCH = (
    "DefaultCPUAllocator", "bad_alloc", "out of memory. Tried to allocate", "CUDA error: out of memory",
    "_STATUS_ALLOC_FAILED", "Unable to find a valid cuDNN algorithm", "unable to find an engine to execute",
)  # fmt: skip
_CGROUP = Path("/sys/fs/cgroup")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory cannot be had, of the host or of a GPU."""
    # torch may not be imported: its own error, for GPUs, is known by name
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(text in str(error) for text in _SAID_BY_TORCH)


def memory_bytes() -> int:
    """Resident size of this process; 0 where the system does not say."""
    return _number_in(Path("/proc/self/status"), r"VmRSS:\s+(\d+) kB") * 1024


def available_memory_bytes() -> int | None:
    """Memory that this process may still take without anything being swapped or killed; None: nobody knows."""
    free = _number_in(Path("/proc/meminfo"), r"MemAvailable:\s+(\d+) kB") * 1024
    if not free and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _number_in(_CGROUP / "memory.max", r"(\d+)")
    if limit:  # what has been read from files counts as taken there, but is given back
        taken = _number_in(_CGROUP / "memory.current", r"(\d+)")
        given_back = _number_in(_CGROUP / "memory.stat", r"inactive_file (\d+)")
        free = min(free or limit, max(0, limit - taken + given_back))
    return free or None


def _number_in(path: Path, pattern: str) -> int:
    """The first number that `pattern` finds in a file of the system; 0 without one."""
    try:
        found = re.search(pattern, path.read_text(encoding="utf-8"))
    except OSError:
        return 0
    return int(found[1]) if found else 0
