"""Does distillation do what the paper says? Students on Fashion-MNIST, every variant with the same seeds.

    python benchmarks/evidence.py --input /usr/share/datasets/fashion-mnist --folder data/evidence \\
        --output docs/results/evidence.json --page docs/results/evidence.md

Everything is done by the real stages on JPEG files in tar shards: one teacher trained without distillation, caches, and
students from them (`fashion_runs.py`). What is done lies below --folder: the same command goes on where it was cut off.
A newcomer's trap: three seeds show little. Differences are taken seed by seed and held against the noise of all runs
together (`pairs.py`); a verdict "within noise" says that this experiment cannot tell, not that there is no difference.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fashion_runs import FashionRuns, Setting, Variant
from harness import Report, parse, parser, require, scratch_folder
from pairs import Pair, Table, write_part

from vkd_cache import console
from vkd_cache.cli import guarded

TINY = {
    "taught": 60, "learnt": 60, "judged": 20, "teacher_epochs": 1, "teacher_batch_size": 20, "epochs": 1,
    "batch_size": 20, "repetitions": 1,
}  # fmt: skip
PLACES = ("input", "folder", "page")  # of this machine, and so not among the settings that are reported
DTYPES = ("float32", "float16", "int8")  # beside uint8, which all others have
VIEWS = (1, 2, 4)  # beside 8
VARIANTS = {
    "plain": Variant(feature=False, logit=False),
    "logit loss only": Variant(feature=False),
    "feature loss only": Variant(logit=False),
    "feature loss only, linear projector": Variant(logit=False, loss={"projector": "linear"}),
    "feature loss only, no normalisation": Variant(logit=False, loss={"normalisation": "none"}),
    "feature loss only, linear, no normalisation": Variant(
        logit=False, loss={"projector": "linear", "normalisation": "none"}
    ),
    "VkD": Variant(),
    "VkD, live teacher": Variant(live=True),
    **{f"VkD, {dtype}": Variant(dtype=dtype) for dtype in DTYPES},
    **{f"VkD, {count} view{'s' * (count > 1)}": Variant(views=count) for count in VIEWS},
    **{f"plain, {count} view{'s' * (count > 1)}": Variant(feature=False, logit=False, views=count) for count in VIEWS},
    "VkD, projector killed": Variant(killed=True),
    "feature loss only, projector killed": Variant(logit=False, killed=True),
}
PAIRS = (
    Pair("VkD helps", "VkD", "plain"),
    Pair("the logit loss helps", "logit loss only", "plain"),
    Pair("the feature loss helps", "feature loss only", "plain"),
    Pair("both help more than logits", "VkD", "logit loss only"),
    Pair("both help more than features", "VkD", "feature loss only"),
    Pair("orthogonal beats linear", "feature loss only", "feature loss only, linear projector"),
    Pair("layer norm beats none", "feature loss only", "feature loss only, no normalisation"),
    Pair("both beat neither", "feature loss only", "feature loss only, linear, no normalisation"),
    Pair("a live teacher is no better than its cache", "VkD, live teacher", "VkD", equal=True),
    *(Pair(f"{dtype} is no better than uint8", f"VkD, {dtype}", "VkD", equal=True) for dtype in DTYPES),
    Pair("8 views beat 1", "VkD", "VkD, 1 view"),
    Pair("8 views beat 2", "VkD", "VkD, 2 views"),
    Pair("8 views beat 4", "VkD", "VkD, 4 views"),
    Pair("VkD helps with 1 view", "VkD, 1 view", "plain, 1 view"),
    Pair("VkD helps with 2 views", "VkD, 2 views", "plain, 2 views"),
    Pair("VkD helps with 4 views", "VkD, 4 views", "plain, 4 views"),
    Pair("a dead projector costs accuracy", "VkD", "VkD, projector killed"),
    Pair("a dead one leaves the logit loss alone", "VkD, projector killed", "logit loss only", equal=True),
    Pair("a dead one alone leaves nothing", "feature loss only, projector killed", "plain", equal=True),
)


def main() -> int:
    """Run the campaign."""
    made = parser("Accuracy of students by what they are taught with; a repetition is a seed.", repetitions=3)
    made.set_defaults(threads=1)
    made.add_argument("--input", required=True, metavar="DIR", help="folder with the four idx.gz files")
    made.add_argument("--folder", default="", metavar="DIR", help="where runs are kept, to go on; empty: nowhere")
    made.add_argument("--page", default="", metavar="FILE", help="write the tables into this Markdown page")
    made.add_argument("--only", default="", metavar="NAME;...", help="these variants alone; empty: all")
    for field in dataclasses.fields(Setting):
        if field.name != "seed":
            name, kind = field.name.replace("_", "-"), type(field.default)
            made.add_argument(f"--{name}", type=kind, default=field.default, help=f"see Setting.{field.name}")
    options = parse(made, TINY)
    report = Report("evidence", argparse.Namespace(**{k: v for k, v in vars(options).items() if k not in PLACES}))
    setting = Setting(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Setting)})
    keep = contextlib.nullcontext(Path(options.folder)) if options.folder else scratch_folder(options)
    with keep as folder:
        runs = FashionRuns(folder.absolute(), Path(options.input), setting)
        table = campaign(runs, chosen(options.only), options.repetitions, report)
    for pair in table.pairs:
        report.facts[f"{pair.variant} - {pair.baseline}"] = table.difference(pair)
    report.finish(options.output)
    if options.page:
        write_part(Path(options.page), table.markdown())
        console.say(f"evidence: written to {options.page}")
    return 0


def chosen(only: str) -> dict[str, Variant]:
    """The variants that --only names, or all.

    Raises:
        ConfigError: a name that is none of theirs.
    """
    names = [name.strip() for name in only.split(";")] if only else list(VARIANTS)
    unknown = sorted(set(names) - set(VARIANTS))
    require(not unknown, f"--only: found {', '.join(unknown)}, expected some of {'; '.join(VARIANTS)}.")
    return {name: VARIANTS[name] for name in names}


def campaign(runs: FashionRuns, variants: Mapping[str, Variant], seeds: int, report: Report) -> Table:
    """Train every variant with every seed; the report gets accuracies and what is known of caches."""
    report.facts["teacher, top-1"] = runs.teacher()["top1"]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    with console.track("evidence", seeds * len(variants), "students") as progress:
        for seed in range(seeds):
            for name, variant in variants.items():
                results[name].append(runs.student(variant, seed))
                console.say(f"{name}, seed {seed}: {results[name][-1]['top1']:.2f}")
                progress.advance()
    top1 = {name: [result["top1"] for result in found] for name, found in results.items()}
    report.measure("top-1, %", top1)
    notes = {name: _note(runs, variant, results[name]) for name, variant in variants.items()}
    report.facts |= {f"stored, {name}": note for name, note in notes.items() if note}
    everything = [result for found in results.values() for result in found]
    report.facts["optimizer steps of a student"] = max(result["steps"] for result in everything)
    report.facts["CPU seconds of a student, mean"] = statistics.mean(result["cpu_s"] for result in everything)
    report.facts["commits of the runs"] = ", ".join(sorted({result["commit"][:7] for result in everything}))
    table = Table(top1, [pair for pair in PAIRS if {pair.variant, pair.baseline} <= set(top1)], notes)
    report.facts["noise of a difference, points"] = table.noise
    return table


def _note(runs: FashionRuns, variant: Variant, results: list[dict[str, Any]]) -> str:
    """What is worth knowing of a variant besides its accuracy."""
    if variant.killed:
        return f"norm of the projector after training: {max(result['projector_norm'] for result in results):g}"
    if variant.live or not (variant.feature or variant.logit):
        return ""
    cache = runs.cache(variant.dtype, variant.views)
    return f"{cache['codec']}, {cache['bytes_per_view']:.0f} B a view"


if __name__ == "__main__":
    sys.exit(guarded(main))
