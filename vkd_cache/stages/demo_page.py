"""The demo's picture and page: curves of the three ways to train, and one HTML file that needs nothing else.

Shape legend: S seeds, E points of a curve.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vkd_cache.runtime import write_atomic
from vkd_cache.stages.demo_report import COLUMNS, KINDS, DemoReport

CURVES_NAME, PAGE_NAME = "curves.png", "index.html"
COLOURS = {"plain": "#8a8f98", "live": "#e08214", "cached": "#2166ac"}
_PANELS = (("eval", "top1", "top-1 on unseen digits, %"), ("step", "task", "loss against the labels"))

Log = Sequence[Mapping[str, Any]]


def draw_demo(path: Path, logs: Mapping[str, Sequence[Log]], report: DemoReport) -> None:
    """Write a PNG with accuracy and task loss over steps: the mean of the seeds, and their range.

    Args:
        path: the file.
        logs: log lines of each run, by kind, one log for each seed.
        report: for the title and the teacher's accuracy.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    figure.suptitle(f"{report.student_name} on {report.num_learnt} digits, taught by {report.teacher_name}")
    for number, (kind_of_line, name, title) in enumerate(_PANELS, start=1):
        axes = figure.add_subplot(1, len(_PANELS), number)
        for kind, runs in logs.items():
            steps, values = _curve(runs, kind_of_line, name)
            style = "--" if kind == "live" else "-"
            axes.plot(steps, values.mean(0), style, label=KINDS[kind], color=COLOURS[kind], lw=1.8, zorder=3)
            axes.fill_between(steps, values.min(0), values.max(0), color=COLOURS[kind], alpha=0.18, lw=0)
        if name == "top1":
            axes.axhline(report.check.teacher_top1, color="#333333", lw=1, ls=":", label="teacher")
            figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _curve(runs: Sequence[Log], kind_of_line: str, name: str) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Steps (E,) and values (S, E) of one number in the logs; all seeds log at the same steps."""
    points = [{line["step"]: line[name] for line in log if line["kind"] == kind_of_line} for log in runs]
    steps = sorted(set.intersection(*(set(values) for values in points)))
    return steps, np.array([[values[step] for step in steps] for values in points])


def write_page(folder: Path, report: DemoReport) -> Path:
    """Write the page with the table and the picture, which must be there; returns its path."""
    picture = base64.b64encode((folder / CURVES_NAME).read_bytes()).decode()
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    body = "\n".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in report.rows()
    )
    page = _PAGE.format(
        conclusion=html.escape(report.conclusion()),
        title=html.escape(report.title),
        head=head,
        body=body,
        picture=picture,
        story=html.escape(_story(report)),
        seconds=f"{report.seconds:.0f}",
    )
    path = folder / PAGE_NAME
    write_atomic(path, page.encode())
    return path


def _story(report: DemoReport) -> str:
    return (
        f"A {report.teacher_name} was trained on {report.num_taught} scanned digits. It then looked once at "
        f"{report.num_views} planned views of {report.num_learnt} of them, and its features went into the cache. The "
        f"same {report.student_name} was trained on these {report.num_learnt} images for {report.epochs} epochs in "
        "three ways, with the same views, order and initial weights: from the labels alone, with the teacher running "
        "beside it, and from the cache with no teacher in the process. Lines are means over the seeds, bands their "
        "range."
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vkd-cache demo</title>
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
<h1>vkd-cache demo</h1>
<p class="conclusion">{conclusion}</p>
<table>
<caption>{title}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
<img alt="Accuracy and task loss over steps for the three ways to train" src="data:image/png;base64,{picture}">
<p>{story}</p>
<footer>Made in {seconds} s by <code>vkd-cache demo</code>; every number is in report.json beside this page.</footer>
</body>
</html>
"""
