"""Stored views: how the 8-bit pixels of one are encoded, and the ragged column that holds those of a unit.

A newcomer's trap: a JPEG's pixels are what its decoder makes of it. Teacher, digest and training all see the *decoded*
bytes of this column, and never those that went into the encoder.

Shape legend: n views of a unit, H/W height and width of a view.
"""

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg

from vkd_cache.cache.arrays import Array, check_array, column_of, summary
from vkd_cache.cache.documents import Fields
from vkd_cache.cache.frames import compressed, expanded
from vkd_cache.errors import CacheError, CacheFormatError

Pixels = npt.NDArray[np.uint8]
Encoded = bytes | memoryview

JPEG, LOSSLESS = "jpeg", "delta_zstd"
CODECS = (JPEG, LOSSLESS)
PIXELS, OFFSETS = "pixels", "pixels_offsets"  # the columns
# at the same bytes it moves a teacher's features less than 4:2:0, and no decoder has a choice of how to enlarge it
SUBSAMPLING = "4:4:4"
_ZSTD_LEVEL = 1  # higher ones gain 1 to 3 % for two to six times the time
_MOST_BYTES = 2**32 - 1
_FRAME = struct.Struct(">BHHB")  # of a JPEG's frame header: bits, height, width, colours
_BASELINE, _FRAMES = 0xC0, {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelSpec:
    """How the views of a cache are stored.

    Attributes:
        codec: `jpeg`, or `delta_zstd`, which loses nothing.
        quality: of a JPEG, 1 to 100; 0 for the other.
    """

    codec: str
    quality: int = 0

    @property
    def is_lossless(self) -> bool:
        """Whether decoded pixels are those that were encoded."""
        return self.codec == LOSSLESS

    @property
    def libraries(self) -> tuple[str, ...]:
        """Libraries whose version decides what stored bytes decode to."""
        return () if self.is_lossless else ("simplejpeg",)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        if self.is_lossless:
            return {"codec": self.codec}
        return {"codec": self.codec, "quality": self.quality, "subsampling": SUBSAMPLING}

    @classmethod
    def from_json(cls, body: object, where: str) -> "PixelSpec":
        """Inverse of `to_json`.

        Raises:
            CacheFormatError: a field is missing, of the wrong type or out of range.
        """
        fields = Fields(body, where, "pixels.")
        if fields.text("codec", CODECS) == LOSSLESS:
            return cls(codec=LOSSLESS)
        fields.text("subsampling", (SUBSAMPLING,))
        return cls(codec=JPEG, quality=fields.whole("quality", 1, 100))

    def __str__(self) -> str:
        return "lossless" if self.is_lossless else f"JPEG of quality {self.quality}"


def encode_view(pixels: Pixels, spec: PixelSpec) -> bytes:
    """(H, W, 3) uint8 pixels of a view as they are stored."""
    if not spec.is_lossless:
        whole = np.ascontiguousarray(pixels)
        subsampling = SUBSAMPLING.replace(":", "")
        data: bytes = simplejpeg.encode_jpeg(
            whole, quality=spec.quality, colorspace="RGB", colorsubsampling=subsampling, fastdct=False
        )
        return data
    planes = np.array(pixels.transpose(2, 0, 1), order="C")
    planes[0] -= planes[1]
    planes[2] -= planes[1]
    planes[:, 1:] -= planes[:, :-1].copy()
    return compressed(planes.reshape(-1).data, _ZSTD_LEVEL)


def decode_view(data: Encoded, spec: PixelSpec, out: Pixels) -> None:
    """Put the stored pixels of one view into `out`.

    Nothing is allocated or decoded before the data are known to be of a view of that size.

    Args:
        data: as `encode_view` gave them, from a file that anybody may have written.
        spec: of the cache.
        out: (H, W, 3) uint8, C order, of the size that the view's params say; undefined after an error.

    Raises:
        ValueError: what is wrong with the data, in a few words.
    """
    height, width, _ = out.shape
    if not spec.is_lossless:
        found = _baseline_size(memoryview(data))
        if found != (height, width):
            raise ValueError(f"a JPEG of {found[1]}x{found[0]} pixels, expected {width}x{height}")
        simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False, buffer=out, strict=True)
        return
    flat = np.frombuffer(expanded(memoryview(data), out.nbytes), np.uint8)
    planes = np.add.accumulate(flat.reshape(3, height, width), axis=1, dtype=np.uint8)
    # plane by plane: three times as fast as transposing them
    out[:, :, 1] = planes[1]
    np.add(planes[0], planes[1], out=out[:, :, 0])
    np.add(planes[2], planes[1], out=out[:, :, 2])


