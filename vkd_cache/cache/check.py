"""What can be checked of a cache without images and without a teacher: every file against its record and the format.

A newcomer's trap: a unit file without a record and a leftover temporary file are no errors. An interrupted run leaves
them, the next one overwrites or removes them, and no reader ever looks at them.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch

from vkd_cache.cache.reader import MANIFEST_PATH, Cache, Unit
from vkd_cache.cache.schema import UnitRecord
from vkd_cache.cache.storage import TEMPORARY
from vkd_cache.cache.units import UnitId, files_of_unit, is_detection, kind_of, record_path, unit_of_record
from vkd_cache.errors import CacheError, CacheMismatchError, CacheVersionError, CorruptCacheError, IncompleteCacheError


class Fault(Enum):
    """Whose fault an error is, which decides what mends it."""

    DAMAGE = "what lies there is worth nothing: dropped, the same extraction makes it again"
    FOREIGN = "whole, but a unit of another cache"
    ELSEWHERE = "not the file's own: dropping it would mend nothing"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        where: path from the cache's root.
        message: what was found, what was expected, what to do.
        is_error: False for leftovers that harm nobody.
        fault: whose fault an error is.
    """

    where: str
    message: str
    is_error: bool = True
    fault: Fault = Fault.ELSEWHERE


def check_structure(cache: Cache, dataset: Mapping[str, Any] | None = None) -> Iterator[Finding]:
    """Everything that is wrong with a cache's files; nothing if it is sound. Reads all of it once.

    Args:
        cache: the cache.
        dataset: identity of the data set that it should belong to, as the manifest has it; None: not compared. Fields
            of the manifest's that it lacks are a later release's, and tolerated.
    """
    yield from check_layout(cache, dataset)
    for unit in cache.units:
        yield from check_unit(cache, unit)


def check_layout(cache: Cache, dataset: Mapping[str, Any] | None = None) -> Iterator[Finding]:
    """What is wrong outside the units: another data set, the teacher's head, files that do not belong."""
    for field in sorted(dataset or {}):
        if (dataset or {})[field] != cache.manifest.dataset.get(field):
            yield Finding(
                where=MANIFEST_PATH,
                message=f"dataset.{field} is not that of the given source. Give the source it was made from.",
            )
    yield from check_head(cache)
    obstacles = cache.storage.obstacles(kind_of)
    for path in obstacles:
        found, wanted = ("a folder", "a file") if kind_of(path) == "file" else ("no folder", "a folder")
        yield Finding(
            where=path,
            message=f"is {found}, expected {wanted}: it stands in the way. `vkd-cache verify --repair` removes it if "
            "it is empty; else move it away.",
        )
    abandoned = frozenset(cache.storage.abandoned())
    paths = cache.storage.paths("")
    published = set(_unit_files(cache, paths))
    for path in paths:
        finding = _stray(path, cache, published, abandoned)
        if finding is not None and path not in obstacles:
            yield finding


def check_head(cache: Cache) -> Iterator[Finding]:
    """What is wrong with the teacher's head, where the manifest names one."""
    try:
        cache.head()
    except (CacheError, OSError) as error:
        # one that fits its checksum and is no head is what the manifest asks for: another would not fit
        fault = Fault.DAMAGE if isinstance(error, CorruptCacheError) else Fault.ELSEWHERE
        yield Finding(where=str((cache.manifest.head or {})["file"]), message=_text(error), fault=fault)


def _text(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}cannot be read ({error.strerror or error}). What is in it nobody knows: try again, as its owner."


def _unit_files(cache: Cache, paths: Sequence[str]) -> Iterator[str]:
    """Those of `paths` that are units' files; where a record cannot be read (`check_unit` says so), all of its unit."""
    for unit in cache.units:
        try:
            yield cache.record(*unit).files[0][0]
        except (CacheError, OSError):
            yield from files_of_unit(unit, paths)


def _stray(path: str, cache: Cache, published: set[str], abandoned: frozenset[str]) -> Finding | None:
    folder = path.partition("/")[0]
    if path == MANIFEST_PATH or folder == "runs" or path in published or unit_of_record(path) is not None:
        return None
    if cache.manifest.head is not None and path == cache.manifest.head["file"]:
        return None
    if folder == TEMPORARY:
        if path not in abandoned:
            return None  # being written just now
        message = "leftover of a writer that died; the next extraction removes it."
    elif folder == "units":
        message = "unit file that no record names: not published, left by a writer that died or came second."
    else:
        message = "does not belong to a cache; it is ignored."
    return Finding(where=path, message=message, is_error=False)


def check_unit(cache: Cache, unit: UnitId) -> Iterator[Finding]:
    """What is wrong with one published unit: its record, its file, its arrays and what they say together."""
    path = record_path(unit)
    try:
        record = cache.record(*unit)
        path = record.files[0][0]
        content = Unit(unit, cache.manifest, cache.read_arrays(record))
    except IncompleteCacheError:
        yield Finding(where=path, message="was published a moment ago, and is not any more.", is_error=False)
        return
    except (CacheError, OSError) as error:
        yield Finding(where=path, message=_text(error), fault=_fault_of(error))
        return
    problems = [*_record_problems(cache, record), *_row_problems(cache, record, content)]
    problems += [*_mixing_problems(content), *_node_problems(cache, content)]
    yield from (Finding(where=path, message=message, fault=Fault.DAMAGE) for message in problems)


