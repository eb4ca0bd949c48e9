"""COCO's annotation files: read, checked entry by entry, and turned into arrays.

Checks run over whole columns in C; only when a column is found wrong are its entries looked at one by one, to name
them. As Python objects the outlines in COCO's files take gigabytes; nothing needs them, and they are dropped while
parsing.
"""

import dataclasses
import gc
import itertools
import json
import reprlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vkd_cache.errors import SourceError
from vkd_cache.sources.boxes import BoxTable
from vkd_cache.sources.findings import Findings, Problem
from vkd_cache.sources.keys import key_problem, shown

MAX_CLASSES = 100_000
MAX_SIDE_PX = 65_535

_LARGEST_ID = 2**63 - 1
_LISTS = ("images", "annotations", "categories")
_MISSING = object()
_CURE = "Correct the file, or make it again."

_NOT_AN_OBJECT = Problem("entries that are not objects", _CURE)
_BAD_PATH = Problem("images whose file_name cannot be used", "It has to be a path inside the folder of the images.")
_IMAGE_TWICE = Problem("image ids that appear more than once", "An id names one image: remove or renumber the others.")
_BOX_TWICE = Problem("annotation ids that appear more than once", "Remove the doubled entries, or renumber them.")
_CATEGORY_TWICE = Problem("category ids that appear more than once", "Renumber or remove the others.")
_NO_IMAGE = Problem("annotations of images that are not listed", "Remove them, or add the images.")
_NO_CATEGORY = Problem("annotations of categories that are not listed", "Remove them, or add the categories.")


class CocoWarning(UserWarning):
    """An annotation file that works, but costs or distorts something."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CocoTables:
    """An annotation file as columns, in the file's order.

    Attributes:
        image_ids: (n,) int64, unique, not negative.
        sizes: (n, 2) int32 width and height, 1..65535 px.
        file_names: n paths below the folder of the images.
        boxes: all annotations.
        class_names: by category id, "" where there is no such category.
    """

    image_ids: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int32]
    file_names: list[str]
    boxes: BoxTable
    class_names: tuple[str, ...]


def read_coco(path: Path) -> CocoTables:
    """Read and check an annotation file.

    Warns:
        CocoWarning: category ids far apart, or an annotation with the id 0.

    Raises:
        SourceError: the file is not there, is not COCO's kind of JSON, or has entries that cannot be used: all entries
            of wrong types in one message, or else all ids and references that do not fit in one message.
    """
    document = _load(path)
    findings = Findings(str(path))
    images, annotations, categories = (_Entries(document[name], name, findings) for name in _LISTS)
    findings.raise_any()
    image_ids = images.integers("id", 0, _LARGEST_ID)
    sizes = np.column_stack([images.integers(side, 1, MAX_SIDE_PX) for side in ("width", "height")])
    file_names = images.texts("file_name")
    category_ids = categories.integers("id", 0, MAX_CLASSES - 1)
    names = categories.texts("name")
    box_ids = annotations.integers("id", 0, _LARGEST_ID)
    box_image_ids = annotations.integers("image_id", 0, _LARGEST_ID)
    box_categories = annotations.integers("category_id", 0, _LARGEST_ID)
    crowd = annotations.integers("iscrowd", 0, 1, default=0)
    xywh, area = annotations.boxes("bbox"), annotations.numbers("area")
    findings.raise_any()

    for name in file_names:
        problem = key_problem(name)
        if problem:
            findings.add(_BAD_PATH, f"{shown(name)} ({problem})")
    _find_twins(image_ids, _IMAGE_TWICE, findings)
    _find_twins(category_ids, _CATEGORY_TWICE, findings)
    _find_twins(box_ids, _BOX_TWICE, findings)
    image = _positions(box_image_ids, image_ids)
    for row in np.flatnonzero(image < 0).tolist():
        findings.add(_NO_IMAGE, f"annotation {box_ids[row]} (image {box_image_ids[row]})")
    for row in np.flatnonzero(_positions(box_categories, category_ids) < 0).tolist():
        findings.add(_NO_CATEGORY, f"annotation {box_ids[row]} (category {box_categories[row]})")
    findings.raise_any()
    _warn(path, category_ids, box_ids)
    class_names = [""] * (int(category_ids.max()) + 1)
    for identity, text in zip(category_ids.tolist(), names, strict=True):
        class_names[identity] = shown(text)
    return CocoTables(
        image_ids=image_ids,
        sizes=sizes.astype(np.int32),
        file_names=file_names,
        boxes=BoxTable(image=image, category=box_categories, crowd=crowd.astype(np.bool_), xywh=xywh, area=area),
        class_names=tuple(class_names),
    )


def _load(path: Path) -> dict[str, list[Any]]:
    """The file's object, with its three lists."""
    try:
        with _no_collection():
            document = json.loads(path.read_bytes(), object_hook=_without_outline)
    except OSError as error:
        raise SourceError(
            f"{path}: the annotation file cannot be read ({error.strerror}). Check that it is there and readable."
        ) from error
    except RecursionError as error:
        raise SourceError(f"{path}: not a COCO file (nested too deep). {_CURE}") from error
    except ValueError as error:  # not JSON, not text, or a number of thousands of digits
        raise SourceError(f"{path}: not JSON ({shown(str(error))}). Copy or download the file again.") from error
    expected = "expected COCO's: an object with the lists images, annotations and categories"
    if not isinstance(document, dict):
        kind = "a list, as files of results have" if isinstance(document, list) else reprlib.repr(document)
        raise SourceError(f"{path}: holds {kind}, {expected}. Give an instances_*.json file.")
    wrong = [name for name in _LISTS if not isinstance(document.get(name), list)]
    if wrong:
        raise SourceError(
            f"{path}: has no list {', '.join(wrong)}, {expected}. Files of images without annotations (image_info_*) "
            "cannot be used; give an instances_*.json file."
        )
    empty = [name for name in ("images", "categories") if not document[name]]
    if empty:
        raise SourceError(f"{path}: the list {' and the list '.join(empty)} is empty, {expected}. {_CURE}")
    return document


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry


