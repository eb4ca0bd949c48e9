"""Ragged dense features: the tokens of several images end to end, all of them or a seeded sample of each image's.

A newcomer's trap: `grid`, `total` and `squares` always speak of *all* valid tokens of an image, even when only a sample
of them is in `values`: that is what keeps the statistics of a batch exact. Which images and how many tokens each has is
kept on the host as NumPy arrays, so that nothing here ever waits for a GPU.

Shape legend: b images, T tokens in all, C channels.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens of b images, in row-major order of each image's valid grid.

    Attributes:
        values: (T, C) floating point; or int8, to be multiplied by `scale`.
        scale: (T, 1) float32 of int8 values, else None.
        grid: (b, 2) int64 (height, width) of each image's valid token grid; n = height * width.
        offsets: (b + 1,) int64; image i has the rows offsets[i] to offsets[i + 1] of `values`.
        index: (T,) int64, ascending within an image: place of each token in its image's valid grid; None: all tokens
            are there.
        total: (b, C) float32 sum over all n valid tokens of each image.
        squares: (b, C) float32 sum of squares over all n valid tokens of each image.
    """

    values: Tensor
    grid: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    total: Tensor
    squares: Tensor
    scale: Tensor | None = None
    index: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.grid)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(b,) valid tokens of each image, whether they are here or not."""
        return self.grid[:, 0] * self.grid[:, 1]

    @property
    def kept(self) -> npt.NDArray[np.int64]:
        """(b,) tokens of each image that are here."""
        return np.diff(self.offsets)

    def dense(self) -> Tensor:
        """(T, C) values as floating point, int8 multiplied by its scale; half types stay what they are."""
        return self.values if self.scale is None else self.values.to(torch.float32) * self.scale

    def places(self) -> npt.NDArray[np.int64]:
        """(T,) where each token here would be among *all* valid tokens of the b images laid end to end."""
        counts = self.counts
        starts = np.cumsum(counts) - counts
        if self.index is None:
            return np.arange(counts.sum(), dtype=np.int64)
        return np.repeat(starts, self.kept) + self.index

    def to(self, device: torch.device) -> "Tokens":
        """The tensors on `device`, from pinned memory without waiting."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def tensors(self) -> tuple[Tensor, ...]:
        """All that `to` copies."""
        return tuple(part for part in (self.values, self.scale, self.total, self.squares) if part is not None)

    def pin_memory(self) -> "Tokens":
        """The tensors in pinned memory."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        scale = None if self.scale is None else change(self.scale)
        return dataclasses.replace(
            self, values=change(self.values), scale=scale, total=change(self.total), squares=change(self.squares)
        )

    def select(self, images: Sequence[int] | npt.NDArray[np.integer]) -> "Tokens":
        """The tokens of some of the images, in the order given."""
        chosen = np.asarray(images, np.int64)
        kept = self.kept[chosen]
        rows = np.repeat(self.offsets[chosen] - (np.cumsum(kept) - kept), kept) + np.arange(kept.sum())
        picked = to_device(torch.from_numpy(rows), self.values.device)
        which = to_device(torch.from_numpy(chosen), self.values.device)
        return Tokens(
            values=self.values[picked],
            scale=None if self.scale is None else self.scale[picked],
            grid=self.grid[chosen],
            offsets=_ends(kept),
            index=None if self.index is None else self.index[rows],
            total=self.total[which],
            squares=self.squares[which],
        )

    def sampled(self, index: npt.NDArray[np.int64], kept: npt.NDArray[np.int64]) -> "Tokens":
        """Some of the tokens of each image, of tokens that are all here; the statistics stay those of all.

        Args:
            index: (T',) int64 places within each image's grid, ascending, the images end to end.
            kept: (b,) how many of them belong to each image.
        """
        sample = dataclasses.replace(self, offsets=_ends(kept), index=index)
        rows = to_device(torch.from_numpy(sample.places()), self.values.device)
        scale = None if self.scale is None else self.scale[rows]
        return dataclasses.replace(sample, values=self.values[rows], scale=scale)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, from the host through pinned memory, so that the host does not wait for the GPU."""
    if values.device == device:
        return values
    if device.type == "cuda" and values.is_cpu:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def tokens_from_maps(maps: Tensor, grid: npt.NDArray[np.int64]) -> Tokens:
    """Valid tokens of feature maps.

    Args:
        maps: (b, C, H, W); only rows < grid[i, 0] and columns < grid[i, 1] of image i are valid.
        grid: (b, 2) int64, at most (H, W).
    """
    parts = [
        image[:, :height, :width].flatten(1).T for image, (height, width) in zip(maps, grid.tolist(), strict=True)
    ]
    return _tokens(parts, grid)


def tokens_from_sequences(sequences: Tensor, grid: tuple[int, int]) -> Tokens:
    """Tokens of (b, N, C) sequences that are valid throughout, on a grid (height, width) with N = height * width."""
    return _tokens(list(sequences), np.tile(np.array(grid, np.int64), (len(sequences), 1)))


def tokens_from_rows(rows: Tensor, grid: npt.NDArray[np.int64]) -> Tokens:
    """Valid tokens (T, C) that already lie end to end, image i having grid[i, 0] * grid[i, 1] of them."""
    return _tokens(torch.split(rows, (grid[:, 0] * grid[:, 1]).tolist()), grid, rows)


def join_tokens(parts: Sequence[Tokens]) -> Tokens:
    """The tokens of several batches end to end; either all of them are samples, or none is."""
    first = parts[0]
    scales = [part.scale for part in parts if part.scale is not None]
    indices = [part.index for part in parts if part.index is not None]
    return Tokens(
        values=torch.cat([part.values for part in parts]),
        scale=torch.cat(scales) if first.scale is not None else None,
        grid=np.concatenate([part.grid for part in parts]),
        offsets=_ends(np.concatenate([part.kept for part in parts])),
        index=np.concatenate(indices) if first.index is not None else None,
        total=torch.cat([part.total for part in parts]),
        squares=torch.cat([part.squares for part in parts]),
    )


def _tokens(parts: Sequence[Tensor], grid: npt.NDArray[np.int64], rows: Tensor | None = None) -> Tokens:
    # float64: a float32 sum over 10,000 tokens is right to four digits only where the mean outweighs the spread
    plain = [part.detach() for part in parts]
    return Tokens(
        values=torch.cat(list(parts)) if rows is None else rows,
        grid=grid,
        offsets=_ends(grid[:, 0] * grid[:, 1]),
        total=torch.stack([part.sum(0, dtype=torch.float64) for part in plain]).float(),
        squares=torch.stack([part.double().square().sum(0) for part in plain]).float(),
    )


def _ends(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
