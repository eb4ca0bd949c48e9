"""The decoder of the fast recipes: Pillow's pixels to the bit, and its reasons, for whatever bytes there are."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from vkd_cache.errors import BrokenImageError
from vkd_cache.views import decode
from vkd_cache.views.decode import decode_image, decode_pixels
from vkd_cache.views.jpeg_header import plain_jpeg_size

FORMS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0, "quality": 95},
    "4:2:2": {"subsampling": 1, "quality": 80},
    "4:2:0": {"subsampling": 2, "quality": 60},
    "progressive": {"progressive": True, "quality": 85},
    "optimised": {"optimize": True, "quality": 20},
    "restarts": {"restart_marker_blocks": 3},
    "rgb": {"keep_rgb": True},
    "profile": {"icc_profile": bytes(range(256)) * 300},
    "comment": {"comment": b"a photograph"},
}


def photograph(width: int = 161, height: int = 107) -> Image.Image:
    china = load_sample_images().images[0]
    return Image.fromarray(china[40 : 40 + 2 * height : 2, 100 : 100 + 2 * width : 2])


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def with_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encode(photograph(), exif=exif.tobytes())


def outcome(decoder: Any, data: bytes, *, oriented: bool) -> tuple[object, ...]:
    """Size and pixels, or the reason for having none."""
    try:
        pixels = np.asarray(decoder(data, oriented=oriented))
    except BrokenImageError as error:
        return (str(error),)
    return pixels.shape, pixels.tobytes()


def assert_same(data: bytes) -> tuple[object, ...]:
    for oriented in (True, False):
        found = outcome(decode_pixels, data, oriented=oriented)
        assert found == outcome(decode_image, data, oriented=oriented)
    return found


@pytest.mark.parametrize(("form", "mode"), [*((form, "RGB") for form in FORMS), ("4:2:0", "L"), ("progressive", "L")])
def test_plain_files_are_decoded_to_pillows_pixels(form: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(photograph().convert(mode), **FORMS[form])
    expected = np.asarray(decode_image(data))
    assert plain_jpeg_size(data, oriented=True) == (161, 107)
    monkeypatch.setattr(decode, "decode_image", None)  # it is not needed
    found = decode_pixels(data)
    assert np.array_equal(found, expected)
    assert found.flags.c_contiguous and found.flags.writeable


def test_real_files_are_decoded_to_pillows_pixels() -> None:
    folder = Path(load_sample_images.__code__.co_filename).parent / "images"
    files = sorted(folder.glob("*.jpg"))
    assert len(files) == 2
    for file in files:
        assert_same(file.read_bytes())
    for size in ((1, 1), (1, 40), (40, 1), (8, 8), (17, 9), (333, 2)):
        assert_same(encode(photograph().resize(size), quality=90))


@pytest.mark.parametrize("orientation", range(10))
def test_exif_turns_the_image_as_pillows(orientation: int) -> None:
    data = with_orientation(orientation)
    assert plain_jpeg_size(data, oriented=True) is None and plain_jpeg_size(data, oriented=False) == (161, 107)
    assert_same(data)
    assert decode_pixels(data).shape[:2] == ((161, 107) if orientation in (5, 6, 7, 8) else (107, 161))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
def test_other_formats_are_pillows(kind: str) -> None:
    data = encode(photograph(), kind)
    assert plain_jpeg_size(data, oriented=True) is None
    assert_same(data)
    assert decode_pixels(data).flags.writeable


def test_four_components_are_pillows() -> None:
    data = encode(photograph().convert("CMYK"))
    assert plain_jpeg_size(data, oriented=True) is None
    assert_same(data)


def test_truncated_files_are_broken_wherever_they_end() -> None:
    for form in ("4:2:0", "progressive"):
        data = encode(photograph(), **FORMS[form])
        reasons = {assert_same(data[:end])[0] for end in (0, 2, *range(3, len(data) - 2, 29))}
        assert reasons == {
            "empty file",
            "not a JPEG, PNG, WebP, GIF or BMP image",
            "JPEG header is damaged",
            "JPEG data is truncated or damaged",
        }


SAMPLES = [encode(photograph(40, 30), **FORMS[form]) for form in ("4:2:0", "progressive", "restarts", "profile")]
SAMPLES[3] = encode(photograph(40, 30), icc_profile=bytes(40), comment=b"comment")
SAMPLES.append(with_orientation(6))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_files_come_to_the_same_end(data: st.DataObject) -> None:
    """Bytes changed, cut out or put in, mostly in the header: the same pixels or the same reason."""
    sample = bytearray(data.draw(st.sampled_from(SAMPLES)))
    for _ in range(data.draw(st.integers(1, 3))):
        header = data.draw(st.booleans())
        at = data.draw(st.integers(0, min(len(sample), 700 if header else len(sample)) - 1))
        change = data.draw(st.sampled_from(("set", "cut", "insert", "marker")))
        if change == "set":
            sample[at] = data.draw(st.integers(0, 255))
        elif change == "cut":
            del sample[at : at + data.draw(st.integers(1, 4))]
        elif change == "insert":
            sample[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        else:
            found = sample.find(b"\xff", at)
            if 0 <= found < len(sample) - 1:
                sample[found + 1] = data.draw(st.sampled_from((0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xD8, 0xDA, 0xDB, 0xE0,
                                                              0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xD9)))  # fmt: skip
    assert_same(bytes(sample))


@pytest.mark.parametrize("marker", [0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE])
@pytest.mark.parametrize(
    "content", [b"JFIF", b"Exif\0\0", b"Adobe", b"ICC_PROFILE\0", b"Photoshop 3.0\x008BIM", b"MPF\0"]
)
def test_short_segments_are_read_as_pillow_reads_them(marker: int, content: bytes) -> None:
    plain = encode(photograph(40, 30))
    for length in range(len(content) + 6):
        segment = (content + b"\x01\x02\x00\x03\x04\x05")[:length]
        assert_same(plain[:2] + bytes((0xFF, marker)) + (length + 2).to_bytes(2, "big") + segment + plain[2:])


def test_the_size_is_checked_before_anything_is_decoded() -> None:
    data = bytearray(encode(photograph()))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    assert plain_jpeg_size(bytes(data), oriented=True) == (65535, 65535)
    assert assert_same(bytes(data)) == ("JPEG image of more than 178956970 pixels",)
    data[at + 5 : at + 9] = b"\x00\x00\x00\x10"
    assert_same(bytes(data))
