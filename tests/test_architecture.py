"""The shape of the code: which way imports point, how long modules get, and that no option is without effect."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from vkd_cache.cli import cli
from vkd_cache.config import SECTIONS

PACKAGE = Path(__file__).parent.parent / "vkd_cache"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}

# arrows go down, or stay inside one part
LEVELS = {"__main__": 5, "cli": 4, "cli_settings": 3, "stages": 2}
LEVELS |= dict.fromkeys(("console", "config", "fields", "errors", "runtime", "sealing", "weights", "memory"), 0)
LEVELS |= dict.fromkeys(("pipeline_file", "remote", "remote_faults", "urls", "local_copies"), 0)
PARTS_LEVEL = 1  # cache, sources, views, teachers, students, losses, ...
SIDEWAYS = {
    ("cache", "vkd_cache.views.params"),
    ("cache", "vkd_cache.views.recipe"),
    ("sources", "vkd_cache.views.params"),
    ("sources", "vkd_cache.views.recipe"),
    ("students", "vkd_cache.projector"),
    ("students", "vkd_cache.losses"),
    ("students", "vkd_cache.detection.canvas"),
    ("students", "vkd_cache.detection.checkpoint"),
    ("students", "vkd_cache.detection.distillation"),
    ("students", "vkd_cache.detection.pretrained"),
    ("students", "vkd_cache.detection.vidt"),
    ("losses", "vkd_cache.normalisation"),
    ("projector", "vkd_cache.orthonormal"),
    ("cache", "vkd_cache.stored_rows"),
    ("detection", "vkd_cache.losses"),
    ("detection", "vkd_cache.normalisation"),
    ("detection", "vkd_cache.projector"),
    ("detection", "vkd_cache.tokens"),
    ("cache", "vkd_cache.tokens"),
    ("teachers", "vkd_cache.detection.canvas"),
    ("teachers", "vkd_cache.detection.checkpoint"),
    ("teachers", "vkd_cache.detection.vidt"),
    ("teachers", "vkd_cache.tokens"),
    ("config", "vkd_cache.errors"),
    ("config", "vkd_cache.fields"),
    ("config", "vkd_cache.pipeline_file"),
    ("pipeline_file", "vkd_cache.errors"),
    ("pipeline_file", "vkd_cache.fields"),
    ("pipeline_file", "vkd_cache.urls"),
    ("runtime", "vkd_cache.errors"),
    ("remote", "vkd_cache.errors"),
    ("remote", "vkd_cache.remote_faults"),
    ("remote", "vkd_cache.urls"),
    ("urls", "vkd_cache.errors"),
    ("config", "vkd_cache.urls"),
    ("local_copies", "vkd_cache.errors"),
    ("local_copies", "vkd_cache.runtime"),
    ("weights", "vkd_cache.errors"),
    ("weights", "vkd_cache.runtime"),
    ("weights", "vkd_cache.sealing"),
    ("console", "vkd_cache.errors"),
    ("console", "vkd_cache.runtime"),
}


def part(module: str) -> str:
    return [*module.split("."), ""][1]


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module of ours that is imported anywhere in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [member if member in MODULES else str(node.module) for member in members]
        else:
            continue
        yield from (name for name in names if part(name) and name.startswith("vkd_cache."))


@pytest.mark.parametrize("module", [name for name in MODULES if part(name)])
def test_imports_point_downwards(module: str) -> None:
    own = part(module)
    for imported in imports(TREES[module]):
        other = part(imported)
        down = LEVELS.get(other, PARTS_LEVEL) < LEVELS.get(own, PARTS_LEVEL)
        assert down or other == own or (own, imported) in SIDEWAYS, f"{module} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short_and_documented(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    assert text.count("\n") <= 400, f"{module} is too long: find the second noun in it"
    assert ast.get_docstring(TREES[module]), f"{module} does not say what it is"


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    yield from ((ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("module", MODULES)
def test_what_nobody_should_meet(module: str) -> None:
    """No pickle, no global random state, no environment outside runtime.py, no exit outside cli.py."""
    tree = TREES[module]
    called = {name for name, _ in calls(tree)}
    assert not [
        name for name in called if re.match(r"(pickle|random)\.|(np|numpy)\.random\.(?!default_rng)[a-z]", name)
    ]
    for name, call in calls(tree):
        if name == "torch.load":
            assert any(ast.unparse(keyword) == "weights_only=True" for keyword in call.keywords)
    assert part(module) == "stages" or "torch.manual_seed" not in called  # initial weights and dropout draw from it
    uses = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert part(module) == "runtime" or not uses & {"os.environ", "os.getenv"}
    assert part(module) == "cli" or "sys.exit" not in uses


def sections_by_name(tree: ast.Module) -> dict[str, str]:
    """Names in `tree` that hold a section: called like it, annotated with its type, or assigned from it."""
    types = {kind.__name__: section for section, kind in SECTIONS.items()}
    found = {section: section for section in SECTIONS}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            found[node.arg] = types.get(ast.unparse(node.annotation), found.get(node.arg, ""))
        elif isinstance(node, ast.AnnAssign):
            name = last_name(node.target)
            found[name] = types.get(ast.unparse(node.annotation), found.get(name, ""))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute) and node.value.attr in SECTIONS:
            found |= {last_name(target): node.value.attr for target in node.targets}
    return found


def last_name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def test_no_field_without_effect() -> None:
    """Half of the reference's flags change nothing; ours are all read somewhere."""
    wanted = {(section, field.name) for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)}
    for module, tree in TREES.items():
        if module != "vkd_cache.config":
            sections = sections_by_name(tree)
            reads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
            wanted -= {(sections.get(last_name(node.value), ""), node.attr) for node in reads}
    assert wanted == set()


