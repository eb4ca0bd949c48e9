"""Decoding: from the bytes of a file to one RGB image, on purpose for every kind of file that data sets hold.

A newcomer's trap: `Image.open` is not used. The format is taken from the first bytes, the size is checked against our
own limit, and EXIF is read here, so that odd files give the same pixels, or the same reason for having none, in every
process and without warnings. The table of what is done with which image is in docs/views.md.

Shape legend: H/W height and width of an image.
"""

import io
import struct
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from vkd_cache.errors import BrokenImageError
from vkd_cache.views.jpeg_header import plain_jpeg_size

Pixels = npt.NDArray[np.uint8]

MAX_IMAGE_PIXELS = 178_956_970

# everything that Pillow's parsers and decoders raise on bytes that are not what they should be
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    EOFError,
    OverflowError,
    ZeroDivisionError,
    RuntimeError,
    struct.error,
)
_STRIP_PX = 2**22
_ORIENTATION_TAG = 0x0112
_TRANSPOSE: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _JpegFile(JpegImageFile):
    """A JPEG file whose EXIF data is left alone: Pillow reads the resolution from it, and warns if it is damaged."""

    def _read_dpi_from_exif(self) -> None:
        return


def _open_gif(file: io.BytesIO) -> GifImageFile:
    with warnings.catch_warnings():  # whose sizes Pillow remarks on while it reads the header; ours are checked later
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return GifImageFile(file)


_FORMATS: tuple[tuple[str, bytes, Callable[[io.BytesIO], ImageFile.ImageFile]], ...] = (
    ("JPEG", b"\xff\xd8\xff", _JpegFile),
    ("PNG", b"\x89PNG\r\n\x1a\n", PngImageFile),
    ("WebP", b"RIFF", WebPImageFile),
    ("GIF", b"GIF8", _open_gif),
    ("BMP", b"BM", BmpImageFile),
)


def decode_image(data: bytes, *, oriented: bool = True) -> Image.Image:
    """Decode the first frame of a JPEG, PNG, WebP, GIF or BMP file, whatever its name says.

    Args:
        data: the whole file.
        oriented: turn it upright by its EXIF orientation. Not for detection: COCO's sizes and boxes, pycocotools and
            the reference speak of the pixels as they are stored.

    Returns:
        RGB image, transparency over white, 16-bit values cut to their high byte.

    Raises:
        BrokenImageError: not one of these formats, damaged, truncated, empty, or of more than `MAX_IMAGE_PIXELS`
            pixels; the text is the same on every machine.
    """
    name, image = _open(data)
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise BrokenImageError(_too_large(name))
    if image.width < 1 or image.height < 1:
        raise BrokenImageError(f"{name} image without pixels")
    try:
        image.load()
        rgb = _to_rgb(image)
    except _DAMAGE as error:
        raise BrokenImageError(f"{name} data is truncated or damaged") from error
    transpose = _TRANSPOSE.get(_exif_orientation(image.info.get("exif"))) if oriented else None
    return rgb if transpose is None else rgb.transpose(transpose)


def decode_pixels(data: bytes, *, oriented: bool = True) -> Pixels:
    """The pixels of `decode_image`, bit for bit, without an image of Pillow's: for the recipes with simplejpeg.

    Plain JPEG files that simplejpeg decodes without a remark are its own. All others go to Pillow, which decides what
    becomes of them: so the same files are refused, for the same reasons.

    Args, Raises: as for `decode_image`.

    Returns:
        (H, W, 3) uint8 RGB, C order, writable.
    """
    size = plain_jpeg_size(data, oriented=oriented)
    if size is not None and 0 < size[0] * size[1] <= MAX_IMAGE_PIXELS:
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        except ValueError:  # what libjpeg only warns of, too: data that end too early, for one
            pass
        else:
            return pixels
    return _as_array(decode_image(data, oriented=oriented))


def _as_array(image: Image.Image) -> Pixels:
    """A copy of the pixels of an RGB image, in strips: Pillow itself would make two."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _STRIP_PX // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels


def _open(data: bytes) -> tuple[str, ImageFile.ImageFile]:
    """The format's name and the image with its header read."""
    for name, magic, open_file in _FORMATS:
        if not data.startswith(magic):
            continue
        try:
            return name, open_file(io.BytesIO(data))
        except Image.DecompressionBombError as error:  # WebP: Pillow looks at the size before we can
            raise BrokenImageError(_too_large(name)) from error
        except _DAMAGE as error:
            raise BrokenImageError(f"{name} header is damaged") from error
    raise BrokenImageError("not a JPEG, PNG, WebP, GIF or BMP image" if data else "empty file")


def _too_large(name: str) -> str:
    return f"{name} image of more than {MAX_IMAGE_PIXELS} pixels"


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode that the formats above decode to, as RGB."""
    if image.mode.startswith("I"):  # 16-bit grey: its high byte, as Pillow itself does for 16-bit colour
        values = np.asarray(image)
        return Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        return _over_white(image if image.mode == "RGBA" else image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """Transparency over white, in strips: of the largest images, each further copy would be most of a gigabyte."""
    whole = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PX // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        strip = image.crop(box)
        whole.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), box)
    return whole


def _exif_orientation(exif: object) -> int:
    """The orientation of an EXIF block (1 to 8), 1 where there is none or it cannot be read."""
    if not isinstance(exif, bytes):
        return 1
    block = exif.removeprefix(b"Exif\x00\x00")
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(block[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for entry in range(count):
            at = start + 2 + 12 * entry
            tag, kind, length = struct.unpack_from(f"{order}HHI", block, at)
            if tag == _ORIENTATION_TAG:
                # a SHORT by the standard, but some cameras write a LONG
                value = {(3, 1): "H", (4, 1): "I"}.get((kind, length))
                return int(struct.unpack_from(order + value, block, at + 8)[0]) if value else 1
    except struct.error:
        return 1
    return 1
