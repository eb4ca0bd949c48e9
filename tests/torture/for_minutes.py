"""How a torture run takes `--minutes` and asks pytest, with the fixtures of the suite, for the one test it holds."""

import argparse
import sys
import time
from typing import NoReturn

import pytest


class Minutes:
    """A plugin that hands the command line's option to the test."""

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes

    @pytest.fixture
    def until(self) -> float:
        """When to stop, by the monotonic clock."""
        return time.monotonic() + 60 * self._minutes


def main(file: str, description: str | None) -> NoReturn:
    """Run the test in `file` for as long as the command line says, and exit."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=10.0, help="how long; default: 10")
    arguments = [file, "-s", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    arguments += ["-o", "faulthandler_timeout=0"]
    sys.exit(pytest.main(arguments, plugins=[Minutes(options.parse_args().minutes)]))
