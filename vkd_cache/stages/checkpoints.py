"""Checkpoints of a training run: written whole or not at all, read without executing anything.

`last.pt` is the state to continue from, `best.pt` the best student so far; they are different files. Both hold the
resolved configuration, so that `eval` can build the student from the file alone.
"""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vkd_cache import console
from vkd_cache.config import Config, config_to_json
from vkd_cache.errors import CheckpointError, ConfigError
from vkd_cache.runtime import expand_home, write_atomic
from vkd_cache.sealing import sealed
from vkd_cache.students.checkpoint import read_torch_file
from vkd_cache.weights import CHECKPOINT_FORMAT

VERSION = 3  # 1: standing held accuracies by name; 2: no checksum at its end
LAST, BEST = "last.pt", "best.pt"

# What may change between a run and its continuation without changing the result.
FREE_FIELDS = {
    "train": {"workers", "device", "output", "resume", "log_every", "checkpoint_every", "tensorboard", "digest_check"},
    "extract": {"workers", "device", "strict"},
    "eval": {"workers", "device", "batch_size", "output"},
    "source": {"train", "val", "local_dir", "local_gb"},
    "student": {"weights"},
    "cache": {"url"},
}
FIRST_STAGE = ("teacher", "cache", "extract")  # without a live teacher they matter by the cache's fingerprint alone
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")  # as runtime.write_atomic names them


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` atomically, marked as ours, with a checksum at its end."""
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, "version": VERSION} | state, buffer)
    write_atomic(path, sealed(buffer.getvalue()))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint of this project.

    Raises:
        CheckpointError: not readable, or not one of ours.
    """
    state = read_torch_file(path)
    if state.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path}: not a training checkpoint of vkd-cache (found keys {', '.join(sorted(map(str, state))[:6])}), "
            "so training cannot continue from it. Give the last.pt of a run, or leave --resume out."
        )
    if state.get("version") != VERSION:
        raise CheckpointError(f"{path}: checkpoint version {state.get('version')!r:.40}, this version reads {VERSION}.")
    sections, views = state.get("config"), state.get("views")
    fits = isinstance(sections, Mapping) and all(isinstance(fields, Mapping) for fields in sections.values())
    fits = fits and isinstance(views, list) and bool(views) and all(type(view) is int and view >= 0 for view in views)
    if not fits or not isinstance(state.get("identity"), Mapping):
        raise CheckpointError(
            f"{path}: says it is a checkpoint of vkd-cache, but its config, identity or views are none. Was it edited?"
        )
    return state


def find_checkpoint(config: Config) -> Path | None:
    """The file that `[train] resume` names: `auto` is the output's own last.pt, where there is one.

    Raises:
        CheckpointError: a file that does not exist.
        ConfigError: the output holds a run, and nothing says whether to continue it.
    """
    last = Path(expand_home(config.train.output)) / LAST
    if config.train.resume == "auto":
        return last if last.is_file() else None
    path = Path(expand_home(config.train.resume)) if config.train.resume else None
    if path is not None and not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint. Give a last.pt, or auto to use the one in --output.")
    if path is not None and path.resolve().parent == last.parent.resolve():
        return path
    if last.is_file():
        raise ConfigError(
            f"{config.train.output}: holds a training run. Continue it with --resume auto, or give another --output."
        )
    return path


def check_same_run(path: Path, state: dict[str, Any], config: Config, identity: dict[str, Any]) -> None:
    """Refuse to continue a run under anything that would change its result.

    Args:
        path: of the checkpoint, for the message.
        state: its content.
        config: of this run, resolved.
        identity: what decides the result besides the configuration, of this run.

    Raises:
        CheckpointError: every differing field with both values.
    """
    differences = []
    ignored = () if config.train.live_teacher else FIRST_STAGE
    for section, fields in config_to_json(config).items():
        if section in ignored:
            continue
        before = state["config"].get(section, {})
        differences += [
            f"  [{section}] {name}: {before.get(name)!r:.200} in the checkpoint, {value!r} now"
            for name, value in fields.items()
            # a checkpoint holds what JSON can: tuples come back as lists
            if name not in FREE_FIELDS.get(section, set()) and _plain(before.get(name)) != _plain(value)
        ]
    for name, value in identity.items():
        stored = state["identity"].get(name)
        if stored != value:
            differences.append(f"  {name}: {stored!r:.200} in the checkpoint, {value!r} now")
    if differences:
        raise CheckpointError(
            f"{path}: was made by another run:\n" + "\n".join(differences) + "\nContinue with the same "
            "configuration, data and processes, or start a new run in another --output."
        )


def remove_stale(output: Path) -> int:
    """Remove what killed processes left of files they were writing, say so, and return how many there were."""
    stale = [path for path in output.glob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]
    for path in stale:
        path.unlink(missing_ok=True)
    if stale:
        console.say(f"train: removed {len(stale)} temporary files that a killed run left in {output}")
    return len(stale)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