def _fault_of(error: Exception) -> Fault:
    if isinstance(error, CacheMismatchError):
        return Fault.FOREIGN
    return Fault.ELSEWHERE if isinstance(error, (CacheVersionError, OSError)) else Fault.DAMAGE


def _record_problems(cache: Cache, record: UnitRecord) -> Iterator[str]:
    counts = cache.manifest.dataset["shard_counts"]
    if record.shard >= len(counts):
        yield f"found shard {record.shard}, the data set has {len(counts)} shards."
    elif record.num_samples + len(record.broken) != counts[record.shard]:
        yield (
            f"found {record.num_samples} rows and {len(record.broken)} broken images, the data set's shard has "
            f"{counts[record.shard]} samples."
        )


def _row_problems(cache: Cache, record: UnitRecord, unit: Unit) -> Iterator[str]:
    rows = unit.rows.astype(np.int64)
    broken = [row for _, row, _ in record.broken]
    total = len(rows) + len(broken)
    if (np.diff(rows) <= 0).any() or broken != sorted(broken):
        yield "rows or broken rows are not in rising order."
    if sorted([*rows.tolist(), *broken]) != list(range(total)):
        yield f"rows and broken rows together are not 0 to {total - 1}, each once."
    if len(set(unit.keys)) != len(unit.keys):
        yield "a key occurs twice."
    if is_detection(cache.manifest):
        if (unit.columns["view_size"] == 0).any():
            yield "view_size: found 0, expected sizes from 1."
        return  # a label stands for an annotation, not for a class
    num_classes = cache.manifest.dataset["num_classes"]
    if (unit.columns["label"] >= num_classes).any():
        yield f"found label {int(unit.columns['label'].max())}, the data set has {num_classes} classes."


def _mixing_problems(unit: Unit) -> Iterator[str]:
    columns = unit.columns
    rows, partner = unit.rows.astype(np.int64), columns["partner"].astype(np.int64)
    kind = columns["mix_kind"].astype(np.int64)
    weight = columns["mix_lambda"].astype(np.float64)
    if (kind > 2).any() or ((partner == rows) & (kind != 0)).any() or ((partner != rows) & (kind == 0)).any():
        yield "mix_kind is not 0 exactly where a row is its own partner, and 1 or 2 elsewhere."
    if not ((weight >= 0) & (weight <= 1)).all():
        yield "mix_lambda leaves [0, 1]."
    if not len(rows):
        return
    position = np.minimum(np.searchsorted(rows, partner), len(rows) - 1)
    if not (rows[position] == partner).all():
        yield "partner names a row that is not in the unit."
        return
    mirrored = partner[position] == rows
    for name in ("mix_kind", "mix_lambda", "mix_box"):
        mirrored &= (columns[name][position] == columns[name]).reshape(len(rows), -1).all(1)
    if not mirrored.all():
        yield f"{int((~mirrored).sum())} rows are not mixed the same way as their partner."


def _node_problems(cache: Cache, unit: Unit) -> Iterator[str]:
    for spec in cache.manifest.nodes:
        if spec.layout == "tokens":
            yield from (f"node '{spec.name}' {problem}" for problem in _token_problems(unit, spec.name))
        elif not _is_finite(unit.node(spec.name)):
            yield f"node '{spec.name}' holds inf or nan."


def _is_finite(values: torch.Tensor) -> bool:
    return not values.numel() or bool(torch.isfinite(torch.stack(values.aminmax())).all())


# How far sums over thousands of tokens, taken in float32, may be from each other, in root mean squares.
_SUM_NOISE = 1e-4


def _token_problems(unit: Unit, name: str) -> Iterator[str]:
    """One image at a time: in float32 a unit of tokens is gigabytes."""
    for row in range(len(unit)):
        tokens = unit.tokens(name, slice(row, row + 1))
        values = tokens.dense().to(torch.float32)
        parts = [values, tokens.total, tokens.squares, *([] if tokens.scale is None else [tokens.scale])]
        if not all(map(_is_finite, parts)):
            yield f"holds inf or nan, first in row {row}."
            return
        size = (float(tokens.counts[0]) * tokens.squares[0].double()).sqrt()
        impossible = bool((tokens.total[0].double().abs() > (1 + _SUM_NOISE) * size + 1e-30).any())
        if impossible or bool((tokens.squares < 0).any()):
            yield f"has a sum and a sum of squares of row {row} that no tokens have."
            return
        if tokens.index is not None:
            continue  # the statistics are those of all tokens, and only a sample is here
        bound = unit.rounding(name, slice(row, row + 1))
        if bound.stride(1) == 0:
            bound = bound[:, :1]  # the same for all channels
        norm = bound.square().sum(0).double().sqrt()
        slack = bound.sum(0).double() + _SUM_NOISE * size
        square_slack = norm * (2 * tokens.squares[0].sqrt() + norm) + _SUM_NOISE * tokens.squares[0]
        off = (values.sum(0) - tokens.total[0]).abs() > slack
        squares = values.square().sum(0)
        if bool((off | ((squares - tokens.squares[0]).abs() > square_slack)).any()):
            yield f"has a sum or a sum of squares of row {row} that is not that of its tokens."
            return
