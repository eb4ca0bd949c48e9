"""Documentation: the generated pages are current, links lead somewhere, and every command shown is one."""

import re
import runpy
import shlex
from pathlib import Path

import click
import pytest

from vkd_cache.cli import cli

ROOT = Path(__file__).parent.parent
MARKDOWN = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PAGES = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES)
def test_generated_pages_are_current(page: str) -> None:
    current = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert current == PAGES[page](), "run python docs/generate.py"


@pytest.mark.parametrize("path", MARKDOWN, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), f"{name(path)} links to {target}"


def shown_commands() -> list[tuple[str, str]]:
    """(file, command line) of every `vkd-cache ...` in a shell block or at the head of a pipeline."""
    found = []
    for path in MARKDOWN:
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"```(?:sh|bash|console|shell)\n(.*?)```", text, flags=re.DOTALL):
            found += [(name(path), line) for line in block.replace("\\\n", " ").splitlines()]
    for path in sorted(ROOT.glob("pipelines/*.toml")):
        found += [(name(path), line) for line in re.findall(r"^#     (.*)$", path.read_text(encoding="utf-8"), re.M)]
    program = re.compile(r"(?:^|\s)(?:vkd-cache|-m vkd_cache|cli\.py)\s(.*)")
    return [(where, match[1]) for where, line in found if (match := program.search(line))]


@pytest.mark.parametrize(("where", "line"), shown_commands())
def test_commands_that_are_shown_exist(where: str, line: str) -> None:
    arguments = shlex.split(line, comments=True)
    context = click.Context(cli, info_name="vkd-cache")
    command = cli.get_command(context, arguments[0])
    if command is None:
        assert arguments[0] in ("--help", "--version"), f"{where}: vkd-cache {line}"
        return
    if "--help" not in arguments:
        command.make_context(arguments[0], arguments[1:], parent=context)
