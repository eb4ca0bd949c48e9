"""What a stranger may put into files: absurd values, changed documents, and code that wants to be run."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from vkd_cache.cache.documents import SEAL, seal
from vkd_cache.cache.schema import Manifest

# each of them has broken a reader of something at some time
ABSURD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**400, 0.0, -0.5, 1.5, 1e308, "", " ",
    "/etc/passwd", "../../outside", "a\0b", "\ud800", "\x1b[2Jx", "x" * 300, "🦊é", "os:system", "nan", "1" * 5000, [],
    [[]], [0], [1, 2, 3, 4, 5], [2**40, 2**40], {}, {"": {}}, {"name": []}, [[[[[[[[]]]]]]]],
)  # fmt: skip
values = st.one_of(
    st.sampled_from(ABSURD), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document, the innermost first."""
    inner: list[tuple[Any, ...]] = []
    if isinstance(document, list):
        document = dict(enumerate(document))
    for key, value in document.items() if isinstance(document, dict) else ():
        inner += [*places(value, (*path, key)), (*path, key)]
    return inner


@st.composite
def changed(draw: st.DrawFn, document: Any, among: st.SearchStrategy[Any] = values) -> Any:
    """The document with one to three of its places replaced, removed, or moved elsewhere."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        there = places(document)
        if not there:
            break
        *way, last = draw(st.sampled_from(there))
        holder = document
        for step in way:
            holder = holder[step]
        what = draw(st.sampled_from(["replace", "replace", "remove", "repeat", "add"]))
        if what == "remove":
            del holder[last]
        elif what == "repeat" and isinstance(holder, list):
            holder.extend(copy.deepcopy([holder[last]] * 3))
        elif what == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["extra", "", "name", "a\0", "\ud800"]))] = copy.deepcopy(draw(among))
        else:
            holder[last] = copy.deepcopy(draw(among))  # or the next example would find it changed
    return document


def document_of(path: Path) -> dict[str, Any]:
    """A document of a cache without its seal."""
    body: dict[str, Any] = json.loads(path.read_bytes())
    del body[SEAL]
    return body


def rewrite_manifest(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a cache's manifest as its maker could have: sealed again, and every record belongs to it."""
    body = document_of(root / "manifest.json")
    change(body)
    (root / "manifest.json").write_bytes(seal(body))
    fingerprint = Manifest.from_json(body).fingerprint()
    for record in sorted((root / "records").rglob("*.json")):
        record.write_bytes(seal({**document_of(record), "fingerprint": fingerprint}))


class Payload:
    """What a hostile pickle holds: reading it makes a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._marker),)


def files_below(root: Path) -> dict[str, bytes]:
    """Every file below `root`, links not followed, with its bytes or what it points to."""
    found = {}
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(folder, name)
            if path.is_symlink():
                found[str(path)] = os.readlink(path).encode()  # noqa: PTH115
            elif path.is_file():
                found[str(path)] = path.read_bytes()
    return found
