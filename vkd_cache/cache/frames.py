"""zstd frames of files that anybody may have written: nothing is allocated for one before its size is known to fit.

A newcomer's trap: a frame says itself how large it becomes, and a lying one is a bomb. Whoever decodes one says what it
has to become.
"""

from typing import cast

from numcodecs.zstd import Zstd  # type: ignore[import-untyped]

# A unit may be this many times as large as its file, and this many bytes more: zeros shrink a lot, and a bomb more.
_MAX_EXPANSION = 100
_MAX_FREE_BYTES = 2**26
_MAGIC = b"\x28\xb5\x2f\xfd"


def most_expanded(num_bytes: int) -> int:
    """Bytes that all arrays of a unit's file of `num_bytes` may have together."""
    return _MAX_EXPANSION * num_bytes + _MAX_FREE_BYTES


def compressed(content: bytes | memoryview, level: int) -> bytes:
    """`content` as one zstd frame that says its size."""
    return cast(bytes, Zstd(level=level).encode(content))


def expanded(frame: memoryview, num_bytes: int) -> bytes:
    """The content of a zstd frame.

    Args:
        frame: whole.
        num_bytes: what its content has to be.

    Raises:
        ValueError: not a frame, or of another size.
    """
    found = frame_bytes(frame)
    if found != num_bytes:
        raise ValueError(f"a zstd frame of {found} bytes, expected {num_bytes}")
    try:
        content = cast(bytes, Zstd(level=1).decode(frame))
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"bytes that are not a zstd frame ({error})") from error
    if len(content) != num_bytes:
        raise ValueError(f"a zstd frame of {len(content)} bytes, expected {num_bytes}")
    return content


def frame_bytes(frame: memoryview) -> int:
    """How large a zstd frame says it is once decompressed (RFC 8878, section 3.1.1.1).

    Raises:
        ValueError: it says nothing, or is no frame.
    """
    if bytes(frame[:4]) != _MAGIC or len(frame) < 5:
        raise ValueError("bytes that are not a zstd frame (no zstd magic number)")
    flags = frame[4]
    is_single = bool(flags & 0x20)
    start = 5 + (0 if is_single else 1) + (0, 1, 2, 4)[flags & 3]
    size = (1 if is_single else 0, 2, 4, 8)[flags >> 6]
    if not size or len(frame) < start + size:
        raise ValueError("bytes that are not a zstd frame (no content size)")
    return int.from_bytes(frame[start : start + size], "little") + (256 if size == 2 else 0)
