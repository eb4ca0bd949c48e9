"""Anything may be in a file that somebody else made: whatever it is, a reader reads it or says so in one message."""

import contextlib
import io
import json
import shutil
import struct
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_samples import make_columns, make_manifest, make_node, make_values, replace_unit, unit_file
from hostile_samples import ABSURD, changed, document_of
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd_cache.cache.check import check_structure
from vkd_cache.cache.documents import seal
from vkd_cache.cache.reader import Cache, open_cache
from vkd_cache.cache.schema import Manifest
from vkd_cache.cache.units import UnitId, record_path
from vkd_cache.cache.writer import create_cache
from vkd_cache.config import Config, load_config
from vkd_cache.errors import VkdCacheError
from vkd_cache.sealing import sealed
from vkd_cache.sources import open_source
from vkd_cache.sources.coco_json import read_coco
from vkd_cache.stages.checkpoints import check_same_run, read_checkpoint, save_checkpoint
from vkd_cache.stages.rendering import Renderer, RenderTask
from vkd_cache.stages.saved_student import load_student, trained_sizes
from vkd_cache.stages.unit_views import CachedViews
from vkd_cache.views.decode import decode_image
from vkd_cache.views.recipe import Recipe
from vkd_cache.weights import read_weights_file

MakeConfig = Callable[..., Config]
RECORD = record_path(UnitId(0, 0))
HEAD = {"weight": torch.ones(3, 5), "bias": torch.ones(3)}


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """What happens inside works, or ends in an error of ours that can be shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    except VkdCacheError as error:
        assert str(error)
        assert len(str(error)) < 5000


def use(cache: Cache) -> None:
    """Read all that there is."""
    Recipe.from_json(cache.manifest.recipe)
    cache.complete_views()
    for finding in check_structure(cache):
        assert len(finding.message) < 5000
    for unit in cache.units:
        with one_message():
            content = cache.read(*unit)
            for node in cache.manifest.nodes:
                (content.tokens if node.layout == "tokens" else content.node)(node.name)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache of one unit in each backend, with a head."""
    roots = {}
    recipe = Recipe(name="vkd", colour="three_augment").to_json()
    for backend in ("zarr", "webdataset"):
        roots[backend] = tmp_path_factory.mktemp("tiny") / backend
        manifest = make_manifest(backend=backend, recipe=recipe, nodes=(make_node("float16"),))
        writer = create_cache(str(roots[backend]), manifest, HEAD)
        writer.publish(0, 0, make_columns(7), {"pooled": make_values(7)})
    return roots


backends = st.sampled_from(["zarr", "webdataset"])


@settings(deadline=None, max_examples=60)
@given(draw=st.data(), backend=backends)
def test_manifests(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, draw: Any, backend: str) -> None:
    root = shutil.copytree(tiny[backend], tmp_path_factory.mktemp("fuzz") / "cache")
    body = draw.draw(changed(document_of(root / "manifest.json")))
    with one_message():
        try:
            sealed = seal(body)
        except ValueError:  # nothing that can be written down
            return
        (root / "manifest.json").write_bytes(sealed)
        fingerprint = Manifest.from_json(body).fingerprint()
        record = root / RECORD
        record.write_bytes(seal({**document_of(record), "fingerprint": fingerprint}))
        use(open_cache(str(root)))


@settings(deadline=None, max_examples=60)
@given(draw=st.data(), backend=backends)
def test_records(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, draw: Any, backend: str) -> None:
    root = shutil.copytree(tiny[backend], tmp_path_factory.mktemp("fuzz") / "cache")
    record = root / RECORD
    record.write_bytes(seal(draw.draw(changed(document_of(record)))))
    with one_message():
        use(open_cache(str(root)))


