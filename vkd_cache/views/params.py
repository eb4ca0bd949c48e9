"""View params: the resolved values that rebuild one view of one sample, and the columns that store them.

A newcomer's trap: `crop` is in *source* pixels (after EXIF orientation), `erase` and `Mix.box` are in *view* pixels.
Everything is stored at the precision it is used at, so that params written and read back render the same bytes.

Shape legend: n samples of a unit, K operations of the recipe (`Recipe.max_ops`).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Columns = Mapping[str, npt.NDArray[np.generic]]

MIX_NONE, MIX_MIXUP, MIX_CUTMIX = 0, 1, 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ViewParams:
    """One view of one sample, before mixing.

    Attributes:
        seed: uint64, where the draws came from; also the source of erase noise.
        source_size: (width, height) of the decoded source image, pixels; oriented, except for detection.
        crop: (top, left, height, width) in source pixels.
        flip: mirrored left to right after resizing.
        ops: up to K ordered (operation id, value) pairs, values exact in float32; see `vkd_cache.views.ops`.
        erase: (top, left, height, width) in view pixels; zero height: nothing erased.
        view_size: (height, width) of a detection view, pixels; (0, 0): the recipe's size.
    """

    seed: int
    source_size: tuple[int, int]
    crop: tuple[int, int, int, int]
    flip: bool
    ops: tuple[tuple[int, float], ...]
    erase: tuple[int, int, int, int] = (0, 0, 0, 0)
    view_size: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MixPlan:
    """The mixing of a whole unit (shard, view): row i becomes lam * view i + (1 - lam) * view partner[i].

    The matching is symmetric: partner[partner[i]] == i, with the same kind, lam and box on both sides.
    An unmixed row is its own partner, with kind 0 and lam 1.

    Attributes:
        partner: (n,) uint32 row within the shard.
        kind: (n,) uint8: 0 none, 1 Mixup, 2 CutMix.
        lam: (n,) float32 in [0, 1], weight of the row's own label; for CutMix one minus the box's true area share.
        box: (n, 4) uint16 (top, left, height, width) in view pixels that come from the partner (CutMix only).
    """

    partner: npt.NDArray[np.uint32]
    kind: npt.NDArray[np.uint8]
    lam: npt.NDArray[np.float32]
    box: npt.NDArray[np.uint16]


def params_to_columns(
    params: Sequence[ViewParams], max_ops: int, *, sized: bool = False
) -> dict[str, npt.NDArray[np.generic]]:
    """Columns `seed` (n,) uint64, `source_size` (n,2) uint32 (width, height), `crop` (n,4) uint32, `flip` (n,) uint8,
    `op_id` (n,K) uint8 with 255 for no operation, `op_value` (n,K) float32, `erase` (n,4) uint16; if `sized`, as for
    detection, `view_size` (n,2) uint16 (height, width)."""
    n = len(params)
    columns: dict[str, npt.NDArray[np.generic]] = {
        "seed": np.array([p.seed for p in params], np.uint64),
        "source_size": np.array([p.source_size for p in params], np.uint32).reshape(n, 2),
        "crop": np.array([p.crop for p in params], np.uint32).reshape(n, 4),
        "flip": np.array([p.flip for p in params], np.uint8),
        "erase": np.array([p.erase for p in params], np.uint16).reshape(n, 4),
    }
    if sized:
        columns["view_size"] = np.array([p.view_size for p in params], np.uint16).reshape(n, 2)
    op_id = np.full((n, max_ops), NO_OP, np.uint8)
    op_value = np.zeros((n, max_ops), np.float32)
    for row, p in enumerate(params):
        for slot, (op, value) in enumerate(p.ops):
            op_id[row, slot] = op
            op_value[row, slot] = value
    return columns | {"op_id": op_id, "op_value": op_value}


def params_from_columns(columns: Columns, row: int) -> ViewParams:
    """The inverse of `params_to_columns` for one row."""
    width, height = (int(v) for v in columns["source_size"][row])
    top, left, crop_height, crop_width = (int(v) for v in columns["crop"][row])
    erase_top, erase_left, erase_height, erase_width = (int(v) for v in columns["erase"][row])
    view_size = (0, 0)
    if "view_size" in columns:
        view_height, view_width = (int(v) for v in columns["view_size"][row])
        view_size = (view_height, view_width)
    ops = tuple(
        (int(op), float(value))
        for op, value in zip(columns["op_id"][row], columns["op_value"][row], strict=True)
        if op != NO_OP
    )
    return ViewParams(
        seed=int(columns["seed"][row]),
        source_size=(width, height),
        crop=(top, left, crop_height, crop_width),
        flip=bool(columns["flip"][row]),
        ops=ops,
        erase=(erase_top, erase_left, erase_height, erase_width),
        view_size=view_size,
    )


NO_OP = 255
