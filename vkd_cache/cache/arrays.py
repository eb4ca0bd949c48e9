"""Named arrays of a unit: how one is found and compared with what the format says of it.

A newcomer's trap: arrays come from files that anyone may have written, so nothing is believed before it is compared.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vkd_cache.errors import CacheFormatError

Array = npt.NDArray[np.generic]


def column_of(columns: Mapping[str, Array], name: str, where: str) -> Array:
    """The column called `name`.

    Raises:
        CacheFormatError: there is none; the message lists those there are.
    """
    if name not in columns:
        raise CacheFormatError(f"{where}: column '{name}' is missing: found {', '.join(sorted(columns))}.")
    return columns[name]


def check_array(array: Array, dtype: str, shape: Sequence[int | None], where: str) -> None:
    """Compare dtype and shape with the format's; None in `shape` stands for any size.

    Raises:
        CacheFormatError: they differ; says both.
    """
    fits = len(array.shape) == len(shape) and all(
        size == wanted or wanted is None for size, wanted in zip(array.shape, shape, strict=True)
    )
    if array.dtype != np.dtype(dtype) or not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise CacheFormatError(f"{where}: found {summary(array)}, expected {np.dtype(dtype)} ({expected}).")


def summary(array: Array) -> str:
    """Dtype and shape, for messages."""
    return f"{array.dtype} {tuple(array.shape)}"