# what a user types is a promise: change it on purpose, here and in the changelog
OPTIONS = {
    "extract": "--source --cache --teacher --teacher-weights --views --dtype --nodes --tokens --pixels --backend "
    "--shard-size --batch-size --workers --device --worker --seed --strict --no-strict --dry-run",
    "train": "--source --val --cache --student --epochs --batch-size --lr --output --resume --seed --amp "
    "--live-teacher --no-live-teacher --teacher --teacher-weights --plain --workers --device --dry-run",
    "eval": "--source --checkpoint --student --ema --teacher --teacher-weights --cache --batch-size --workers "
    "--device --output --json",
    "verify": "--source --pixels --teacher --teacher-name --teacher-weights --sample --repair --workers --device "
    "--json",
    "convert": "--backend --dtype --block-samples --shard-size --source --views --worker --force --dry-run --json",
    "compare": "--source --cache --student --teacher --teacher-weights --steps --batch-size --device --output --json",
    "plan": "--source --cache --teacher --teacher-weights --views --dtype --tokens --pixels --student --epochs "
    "--batch-size --seconds --json",
    "demo": "--task --output --short --json",
}
# options that are not called like the field they set; every other one is
NAMES = {
    ("--source", "source", "train"),
    ("--source", "source", "val"),  # eval
    ("--cache", "cache", "url"),
    ("--teacher", "teacher", "name"),
    ("--teacher-name", "teacher", "name"),  # verify, where --teacher says that it is to be run
    ("--teacher-weights", "teacher", "weights"),
    ("--student", "student", "name"),
    ("--views", "views", "count"),
}


def test_the_options_are_the_published_ones() -> None:
    given = {
        name: [flag for option in command.params for flag in (*option.opts, *option.secondary_opts) if "-" in flag]
        for name, command in cli.commands.items()
    }
    assert given == {name: flags.split() for name, flags in OPTIONS.items()}


@pytest.mark.parametrize("command", cli.commands.values(), ids=lambda command: str(command.name))
def test_options_are_named_like_the_fields_they_set(command: click.Command) -> None:
    for option in command.params:
        section, separator, field = str(option.name).partition("__")
        if separator:
            assert field in {known.name for known in dataclasses.fields(SECTIONS[section])}
            flag = option.opts[0]
            assert flag == f"--{field.replace('_', '-')}" or (flag, section, field) in NAMES


def test_every_command_takes_a_pipeline_first() -> None:
    for command in cli.commands.values():
        arguments = [param for param in command.params if isinstance(param, click.Argument)]
        assert len(arguments) == (2 if command.name == "convert" else 1)  # where to
        assert "PIPELINE" in arguments[0].make_metavar(click.Context(command))