@contextmanager
def _no_collection() -> Iterator[None]:
    """Millions of new objects and no garbage among them: looking for some would take longer than parsing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Entries:
    """One list of the file, read a field at a time; what is wrong goes to the findings, and a stand-in comes back."""

    def __init__(self, entries: list[Any], name: str, findings: Findings) -> None:
        self._entries, self._name, self._findings = entries, name, findings
        if not set(map(type, entries)) <= {dict}:
            for position, entry in enumerate(entries):
                if type(entry) is not dict:
                    findings.add(_NOT_AN_OBJECT, f"{name}[{position}] ({reprlib.repr(entry)})")

    def integers(self, field: str, low: int, high: int, *, default: object = _MISSING) -> npt.NDArray[np.int64]:
        """(n,) whole numbers from `low` to `high`; true and false count as 1 and 0 where these are all there is."""
        values = self._values(field, default)
        allowed = {int, bool} if high == 1 else {int}
        if not set(map(type, values)) <= allowed or (values and not low <= min(values) <= max(values) <= high):
            wanted = f"a whole number from {low} to {high}"
            self._name_wrong(field, values, wanted, lambda value: type(value) in allowed and low <= value <= high)
            return np.zeros(len(values), dtype=np.int64)
        return np.array(values, dtype=np.int64)

    def texts(self, field: str) -> list[str]:
        values = self._values(field)
        if not set(map(type, values)) <= {str}:
            self._name_wrong(field, values, "text", lambda value: type(value) is str)
        return values

    def numbers(self, field: str) -> npt.NDArray[np.float64]:
        """(n,) with NaN where the field is missing or null."""
        values = self._values(field, None)
        if not set(map(type, values)) <= {int, float, type(None)}:
            self._name_wrong(field, values, "a number", lambda value: value is None or type(value) in (int, float))
            return np.zeros(len(values))
        return _floats(values)

    def boxes(self, field: str) -> npt.NDArray[np.float64]:
        values = self._values(field)
        good = set(map(type, values)) <= {list} and set(map(len, values)) <= {4}
        flat = list(itertools.chain.from_iterable(values)) if good else []
        if not good or not set(map(type, flat)) <= {int, float}:
            self._name_wrong(field, values, "four numbers (left, top, width, height)", _is_box)
            return np.zeros((len(values), 4))
        return _floats(flat).reshape(-1, 4)

    def _values(self, field: str, default: object = _MISSING) -> list[Any]:
        return [entry.get(field, default) for entry in self._entries]

    def _name_wrong(self, field: str, values: list[Any], wanted: str, accepts: Callable[[Any], bool]) -> None:
        problem = Problem(f"{self._name} whose {field} is not {wanted}", _CURE)
        for position, value in enumerate(values):
            if not accepts(value):
                found = "missing" if value is _MISSING else reprlib.repr(value)
                self._findings.add(problem, f"{self._name}[{position}] ({found})")


def _is_box(value: object) -> bool:
    return type(value) is list and len(value) == 4 and all(type(number) in (int, float) for number in value)


def _floats(values: list[Any]) -> npt.NDArray[np.float64]:
    try:
        return np.array(values, dtype=np.float64)
    except OverflowError:  # a whole number beyond the range of floats
        return np.array(
            [np.inf if type(value) is int and abs(value) > 2**1000 else value for value in values], np.float64
        )


def _find_twins(ids: npt.NDArray[np.int64], problem: Problem, findings: Findings) -> None:
    found, counts = np.unique(ids, return_counts=True)
    for identity in found[counts > 1].tolist():
        findings.add(problem, str(identity))


def _positions(wanted: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each wanted id stands in `ids`; -1 where it does not."""
    order = np.argsort(ids, kind="stable")
    places = order[np.minimum(np.searchsorted(ids[order], wanted), len(ids) - 1)]
    return np.where(ids[places] == wanted, places, -1)


def _warn(path: Path, category_ids: npt.NDArray[np.int64], box_ids: npt.NDArray[np.int64]) -> None:
    num_outputs = int(category_ids.max()) + 1
    if num_outputs > 2 * len(category_ids):
        warnings.warn(
            f"{path}: {len(category_ids)} categories with ids up to {num_outputs - 1}: a detector has one output "
            f"an id, so {num_outputs - len(category_ids)} outputs learn nothing. Renumber the categories from 1.",
            CocoWarning,
            stacklevel=7,
        )
    if (box_ids == 0).any():
        warnings.warn(
            f"{path}: an annotation has the id 0, which pycocotools takes for 'no match': a detection of that box "
            "counts as wrong. Number annotations from 1 where AP is measured.",
            CocoWarning,
            stacklevel=7,
        )
