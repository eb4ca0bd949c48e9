"""Fields of the configuration: declared with their documentation and bounds, and checked against them.

A newcomer's trap: a whole number is taken where a number is expected, never the other way round, and true is no number.
"""

import dataclasses
import difflib
import math
import re
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any


def option(
    default: Any,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    zero_word: str = "",
) -> Any:
    """A documented field: `choices` for strings, inclusive bounds for numbers; of a tuple, for each of its entries.

    `zero_word` may stand for the number 0, where that one means something of its own.
    """
    metadata = {"doc": doc, "choices": choices, "minimum": minimum, "maximum": maximum, "zero_word": zero_word}
    return dataclasses.field(default=default, metadata=metadata)


def suggestion(wrong: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or nothing."""
    near = difflib.get_close_matches(wrong, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def checked_value(value: object, hint: Any, metadata: Mapping[str, Any]) -> object:
    """`value`, as TOML or the command line has it, as a field's own type.

    Args:
        value: what was given.
        hint: the field's type: a plain one, a tuple of any length, or either or None.
        metadata: as `option` makes it.

    Raises:
        ValueError: another type, choice or range; says what was found and what was expected.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    wanted = next(kind for kind in kinds if kind is not type(None))
    choices = metadata["choices"]
    if typing.get_origin(wanted) is tuple:
        entry_kind = typing.get_args(wanted)[0]
        if not isinstance(value, (list, tuple)) or not all(type(entry) is entry_kind for entry in value):
            raise ValueError(f"found {_shown(value)}, expected a list of {_PLURALS[entry_kind]}")
        return tuple(checked_value(entry, entry_kind, metadata) for entry in value)
    if value == metadata["zero_word"] and value != "":
        return 0
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < _BEYOND_FLOATS else math.inf
    if type(value) is not wanted:
        quoted = f', in quotes: "{value}"' if wanted is str and type(value) in (int, float) else ""
        either = f" or {metadata['zero_word']!r}" if metadata["zero_word"] else ""
        raise ValueError(f"found {_shown(value)}, expected {_NAMES[wanted]}{either}{quoted}")
    if isinstance(value, str):
        _check_text(value)
        _check_choice(value, choices)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = metadata["minimum"], metadata["maximum"]
        # written so that nan fails too
        if not ((low is None or value >= low) and (high is None or value <= high)):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"found {_shown(value)}, expected {bounds}")
        if not math.isfinite(value):
            raise ValueError(f"found {_shown(value)}, expected a finite number")
    return value


_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
_PLURALS = {str: "strings", int: "whole numbers"}
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f]")


_BEYOND_FLOATS = 2**1023
_LONGEST_TEXT = 2**16


def _shown(value: object) -> str:
    # beyond 4300 digits Python refuses to write a whole number down
    if isinstance(value, int) and abs(value) > 10**100:
        return "a number of more than 100 digits"
    return _SHORTENED.repr(value) if isinstance(value, (dict, list, tuple)) else repr(value)[:200]


_SHORTENED = reprlib.Repr()
_SHORTENED.maxlist = _SHORTENED.maxtuple = 40
_SHORTENED.maxstring = _SHORTENED.maxother = _SHORTENED.maxlong = 100


def _check_text(value: str) -> None:
    """Refuse what no path, name or URL can hold, and what a terminal would act on."""
    if len(value) > _LONGEST_TEXT:
        raise ValueError(f"found a string of {len(value)} characters, expected at most {_LONGEST_TEXT}")
    if _UNUSABLE.search(value):
        raise ValueError(f"found {ascii(value)[:200]}, expected no control characters")


def _check_choice(value: str, choices: tuple[str, ...]) -> None:
    if choices and value not in choices:
        raise ValueError(f"found '{value}', expected one of {', '.join(choices)}{suggestion(value, choices)}")
