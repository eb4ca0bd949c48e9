"""Files that claim far more than they hold, read one after the other by a process that may not have the memory.

Run by tests/test_hostile.py: `hostile_bombs.py FOLDER IMAGES SHARD_SIZE`, where FOLDER holds a cache of IMAGES. Prints
one JSON object: what became of each bomb. Files with holes claim terabytes and take no disk.
"""

import argparse
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cache_samples import replace_unit, unit_file
from hostile_samples import document_of
from PIL import Image
from safetensors.torch import save

from vkd_cache.cache import tar_backend
from vkd_cache.cache.documents import seal
from vkd_cache.cache.reader import open_cache
from vkd_cache.cache.units import UnitId, record_path
from vkd_cache.cache.writer import create_cache
from vkd_cache.config import config_to_json, load_config
from vkd_cache.errors import CheckpointError, VkdCacheError
from vkd_cache.sealing import sealed
from vkd_cache.sources import open_source
from vkd_cache.stages.saved_student import load_student
from vkd_cache.stages.unit_views import CachedViews
from vkd_cache.students import create_student
from vkd_cache.teachers import load_classifier
from vkd_cache.views.decode import decode_image
from vkd_cache.views.recipe import Recipe
from vkd_cache.weights import read_weights_file

ALLOWED_BYTES = 768 * 2**20
RECORD = record_path(UnitId(0, 0))
HUGE = 2**40

Bomb = Callable[[], object]


def main(folder: Path, images: str, shard_size: int) -> dict[str, str]:
    """What became of each bomb, by name."""
    torch.set_num_threads(1)
    bombs = cache_bombs(folder, images, shard_size) | image_bombs() | weights_bombs(folder) | source_bombs(folder)
    load_student(str(plain_checkpoint(folder)), load_config(), 10)  # all that is imported is there before the limit
    if Path("/proc/self/statm").is_file():
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + ALLOWED_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcome = {}
    for name, bomb in bombs.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                bomb()
        except VkdCacheError as error:
            outcome[name] = f"refused: {str(error)[:200]}"
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test shows it
            outcome[name] = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            outcome[name] = "was read"
    return outcome


# ----------------------------------------------------------------------------------------------------- caches


def read_first(root: Path) -> object:
    """The first unit of a cache."""
    return open_cache(str(root)).read(0, 0)


