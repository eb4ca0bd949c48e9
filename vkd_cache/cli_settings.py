"""What the commands share: options that set fields of the configuration, and the ways from options to a result.

A newcomer's trap: an option that overrides a field takes its type, choices and help from that field (`setting`), and
nothing here may import torch or numpy at the top: `vkd-cache --help` answers at once.
"""

import dataclasses
import json
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from vkd_cache import console
from vkd_cache.config import SECTIONS, Config, find_pipeline, load_config
from vkd_cache.errors import ConfigError
from vkd_cache.runtime import JobSplit, rank_split

TEACHER_HELP = "timm model name, or package.module:callable that returns an nn.Module"
CODE_HELP = "the teacher, where it is a package.module:callable: code is run only if you name it, not a cache"
VAL_HELP = "images to evaluate on: a folder, COCO's too, or tar pattern; default: val/ beside the training split"
VIEWS_HELP = "a count N (views 0..N-1) or a range A:B (views A..B-1); default: 1"
SAMPLE_HELP = "samples that --pixels and --teacher look at; 0: all; default: 64"
WORKER_HELP = "share I (from 0) of N; torchrun and SLURM arrays need no such option"
pipeline_argument = click.argument("pipeline", required=False)
dry_run_option = click.option("--dry-run", is_flag=True, help="say what would be done, and stop")
json_option = click.option("--json", "as_json", is_flag=True, help="print one JSON document instead of tables")

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def setting(
    flag: str, key: str, *, metavar: str | None = None, help_text: str | None = None, bare: bool = False
) -> _Decorator:
    """An option that overrides the field `key` ("section.field").

    Args:
        flag: its name, with the dashes.
        key: the field it sets.
        metavar: what its value is called in the help.
        help_text: its help; None: the field's own documentation.
        bare: it may also be given without a value, which then reads "".
    """
    section, _, name = key.partition(".")
    metadata = next(field.metadata for field in dataclasses.fields(SECTIONS[section]) if field.name == name)
    hint = typing.get_type_hints(SECTIONS[section])[name]
    keywords: dict[str, Any] = {"default": None, "help": help_text or metadata["doc"]}
    if hint is bool:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    elif typing.get_origin(hint) is tuple:
        keywords |= {"callback": _listed, "metavar": metavar}
    elif metadata["choices"]:
        keywords |= {"type": click.Choice(metadata["choices"])}
    elif metadata["zero_word"]:
        keywords |= {"callback": _number_or(metadata["zero_word"]), "metavar": metavar}
    else:
        keywords |= {"type": hint, "metavar": metavar}
    if bare:
        keywords |= {"is_flag": False, "flag_value": ""}
    return click.option(flag, f"{section}__{name}", **keywords)


def _number_or(word: str) -> Callable[[click.Context, click.Parameter, str | None], int | str | None]:
    """Reads a whole number, or `word`, which stands for 0."""

    def read(_context: click.Context, option: click.Parameter, value: str | None) -> int | str | None:
        if value is None or value == word:
            return value
        try:
            return int(value)
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is neither a whole number nor {word!r}.", param=option) from error

    return read


def _listed(_context: click.Context, _option: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [part.strip() for part in value.split(",")]


def resolve(pipeline: str | None, settings: Mapping[str, object], *needed: str) -> Config:
    """Defaults < pipeline < options; settings are named `section__field`, and None or "" was not given."""
    overrides: dict[str, dict[str, object]] = {}
    for name, value in settings.items():
        if value is not None and value != "":
            section, _, field = name.partition("__")
            overrides.setdefault(section, {})[field] = value
    config = load_config(pipeline, overrides)
    require(config, *needed)
    return config


def require(config: Config, *keys: str) -> None:
    """Name every one of `keys` ("section.field") that this run needs and nobody gave."""
    command = click.get_current_context().command
    flags = {option.name: option.opts[0] for option in command.params}
    missing = []
    for key in keys:
        section, _, name = key.partition(".")
        if not getattr(getattr(config, section), name):
            flag = flags.get(f"{section}__{name}")
            missing.append(f"[{section}] {name}" + (f" ({flag})" if flag else ""))
    if missing:
        ways = "the option, or a" if "(" in "".join(missing) else "another"
        raise ConfigError(f"{command.name}: nothing says {', '.join(missing)}. Give {ways} pipeline file that has it.")


def is_cache(text: str) -> bool:
    """Whether `verify`'s argument is a cache rather than a pipeline.

    Raises:
        ConfigError: it is neither.
    """
    if not text:
        raise ConfigError("CACHE is empty, expected a directory, a URL or a pipeline file.")
    if "://" in text or Path(text).is_dir():
        return True
    try:
        find_pipeline(text)
    except ConfigError as error:
        raise ConfigError(f"{text}: no such cache directory. As a pipeline: {error}") from error
    return False


def ranks() -> JobSplit:
    """This process' share of a run that torchrun started; only the first one speaks."""
    split = rank_split()
    console.set_quiet(split.index > 0)
    return split


def present(title: str, document: dict[str, Any], as_json: bool) -> None:
    """A result on stdout: one JSON document, or tables."""
    if as_json:
        print_json(document)
    else:
        console.show_document(title, document)


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON document of `--json`."""
    click.echo(json.dumps(document, indent=2))