def _baseline_size(data: memoryview) -> tuple[int, int]:
    """Height and width of a JPEG with three colours, and with no more passes than we write: those of another are
    bounded by nothing."""
    at = 2
    while bytes(data[:2]) == b"\xff\xd8" and at + 4 + _FRAME.size <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker in _FRAMES:
            bits, height, width, colours = _FRAME.unpack_from(data, at + 4)
            if (marker, bits, colours) != (_BASELINE, 8, 3):
                break
            return height, width
        at += 2 + length
    raise ValueError("bytes that are not a baseline JPEG of three colours")


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedViews:
    """The stored pixels of n views.

    Attributes:
        content: (bytes,) uint8, those of all views end to end.
        offsets: (n + 1,) int64 where each begins, and the end.
    """

    content: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, place: int) -> memoryview:
        return self.content.data[self.offsets[place] : self.offsets[place + 1]]

    @classmethod
    def joined(cls, views: Sequence[Encoded]) -> "EncodedViews":
        """Those of single views, end to end."""
        offsets = np.cumsum([0, *map(len, views)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(views), np.uint8), offsets)

    @classmethod
    def of_columns(cls, columns: Mapping[str, Array]) -> "EncodedViews":
        """Those of a unit, whose columns have been checked."""
        return cls(columns[PIXELS].astype(np.uint8, copy=False), columns[OFFSETS].astype(np.int64))

    def to_columns(self) -> dict[str, Array]:
        """The unit's columns.

        Raises:
            CacheError: more bytes than a unit can hold.
        """
        if self.offsets[-1] > _MOST_BYTES:
            raise CacheError(
                f"found {self.offsets[-1]} bytes of stored pixels, a unit holds at most {_MOST_BYTES}. Give a smaller "
                "[source] shard_size, in another cache."
            )
        return {PIXELS: self.content, OFFSETS: self.offsets.astype(np.uint32)}

    def copy(self) -> "EncodedViews":
        """The same in memory of its own: what a worker process sends lies in a block that it waits for."""
        return EncodedViews(self.content.copy(), self.offsets.copy())

    def take(self, places: Sequence[int] | npt.NDArray[np.integer]) -> "EncodedViews":
        """Those of some views, in the order given."""
        return EncodedViews.joined([self[place] for place in np.asarray(places, np.int64).tolist()])


def check_pixels(columns: Mapping[str, Array], num_rows: int, where: str) -> None:
    """Check the columns of stored pixels against the format and each other; what is in them is not looked at.

    Raises:
        CacheFormatError: a column is missing or not as the format says; names the column, found and expected.
    """
    content, offsets = column_of(columns, PIXELS, where), column_of(columns, OFFSETS, where)
    check_array(content, "|u1", (None,), f"{where}: column '{PIXELS}'")
    check_array(offsets, "<u4", (num_rows + 1,), f"{where}: column '{OFFSETS}'")
    ends = offsets.astype(np.int64)
    if ends[0] != 0 or ends[-1] != len(content) or (np.diff(ends) < 1).any():
        raise CacheFormatError(
            f"{where}: column '{OFFSETS}': found {summary(offsets)}, expected offsets from 0 to {len(content)}, the "
            f"length of {PIXELS}, that rise with every row."
        )