def cache_bombs(folder: Path, images: str, shard_size: int) -> dict[str, Bomb]:
    """Caches whose documents, units and heads claim what they do not hold."""
    original = folder / "cache"

    def copy(name: str) -> Path:
        return shutil.copytree(original, folder / f"cache-{name}")

    def sparse(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.touch()
        os.truncate(path, HUGE)

    roots = {name: copy(name) for name in ("manifest", "record", "unit", "recorded", "head", "width", "counts")}
    sparse(roots["manifest"] / "manifest.json")
    sparse(roots["record"] / RECORD)
    sparse(unit_file(roots["unit"], 0))
    recorded = unit_file(roots["recorded"], 0)
    body = document_of(roots["recorded"] / RECORD)
    body["files"][0]["bytes"] = HUGE
    (roots["recorded"] / RECORD).write_bytes(seal(body))
    sparse(recorded)
    head = document_of(roots["head"] / "manifest.json")["head"]["file"]
    sparse(roots["head"] / head)
    body = document_of(roots["width"] / "manifest.json")
    body["nodes"][0]["shape"] = [2**28]
    (roots["width"] / "manifest.json").write_bytes(seal(body))
    body = document_of(roots["counts"] / RECORD)
    body["num_samples"] = 2**32 - 1
    (roots["counts"] / RECORD).write_bytes(seal(body))

    def epoch(root: Path) -> object:
        return CachedViews(open_cache(str(root)), open_source(images, shard_size=shard_size), [0]).slot_counts(0)

    return {
        "manifest of a terabyte": partial(read_first, roots["manifest"]),
        "record of a terabyte": partial(read_first, roots["record"]),
        "unit of a terabyte": partial(read_first, roots["unit"]),
        "unit of a terabyte, as recorded": partial(read_first, roots["recorded"]),
        "head of a terabyte": lambda: open_cache(str(roots["head"])).head(),
        "teacher of 2**28 features": partial(read_first, roots["width"]),
        "record of 2**32 samples": lambda: epoch(roots["counts"]),
        **{f"unit: {name}": bomb for name, bomb in unit_bombs(copy, images, shard_size).items()},
    }


def unit_bombs(copy: Callable[[str], Path], images: str, shard_size: int) -> dict[str, Bomb]:
    """Unit files with the checksum that belongs to them."""
    encoding = {"name": "default", "configuration": {"separator": "/"}}
    shape = {"zarr_format": 3, "node_type": "array", "chunk_key_encoding": encoding}
    codecs = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 1, "checksum": False}},
    ]

    def zipped(num_bytes: int, frame: bytes, deflate: bool = False) -> bytes:
        stream = io.BytesIO()
        metadata = {
            **shape, "shape": [num_bytes], "data_type": "uint8", "codecs": codecs,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [num_bytes]}},
        }  # fmt: skip
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as archive:
            archive.writestr("row/zarr.json", json.dumps(metadata))
            archive.writestr("row/c/0", frame)
        return stream.getvalue()

    def claiming(num_bytes: int) -> bytes:
        return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", num_bytes) + b"\x01\x00\x00"

    many = zipped(1, claiming(1))
    end = bytearray(many[-22:])
    end[12:16] = struct.pack("<I", 2**31)
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }" % 10**17
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n"
    contents = {
        "zstd claims a terabyte": zipped(HUGE, claiming(HUGE)),
        "zstd claims four gigabytes": zipped(2**32, claiming(2**32)),
        "zstd claims less than it says": zipped(2**25, claiming(2**32)),
        "deflated": zipped(2**30, bytes(2**24), deflate=True),
        "list of entries of gigabytes": many[:-22] + bytes(end),
    }
    bombs: dict[str, Bomb] = {
        "npy of an absurd shape": lambda: tar_backend.unpack(tar_member("000000.row.npy", len(npy), npy) + bytes(1024)),
        "tar of a terabyte": lambda: tar_backend.unpack(tar_member("000000.row.npy", 2**32) + bytes(1024)),
    }
    for name, data in contents.items():
        root = copy(name.replace(" ", "-"))
        replace_unit(root, data)
        bombs[name] = partial(read_first, root)
    rows = {"crop": [0, 0, 2**31, 2**31], "source_size": [60_000, 60_000], "erase": [0, 0, 65_535, 65_535]}
    for name, row in rows.items():
        bombs[f"{name} of gigabytes"] = _column_bomb(copy(name), name, row, images, shard_size)
    return bombs


def _column_bomb(root: Path, name: str, row: list[int], images: str, shard_size: int) -> Bomb:
    cache = open_cache(str(root))
    unit = cache.read(0, 0)
    columns = {column: np.array(values) for column, values in unit.columns.items()}
    columns[name][0] = row
    head = dict(zip(("weight", "bias"), cache.head() or (), strict=False)) or None
    writer = create_cache(str(root), cache.manifest, head)
    writer.publish(0, 0, columns, {spec.name: unit.node(spec.name) for spec in cache.manifest.nodes})
    source = open_source(images, shard_size=shard_size)
    return lambda: CachedViews(open_cache(str(root)), source, [0]).open(0, 0)


