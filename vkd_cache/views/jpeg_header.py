"""Which JPEG files are plain: nothing in their header that a decoder could take one way or another.

A newcomer's trap: this is no judgement on a file. One that is not plain (EXIF that may turn it, four components, an odd
or damaged segment) is Pillow's to read or to refuse. It only saves Pillow's own look at most files, and so it may only
say yes where Pillow's would find nothing wrong.
"""

_START_OF_SCAN, _COMMENT, _QUANTISATION, _HUFFMAN, _RESTART = 0xDA, 0xFE, 0xDB, 0xC4, 0xDD
_FRAMES = (0xC0, 0xC2)  # baseline, progressive: Huffman coded, 8 bits
_APPLICATION = range(0xE0, 0xF0)
_EXIF, _PHOTOSHOP = 0xE1, 0xED
_LEAST_LENGTHS = {0xE0: 16, 0xE2: 16, 0xEE: 14}  # of JFIF, ICC profile and Adobe segments that are whole
_TABLE_BYTES = 65  # of a quantisation table with 8-bit entries


def plain_jpeg_size(data: bytes, *, oriented: bool) -> tuple[int, int] | None:
    """(width, height) in pixels of a plain grey or colour JPEG file; None for any other file.

    Args:
        data: the whole file.
        oriented: EXIF data matter: a file that has some is not plain.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    size, at, num_bytes = None, 2, len(data)
    while at + 4 <= num_bytes and data[at] == 0xFF:
        marker = data[at + 1]
        start, end = at + 4, at + 2 + (data[at + 2] << 8 | data[at + 3])
        if not start <= end <= num_bytes:
            return None
        if marker == _START_OF_SCAN:
            return size
        if marker in _FRAMES:
            if size is not None or (size := _frame_size(data[start:end])) is None:
                return None
        elif marker in _APPLICATION:
            if not _harmless(marker, data[start:end], oriented):
                return None
        elif marker == _QUANTISATION:
            tables = data[start:end]
            if len(tables) % _TABLE_BYTES or any(kind >= 16 for kind in tables[::_TABLE_BYTES]):
                return None
        elif marker not in (_HUFFMAN, _COMMENT, _RESTART):
            return None
        at = end
    return None


def _frame_size(frame: bytes) -> tuple[int, int] | None:
    """(width, height) of a frame of one or three components."""
    if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3) or len(frame) != 6 + 3 * frame[5]:
        return None
    return frame[3] << 8 | frame[4], frame[1] << 8 | frame[2]


def _harmless(marker: int, segment: bytes, oriented: bool) -> bool:
    """Whether an application segment says nothing that Pillow could stumble over, or that matters."""
    if marker == _EXIF:
        return not (oriented and segment.startswith(b"Exif"))
    if marker == _PHOTOSHOP:
        return not segment.startswith(b"Photoshop")
    return len(segment) + 2 >= _LEAST_LENGTHS.get(marker, 2)
