"""Decoding: every kind of image that data sets hold, on purpose, and reasons that are the same everywhere."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vkd_cache.errors import BrokenImageError
from vkd_cache.views.decode import MAX_IMAGE_PIXELS, decode_image


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(width: int = 20, height: int = 12) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    bands = [255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)]
    return Image.fromarray(np.stack(bands, axis=2).astype(np.uint8))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {})])
def test_lossless_formats_give_their_pixels(kind: str, options: dict[str, Any]) -> None:
    decoded = decode_image(encode(picture(), kind, **options))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(picture()))


def test_a_jpeg_gives_pillows_pixels() -> None:
    data = encode(picture(), "JPEG", quality=80)
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), kind, exif=exif.tobytes())
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    decoded = decode_image(data)
    assert decoded.size == ((20, 12) if orientation < 5 else (12, 20))
    assert np.array_equal(np.asarray(decoded), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x09\x00\x00\x00\x00\x00\x00",
        b"Exif\x00\x00II*\x00\xff\xff\xff\xff",
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01\x12\x00\x02",
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x02\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00",
        b"Exif\x00\x00junk",
    ],
    ids=["value 9", "offset outside", "cut off", "text", "no header"],
)
def test_exif_that_makes_no_sense_is_ignored_without_a_warning(exif: bytes) -> None:
    assert decode_image(encode(picture(), "JPEG", exif=exif)).size == (20, 12)


def test_an_orientation_written_as_a_long_is_read() -> None:
    exif = (
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x04\x00\x00\x00\x01\x00\x00\x00\x06\x00\x00\x00\x00"
    )
    assert decode_image(encode(picture(), "JPEG", exif=exif)).size == (12, 20)


def test_grey_and_bilevel_become_three_equal_channels() -> None:
    grey = picture().convert("L")
    for image, data in (
        (grey, encode(grey, "PNG")),
        (grey.convert("1"), encode(grey.convert("1"), "PNG")),
        (None, encode(grey, "JPEG")),
    ):
        pixels = np.asarray(decode_image(data))
        assert (pixels[..., 0] == pixels[..., 1]).all()
        assert (pixels[..., 0] == pixels[..., 2]).all()
        if image is not None:
            assert np.array_equal(pixels[..., 0], np.asarray(image.convert("L")))


def test_a_palette_gives_its_colours() -> None:
    palette = picture().quantize(16)
    for kind in ("PNG", "GIF", "BMP"):
        decoded = decode_image(encode(palette, kind))
        assert np.array_equal(np.asarray(decoded), np.asarray(palette.convert("RGB")))


def test_transparency_lies_over_white() -> None:
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    alpha = np.asarray(image)[..., 3:] / 255.0
    expected = np.asarray(image)[..., :3] * alpha + 255 * (1 - alpha)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        decoded = np.asarray(decode_image(encode(image, kind, **options)))
        assert np.abs(decoded - expected).max() <= 1.0
    grey = np.asarray(decode_image(encode(image.convert("LA"), "PNG")))
    luma = np.asarray(image.convert("RGB").convert("L"))[..., None]
    assert np.abs(grey - (luma * alpha + 255 * (1 - alpha))).max() <= 1.0


def test_transparency_of_a_large_image_is_composited_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    image = Image.fromarray(rng.integers(0, 256, (37, 23, 4)).astype(np.uint8))
    whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    for pixels in (1, 23, 100, 10**6):
        monkeypatch.setattr("vkd_cache.views.decode._STRIP_PX", pixels)
        assert decode_image(encode(image, "PNG")).tobytes() == whole.tobytes()


def test_a_transparent_palette_entry_or_colour_is_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    for data in (
        encode(palette, "PNG", transparency=0),
        encode(palette, "PNG", transparency=bytes([0, 255])),
        encode(palette, "GIF", transparency=0),
        encode(palette.convert("RGB"), "PNG", transparency=(10, 20, 30)),
    ):
        assert np.asarray(decode_image(data)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_cmyk_as_adobe_writes_it_is_converted() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    pixels = np.asarray(decode_image(encode(image, "JPEG", quality=95))).astype(int)
    assert np.abs(pixels - [255, 0, 0]).max() <= 4


def test_sixteen_bits_keep_their_high_byte() -> None:
    values = [0, 255, 256, 0x80FF, 0xFFFF]
    grey = png(5, 1, 16, 0, b"\x00" + struct.pack(">5H", *values))
    colour = png(5, 1, 16, 2, b"\x00" + b"".join(struct.pack(">3H", v, v, v) for v in values))
    for data in (grey, colour):
        assert np.asarray(decode_image(data))[0, :, 1].tolist() == [0, 0, 1, 0x80, 0xFF]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.asarray(decode_image(data))[3, 3].tolist() == [255, 0, 0]


def test_a_file_is_what_its_bytes_say() -> None:
    assert decode_image(encode(picture(), "PNG")).size == (20, 12)
    with pytest.raises(BrokenImageError, match=r"^not a JPEG, PNG, WebP, GIF or BMP image$"):
        decode_image(encode(picture(), "TIFF"))
    with pytest.raises(BrokenImageError, match=r"^empty file$"):
        decode_image(b"")


@pytest.mark.parametrize(("kind", "name"), [("JPEG", "JPEG"), ("PNG", "PNG"), ("WEBP", "WebP"), ("GIF", "GIF")])
def test_a_truncated_file_is_broken(kind: str, name: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, kind)
    with pytest.raises(BrokenImageError, match=f"^{name} (data is truncated or damaged|header is damaged)$"):
        decode_image(data[: len(data) // 2])
    with pytest.raises(BrokenImageError, match=f"^{name} header is damaged$"):
        decode_image(data[:12])


def test_a_large_image_is_read_without_a_warning_and_a_huge_one_refused_by_its_header() -> None:
    side = 9_600  # 92 million pixels: above Pillow's warning, below the limit
    rows = (b"\x00" + bytes(side // 8)) * side
    assert decode_image(png(side, side, 1, 0, rows)).size == (side, side)
    assert side * side < MAX_IMAGE_PIXELS
    for huge in (png(13_378, 13_378, 1, 0, b""), png(MAX_IMAGE_PIXELS + 1, 1, 1, 0, b"")):
        with pytest.raises(BrokenImageError, match=r"^PNG image of more than 178956970 pixels$"):
            decode_image(huge)


def test_a_gif_whose_frame_is_larger_than_it_says_gives_no_warning() -> None:
    data = bytearray(encode(picture(), "GIF"))
    data[6:10] = struct.pack("<HH", 12_000, 9_000)  # more than Pillow remarks on, less than is refused
    frame = data.index(b"\x2c")
    data[frame + 5 : frame + 9] = struct.pack("<HH", 12_001, 9_000)
    with pytest.raises(BrokenImageError, match="truncated or damaged"):
        decode_image(bytes(data))


def test_an_image_without_pixels_is_broken() -> None:
    with pytest.raises(BrokenImageError, match=r"^PNG "):
        decode_image(png(0, 5, 8, 0, b""))


SEEDS = [
    encode(picture(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00"),
    encode(picture(), "PNG"),
    encode(picture().convert("RGBA"), "WEBP"),
    encode(picture().quantize(8), "GIF"),
    encode(picture().quantize(8), "BMP"),
]


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6), st.data())
def test_damaged_bytes_give_an_image_or_one_of_the_reasons(
    seed: bytes, changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    damaged = bytearray(seed)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    reasons = []
    for _ in range(2):
        try:
            assert decode_image(bytes(damaged)).mode == "RGB"
            reasons.append("")
        except BrokenImageError as error:
            reasons.append(str(error))
    assert reasons[0] == reasons[1]
    assert len(reasons[0]) < 60
