"""Dense node values of a batch as they are stored: few bytes to join, pin and copy, made floats where they are used.

A newcomer would decode in the reader: the host then multiplies, and four times the bytes cross to the GPU. Here 8-bit
values stay 8-bit values until `dense` is called, on the device.

Shape legend: b samples, C channels, u units that they come from.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Places = npt.NDArray[np.integer]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """Node values of b samples.

    Attributes:
        values: (b, C) or (b, C, H, W): floating point; int8, to be multiplied by `scale`; or uint8, whose squares are.
        scale: (b, 1) or (b, 1, H, W) float32 of int8 values; (u, C) of uint8 values, a row for each unit; else None.
        unit: (b,) int64, the row of `scale` that belongs to each sample; of uint8 values from more than one unit.
    """

    values: Tensor
    scale: Tensor | None = None
    unit: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def dense(self) -> Tensor:
        """The values as floating point, on the device they are on: half types stay what they are, else float32."""
        if self.scale is None:
            return self.values
        dense = self.values.to(torch.float32)
        if self.values.dtype != torch.uint8:
            return dense.mul_(self.scale)
        scale = self.scale if self.unit is None else self.scale[self.unit]
        dense = dense.mul_(dense)  # exact integers: one rounding in all
        return dense.mul_(scale.reshape([len(scale), -1] + [1] * (dense.ndim - 2)))

    def select(self, rows: Places | slice) -> "StoredRows":
        """Some of the samples, in the order given; on the host."""
        chosen = torch.from_numpy(np.arange(len(self))[rows])
        shared = self.values.dtype == torch.uint8  # then the scale has no rows of samples
        return StoredRows(
            values=self.values[chosen],
            scale=self.scale if shared or self.scale is None else self.scale[chosen],
            unit=None if self.unit is None else self.unit[chosen],
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """All that `to` copies."""
        return tuple(part for part in (self.values, self.scale, self.unit) if part is not None)

    def to(self, device: torch.device) -> "StoredRows":
        """The same on `device`, from pinned memory without waiting."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "StoredRows":
        """The same in pinned memory."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "StoredRows":
        scale, unit = (None if part is None else change(part) for part in (self.scale, self.unit))
        return StoredRows(values=change(self.values), scale=scale, unit=unit)


def join_rows(parts: Sequence[tuple[StoredRows, Places]], count: int) -> StoredRows:
    """The samples of several units as those of one batch of `count`.

    Args:
        parts: rows of one node, each part with the (n,) positions of its samples in the batch; every part of one unit,
            or of several that were joined before.
        count: of all samples; each position is there once.
    """
    first = parts[0][0]
    if len(parts) == 1 and bool((np.diff(parts[0][1]) == 1).all()):
        return first
    values = first.values.new_empty((count, *first.values.shape[1:]))
    shared = first.values.dtype == torch.uint8
    by_sample = first.scale is not None and not shared
    scale = first.scale.new_empty((count, *first.scale.shape[1:])) if by_sample and first.scale is not None else None
    unit = torch.empty(count, dtype=torch.int64)
    before, scales = 0, []
    for part, position in parts:
        _put(values, position, part.values)
        if scale is not None and part.scale is not None:
            _put(scale, position, part.scale)
        elif part.scale is not None:
            unit[torch.from_numpy(position)] = before if part.unit is None else part.unit + before
            before += len(part.scale)
            scales.append(part.scale)
    if not scales:
        return StoredRows(values=values, scale=scale)
    return StoredRows(values=values, scale=torch.cat(scales), unit=unit if before > 1 else None)


def _put(target: Tensor, position: Places, rows: Tensor) -> None:
    """By numpy: torch would share kilobytes out among its threads, which data workers keep from the cores, and wait."""
    if target.dtype == torch.bfloat16:  # numpy has none
        target, rows = target.view(torch.int16), rows.view(torch.int16)
    target.numpy()[position] = rows.numpy()
