"""The demo's curves and page: one picture over all runs, and one HTML file that needs nothing else.

Shape legend: S seeds, E points of a curve.
"""

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vkd_cache.config import Config
from vkd_cache.runtime import write_atomic
from vkd_cache.stages.demo_report import Comparison

CURVES_NAME, PAGE_NAME = "curves.png", "index.html"

Log = Sequence[Mapping[str, Any]]


class Panel(NamedTuple):
    """One diagram: which lines of the logs (`step` or `eval`), which of their numbers, and what it is."""

    kind_of_line: str
    name: str
    title: str


class Pen(NamedTuple):
    """How the runs of one kind are drawn."""

    colour: str
    style: str = "-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """What the curves show.

    Attributes:
        title: of all panels.
        panels: the first one is of the metric that the teacher's line belongs to.
        pens: by kind of run.
        teacher_score: the teacher's value of that metric.
    """

    title: str
    panels: tuple[Panel, ...]
    pens: Mapping[str, Pen]
    teacher_score: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What a task's steps hand over.

    Attributes:
        config: of the students, with the paths of this demo.
        report: the numbers.
        chart: how to draw the logs.
        pictures: what can be seen in further PNGs for the page, by name of the file.
    """

    config: Config
    report: Comparison
    chart: Chart
    pictures: Mapping[str, str] = dataclasses.field(default_factory=dict)


def draw_demo(path: Path, logs: Mapping[str, Sequence[Log]], labels: Mapping[str, str], chart: Chart) -> None:
    """Write a PNG with the chart's panels over steps: the mean of the seeds, and their range.

    Args:
        path: the file.
        logs: log lines of each run, by kind, one log for each seed.
        labels: what the kinds are called.
        chart: what to draw of them.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(chart.panels), 4.2), layout="constrained")
    figure.suptitle(chart.title)
    for number, panel in enumerate(chart.panels, start=1):
        axes = figure.add_subplot(1, len(chart.panels), number)
        for kind, runs in logs.items():
            steps, values = _curve(runs, panel.kind_of_line, panel.name)
            pen = chart.pens[kind]
            axes.plot(steps, values.mean(0), pen.style, label=labels[kind], color=pen.colour, lw=1.8, zorder=3)
            axes.fill_between(steps, values.min(0), values.max(0), color=pen.colour, alpha=0.18, lw=0)
        if number == 1:
            axes.axhline(chart.teacher_score, color="#333333", lw=1, ls=":", label="teacher")
            figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _curve(runs: Sequence[Log], kind_of_line: str, name: str) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Steps (E,) and values (S, E) of one number in the logs; all seeds log at the same steps."""
    points = [{line["step"]: line[name] for line in log if line["kind"] == kind_of_line} for log in runs]
    steps = sorted(set.intersection(*(set(values) for values in points)))
    return steps, np.array([[values[step] for step in steps] for values in points])


def write_page(folder: Path, report: Comparison, pictures: Mapping[str, str]) -> Path:
    """Write the page with the table and the pictures; returns its path.

    Args:
        folder: where it goes, and where the pictures are.
        report: what it tells.
        pictures: what can be seen in each PNG, by the name of the file.
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in report.columns)
    body = "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in report.rows())
    page = _PAGE.format(
        heading=html.escape(report.heading),
        conclusion=html.escape(report.conclusion()),
        title=html.escape(report.title),
        head=head,
        body=body,
        pictures="\n".join(_picture(folder / name, seen) for name, seen in pictures.items()),
        story=html.escape(report.story()),
        seconds=f"{report.seconds:.0f}",
    )
    path = folder / PAGE_NAME
    write_atomic(path, page.encode())
    return path


def _picture(path: Path, seen: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(seen)}" src="data:image/png;base64,{data}">'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.5rem; margin-bottom: .3rem; }}
.conclusion {{ font-size: 1.1rem; }}
table {{ border-collapse: collapse; width: 100%; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; color: #555; padding-bottom: .4rem; }}
th, td {{ text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; }}
th {{ border-bottom: 2px solid #888; }}
img {{ max-width: 100%; }}
footer {{ color: #666; font-size: .9rem; margin-top: 2rem; }}
</style>
</head>
<body>
<h1>{heading}</h1>
<p class="conclusion">{conclusion}</p>
<table>
<caption>{title}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
{pictures}
<p>{story}</p>
<footer>Made in {seconds} s by <code>vkd-cache demo</code>; every number is in report.json beside this page.</footer>
</body>
</html>
"""
