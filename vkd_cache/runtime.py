"""The machine a job runs on: its place among other processes, its devices, its versions.

The only module that reads the environment, and the only one that knows about torchrun and SLURM.
"""

import dataclasses
import errno
import os
import platform
import secrets
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vkd_cache import __version__
from vkd_cache.errors import ConfigError

# What a file system says of something that it cannot do at all.
LACKING = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EMLINK, errno.ENOLCK}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSplit:
    """This process' share of a job of several processes: worker `index` of `count`, `local_index` on its machine."""

    index: int = 0
    count: int = 1
    local_index: int = 0


def job_split(worker: str | None = None) -> JobSplit:
    """The share given by `--worker I/N`, else by torchrun, else by a SLURM array, else the whole job.

    Raises:
        ConfigError: `worker` is not I/N with 0 <= I < N, or the environment's numbers are not consistent.
    """
    if worker is not None:
        given_index, _, given_count = worker.partition("/")
        return _split("--worker", given_index, given_count, local="0")
    if "SLURM_ARRAY_TASK_ID" in os.environ and not _under_torchrun():
        return _slurm_array()
    return rank_split()


def rank_split() -> JobSplit:
    """This process' rank among those that train together: torchrun's, else the whole job.

    Not `job_split`: the tasks of a SLURM array share out an extraction, but each of them trains a model of its own.

    Raises:
        ConfigError: the environment's numbers are not consistent.
    """
    if not _under_torchrun():
        return JobSplit()
    environment = os.environ
    return _split("RANK/WORLD_SIZE", environment["RANK"], environment["WORLD_SIZE"], environment.get("LOCAL_RANK", "0"))


def _under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _slurm_array() -> JobSplit:
    # arrays may start anywhere (--array=1-8) and be strided; only MIN, MAX and COUNT together say where we stand
    task, first, last, count = (
        os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "MIN", "MAX", "COUNT")
    )
    try:
        steps, span, offset = int(count) - 1, int(last) - int(first), int(task) - int(first)
    except ValueError:
        steps, span, offset = -1, 0, 0
    stride = span // steps if steps > 0 else 1
    if steps < 0 or stride < 1 or stride * steps != span or offset % stride:
        # of --array=0,1,9 nobody but the scheduler knows which task is the second
        raise ConfigError(
            f"SLURM_ARRAY_TASK_*: found ID={task!r} MIN={first!r} MAX={last!r} COUNT={count!r}, expected evenly spaced "
            "whole numbers (--array=0-7). Give --worker I/N instead."
        )
    return _split("SLURM_ARRAY_TASK_ID", str(offset // stride), count, local=os.environ.get("SLURM_LOCALID", "0"))


def _split(where: str, index: str, count: str, local: str) -> JobSplit:
    try:
        split = JobSplit(index=int(index), count=int(count), local_index=int(local))
    except ValueError:
        split = JobSplit(index=0, count=0)
    if not 0 <= split.index < split.count:
        found = f"{index}/{count}".removesuffix("/")
        raise ConfigError(f"{where}: found '{found}', expected I/N with 0 <= I < N, for example 0/4.")
    return split


def resolve_device(name: str, local_index: int = 0) -> str:
    """`auto` -> `cuda:<local_index>` where there is a GPU, else `cpu`; other names are checked.

    Raises:
        ConfigError: not a device name, or a GPU that this machine does not have.
    """
    import torch

    if name == "auto":
        count = torch.cuda.device_count()
        return f"cuda:{local_index % count}" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: found '{name}', expected auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: found '{name}', expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        index = local_index if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ConfigError(f"device: found '{name}', but torch sees {torch.cuda.device_count()} GPUs here.")
        return f"cuda:{index}"
    return "cpu"


def library_versions(*more: str) -> dict[str, str]:
    """Versions of everything that can change a pixel or a feature, of Python and vkd-cache; `more`: distributions
    that only some caches depend on."""
    from PIL import features

    found = {"python": platform.python_version(), "vkd_cache": __version__}
    for name in ("numpy", "pillow", "timm", "torch", "torchvision", "zarr", *more):
        found[name] = _version(name)
    found["libjpeg"] = str(features.version("libjpeg_turbo") or features.version("jpg") or "unknown")
    return found


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def hardware() -> dict[str, str | int]:
    """What a reader of a result needs to know of the machine; never a host name."""
    import torch

    found: dict[str, str | int] = {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": num_cores(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = torch.cuda.device_count()
    return found


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def expand_home(path: str | Path) -> str:
    """`path` with a leading `~` or `~user` replaced, for paths that no shell has seen; as it is without such a user."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path's own raises a RuntimeError where there is no such user


def user_cache_folder() -> Path:
    """Where this user's programs keep what can be had again: below $XDG_CACHE_HOME, else ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given if os.path.isabs(given) else expand_home("~/.cache")) / "vkd-cache"  # noqa: PTH117


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far.

    Linux says it per program (VmHWM); getrusage's figure would start from the launching process', which a shell script
    or a test may have made large before this program began.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a reader, or a crash at any moment, sees the old file or the new one."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    # not mkstemp, whose files nobody else may read: results are shared with the same people as the files around them
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk, say: writing names no file by itself
            error.filename = str(path)
        raise
    sync_directory(path.parent)


def replace_file(temporary: Path, target: Path) -> None:
    """Rename a finished file to `target`, over what is there.

    Some network file systems rename over nothing. There the old file is removed first: a crash in between leaves the
    new one under its temporary name.
    """
    try:
        temporary.replace(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.EACCES, errno.EPERM, errno.EBUSY) or not target.is_file():
            raise
        target.unlink()
        temporary.replace(target)


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power cut, where its file system syncs more than files."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in LACKING:
            raise
    finally:
        os.close(handle)