# ----------------------------------------------------------------------------------------------------- images


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A grey PNG whose pixels are all missing but a few."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(4096)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def image_bombs() -> dict[str, Bomb]:
    """Images that claim billions of pixels, or megabytes beside them."""
    zeros = zlib.compress(bytes(2**26), 9)
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    at = jpeg.getvalue().index(b"\xff\xc0")
    large_jpeg = jpeg.getvalue()[: at + 5] + struct.pack(">HH", 65_500, 65_500) + jpeg.getvalue()[at + 9 :]
    gif = b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"\x2c"
    gif += struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0)
    bmp = b"BM" + struct.pack("<IHHI", 1000, 0, 0, 54)
    bmp += struct.pack("<IiiHHIIiiII", 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0)
    frame = bytes(6) + (7).to_bytes(3, "little") * 2 + (10).to_bytes(3, "little") + b"\0" + b"VP8L" + bytes(8)
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + (16_382).to_bytes(3, "little") * 2
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    files = {
        "PNG of 60,000 x 60,000": png(60_000, 60_000),
        "PNG of 2**31 pixels a side": png(2**31 - 1, 2**31 - 1),
        "PNG with a text of 64 MB": png(64, 64, chunk(b"zTXt", b"a\0\0" + zeros)),
        "PNG with a profile of 64 MB": png(64, 64, chunk(b"iCCP", b"a\0\0" + zeros)),
        "JPEG of 65,500 x 65,500": large_jpeg,
        "GIF of 65,535 x 65,535": gif,
        "BMP of 2**30 x 2**30": bmp + bytes(64),
        "WebP of 16,383 x 16,383": b"RIFF" + struct.pack("<I", len(body)) + body,
    }
    return {name: partial(decode_image, data) for name, data in files.items()}


# ----------------------------------------------------------------------------------------------------- weights


def plain_checkpoint(folder: Path, **changes: object) -> Path:
    """A checkpoint of ours with a small student, and with whatever it says changed."""
    path = folder / f"checkpoint{len(list(folder.glob('checkpoint*')))}.pt"
    config = json.loads(json.dumps(config_to_json(load_config())))
    config["student"]["name"], config["views"]["size_px"] = "test_vit", 32
    state = {"format": "vkd-cache checkpoint", "version": 3, "config": config, "num_classes": 10}
    state["student"] = create_student("test_vit", 10, input_px=32).state_dict()
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            config[section][field] = value
        else:
            state[name] = value
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(sealed(buffer.getvalue()))
    return path


def weights_bombs(folder: Path) -> dict[str, Bomb]:
    """Weights whose shapes are not in the file, and students larger than theirs."""
    phantom = folder / "phantom.pt"
    torch.save({"fc.weight": torch.zeros(1, 1).expand(2**30, 512)}, phantom)
    hollow = folder / "hollow.safetensors"
    hollow.write_bytes(save({"fc.weight": torch.zeros(2**30, 0)}))
    filled = folder / "bytearray.pt"
    filled.write_bytes(b"\x80\x02c__builtin__\nbytearray\n" + pickle.dumps(2**36, 2)[2:-1] + b"\x85R.")
    packed = folder / "packed.pt"
    torch.save({"w": torch.zeros(2**22)}, folder / "unpacked.pt")
    deflated = zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(folder / "unpacked.pt") as source, deflated as target:
        for entry in source.infolist():
            content = source.read(entry)
            with target.open(entry.filename, "w", force_zip64=True) as member:
                for _ in range(12 if len(content) > 2**20 else 1):
                    member.write(content)
    meta = folder / "meta.pt"
    torch.save({"fc.weight": torch.empty(2**20, 2**20, device="meta")}, meta)
    checkpoints = {
        "a million classes": plain_checkpoint(folder, num_classes=2**20),
        "2**62 classes": plain_checkpoint(folder, num_classes=2**62),
        "2**30 pixels": plain_checkpoint(folder, views__size_px=2**30),
        "4096 pixels": plain_checkpoint(folder, views__size_px=4096),
        "a student of billions": plain_checkpoint(folder, student__name="vit_gigantic_patch14_224"),
    }
    files = {"a phantom tensor": phantom, "a bytearray": filled, "compressed entries": packed, "a meta tensor": meta}
    plain, resnet = load_config(), load_config(overrides={"student": {"name": "resnet10t"}})
    teacher = load_config(overrides={"teacher": {"name": "test_resnet", "weights": str(phantom)}}).teacher
    return {
        **{f"weights: {name}": partial(read_weights_file, path, CheckpointError) for name, path in files.items()},
        **{f"checkpoint: {name}": partial(load_student, str(path), plain, 10) for name, path in checkpoints.items()},
        "checkpoint: 2**30 classes of no width": lambda: load_student(str(hollow), resnet, 10),
        "teacher of a phantom": lambda: load_classifier(teacher, nodes=("pooled",), num_classes=10, view_px=32),
    }


