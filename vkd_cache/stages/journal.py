"""The record of a training run: JSON lines, TensorBoard on request, and a picture of the curves at the end.

One line per logged step (`kind` "step") and per evaluation (`kind` "eval"). A resumed run drops the lines that lie
behind its checkpoint, so the file reads as if nothing had happened.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vkd_cache.errors import ConfigError
from vkd_cache.runtime import write_atomic

LOG_NAME = "log.jsonl"
METRIC_LABELS = {"top1": "top-1", "ap": "AP"}  # how the watched metrics are called in lines and pictures
CURVES_NAME = "curves.png"
_NO_TERMS = ("kind", "step", "epoch", "lr", "samples_per_s")  # of a step's line; all others are loss terms


class Journal:
    """Appends to a run's log; a context manager."""

    def __init__(self, output: Path, *, upto_step: int = 0, evaluated: bool = True, tensorboard: bool = False) -> None:
        """Open the log of a run that goes on after `upto_step`; `evaluated`: that step's evaluation is behind it."""
        self._events = _tensorboard_writer(output, upto_step) if tensorboard else None
        path = output / LOG_NAME
        last = {"step": upto_step, "eval": upto_step if evaluated else upto_step - 1}
        kept = [line for line in read_log(path) if line["step"] <= last[line["kind"]]]
        write_atomic(path, b"".join(_line(entry) for entry in kept))
        self._file = path.open("ab")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; numbers also go to TensorBoard as `kind/name`."""
        self._file.write(_line({"kind": kind, "step": step} | dict(values)))
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Put the lines on the disk: before a checkpoint that lies behind them."""
        os.fsync(self._file.fileno())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a last line cut short by a crash is dropped."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _tensorboard_writer(output: Path, upto_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "[train] tensorboard: the tensorboard package is not installed: pip install tensorboard."
        ) from error
    return SummaryWriter(log_dir=str(output / "tensorboard"), purge_step=upto_step + 1)


def draw_curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> None:
    """A PNG of the loss terms and of the watched metric over steps, one colour a run.

    Args:
        path: the file to write.
        runs: log lines by name of the run.
        title: what is shown.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    panels = [("step", term) for term in _names(runs, "step") if term not in _NO_TERMS]
    panels += [("eval", name) for name in _names(runs, "eval") if name in METRIC_LABELS]
    figure = Figure(figsize=(4.2 * max(1, len(panels)), 3.4), layout="constrained")
    figure.suptitle(title)
    for number, (kind, name) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for label, lines in runs.items():
            points = [(line["step"], line[name]) for line in lines if line["kind"] == kind and name in line]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 12 else "", markersize=3)
        axes.set_title(f"{METRIC_LABELS[name]}, %" if kind == "eval" else f"{name} loss")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(runs) > 1 and number == 1:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _names(runs: Mapping[str, Sequence[Mapping[str, Any]]], kind: str) -> list[str]:
    """What lines of that kind hold, in the order of their first appearance."""
    chosen = (line for lines in runs.values() for line in lines if line["kind"] == kind)
    return list(dict.fromkeys(name for line in chosen for name in line))
