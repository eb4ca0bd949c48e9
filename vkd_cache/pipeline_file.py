"""Files of settings: where a pipeline lies, and its TOML read whoever has written it.

A newcomer's trap: a pipeline may come from a stranger, so numbers of thousands of digits, lists a thousand deep and
files of gigabytes are one message, too.
"""

import tomllib
from pathlib import Path
from typing import Any

from vkd_cache.errors import ConfigError
from vkd_cache.fields import suggestion
from vkd_cache.urls import check_url

_MAX_FILE_BYTES = 2**22


def find_pipeline(name: str) -> Path:
    """The file of a pipeline given by path or by the name of one that is installed with the package.

    Raises:
        ConfigError: neither a file nor the name of an installed pipeline.
    """
    check_url(name, "pipeline")  # a mistyped command may have a URL here, and the message below shows it
    path = Path(name)
    if path.is_file():
        return path
    package = Path(__file__).parent
    folders = [package / "pipelines", package.parent / "pipelines"]  # in a wheel; in a checkout
    known = {file.stem: file for folder in folders for file in folder.glob("*.toml")}
    if name.removesuffix(".toml") in known:
        return known[name.removesuffix(".toml")]
    raise ConfigError(
        f"{name}: no such pipeline file, and no installed pipeline of that name"
        f"{suggestion(name, known) or '.'} Installed: {', '.join(sorted(known)) or 'none'}."
    )


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds.

    Raises:
        ConfigError: it cannot be read, or is not TOML of a size and depth that settings have.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}), expected a TOML file.") from error
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: more than {_MAX_FILE_BYTES} bytes, expected a TOML file of a few settings.")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ConfigError(f"{path}: not a TOML file: nested too deep") from error
    except ValueError as error:  # not TOML, not UTF-8, or a number of thousands of digits
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
