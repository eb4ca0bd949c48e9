"""What a stored type costs a student in accuracy: Fashion-MNIST, every type with the same seeds, three of them.

    python benchmarks/bytes_accuracy.py --input /usr/share/datasets/fashion-mnist --folder data/bytes_accuracy \\
        --output docs/results/bytes_accuracy.json --page docs/results/bytes.md

One teacher trained without distillation, its cache in each type, and students from them that differ in nothing else, by
the real stages (`fashion_runs.py`, as the evidence uses it); float32 is the baseline. What is done lies below --folder:
the same command goes on where it was cut off. A newcomer's trap: three seeds show differences of a point, not of a
tenth; the noise is said (`pairs.py`), and "within noise" means that this experiment cannot tell.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from fashion_runs import FashionRuns, Setting, Variant
from harness import Report, parse, parser, scratch_folder
from pairs import Pair, Table, write_part

from vkd_cache import console
from vkd_cache.guard import guarded

TINY = {
    "taught": 60, "learnt": 60, "judged": 20, "teacher_epochs": 1, "teacher_batch_size": 20, "epochs": 1,
    "batch_size": 20, "repetitions": 1,
}  # fmt: skip
PLACES = ("input", "folder", "page")  # of this machine, and so not among the settings that are reported
EXACT = "float32"
DTYPES = "float16,uint8,uint4"
PLAIN = "no distillation"  # how far a type could fall


def main() -> int:
    """Run it."""
    made = parser("Accuracy of students by the stored type of their cache; a repetition is a seed.", repetitions=3)
    made.set_defaults(threads=1)
    made.add_argument("--input", required=True, metavar="DIR", help="folder with the four idx.gz files")
    made.add_argument("--folder", default="", metavar="DIR", help="where runs are kept, to go on; empty: nowhere")
    made.add_argument("--page", default="", metavar="FILE", help="write the tables into this Markdown page")
    made.add_argument("--dtypes", default=DTYPES, help=f"stored types beside {EXACT}, with commas")
    for field in dataclasses.fields(Setting):
        if field.name != "seed":
            name, kind = field.name.replace("_", "-"), type(field.default)
            made.add_argument(f"--{name}", type=kind, default=field.default, help=f"see Setting.{field.name}")
    options = parse(made, TINY)
    report = Report("bytes_accuracy", argparse.Namespace(**{k: v for k, v in vars(options).items() if k not in PLACES}))
    setting = Setting(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Setting)})
    keep = contextlib.nullcontext(Path(options.folder)) if options.folder else scratch_folder(options)
    with keep as folder:
        runs = FashionRuns(folder.absolute(), Path(options.input), setting)
        table = compare(runs, [EXACT, *options.dtypes.split(",")], options.repetitions, report)
    report.finish(options.output)
    if options.page:
        write_part(Path(options.page), table.markdown(), "bytes_accuracy.py")
        console.say(f"bytes_accuracy: written to {options.page}")
    return 0


def compare(runs: FashionRuns, dtypes: Sequence[str], seeds: int, report: Report) -> Table:
    """Students from every type with every seed; the report gets accuracies, sizes, and differences from float32."""
    report.facts["teacher, top-1"] = runs.teacher()["top1"]
    variants = {dtype: Variant(dtype=dtype) for dtype in dtypes} | {PLAIN: Variant(feature=False, logit=False)}
    top1: dict[str, list[float]] = {name: [] for name in variants}
    with console.track("bytes_accuracy", seeds * len(variants), "students") as progress:
        for seed in range(seeds):
            for name, variant in variants.items():
                top1[name].append(runs.student(variant, seed)["top1"])
                console.say(f"{name}, seed {seed}: {top1[name][-1]:.2f}")
                progress.advance()
    report.measure("top-1, %", top1)
    notes = {PLAIN: ""}
    for dtype in dtypes:
        cache = runs.cache(dtype, variants[dtype].views)
        notes[dtype] = f"{cache['codec']}, {cache['bytes_per_view']:.0f} B a view"
        report.facts[f"{dtype}: bytes per view, everything"] = cache["bytes_per_view"]
    pairs = [Pair(f"{dtype} costs nothing", dtype, EXACT, equal=True) for dtype in dtypes if dtype != EXACT]
    table = Table(top1, [*pairs, Pair("distillation helps", EXACT, PLAIN)], notes)
    for pair in table.pairs:
        report.facts[f"{pair.variant} - {pair.baseline}"] = table.difference(pair)
    report.facts["noise of a difference, points"] = table.noise
    return table


if __name__ == "__main__":
    sys.exit(guarded(main))
