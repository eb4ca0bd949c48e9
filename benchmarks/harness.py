"""What the benchmarks share: options, interleaved repetitions, and a report that is a table and a JSON document.

A newcomer's trap: a number here is never compared with one of another run. Everything is a ratio between things that
were measured turn by turn in the same process family, repetition by repetition.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vkd_cache import console
from vkd_cache.errors import ConfigError
from vkd_cache.runtime import hardware, library_versions, write_atomic

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What a ratio should be: at most, or at least, `bound`. Missing it is reported, never an error."""

    bound: float
    at_most: bool = True

    def met(self, value: float) -> bool:
        """Whether `value` is on the right side of the bound."""
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.bound:g}"


class Report:
    """The results of one benchmark.

    Attributes:
        name: of the benchmark.
        settings: every option it ran with.
        measurements: unit and one value per repetition, by name.
        ratios: numerator over denominator, repetition by repetition, by name.
        facts: what was counted or found out once, by name.
        curves: what a figure is drawn from, by name; in the document, in no table.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        places = ("output", "scratch", "table")
        self.settings = {key: value for key, value in vars(options).items() if key not in places}
        self._as_table = getattr(options, "table", False)
        self.measurements: dict[str, dict[str, Any]] = {}
        self.ratios: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {}
        self.curves: dict[str, dict[str, list[float]]] = {}

    def measure(self, unit: str, series: Mapping[str, Sequence[float]]) -> None:
        """Keep every repetition of each of `series`."""
        for name, values in series.items():
            self.measurements[name] = {"unit": unit} | spread(values)

    def ratio(self, name: str, numerator: str, denominator: str, target: Target | None = None) -> None:
        """Relate two measurements, repetition by repetition; the median is held against `target`."""
        above, below = (self.measurements[side]["values"] for side in (numerator, denominator))
        self.ratio_of(name, [a / b for a, b in zip(above, below, strict=True)], target)
        self.ratios[name] |= {"numerator": numerator, "denominator": denominator}

    def ratio_of(self, name: str, values: Sequence[float], target: Target | None = None) -> None:
        """Keep a ratio that was worked out by the benchmark itself."""
        self.ratios[name] = spread(values)
        if target is not None:
            self.ratios[name] |= {"target": str(target), "met": target.met(self.ratios[name]["median"])}

    def show(self) -> None:
        """Tables on stdout."""
        console.show_table(f"{self.name}: measured", *self._measured())
        console.show_table(f"{self.name}: ratios", *self._related())
        if self.facts:
            console.show_table(f"{self.name}: facts", ["what", "value"], [[k, _text(v)] for k, v in self.facts.items()])

    def to_json(self) -> dict[str, Any]:
        """Everything a reader of the numbers needs; never a path or a name of the machine."""
        found, changed = commit()
        return {
            "benchmark": self.name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": found,
            "uncommitted_changes": changed,
            "config": self.settings,
            "versions": library_versions(),
            "hardware": hardware() | {"torch_threads": torch.get_num_threads()},
            "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else [],
            "measurements": self.measurements,
            "ratios": self.ratios,
            "facts": self.facts,
        } | ({"curves": self.curves} if self.curves else {})

    def to_markdown(self) -> str:
        """The tables of `show`, with what they were measured on and how to repeat them."""
        found = self.to_json()
        machine, load = found["hardware"], found["load_average"]
        where = f"{machine['cores']} cores, {machine['cpu']}"
        where += f", {machine['gpu']}" if machine.get("gpu") else ", no GPU"
        given = {name: value for name, value in self.settings.items() if value not in ("", None, False)}
        settings = ", ".join(f"{name} {value}" for name, value in given.items())
        lines = [
            f"# {self.name}",
            "",
            f"{found['date'][:10]}, commit {found['commit'][:7]}, {where}, torch {found['versions']['torch']}, load "
            f"{load[0] if load else 'unknown'} at the end. Every repetition is in the JSON file of the same name; what "
            "is measured, and how, in [README.md](../README.md).",
            "",
            f"Settings: {settings}.",
        ]
        for title, rows in (("measured", self._measured()), ("ratios", self._related())):
            head, body = rows
            if body:
                lines += ["", f"## {title}", "", _row(head), _row(["---"] * len(head)), *map(_row, body)]
        if self.facts:
            lines += ["", "## facts", "", _row(["what", "value"]), _row(["---", "---"])]
            lines += [_row([name, _text(value)]) for name, value in self.facts.items()]
        return "\n".join(lines) + "\n"

    def finish(self, output: str) -> None:
        """Show the tables; where `output` names a file, write the JSON there, and the tables beside it (--table)."""
        self.show()
        if output:
            path = Path(output)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(self.to_json(), indent=1).encode() + b"\n")
            if self._as_table:
                write_atomic(path.with_suffix(".md"), self.to_markdown().encode())
            console.say(f"{self.name}: written to {output}")

    def _measured(self) -> tuple[list[str], list[list[str]]]:
        rows = [[name, found["unit"], *_cells(found)] for name, found in self.measurements.items()]
        return ["what", "unit", "median", "min", "max", "n"], rows

    def _related(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            [name, *_cells(found), found.get("target", ""), {True: "yes", False: "NO"}.get(found.get("met"), "")]
            for name, found in self.ratios.items()
        ]
        return ["ratio", "median", "min", "max", "n", "target", "met"], rows


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest, and all of them."""
    rounded = [float(f"{value:.6g}") for value in values]
    return {"median": statistics.median(rounded), "min": min(rounded), "max": max(rounded), "values": rounded}


