"""What the tests of both demos share: a short run from the command line, and what its page refers to."""

import html.parser
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from vkd_cache.config import Config
from vkd_cache.errors import ConfigError
from vkd_cache.stages.demo import MARK_NAME


class Finished(NamedTuple):
    """Output folder, JSON document and stderr."""

    output: Path
    document: dict[str, Any]
    said: str


def run_short_demo(output: Path, *options: str) -> Finished:
    """Over the ruins of an earlier demo, with a stranger's file among them."""
    (output / "teacher").mkdir(parents=True)
    (output / "teacher" / "last.pt").write_bytes(b"cut sh")
    (output / "notes.txt").write_text("mine")
    (output / MARK_NAME).touch()
    command = [sys.executable, "-m", "vkd_cache", "demo", "--short", "--json", "--output", str(output), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return Finished(output, json.loads(result.stdout), result.stderr)


def own_process(_: Config) -> int:
    """A job that tells where it runs."""
    return os.getpid()


def refuses(_: Config) -> int:
    """A job that fails."""
    raise ConfigError("on purpose")


class Page(html.parser.HTMLParser):
    """Collects what a page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("link", "script", "a"):
            self.links.append(values.get("href") or values.get("src") or tag)
        if tag == "img":
            self.pictures.append(values["src"] or "")
