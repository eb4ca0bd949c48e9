"""Views whose pixels a cache stores: encoded, decoded again, shown to the teacher, and then read instead of images.

A newcomer's trap: a stored view needs no image, but its params and its digest all the same. What the device does to it
(a colour map, mixing), where its boxes are, and whether the decoder still gives what the teacher saw, they say.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from vkd_cache.cache.pixel_codecs import JPEG, LOSSLESS, Encoded, PixelSpec, decode_view, encode_view
from vkd_cache.cache.reader import Cache
from vkd_cache.config import CacheConfig
from vkd_cache.errors import CorruptCacheError
from vkd_cache.runtime import library_versions

Pixels = npt.NDArray[np.uint8]

_ADVICE = (
    "Run vkd-cache verify on the cache. If it says that the files are as they were written, use the versions that the "
    "cache was made with, or extract another cache."
)


def wanted_spec(config: CacheConfig) -> PixelSpec | None:
    """How a `[cache]` section asks views to be stored; None: not at all."""
    if config.pixels == "jpeg":
        return PixelSpec(codec=JPEG, quality=config.pixels_quality)
    return PixelSpec(codec=LOSSLESS) if config.pixels == "lossless" else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredPixels:
    """How the views of one cache are stored, for whoever renders or reads them.

    Attributes:
        spec: as the manifest says.
        url: of the cache, for messages.
        made_with: library versions of the manifest, for messages.
    """

    spec: PixelSpec
    url: str
    made_with: Mapping[str, str]

    @classmethod
    def wanted(cls, config: CacheConfig) -> "StoredPixels | None":
        """Those of the cache that a `[cache]` section describes, made here; None where it asks for none."""
        spec = wanted_spec(config)
        return None if spec is None else cls(spec=spec, url=config.url, made_with=library_versions(*spec.libraries))

    @classmethod
    def of_cache(cls, cache: Cache | None) -> "StoredPixels | None":
        """Those of a cache, where it has any."""
        if cache is None or cache.manifest.pixels is None:
            return None
        return cls(spec=cache.manifest.pixels, url=cache.url, made_with=cache.manifest.versions)

    def stored(self, pixels: Pixels) -> tuple[bytes, Pixels]:
        """What is stored of a view (H, W, 3), and what it decodes to: that is the view from now on."""
        data = encode_view(pixels, self.spec)
        if not self.spec.is_lossless:
            pixels = np.empty(pixels.shape, np.uint8)
            decode_view(data, self.spec, pixels)
        return data, pixels

    def decode(self, data: Encoded, out: Pixels, what: str) -> None:
        """Put the stored pixels of the view called `what` into `out` (H, W, 3), C order.

        Raises:
            CorruptCacheError: the data are not those of a view of that size.
        """
        try:
            decode_view(data, self.spec, out)
        except ValueError as error:
            raise CorruptCacheError(f"{self.url}: stored pixels of {what}: found {error}. {_ADVICE}") from error

    def other_pixels(self, what: str, found: int, expected: int) -> CorruptCacheError:
        """The error for stored pixels that decode to another digest than the teacher saw."""
        return CorruptCacheError(
            f"{self.url}: stored pixels of {what} decode to digest {found:016x}, the teacher saw {expected:016x}. "
            f"{self.versions()}{_ADVICE}"
        )

    def versions(self) -> str:
        """The versions that decide what stored pixels decode to, here and where the cache was made, as a sentence."""
        here = library_versions(*self.spec.libraries)
        there = self.made_with
        shown = [f"{name} {here[name]} here, {there.get(name, 'unknown')} there" for name in self.spec.libraries]
        return f"Stored pixels: {', '.join(shown)}. " if shown else ""
