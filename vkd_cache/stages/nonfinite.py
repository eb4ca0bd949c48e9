"""A loss that is not finite: which step and which samples it was, kept until it has been looked at, and the report.

A newcomer's trap: the loss is not looked at in the step, for that would make the host wait for a GPU. So by the time it
is seen, other steps have gone by; what belongs to each of them is remembered here, and the first bad one is reported,
with the one before it, whose update of the weights may be the cause.
"""

import dataclasses
import enum
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vkd_cache.cache.reader import Cache, Unit
from vkd_cache.errors import CacheError, VkdCacheError
from vkd_cache.runtime import write_atomic
from vkd_cache.stages.checkpoints import LAST
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.ranks import union
from vkd_cache.stages.run import Run
from vkd_cache.stages.units import finite_rows

REPORT_NAME, RANK_REPORT_NAME = "nonfinite.json", "nonfinite-rank{}.json"
_SHOWN_KEYS = 3
_SANE = 1e6  # a loss above is that of a student that has diverged, finite or not


class Fault(enum.IntEnum):
    """What else than a loss can be wrong with a run, as a number that ranks can exchange."""

    NONE = 0
    WEIGHTS = 1
    SCALE = 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlace:
    """Which samples a batch held.

    Attributes:
        epoch, batch: its place; `batch` counts within the epoch.
        view: number of the view that they were shown in.
        shard, row: (b,) int64, where each sample is in the source.
    """

    epoch: int
    batch: int
    view: int
    shard: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]


