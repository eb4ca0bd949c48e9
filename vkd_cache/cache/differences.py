"""In what two manifests differ, field by field.

A newcomer's trap: only the fingerprinted fields count, because only they decide whether units belong together.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vkd_cache.cache.schema import Manifest


def manifest_differences(a: Manifest, b: Manifest) -> list[tuple[str, Any, Any]]:
    """Every fingerprinted field in which two manifests differ: (path, value in a, value in b).

    A field that one side lacks has the value None there. Lists of one length are compared entry by entry.
    """
    return list(_differences("", a.fingerprinted(), b.fingerprinted()))


def _differences(path: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in sorted(a.keys() | b.keys()):
            yield from _differences(f"{path}.{name}" if path else name, a.get(name), b.get(name))
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for index, (entry_a, entry_b) in enumerate(zip(a, b, strict=True)):
            yield from _differences(f"{path}[{index}]", entry_a, entry_b)
    # the type too: True == 1 and 1 == 1.0 in Python, but not in the canonical bytes that are hashed
    elif a != b or type(a) is not type(b):
        yield path, a, b