def interleave(title: str, kinds: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Call every kind once a repetition; who starts rotates, so that slow drift of the machine hits all alike."""
    names = list(kinds)
    found: dict[str, list[float]] = {name: [] for name in names}
    with console.track(title, repetitions * len(names), "measurements") as progress:
        for repetition in range(repetitions):
            first = repetition % len(names)
            for name in names[first:] + names[:first]:
                found[name].append(kinds[name]())
                progress.advance()
    return found


def parser(description: str, *, repetitions: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--repetitions", type=int, default=repetitions, help="interleaved repetitions")
    made.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's own choice")
    made.add_argument("--seed", type=int, default=0, help="seed of the made data")
    made.add_argument("--output", default="", metavar="FILE", help="write the JSON result there")
    made.add_argument("--table", action="store_true", help="write the tables beside it, as Markdown")
    made.add_argument("--scratch", default=None, metavar="DIR", help="where made data may lie; default: a new folder")
    made.add_argument("--tiny", action="store_true", help="small enough for a test: shows that it runs, nothing more")
    return made


def parse(made: argparse.ArgumentParser, tiny: Mapping[str, Any]) -> argparse.Namespace:
    """The options; `tiny` holds the defaults under --tiny, and what is given explicitly still wins."""
    if made.parse_known_args()[0].tiny:
        made.set_defaults(**tiny)
    options = made.parse_args()
    if options.repetitions < 1:
        made.error("--repetitions: expected at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    # worker processes would import the script again, heavy modules and all; nothing in it is for them
    vars(sys.modules["__main__"]).pop("__file__", None)
    return options


@contextlib.contextmanager
def scratch_folder(options: argparse.Namespace) -> Iterator[Path]:
    """A folder for made data, removed afterwards; `--scratch` says on which disk it lies."""
    with tempfile.TemporaryDirectory(prefix="vkd-cache-benchmark-", dir=options.scratch) as name:
        yield Path(name)


class Stopwatch:
    """Wall-clock and CPU seconds of a `with` block; waits for the GPU at both ends.

    Attributes:
        wall_s: seconds that passed.
        cpu_s: CPU seconds of this process, all its threads.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._on_gpu = device is not None and device.type == "cuda"
        self.wall_s = self.cpu_s = 0.0

    def __enter__(self) -> "Stopwatch":
        self._wait()
        self._begun = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.wall_s = time.perf_counter() - self._begun[0]
        self.cpu_s = time.process_time() - self._begun[1]

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def require(condition: bool, message: str) -> None:
    """Stop with `message` where a benchmark would compare things that are not comparable."""
    if not condition:
        raise ConfigError(message)


def commit() -> tuple[str, bool]:
    """The commit of this checkout, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False


def _cells(found: Mapping[str, Any]) -> list[str]:
    return [*(f"{found[name]:.4g}" for name in ("median", "min", "max")), str(len(found["values"]))]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _text(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
