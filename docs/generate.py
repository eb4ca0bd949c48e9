"""Writes docs/configuration.md and docs/cli.md from the program itself: `python docs/generate.py`.

A test fails when the files are not what this writes.
"""

import dataclasses
from pathlib import Path
from typing import Any

import click

from vkd_cache.cli import cli
from vkd_cache.config import SECTIONS

HERE = Path(__file__).parent
NOTE = "<!-- made by docs/generate.py; change the program, not this file -->\n"


def configuration_page() -> str:
    """Every field of every section, with its default and what it may be."""
    lines = [
        "# Configuration",
        "",
        NOTE,
        "A pipeline is a TOML file with the sections below; what it leaves out has the default, and options",
        "override it. `vkd-cache COMMAND PIPELINE` takes a path, or the name of an installed pipeline",
        "(`deit_tiny_imagenet`, `deit_small_imagenet`, `vidt_swin_nano_coco`, `vidt_swin_tiny_coco`, `demo`,",
        "`demo_detection`). Unknown",
        "keys and values out of range are errors, all reported at once. Paths are relative to where the command is",
        "run.",
    ]
    flags = flags_by_field()
    for section, kind in SECTIONS.items():
        lines += ["", f"## [{section}]", "", str(kind.__doc__), ""]
        lines += ["| key | default | values | option | means |", "|---|---|---|---|---|"]
        for field in dataclasses.fields(kind):
            cells = (
                f"`{field.name}`",
                f"`{toml_value(field.default)}`" if field.default is not None else "",
                allowed(field),
                ", ".join(flags.get((section, field.name), ())),
                field.metadata["doc"].replace("|", "\\|"),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """What `--help` says, for the program and each of its commands."""
    lines = [
        "# Command line",
        "",
        NOTE,
        "`vkd-cache`, `python -m vkd_cache` and, from a checkout, `python cli.py` are the same program. Messages and",
        "progress go to stderr, results to stdout.",
        "",
        "| exit code | means |",
        "|---|---|",
        "| 0 | done |",
        "| 1 | error; `compare`: a gap beyond its bound |",
        "| 2 | wrong usage or configuration |",
        "| 3 | `extract`, `convert`: some units failed; `verify`, `demo`: errors in the cache, repaired ones too |",
        "| 130 | interrupted |",
    ]
    lines += ["", "## vkd-cache", "", "```text", help_text(cli, "vkd-cache"), "```"]
    for name, command in cli.commands.items():
        lines += ["", f"## {name}", "", "```text", help_text(command, f"vkd-cache {name}"), "```"]
    return "\n".join(lines) + "\n"


def help_text(command: click.Command, path: str) -> str:
    """`path --help` at 100 columns."""
    parent = None if command is cli else click.Context(cli, **cli.context_settings)
    settings = {"terminal_width": 100, "resilient_parsing": True, "parent": parent}
    return command.make_context(path, [], **settings).get_help()


def flags_by_field() -> dict[tuple[str, str], list[str]]:
    """The options that set a field, each with the commands that have it."""
    commands: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, command in cli.commands.items():
        for option in command.params:
            section, separator, field = str(option.name).partition("__")
            if separator:
                commands.setdefault((section, field), {}).setdefault(option.opts[0], []).append(name)
    return {
        key: [f"{', '.join(names)} `{flag}`" for flag, names in by_flag.items()] for key, by_flag in commands.items()
    }


def allowed(field: dataclasses.Field[Any]) -> str:
    """The field's choices or bounds, for people."""
    low, high = field.metadata["minimum"], field.metadata["maximum"]
    if field.metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in field.metadata["choices"])
    if low is None:
        return ""
    return f"≥ {number(low)}" if high is None else f"{number(low)} to {number(high)}"


def number(value: float) -> str:
    """Large bounds as a power of two."""
    return "2^63 - 1" if value == 2**63 - 1 else f"{value}"


def toml_value(value: object) -> str:
    """A default as it would stand in the file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(entry) for entry in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


PAGES = {"configuration.md": configuration_page, "cli.md": cli_page}

if __name__ == "__main__":
    for file_name, page in PAGES.items():
        (HERE / file_name).write_text(page(), encoding="utf-8")