DOCUMENTS = [
    b"", b"\0", b"{", b"[]", b"nan", b'{"a": 1e999}', b'{"a": NaN}', b"[" * 100_000, b'{"a":' * 50_000,
    b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1, "a": 2}', b'{"format_version": 1}', b'{"format_version": 10e99}',
    b'\xef\xbb\xbf{}', b'{"format_version": 1, "a": "\\ud800"}', b"[" + b"{}," * 9999 + b"{}]",
    b'{"format_version": 1, "a": ' + b"[" * 40 + b"]" * 40 + b"}",
]  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    data=st.one_of(st.sampled_from(DOCUMENTS), st.binary(max_size=80)), where=st.sampled_from(["manifest.json", RECORD])
)
def test_what_is_no_document(
    tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: bytes, where: str
) -> None:
    root = shutil.copytree(tiny["zarr"], tmp_path_factory.mktemp("fuzz") / "cache")
    (root / where).write_bytes(data)
    with one_message():
        use(open_cache(str(root)))


@settings(deadline=None, max_examples=150)
@given(
    backend=backends,
    at=st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4),
    cut=st.integers(0, 2**16),
)
def test_unit_files(
    tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, backend: str, at: list[tuple[int, bytes]], cut: int
) -> None:
    """Published with the checksum that belongs to them: only the format says no."""
    root = shutil.copytree(tiny[backend], tmp_path_factory.mktemp("fuzz") / "cache")
    data = bytearray(unit_file(root, 0).read_bytes())
    for position, content in at:
        start = position % len(data)
        data[start : start + len(content)] = content
    data = data[: cut] if cut < len(data) // 8 else data
    replace_unit(root, bytes(data))
    with one_message():
        use(open_cache(str(root)))


TENSORS = {
    "weight": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]},
    "bias": {"dtype": "F32", "shape": [3], "data_offsets": [60, 72]},
}


@settings(deadline=None, max_examples=60)
@given(
    header=st.one_of(st.binary(max_size=200), changed(TENSORS).map(lambda body: json.dumps(body).encode())),
    length=st.sampled_from([None, 0, 8, 2**31, 2**60, 2**64 - 1]),
)
def test_heads(
    tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, header: bytes, length: int | None
) -> None:
    import hashlib

    root = shutil.copytree(tiny["zarr"], tmp_path_factory.mktemp("fuzz") / "cache")
    data = struct.pack("<Q", len(header) if length is None else length) + header + bytes(72)
    body = document_of(root / "manifest.json")
    body["head"]["sha256"] = hashlib.sha256(data).hexdigest()
    (root / "manifest.json").write_bytes(seal(body))
    (root / body["head"]["file"]).write_bytes(data)
    with one_message():
        open_cache(str(root)).head()


@settings(deadline=None, max_examples=50)
@given(draw=st.data())
def test_columns_that_fit_the_format_and_nothing_else(
    small_cache: Path, digits_tree: Path, tmp_path_factory: pytest.TempPathFactory, draw: Any
) -> None:
    """Numbers of stored views that no plan draws: training renders them or refuses them."""
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(small_cache, root / "cache")
    cache = open_cache(str(root / "cache"))
    unit = cache.read(0, 0)
    columns = {name: np.array(column) for name, column in unit.columns.items()}
    for name in draw.draw(st.lists(st.sampled_from(sorted(set(columns) - {"key_bytes", "key_offsets"})), max_size=3)):
        column, row = columns[name], draw.draw(st.integers(0, len(unit) - 1))
        kind = column.dtype
        limits = np.finfo(kind) if kind.kind == "f" else np.iinfo(kind)
        hostile = [limits.min, limits.max, 0, 1, 7] + ([float("nan"), float("inf"), -1.0] if kind.kind == "f" else [])
        entry = draw.draw(st.sampled_from(hostile))
        column[row if draw.draw(st.booleans()) else slice(None)] = entry
    head = dict(zip(HEAD, cache.head() or (), strict=False)) or None
    writer = create_cache(str(root / "cache"), cache.manifest, head)
    with one_message():
        writer.publish(0, 0, columns, {node.name: unit.node(node.name) for node in cache.manifest.nodes})
        source = open_source(str(digits_tree), shard_size=48)
        views = CachedViews(open_cache(str(root / "cache")), source, [0, 1])
        views.slot_counts(0)
        content = views.open(0, 0)
        recipe = Recipe.from_json(cache.manifest.recipe)
        rows = content.slots[:4].reshape(-1)
        rows = rows[rows >= 0]
        stored = {name: np.asarray(content.unit.columns[name])[rows] for name in content.unit.columns}  # type: ignore[union-attr]
        task = RenderTask(tag=None, shard=np.zeros(len(rows), np.int64), row=rows, view=0, params=stored)
        rendered = Renderer(source, recipe, cache.manifest.seed)[task]
        if rendered.error is not None:
            raise rendered.error


