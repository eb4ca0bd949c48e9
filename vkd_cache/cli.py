"""The command line: options -> config -> stage -> exit code.

A newcomer's trap: nothing here may import torch or numpy at the top, so stages are imported inside their commands and
`vkd-cache --help` answers at once. An option that overrides a field of the configuration is a `setting`; the few that
are not fields say what this one run does (`--dry-run`, `--json`).

Exit codes: 0 done, 1 error, 2 usage or configuration, 3 some units failed or are not sound, 130 interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from vkd_cache import __version__, console
from vkd_cache.cli_settings import (
    CODE_HELP,
    SAMPLE_HELP,
    TEACHER_HELP,
    VAL_HELP,
    VIEWS_HELP,
    WORKER_HELP,
    dry_run_option,
    is_cache,
    json_option,
    pipeline_argument,
    present,
    print_json,
    ranks,
    require,
    resolve,
    setting,
)
from vkd_cache.guard import guarded
from vkd_cache.runtime import expand_home, job_split

_PLANNED_CACHE_HELP = "the cache, as far as it is there: what is missing is planned, and nothing written"
_PLANNED_WEIGHTS_HELP = "file with its weights; without, or where it is missing, random ones, which are as fast"
_SECONDS_HELP = "time to measure for, about; starts of processes come on top; default: 60"
_DEMOS = {"classification": "demo", "detection": "demo_detection"}  # task and its pipeline
_DEMO_OUTPUTS = {"classification": "vkd-cache-demo", "detection": "vkd-cache-demo-detection"}


class _InOrder(click.Group):
    """Lists the commands in the order in which one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="vkd-cache")
def cli() -> None:
    """Run a vision teacher once, train any number of VkD students from the cache.

    PIPELINE is a TOML file, or the name of an installed one (deit_tiny_imagenet, deit_small_imagenet,
    vidt_swin_nano_coco, vidt_swin_tiny_coco, demo, demo_detection); options override what it says.
    """


@cli.command(short_help="run the teacher once, write the cache")
@pipeline_argument
@setting("--source", "source.train", metavar="PATH")
@setting("--cache", "cache.url", metavar="URL")
@setting("--teacher", "teacher.name", metavar="NAME")
@setting("--teacher-weights", "teacher.weights", metavar="FILE")
@setting("--views", "views.count", metavar="N|A:B", help_text=VIEWS_HELP)
@setting("--dtype", "cache.dtype")
@setting("--nodes", "cache.nodes", metavar="NAME,...")
@setting("--tokens", "cache.tokens", metavar="X")
@setting("--pixels", "cache.pixels")
@setting("--backend", "cache.backend")
@setting("--shard-size", "source.shard_size", metavar="N")
@setting("--batch-size", "extract.batch_size", metavar="N|auto")
@setting("--workers", "extract.workers", metavar="N")
@setting("--device", "extract.device", metavar="NAME")
@click.option("--worker", metavar="I/N", help=WORKER_HELP)
@setting("--seed", "views.seed", metavar="N")
@setting("--strict", "extract.strict")
@dry_run_option
def extract(pipeline: str | None, worker: str | None, dry_run: bool, **settings: object) -> int:
    """Stage one: run the teacher over the planned views and publish its features.

    The same command again finishes what is missing; a larger --views adds views.
    """
    config = resolve(pipeline, settings, "source.train", "cache.url", "teacher.name")
    split = job_split(worker)
    console.set_quiet(split.local_index > 0)  # one voice per machine; each --worker has a console of its own
    from vkd_cache.stages.extract import extract as run

    return run(config, split, dry_run=dry_run).exit_code


