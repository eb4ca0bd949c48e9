"""Made the golden caches of format version 2, whose columns are packed: those of version 1, converted. Run once.

Never again: what lies in tests/golden/v2 is what a release wrote, and every later one has to read it. The images and
the expected values are those of version 1.

    zarr        of v1/zarr
    webdataset  of v1/webdataset, in blocks of 4 rows
    tokens      of v1/tokens
    uint4       of v1/zarr, its features once more rounded, to sqrt_uint4

    OMP_NUM_THREADS=1 python tests/golden/make_v2.py
"""

from pathlib import Path

from vkd_cache.runtime import JobSplit
from vkd_cache.stages.convert import ConvertRequest, convert
from vkd_cache.stages.convert_plan import Wish

ROOT = Path(__file__).parent
CACHES = {"zarr": ("zarr", None), "webdataset": ("webdataset", None), "tokens": ("tokens", None),
          "uint4": ("zarr", "uint4")}  # fmt: skip


def main() -> None:
    """Convert each, and take away what is not part of the content."""
    for name, (source, dtype) in CACHES.items():
        target = ROOT / "v2" / name
        request = ConvertRequest(source=str(ROOT / "v1" / source), target=str(target), wish=Wish(dtype=dtype))
        convert(request, JobSplit())
        for folder in (target / "runs", target / ".incomplete"):
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


if __name__ == "__main__":
    main()
