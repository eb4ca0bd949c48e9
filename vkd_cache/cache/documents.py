"""The two kinds of JSON document of a cache (manifest, record): how they are written, sealed and checked.

A document is canonical bytes: sorted keys, one-space indent, ASCII, a final newline, and a checksum of itself. A
newcomer's trap: editing one by hand, even its white space, breaks the seal on purpose.
"""

import contextlib
import json
import reprlib
from collections.abc import Mapping
from typing import Any

import xxhash

from vkd_cache.errors import CacheFormatError, CacheVersionError, CorruptCacheError

FORMAT_VERSION = 2  # the newest that is read, and that of new manifests
FIRST_VERSION = 1
SEAL = "xxh3_128"
MAX_DOCUMENT_BYTES = 2**28  # a million shards take a quarter of it
_DEEPEST = 32  # objects within objects; the format needs five, and a stack has an end

_CURE = "Is this a cache? Then restore the file, or run `vkd-cache verify --repair` on it and do what that says."

_SHORTENED = reprlib.Repr()  # never the whole of what may be a hundred megabytes
_SHORTENED.maxlevel, _SHORTENED.maxlist, _SHORTENED.maxdict = 3, 12, 12
_SHORTENED.maxstring = _SHORTENED.maxlong = _SHORTENED.maxother = 80


def canonical(body: Mapping[str, Any]) -> bytes:
    """The one way to write `body` as bytes; the same object gives the same bytes on every machine."""
    return json.dumps(body, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


def seal(body: Mapping[str, Any]) -> bytes:
    """`body` as a document, with the checksum of its canonical bytes as one more field."""
    return canonical({**body, SEAL: xxhash.xxh3_128_hexdigest(canonical(body))})


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The body of a document, without its seal.

    Args:
        data: what was stored.
        where: the document's address, for messages.

    Raises:
        CacheFormatError: not a JSON object, or of a format version that this release does not know
            (CacheVersionError, where it is as it was written).
        CorruptCacheError: changed since it was written.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise CacheFormatError(f"{where}: found {len(data)} bytes, expected at most {MAX_DOCUMENT_BYTES} of JSON.")
    try:
        body = json.loads(data.decode("ascii"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CacheFormatError(f"{where}: found bytes that are not JSON ({error}). {_CURE}") from error
    if _is_deeper(body, _DEEPEST):
        raise CacheFormatError(f"{where}: found JSON nested more than {_DEEPEST} deep. Is this a cache?")
    if not isinstance(body, dict):
        raise CacheFormatError(f"{where}: found a JSON {type(body).__name__}, expected an object. Is this a cache?")
    found, expected = body.pop(SEAL, None), ""
    with contextlib.suppress(ValueError, RecursionError):  # of what cannot be written back
        expected = xxhash.xxh3_128_hexdigest(canonical(body))
    intact = bool(expected) and found == expected and canonical({**body, SEAL: found}) == data
    check_version(body, where, intact=intact)
    if not intact:
        raise CorruptCacheError(
            f"{where}: changed since it was written: found checksum {_short(found)}, expected {expected!r}. "
            f"{_CURE}"
        )
    return body


def check_version(body: Mapping[str, Any], where: str, *, intact: bool = True) -> None:
    """Refuse a document of another format version than ours, with what to do about it.

    Args:
        body: the document.
        where: its address, for messages.
        intact: whether its seal fits. Every version keeps the seal, so one that does not fit means damage.

    Raises:
        CacheFormatError: the version is missing or not a number.
        CacheVersionError: it is one that we do not read, in a document that is as it was written.
    """
    found = body.get("format_version")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise CacheFormatError(
            f"{where}: format_version: found {_short(found)}, expected {FIRST_VERSION} to {FORMAT_VERSION}. Is this a "
            "cache?"
        )
    if found > FORMAT_VERSION:
        message = f"{where}: found format version {_short(found)}, this vkd-cache reads up to {FORMAT_VERSION}. "
        if not intact:
            raise CacheFormatError(f"{message}Upgrade vkd-cache, or restore the file: its checksum does not fit.")
        raise CacheVersionError(f"{message}Upgrade vkd-cache to read this cache.")


def _is_deeper(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not levels or any(_is_deeper(entry, levels - 1) for entry in inner if isinstance(entry, (dict, list)))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


class Fields:
    """Typed access to one JSON object, with an error that names the field, what was found and what was expected.

    Fields that are never asked for are tolerated: a later release may add some.
    """

    def __init__(self, body: object, where: str, path: str = "") -> None:
        if not isinstance(body, dict):
            what = path.rstrip(".") or "document"
            raise CacheFormatError(f"{where}: {what}: found {_short(body)}, expected an object.")
        self.body: dict[str, Any] = body
        self.where = where
        self.path = path

    def refuse(self, name: str, expected: str) -> CacheFormatError:
        """The error for field `name`, to be raised."""
        found = _short(self.body[name]) if name in self.body else "nothing"
        return CacheFormatError(f"{self.where}: {self.path}{name}: found {found}, expected {expected}.")

    def text(self, name: str, choices: tuple[str, ...] = ()) -> str:
        """A string, one of `choices` where there are any."""
        value = self.body.get(name)
        if not isinstance(value, str) or (choices and value not in choices):
            raise self.refuse(name, f"one of {', '.join(choices)}" if choices else "a string")
        return value

    def whole(self, name: str, minimum: int = 0, maximum: int = 2**63 - 1) -> int:
        """A whole number from `minimum` to `maximum`."""
        value = self.body.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.refuse(name, f"a whole number from {minimum} to {maximum}")
        return value

    def wholes(self, name: str, minimum: int = 0, maximum: int = 2**63 - 1) -> tuple[int, ...]:
        """A list of whole numbers from `minimum` to `maximum`."""
        value = self.body.get(name)
        if not isinstance(value, list) or not all(
            isinstance(entry, int) and not isinstance(entry, bool) and minimum <= entry <= maximum for entry in value
        ):
            raise self.refuse(name, f"a list of whole numbers from {minimum} to {maximum}")
        return tuple(value)

    def object(self, name: str) -> dict[str, Any]:
        """A JSON object, as it is."""
        value = self.body.get(name)
        if not isinstance(value, dict):
            raise self.refuse(name, "an object")
        return value

    def entries(self, name: str, maximum: int = 2**31) -> list[Any]:
        """A JSON list of at most `maximum` entries, as it is."""
        value = self.body.get(name)
        if not isinstance(value, list) or len(value) > maximum:
            raise self.refuse(name, f"a list of at most {maximum} entries")
        return value


def _short(value: object) -> str:
    text = _SHORTENED.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
