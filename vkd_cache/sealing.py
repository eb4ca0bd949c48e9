"""A checksum of a whole torch file, inside the file: torch's own reader notices damage to less than half of its bytes.

torch.save writes a zip archive with a CRC of each entry, and torch.load looks at none of them: of 2,341 bytes of a
small file, 558 could be flipped and other weights came back without a word. So our checkpoints end with the XXH3-128
of everything before it. A newcomer's trap: it is the zip archive's comment, so the file stays one that torch.load, and
any zip tool, reads.
"""

import re
import struct
from pathlib import Path

import xxhash

_MARK = b"vkd-cache xxh3_128 "
_DIGITS = 32
_SEAL = re.compile(re.escape(_MARK) + rb"([0-9a-f]{%d})" % _DIGITS)
_SEAL_BYTES = len(_MARK) + _DIGITS
_END_RECORD = b"PK\x05\x06"  # of a zip archive, 22 bytes with the length of its comment in the last two
_END_BYTES = 22
_BLOCK_BYTES = 2**24


def sealed(data: bytes) -> bytes:
    """A torch file without a comment, as one that ends with its checksum.

    Raises:
        ValueError: `data` does not end like a zip archive without a comment.
    """
    end = data[-_END_BYTES:]
    if not end.startswith(_END_RECORD) or not end.endswith(b"\0\0"):
        raise ValueError("expected a zip archive without a comment")
    body = data[:-2] + struct.pack("<H", _SEAL_BYTES) + _MARK
    return body + xxhash.xxh3_128_hexdigest(body).encode("ascii")


def seal_problem(path: Path) -> str | None:
    """What is wrong with the checksum at the end of a file: "" for nothing; None: there is none.

    Raises:
        OSError: the file cannot be read.
    """
    checksum = xxhash.xxh3_128()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _SEAL_BYTES))
        match = _SEAL.fullmatch(file.read())
        if match is None:
            return None
        file.seek(0)
        left = size - _DIGITS
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            checksum.update(block)
            left -= len(block)
    expected = match[1].decode("ascii")
    found = checksum.hexdigest()
    return "" if found == expected else f"found checksum {found}, its end says {expected}"