@cli.command(short_help="train a student from the cache")
@pipeline_argument
@setting("--source", "source.train", metavar="PATH")
@setting("--val", "source.val", metavar="PATH", help_text=VAL_HELP)
@setting("--cache", "cache.url", metavar="URL")
@setting("--student", "student.name", metavar="NAME")
@setting("--epochs", "train.epochs", metavar="N")
@setting("--batch-size", "train.batch_size", metavar="N")
@setting("--lr", "train.lr", metavar="X")
@setting("--output", "train.output", metavar="DIR")
@setting("--resume", "train.resume", metavar="auto|FILE")
@setting("--seed", "train.seed", metavar="N")
@setting("--amp", "train.amp")
@setting("--live-teacher", "train.live_teacher")
@setting("--teacher", "teacher.name", metavar="NAME", help_text="with --live-teacher: " + TEACHER_HELP)
@setting("--teacher-weights", "teacher.weights", metavar="FILE")
@click.option("--plain", is_flag=True, help="without distillation: feature and logit weights 0")
@setting("--workers", "train.workers", metavar="N")
@setting("--device", "train.device", metavar="NAME")
@dry_run_option
def train(pipeline: str | None, plain: bool, dry_run: bool, **settings: object) -> int:
    """Stage two: train a student from the cache, with no teacher in the process.

    Under torchrun every rank runs this same command.
    """
    if plain:
        settings |= {"loss__feature_weight": 0.0, "loss__logit_weight": 0.0}
    config = resolve(pipeline, settings, "source.train", "student.name", "train.output")
    if config.train.live_teacher:
        require(config, "teacher.name")
    elif config.loss.feature_weight or config.loss.logit_weight:
        require(config, "cache.url")
    split = ranks()
    from vkd_cache.stages.train import train as run

    run(config, split, dry_run=dry_run)
    return 0


@cli.command("eval", short_help="accuracy or COCO AP of a student, a teacher, or a cache")
@pipeline_argument
@setting("--source", "source.val", metavar="PATH", help_text=VAL_HELP)
@click.option("--checkpoint", default="", metavar="FILE", help="checkpoint of a student: ours or the VkD authors'")
@setting("--student", "student.name", metavar="NAME")
@click.option("--ema", is_flag=True, help="the checkpoint's weight average instead of its weights")
@setting("--teacher", "teacher.name", metavar="[NAME]", bare=True)
@setting("--teacher-weights", "teacher.weights", metavar="FILE")
@setting("--cache", "cache.url", metavar="[URL]", bare=True)
@setting("--batch-size", "eval.batch_size", metavar="N")
@setting("--workers", "eval.workers", metavar="N")
@setting("--device", "eval.device", metavar="NAME")
@setting("--output", "eval.output", metavar="DIR")
@json_option
def evaluate(pipeline: str | None, checkpoint: str, ema: bool, as_json: bool, **settings: object) -> int:
    """Stage three: exact top-1 and top-5 of a student, of a teacher, or of the cached teacher.

    --checkpoint evaluates a student, --teacher a network, --cache the views in a cache through the stored head; give
    one or more. --teacher and --cache without a value take the pipeline's. Of a detector, on images with boxes, it
    gives the twelve numbers of COCO, and writes detections.json and detections.png.
    """
    asked = {name: settings[f"{name}__{field}"] is not None for name, field in (("teacher", "name"), ("cache", "url"))}
    if not (checkpoint or any(asked.values())):
        raise click.UsageError("nothing to evaluate: give --checkpoint FILE, --teacher or --cache, or several of them.")
    config = resolve(pipeline, settings)
    if not config.source.train:  # a layout with train/ and val/ may stand in [source] train
        require(config, *(["source.val"] if checkpoint or asked["teacher"] else []))
    require(config, *(["teacher.name"] if asked["teacher"] else []), *(["cache.url"] if asked["cache"] else []))
    split = ranks()
    from vkd_cache.stages.coco_scores import DetectionResult, score_table
    from vkd_cache.stages.evaluate import EvalRequest
    from vkd_cache.stages.evaluate import evaluate as run

    request = EvalRequest(checkpoint=checkpoint, ema=ema, **asked)
    results = run(config, request, split)
    detectors = [result for result in results if isinstance(result, DetectionResult)]
    if split.index > 0:
        return 0
    if detectors and not as_json:
        console.show_table("Evaluation", *score_table(detectors))
    else:
        present("Evaluation", {"results": [result.to_json() for result in results]}, as_json)
    return 0