def member(name: bytes, size: bytes, kind: bytes, body: bytes) -> bytes:
    """A tar member with the checksum that belongs to it, whatever else it says."""
    header = name[:100].ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size[:12].ljust(12, b"\0")
    header += b"00000000000\0" + b" " * 8 + kind[:1] + bytes(100) + b"ustar\x0000" + bytes(247)
    header = header[:512].ljust(512, b"\0")
    header = header[:148] + b"%06o\0 " % sum(header) + header[156:]
    return header + body + bytes(-len(body) % 512)


NAMES = [b"a.jpg", b"a.cls", b"a.json", b"../../x.jpg", b"/x.cls", b"\xff.jpg", b"a/../b.jpg", b".jpg"]
SIZES = [b"0", b"3", b"00000000003", b"77777777777", b"-1", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"9", b""]
BODIES = [
    b"", b"7\n", b"1" * 5000, b"\xd9\xa3", b'{"label": 1e999}', b"[" * 500, b'{"label":' + b"9" * 5000, b"11 size=-9\n",
    b"28 size=99999999999999999999\n", b"19 path=../../a.jpg\n", b"99999999999 a=b\n", b"22 GNU.sparse.major=1\n",
]  # fmt: skip
members = st.builds(
    member,
    st.one_of(st.sampled_from(NAMES), st.binary(max_size=20)),
    st.sampled_from(SIZES),
    st.sampled_from([b"0", b"\0", b"L", b"x", b"g", b"K", b"S", b"1", b"2", b"5", b"Z"]),
    st.one_of(st.sampled_from(BODIES), st.binary(max_size=30)),
)


@settings(deadline=None, max_examples=200)
@given(parts=st.lists(members, max_size=6), ending=st.sampled_from([bytes(1024), b"", bytes(100)]))
def test_source_tars(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], ending: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.tar"
    path.write_bytes(b"".join(parts) + ending)
    with one_message():
        source = open_source(str(path))
        for row in range(len(source.shards[0].keys)):
            source.read(0, row)


COCO = {
    "images": [{"id": number, "width": 64, "height": 48, "file_name": f"{number}.jpg"} for number in range(3)],
    "annotations": [
        {"id": number + 1, "image_id": number, "category_id": 1, "bbox": [1, 2, 30, 20.5], "area": 600, "iscrowd": 0}
        for number in range(3)
    ],
    "categories": [{"id": 1, "name": "digit"}],
}


@settings(deadline=None, max_examples=150)
@given(document=changed(COCO))
def test_coco_files(tmp_path_factory: pytest.TempPathFactory, document: Any) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    (root / "annotations").mkdir()
    (root / "val2017").mkdir()
    for number in range(3):
        (root / "val2017" / f"{number}.jpg").write_bytes(b"no image")
    try:
        text = json.dumps(document)
    except ValueError:  # a number that Python does not write down
        return
    (root / "annotations" / "instances_val2017.json").write_text(text)
    with one_message():
        read_coco(root / "annotations" / "instances_val2017.json")
        source = open_source(str(root), split="val")
        source.read(0, 0)


