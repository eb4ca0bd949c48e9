"""URLs that users give: which are remote, that none carries credentials, and that each is spelt as one.

A newcomer's trap: a URL ends in manifests, run logs, records and checkpoints, and messages show it; so it is refused
where the configuration is read, before anything could write it down.
"""

import re
from pathlib import Path
from urllib.parse import parse_qsl

from vkd_cache.errors import ConfigError


def is_remote(spec: str) -> bool:
    """Whether `spec` is a URL of something else than this machine's file system."""
    return "://" in spec and not spec.startswith("file://")


def check_url(url: str, what: str) -> None:
    """Refuse a URL that carries credentials: URLs end in logs, records and checkpoints.

    Args:
        url: a path or URL.
        what: what it is for, as the message names it, such as "cache".

    Raises:
        ConfigError: user:password@, or a query with a signature, a token or a key. The message does not repeat them.
    """
    for part in url.split("::"):  # some tools join URLs so; ours refuse that later, and would show them all
        protocol, separator, rest = part.partition("://")
        found = _credentials_in(protocol.lower(), rest) if separator else ""
        if found:
            raise ConfigError(
                f"{what}: the {protocol}:// URL carries {found}, which would end in logs and records. Take it out of "
                "the URL and give credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "AWS_PROFILE) or in fsspec's configuration; docs/storage.md says how."
            )


_NEARLY_A_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/?([^/].*)", re.DOTALL)


def check_place(text: str, what: str) -> None:
    """Refuse what was meant to be a URL and would be a folder called `s3:`, and one that ends with the process.

    Args:
        text: a path or URL of data or a cache.
        what: what it is for, as the message names it, such as "[cache] url".

    Raises:
        ConfigError: a slash too few, a protocol in capitals, or memory://. A path that exists is what it says.
    """
    protocol, separator, rest = text.partition("://")
    if separator and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", protocol):
        if protocol != protocol.lower():
            raise ConfigError(f"{what}: found {text}, expected {protocol.lower()}://{rest}, in small letters.")
        if protocol == "memory":
            raise ConfigError(f"{what}: found {text}, which ends with this process. Give a folder, or another URL.")
        return
    found = _NEARLY_A_URL.fullmatch(text)
    if found is None or Path(text).exists():
        return
    import fsspec  # only here: --help is to be there at once

    protocol = found[1].lower()
    if protocol in fsspec.available_protocols():
        example = f"{protocol}://bucket/..., as in {protocol}://{found[2]}"
        expected = "the path alone, without a protocol" if protocol in ("file", "local") else example
        raise ConfigError(f"{what}: found {text}, expected {expected}. For a folder of that name give ./{text}.")


_SECRETIVE = re.compile(r"sig|token|key|secret|passw|credential|auth|x-(amz|goog|oss)-", re.IGNORECASE)


def _credentials_in(protocol: str, rest: str) -> str:
    """What kind of credentials the part of a URL after `://` carries, '' for none."""
    plain, _, query = rest.partition("?")
    host = plain.partition("/")[0]
    # a secret may contain slashes, so a password is looked for up to the last @; a port is digits up to the path
    if "@" in plain and ":" in host and not host.startswith("arn:") and not re.fullmatch(r"[^@:]*:\d+", host):
        return "a user and a password"
    if "@" in host and protocol not in ("abfs", "abfss", "az", "adl", "wasb", "wasbs"):  # there: container@account
        return "a user"
    if query and any(_SECRETIVE.search(name) for name, _ in parse_qsl(query, keep_blank_values=True)):
        return "a signature, token or key"
    return ""
