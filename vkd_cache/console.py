"""What people see: progress and messages on stderr, results on stdout.

A newcomer's trap: stdout belongs to results (a table, or the one JSON document of `--json`), so that a command can be
piped; everything said on the way goes to stderr. On a terminal `track` draws a bar, elsewhere it writes a plain line
now and then, and `set_quiet` (ranks above 0) silences all but warnings.
"""

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

PLAIN_INTERVAL_S = 5.0
_TABLE_WIDTH = 240  # characters, where there is no terminal to fit into: a table in a log is never folded

# control characters but line ends and tabs, halves of surrogate pairs, and what turns the direction of writing
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")

# no console captures a stream: rich looks up sys.stdout and sys.stderr at each line
_messages = Console(stderr=True, highlight=False, markup=False, emoji=False)
_results = Console(highlight=False, markup=False, emoji=False)
_wide_results = Console(highlight=False, markup=False, emoji=False, width=_TABLE_WIDTH)
_quiet = False
_live: RichProgress | None = None  # one bar area; a nested `track` adds a line to it


class Progress:
    """Counts towards a total and shows how far it is; made by `track`. Safe to advance from several threads."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._done = 0
        self._detail = ""
        self._lock = threading.Lock()
        self._started = time.monotonic()

    @property
    def done(self) -> int:
        """Units counted so far."""
        return self._done

    def advance(self, n: int = 1) -> None:
        """Count `n` more units."""
        with self._lock:
            self._done += n
            self._show()

    def leave_out(self, n: int) -> None:
        """Take `n` units off the total: they need not be done after all."""
        with self._lock:
            self._total -= n
            self._show()

    def detail(self, text: str) -> None:
        """Show `text` after the rate from now on, for example where time goes."""
        with self._lock:
            self._detail = text
            self._show()

    def _show(self) -> None:
        """Bring the display up to date; a subclass may have one."""

    def _close(self) -> None:
        """Say the last word, if there is a display."""

    def _elapsed_s(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)


class _Lines(Progress):
    """Plain lines, for logs and pipes."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        super().__init__(title, total, unit)
        self._last_line = self._started

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._last_line < PLAIN_INTERVAL_S or self._done >= self._total:
            return  # the closing line reports the end
        self._last_line = now
        rate = self._done / self._elapsed_s()
        left = clock((self._total - self._done) / rate) if self._done else "?"
        share = f"{100 * self._done / self._total:.0f}%"
        say(self._line(f"{self._done}/{self._total} {self._unit} ({share}), {rate:.4g} {self._unit}/s, ETA {left}"))

    def _close(self) -> None:
        elapsed_s = self._elapsed_s()
        count = str(self._done) if self._done == self._total else f"{self._done}/{self._total}"
        say(self._line(f"{count} {self._unit} in {clock(elapsed_s)}, {self._done / elapsed_s:.4g} {self._unit}/s"))

    def _line(self, text: str) -> str:
        return f"{self._title}: {text}" + (f" | {self._detail}" if self._detail else "")


class _Bar(Progress):
    """One line of the terminal's live area."""

    def __init__(self, title: str, total: int, unit: str, live: RichProgress) -> None:
        super().__init__(title, total, unit)
        self._live = live
        self._task: TaskID = live.add_task(title, total=total, unit=unit, detail="")

    def _show(self) -> None:
        self._live.update(self._task, completed=self._done, total=self._total, detail=self._detail)

    def _close(self) -> None:
        self._live.refresh()
        self._live.stop_task(self._task)


class _RateColumn(ProgressColumn):
    """`312.5 images/s, ETA 0:12:04`, and the whole time once it is over."""

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        unit = task.fields["unit"]
        speed = f"{rate:.4g} {unit}/s" if rate else f"- {unit}/s"
        if task.finished or task.stop_time is not None:
            return Text(f"{speed} in {clock(task.elapsed or 0.0)}")
        left = task.time_remaining
        return Text(f"{speed}, ETA {'?' if left is None else clock(left)}")


@contextlib.contextmanager
def track(title: str, total: int, unit: str = "images") -> Iterator[Progress]:
    """Show the progress of the enclosed work: a bar with rate and ETA, or plain lines where stderr is no terminal.

    Args:
        title: what is done, one or two words.
        total: units of the whole work, at least 0; the count may stop short of it.
        unit: what is counted, plural.
    """
    if _quiet:
        yield Progress(title, total, unit)
        return
    if not _messages.is_terminal:
        progress: Progress = _Lines(title, total, unit)
        try:
            yield progress
        finally:
            progress._close()
        return
    with _live_area() as live:
        progress = _Bar(title, total, unit, live)
        try:
            yield progress
        finally:
            progress._close()


def set_quiet(quiet: bool) -> None:
    """Silence progress, messages and tables of this process (ranks above 0). Warnings are still shown."""
    global _quiet
    _quiet = quiet


def plain(text: str) -> str:
    """`text` without what a terminal would obey, or a stream refuse: both may come in a stranger's names and keys."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def say(text: str) -> None:
    """One line on stderr."""
    if not _quiet:
        _messages.print(plain(text), soft_wrap=True)


def warn(text: str) -> None:
    """One line on stderr that a reader should not miss."""
    _messages.print(f"Warning: {plain(text)}", style="yellow", soft_wrap=True)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; columns whose cells are all numbers are aligned to the right."""
    if _quiet:
        return
    results = _results if _results.is_terminal else _wide_results
    table = Table()
    for position, name in enumerate(columns):
        numeric = all(row[position][:1].isdigit() or row[position][:1] in ("-", "+", "") for row in rows)
        table.add_column(Text(plain(name)), justify="right" if numeric and rows else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    if title:
        results.print(plain(title), style="italic", soft_wrap=True)
    results.print(table)


def show_document(title: str, document: Mapping[str, object]) -> None:
    """A JSON document as tables on stdout: one of its plain values, one for each list of objects in it."""
    plain: list[tuple[str, str]] = []
    tables: list[tuple[str, list[Mapping[str, object]]]] = []
    for name, value in _flat(document):
        if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            tables.append((name, value))
        elif isinstance(value, list) and len(value) > 8:
            plain.append((name, f"{len(value)} values"))
        else:
            plain.append((name, _cell(value)))
    if plain:
        show_table(title, ("", "value"), plain)
    for name, entries in tables:
        flat = [dict(_flat(entry)) for entry in entries]
        columns = list(dict.fromkeys(column for entry in flat for column in entry))
        heading = f"{title}: {name}" if plain or len(tables) > 1 else title
        show_table(heading, columns, [[_cell(entry.get(column)) for column in columns] for entry in flat])


def _flat(document: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Pairs of dotted name and value, without the objects in between."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(entry) for entry in value)
    return str(value)


def clock(seconds: float) -> str:
    """A duration for people: `0.4 s`, `42 s`, `3:05`, `1:02:03`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def _live_area() -> Iterator[RichProgress]:
    """The terminal's one live area; the outermost `track` opens and closes it."""
    global _live
    if _live is not None:
        yield _live
        return
    count = TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        count,
        _RateColumn(),
        TextColumn("{task.fields[detail]}", markup=False, style="dim"),
    )
    with RichProgress(*columns, console=_messages, refresh_per_second=4) as live:
        _live = live
        try:
            yield live
        finally:
            _live = None


def counted(number: int, noun: str) -> str:
    """`1 unit`, `2 units`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