def toml_of(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(toml_of, value))}]"
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, int):
        return f"0x{value:x}" if value > 2**64 else str(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


SECTIONS = st.sampled_from(["source", "views", "teacher", "cache", "extract", "student", "loss", "train", "eval", "x"])
KEYS = st.sampled_from(["train", "count", "seed", "name", "url", "tokens", "nodes", "batch_size", "lr", "scales", "zz"])
TOMLS = [
    b"a = " + b"[" * 5000, b"a" * 10**5, b"[a" + b".a" * 5000 + b"]", b"\xff", b"a = " + b"9" * 5000, b"\0", b"= 1",
    b"[source]\ntrain = 1979-05-27", b"[train]\nlr = inf", b"[train]\nlr = nan", b"a = 0x" + b"f" * 9999,
    b"[train]\nlr = 1" + b"0" * 400, b'[cache]\nurl = "a\\u0000b"', b"#" * 2**22 + b"#",
]  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(
    data=st.one_of(
        st.sampled_from(TOMLS),
        st.binary(max_size=60),
        st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.lists(st.tuples(SECTIONS, KEYS, st.sampled_from(ABSURD[1:])), max_size=4)
        .map(lambda rows: "".join(f"[{s}]\n{k} = {toml_of(v)}\n" for s, k, v in rows))
        .map(lambda text: text.encode("utf-8", "surrogatepass")),
    )
)  # fmt: skip
def test_pipelines(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "run.toml"
    path.write_bytes(data)
    with one_message():
        load_config(str(path))


@pytest.fixture(scope="module")
def checkpoint(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as training writes it, of the smallest student."""
    from vkd_cache.config import config_to_json
    from vkd_cache.students import create_student

    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    student = create_student("test_vit", 10, input_px=32)
    state = {"config": config_to_json(tiny_config()), "identity": {}, "num_classes": 10, "views": [0]}
    save_checkpoint(path, json.loads(json.dumps(state)) | {"student": student.state_dict()})
    return path


@settings(deadline=None, max_examples=25)
@given(draw=st.data())
def test_checkpoints(
    checkpoint: Path, tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, draw: Any
) -> None:
    state = read_weights_file(checkpoint, VkdCacheError)  # type: ignore[arg-type]
    weights = dict(state.pop("student"))
    if draw.draw(st.booleans()):
        name = draw.draw(st.sampled_from(sorted(weights)))
        weights[name] = draw.draw(
            st.sampled_from([torch.zeros(()), torch.zeros(0, 3), torch.zeros(7, 7, dtype=torch.bool), 3, "x", None])
        )
        state = {**state, "student": weights}
    else:
        state = draw.draw(changed(state)) | {"student": weights}
    path = tmp_path_factory.mktemp("fuzz") / "last.pt"
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
    except (UnicodeEncodeError, OverflowError):  # nothing that a pickle can hold
        return
    path.write_bytes(sealed(buffer.getvalue()))
    config = tiny_config(student={"name": ""})
    with one_message():
        load_student(str(path), config, 10)
    with one_message():
        trained_sizes(str(path), config.views)
    with one_message():
        check_same_run(path, read_checkpoint(path), config, {"world": 1})


@settings(deadline=None, max_examples=100)
@given(draw=st.data(), kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]))
def test_images(draw: Any, kind: str) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(buffer, kind)
    data = bytearray(buffer.getvalue())
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(data) - 1))
        data[at : at + 2] = draw.draw(st.sampled_from([b"\0\0", b"\xff\xff", b"\x7f\xff", b"\x01", b""]))
    with one_message():
        decode_image(bytes(data))


def test_tar_of_a_source_can_be_opened_at_all(tmp_path: Path) -> None:
    """The members above are tars: what is refused is what they say."""
    parts = [member(b"a.jpg", b"3", b"0", b"abc"), member(b"a.cls", b"1", b"0", b"7")]
    (tmp_path / "a.tar").write_bytes(b"".join(parts) + bytes(1024))
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getnames() == ["a.jpg", "a.cls"]
    assert open_source(str(tmp_path / "a.tar")).num_classes == 8