@cli.command(short_help="check a cache against its checksums, source and teacher")
@click.argument("cache_or_pipeline", metavar="CACHE|PIPELINE")
@setting("--source", "source.train", metavar="PATH")
@click.option("--pixels", is_flag=True, help="render views again and compare their digests; needs the source")
@click.option("--teacher", is_flag=True, help="run the teacher again and compare its features; needs the source")
@setting("--teacher-name", "teacher.name", metavar="NAME", help_text=CODE_HELP)
@setting("--teacher-weights", "teacher.weights", metavar="FILE")
@click.option("--sample", default=64, metavar="N", type=click.IntRange(min=0), help=SAMPLE_HELP)
@click.option("--repair", is_flag=True, help="drop what is damaged, for the same extract to make it again")
@setting("--workers", "extract.workers", metavar="N")
@setting("--device", "extract.device", metavar="NAME")
@json_option
def verify(cache_or_pipeline: str, as_json: bool, **settings: Any) -> int:
    """Check a cache: structure and checksums, and on request its pixels and features.

    CACHE is a directory or URL; a pipeline stands for its [cache] url. Ends with 0 where the cache is sound, 3 where it
    was not, also where --repair has dropped what was damaged.
    """
    asked = {name: settings.pop(name) for name in ("pixels", "teacher", "sample", "repair")}
    if is_cache(cache_or_pipeline):
        config = resolve(None, settings | {"cache__url": cache_or_pipeline})
        again = ""
    else:
        config = resolve(cache_or_pipeline, settings, "cache.url")
        again = f"vkd-cache extract {cache_or_pipeline}"
    if asked["pixels"] or asked["teacher"]:
        require(config, "source.train")
    from vkd_cache.stages.verify import VerifyRequest
    from vkd_cache.stages.verify import verify as run

    request = VerifyRequest(url=config.cache.url, source=config.source.train, again=again, **asked)
    report = run(config, request)
    present("Verification", report.to_json(), as_json)
    return report.exit_code


@cli.command(short_help="another backend, dtype or shard size of a cache, without the teacher")
@click.argument("cache_or_pipeline", metavar="CACHE|PIPELINE")
@click.argument("target", metavar="TARGET")
@setting("--backend", "cache.backend", help_text="container of a unit; default: as it is")
@setting("--dtype", "cache.dtype", help_text="stored type of node values; default: as they are")
@setting("--block-samples", "cache.block_samples", metavar="N")
@setting("--shard-size", "source.shard_size", metavar="N", help_text="samples per shard; needs --source")
@setting("--source", "source.train", metavar="PATH", help_text="data set of the cache, for --shard-size")
@setting("--views", "views.count", metavar="N|A:B", help_text="a count N or a range A:B of views; default: all")
@click.option("--worker", metavar="I/N", help=WORKER_HELP)
@click.option("--force", is_flag=True, help="also store values in a type that promises more than is left of them")
@dry_run_option
@json_option
def convert(
    cache_or_pipeline: str, target: str, worker: str | None, force: bool, dry_run: bool, as_json: bool, **settings: Any
) -> int:
    """Make the cache TARGET from another one: its backend, dtype or shard size changed, by no teacher.

    CACHE and TARGET are directories or URLs; a pipeline stands for its [cache] url. What is not asked for stays as it
    is. The same command again finishes what is missing.
    """
    from_cache = is_cache(cache_or_pipeline)
    url = {"cache__url": cache_or_pipeline} if from_cache else {}
    config = resolve(None if from_cache else cache_or_pipeline, settings | url, "cache.url")
    given = {name.partition("__")[2]: value for name, value in settings.items() if value is not None}
    split = job_split(worker)
    console.set_quiet(split.local_index > 0 or (dry_run and as_json))
    from vkd_cache.stages.convert import ConvertRequest
    from vkd_cache.stages.convert import convert as run
    from vkd_cache.stages.convert_plan import Wish

    request = ConvertRequest(
        source=config.cache.url,
        target=target,
        wish=Wish(force=force, **{name: given.get(name) for name in ("backend", "dtype", "block_samples")}),
        shard_size=given.get("shard_size"),
        images=given.get("train", config.source.train if "shard_size" in given else ""),
        views=given.get("count", ""),
    )
    summary = run(request, split, dry_run=dry_run)
    if as_json:
        print_json(summary.to_json())
    return summary.exit_code