# ----------------------------------------------------------------------------------------------------- sources


def tar_member(name: str, num_bytes: int, body: bytes = b"", kind: bytes = b"0") -> bytes:
    """A tar member that claims `num_bytes`."""
    size = b"\x80" + num_bytes.to_bytes(11, "big") if num_bytes >= 2**33 else b"%011o\0" % num_bytes
    header = name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0" + b" " * 8
    header = (header + kind + bytes(100) + b"ustar\x0000").ljust(512, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:] + body + bytes(-len(body) % 512)


def source_bombs(folder: Path) -> dict[str, Bomb]:
    """Data sets whose files, labels and numbers are absurd."""

    def tar(name: str, content: bytes, holes: int = 0) -> str:
        path = folder / f"{name}.tar"
        path.write_bytes(content)
        if holes:
            os.truncate(path, holes)
        return str(path)

    good = tar_member("a.jpg", 3, b"abc")
    label = tar_member("a.cls", 10, b"4294967295")
    paths = {
        "a label of 2**32": tar("label", good + label + bytes(1024)),
        "a label of a gigabyte": tar("long", good + tar_member("a.cls", 2**30), 2**31),
        "a member of 2**63 bytes": tar("size", tar_member("a.jpg", 2**63)),
        "a name of a gigabyte": tar("name", tar_member("x", 2**30, kind=b"L"), 2**31),
        "a pax header of a gigabyte": tar("pax", tar_member("x", 2**30, kind=b"x"), 2**31),
    }
    image = tar("image", tar_member("a.jpg", 2**38), 2**38 + 512)
    with open(image, "r+b") as file:  # noqa: PTH123
        file.seek(2**38 + 512)
        file.write(tar_member("a.cls", 1, b"3") + bytes(1024))
    classes = folder / "classes" / "one"
    classes.mkdir(parents=True)
    (classes / "a.jpg").touch()
    os.truncate(classes / "a.jpg", HUGE)
    (folder / "coco" / "annotations").mkdir(parents=True)
    (folder / "coco" / "val2017").mkdir()
    huge = {"images": [{"id": 1, "width": 9, "height": 9, "file_name": "a.jpg"}], "annotations": [],
            "categories": [{"id": 2**50, "name": "x"}]}  # fmt: skip
    (folder / "coco" / "annotations" / "instances_val2017.json").write_text(json.dumps(huge))
    toml = folder / "large.toml"
    toml.write_bytes(b"")
    os.truncate(toml, HUGE)
    compressed = folder / "bomb.tar"
    compressed.write_bytes(gzip.compress(bytes(2**26)))
    return {
        **{f"source: {name}": partial(open_source, path) for name, path in paths.items()},
        "source: an image of 2**38 bytes in a tar": lambda: open_source(image).read(0, 0),
        "source: an image of a terabyte": lambda: open_source(str(folder / "classes")).read(0, 0),
        "source: a category of 2**50": lambda: open_source(str(folder / "coco"), split="val"),
        "source: a compressed tar": lambda: open_source(str(compressed)),
        "source: 10**15 tars": lambda: open_source("x-{000000000000000..999999999999999}.tar"),
        "source: 2**40 tars": lambda: open_source("x-" + "{a,b}" * 40 + ".tar"),
        "pipeline of a terabyte": lambda: load_config(str(toml)),
        "a view of 65,535 pixels": lambda: Recipe.from_json({**Recipe(name="x").to_json(), "size_px": 65_535}),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("images")
    parser.add_argument("shard_size", type=int)
    given = parser.parse_args()
    sys.stdout.write(json.dumps(main(given.folder, given.images, given.shard_size)))