def place_of(batch: FedBatch) -> BatchPlace:
    """Which samples `batch` holds, without holding on to anything of it."""
    rendered = batch.rendered
    shard, row = rendered.shard.copy(), rendered.row.copy()
    return BatchPlace(epoch=batch.epoch, batch=batch.step, view=rendered.view, shard=shard, row=row)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepNote:
    """An optimizer step that nobody has looked at yet.

    Attributes:
        step: its number, from 1.
        lr: learning rate.
        batches: what it was trained on.
        terms: its loss terms, scalars on the device.
        gradient_norm: of its gradients before clipping, on the device; None where nobody needed it.
    """

    step: int
    lr: float
    batches: tuple[BatchPlace, ...]
    terms: Mapping[str, Tensor]
    gradient_norm: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SeenStep:
    """An optimizer step whose numbers are on the host; attributes as `StepNote`."""

    step: int
    lr: float
    batches: tuple[BatchPlace, ...]
    terms: dict[str, float]
    gradient_norm: float | None

    @property
    def finite(self) -> bool:
        """Whether all its loss terms are."""
        return all(map(math.isfinite, self.terms.values()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Incident:
    """What stops a run; the same on all ranks but for `at` and `before`.

    Attributes:
        fault: what is wrong; NONE: the loss of step `step`.
        step: the first bad step; for other faults the last one done.
        at, before: that step and the one before, of this rank; None where it was not done by this process.
        ranks: loss terms of every rank at that step.
    """

    fault: Fault
    step: int
    at: SeenStep | None
    before: SeenStep | None
    ranks: Sequence[Mapping[str, float]]


def report(incident: Incident, run: Run, nodes: Sequence[str], *, command: str = "train") -> VkdCacheError:
    """Write what is known of `incident` into the run's output, and say so; all ranks call this.

    Args:
        incident: what happened.
        run: the run that it happened to.
        nodes: those of the cache that the losses were computed from.
        command: which one the run is of.

    Returns:
        The error to raise: the same on all ranks, and only when all of them have written.
    """
    split = run.split
    bad = unusable_features(run.cache, incident.at, nodes) if run.cache is not None else []
    for each in bad:
        each["key"] = run.source.shards[each["shard"]].keys[each["row"]]
    name = REPORT_NAME if split.count == 1 else RANK_REPORT_NAME.format(split.index)
    path, problem = run.output / name, ""
    try:
        run.output.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(_document(incident, run, bad, command), indent=2, allow_nan=False).encode())
    except OSError as error:
        problem = error.strerror or str(error)
    named = {f"key '{each['key']}' (shard {each['shard']}, view {each['view']}, node '{each['node']}')" for each in bad}
    poisoned = sorted(union(named, split))  # a rank that leaves before the others have written ends them
    there = f"are in {run.output / (REPORT_NAME if split.count == 1 else RANK_REPORT_NAME.format('*'))}"
    if problem:
        there = f"could not be written to {path} ({problem})"
    return VkdCacheError(" ".join([f"{command}:", *_sentences(incident, run, poisoned, there, command)]))


def remove_reports(output: Path) -> None:
    """Remove the reports of a run before this one."""
    for path in output.glob("nonfinite*.json"):
        if path.is_file():
            path.unlink(missing_ok=True)


def unusable_features(cache: Cache, step: SeenStep | None, nodes: Sequence[str]) -> list[dict[str, Any]]:
    """The samples of a step whose stored values are not finite: shard, row, view and node of each.

    What cannot be read any more is left out: this explains an error, and must not become another.
    """
    found = []
    for batch in step.batches if step is not None else ():
        for shard in np.unique(batch.shard).tolist():
            rows = np.unique(batch.row[batch.shard == shard])
            try:
                unit = cache.read(shard, batch.view)
                for node in nodes:
                    bad = rows[~_finite(unit, node, np.searchsorted(unit.rows, rows))].tolist()
                    found += [{"shard": shard, "row": row, "view": batch.view, "node": node} for row in bad]
            except (CacheError, OSError):
                continue
    return found


def _finite(unit: Unit, node: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    return finite_rows(unit.tokens(node, rows) if unit.layout(node) == "tokens" else unit.node(node, rows))


def _document(incident: Incident, run: Run, bad: list[dict[str, Any]], command: str) -> dict[str, Any]:
    train = run.config.train
    first = incident.at.batches[0] if incident.at is not None and incident.at.batches else None
    return {
        "command": command,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "found": _FOUND[incident.fault],
        "step": incident.step,
        "epoch": first.epoch if first is not None else None,
        "view": first.view if first is not None else None,
        "rank": run.split.index,
        "losses_of_ranks": [_plain(terms) for terms in incident.ranks],
        "amp": train.amp,
        "clip_grad": train.clip_grad,
        "live_teacher": train.live_teacher,
        "unusable_features": bad,
        "at": _step_json(incident.at, run),
        "before": _step_json(incident.before, run),
    }


def _step_json(step: SeenStep | None, run: Run) -> dict[str, Any] | None:
    if step is None:
        return None
    norm = step.gradient_norm
    return {
        "step": step.step,
        "lr": step.lr,
        "losses": _plain(step.terms),
        "gradient_norm": None if norm is None else _number(norm),
        "batches": [
            {
                "epoch": batch.epoch,
                "batch": batch.batch,
                "view": batch.view,
                "shards": batch.shard.tolist(),
                "rows": batch.row.tolist(),
                "keys": _keys_of(batch, run),
            }
            for batch in step.batches
        ],
    }


def _keys_of(batch: BatchPlace, run: Run) -> list[str]:
    shards = run.source.shards
    return [shards[shard].keys[row] for shard, row in zip(batch.shard.tolist(), batch.row.tolist(), strict=True)]


def _plain(terms: Mapping[str, float]) -> dict[str, float | str]:
    return {name: _number(value) for name, value in terms.items()}


def _number(value: float) -> float | str:
    """JSON has no inf and no nan: they are written as text."""
    return value if math.isfinite(value) else str(value)


_FOUND = {
    Fault.NONE: "a loss that is not finite",
    Fault.WEIGHTS: "weights, averages or optimizer state that are not finite",
    Fault.SCALE: "a loss scale that has sunk to nothing: the gradients overflow float16 at every step",
}


def _sentences(incident: Incident, run: Run, poisoned: Sequence[str], there: str, command: str) -> list[str]:
    """The error: what was found, where the keys are, why if that is known, and what to do."""
    said = [f"step {incident.step}: {_found(incident, run)}."]
    if incident.at is not None:
        keys = [key for batch in incident.at.batches for key in _keys_of(batch, run)]
        shown = ", ".join(f"'{key}'" for key in keys[:_SHOWN_KEYS])
        more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
        said.append(f"The keys of its batch ({shown}{more}) and of the step before {there}.")
    if command == "train":
        last = "the last checkpoint is intact" if (run.output / LAST).is_file() else "there is no checkpoint yet"
        said.append(f"Nothing is saved from here; {last}.")
    if poisoned:
        shown, more = poisoned[0], f" and {len(poisoned) - 1} more" if len(poisoned) > 1 else ""
        return [
            *said,
            f"The features stored for {shown}{more} are not finite: run vkd-cache verify --repair, which drops "
            "such units, then the same extract, then this command with --resume auto.",
        ]
    return [*said, *_hints(incident, run), _cure(run)]


def _found(incident: Incident, run: Run) -> str:
    if incident.fault == Fault.WEIGHTS:
        return "weights, or what the optimizer knows of their gradients, are not finite"
    if incident.fault == Fault.SCALE:
        return "the loss scale has sunk to nothing, because the gradients overflow float16 at every step"
    bad = [rank for rank, terms in enumerate(incident.ranks) if not all(map(math.isfinite, terms.values()))]
    terms = incident.ranks[bad[0]] if bad else {}
    shown = ", ".join(f"{name} {value:g}" for name, value in terms.items())
    if run.split.count == 1:
        return f"the loss of its batch is not finite: {shown}"
    return f"the loss of its batch is not finite on {len(bad)} of {run.split.count} ranks, on rank {bad[0]}: {shown}"


def _hints(incident: Incident, run: Run) -> list[str]:
    before = incident.before
    if before is not None and before.gradient_norm is not None and not math.isfinite(before.gradient_norm):
        if run.config.train.amp != "fp16":  # whose scaler has skipped that step
            return [f"The gradients of step {before.step} were not finite, though its loss was."]
    elif run.config.train.live_teacher and any(
        abs(terms.get("task", math.inf)) < _SANE and not all(map(math.isfinite, terms.values()))
        for terms in incident.ranks
    ):
        return ["The task loss is finite: look at the teacher's outputs for these keys first."]
    return []


def _cure(run: Run) -> str:
    amp = {"off": "", "bf16": ", or --amp off", "fp16": ", or --amp bf16 or off"}[run.config.train.amp]
    cure = "Use a smaller --lr, a warm-up ([train] warmup_epochs), [train] clip_grad"
    return f"{cure}{amp}, in a new --output."