@cli.command(short_help="measure the gap between cache and live teacher")
@pipeline_argument
@setting("--source", "source.train", metavar="PATH")
@setting("--cache", "cache.url", metavar="URL")
@setting("--student", "student.name", metavar="NAME")
@setting("--teacher", "teacher.name", metavar="NAME")
@setting("--teacher-weights", "teacher.weights", metavar="FILE")
@click.option("--steps", default=100, metavar="N", type=click.IntRange(min=1), help="steps of each run; default: 100")
@setting("--batch-size", "train.batch_size", metavar="N")
@setting("--device", "train.device", metavar="NAME")
@setting("--output", "train.output", metavar="DIR")
@json_option
def compare(pipeline: str | None, steps: int, as_json: bool, **settings: object) -> int:
    """Train the same steps from the cache and with the live teacher, and measure the gap.

    In lockstep, both losses at the same student weights, and free-running, each on its own.
    """
    config = resolve(pipeline, settings, "source.train", "cache.url", "student.name", "teacher.name", "train.output")
    from vkd_cache.stages.compare import compare as run

    report = run(config, steps=steps)
    present("Cache against live teacher", report.to_json(), as_json)
    return report.exit_code


@cli.command(short_help="bytes, hours and break-even, before anything is written")
@pipeline_argument
@setting("--source", "source.train", metavar="PATH")
@setting("--cache", "cache.url", metavar="URL", help_text=_PLANNED_CACHE_HELP)
@setting("--teacher", "teacher.name", metavar="NAME")
@setting("--teacher-weights", "teacher.weights", metavar="FILE", help_text=_PLANNED_WEIGHTS_HELP)
@setting("--views", "views.count", metavar="N|A:B", help_text=VIEWS_HELP)
@setting("--dtype", "cache.dtype")
@setting("--tokens", "cache.tokens", metavar="X")
@setting("--pixels", "cache.pixels")
@setting("--student", "student.name", metavar="NAME")
@setting("--epochs", "train.epochs", metavar="N")
@setting("--batch-size", "train.batch_size", metavar="N")
@click.option("--seconds", default=60.0, metavar="X", type=click.FloatRange(0.1, 86400), help=_SECONDS_HELP)
@json_option
def plan(pipeline: str | None, seconds: float, as_json: bool, **settings: object) -> int:
    """What a cache will take and gain: bytes, hours, memory, and when it pays against a live teacher.

    Measured on this machine, with a sample of the source, into a temporary folder that is removed. Without --student,
    stage one alone.
    """
    config = resolve(pipeline, settings, "source.train", "teacher.name")
    from vkd_cache.stages.planning import plan as run

    report = run(config, seconds=seconds)
    if as_json:
        print_json(report.to_json())
    else:
        report.show()
    return 0


@cli.command(short_help="all of it on real digits, on a CPU, in minutes")
@pipeline_argument
@click.option("--task", default="classification", type=click.Choice(list(_DEMOS)), help="default: classification")
@click.option("--output", metavar="DIR", help="default: vkd-cache-demo or vkd-cache-demo-detection, here")
@click.option("--short", is_flag=True, help="fewer steps and seeds: shows that all of it runs, not what it gains")
@json_option
def demo(pipeline: str | None, task: str, output: str | None, short: bool, as_json: bool) -> int:
    """All of it on real digits, on a CPU: teacher, cache, students, checks, one table.

    To classify them takes minutes, to detect them on photographs half an hour. The first takes the pipeline demo, the
    second demo_detection, where no other one is given.
    """
    config = resolve(pipeline or _DEMOS[task], {})
    from vkd_cache.stages.demo import demo as run

    report = run(config, Path(expand_home(output or _DEMO_OUTPUTS[task])), task=task, short=short)
    if as_json:
        print_json(report.to_json())
    else:
        console.show_table(report.title, report.columns, report.rows())
    return report.exit_code


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program with `arguments`, default those of the process, and exit."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    sys.exit(guarded(lambda: cli.main(given, prog_name="vkd-cache", standalone_mode=False)))
