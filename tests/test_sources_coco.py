"""COCO's layout as a source: keys, boxes, identity, and every mistake an annotation file can hold; on real images."""

import contextlib
import copy
import io
import json
import multiprocessing
import pickle
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vkd_cache.errors import ConfigError, SourceError
from vkd_cache.sources import (
    BoxAnnotation,
    CocoSource,
    is_detection,
    open_source,
    source_identity,
    validation_beside,
)
from vkd_cache.sources.coco_json import CocoWarning

Document = dict[str, Any]


def document_of(tree: Path, split: str = "train") -> Document:
    document = json.loads((tree / "annotations" / f"instances_{split}2017.json").read_text())
    assert isinstance(document, dict)
    return document


def open_document(document: object, tree: Path, folder: Path, *, shard_size: int = 8) -> CocoSource:
    """The document, written to a file in `folder`, over the training images of `tree`."""
    path = folder / "instances.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return CocoSource(path, tree / "train2017", shard_size=shard_size)


def error_of(document: object, tree: Path, folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_document(document, tree, folder)
    return str(caught.value)


def samples(source: CocoSource) -> Iterator[tuple[str, int, BoxAnnotation]]:
    """(key, label, boxes) of every sample, in order."""
    for number, shard in enumerate(source.shards):
        for row, key in enumerate(shard.keys):
            yield key, int(shard.labels[row]), source.boxes(number, row)


def boxes_by_key(source: CocoSource) -> dict[str, BoxAnnotation]:
    return {key: boxes for key, _, boxes in samples(source)}


# --- what is read -----------------------------------------------------------------------------------------------------


def test_a_coco_layout(coco_tree: Path) -> None:
    train, val = open_source(str(coco_tree), shard_size=10), open_source(str(coco_tree), split="val")
    assert is_detection(train) and is_detection(val)
    assert (train.kind, train.location, train.num_classes) == ("coco", str(coco_tree), 11)
    assert train.class_names == ("", *(f"digit {digit}" for digit in range(10)))
    assert [len(shard.keys) for shard in train.shards] == [10, 10, 4]
    assert [shard.name for shard in train.shards] == ["block-000000", "block-000001", "block-000002"]
    assert train.annotation_file == coco_tree / "annotations" / "instances_train2017.json"
    assert (train.num_crowd, train.num_degenerate, train.num_without_boxes) == (1, 1, 1)
    assert (val.num_crowd, val.num_degenerate, val.num_without_boxes) == (1, 0, 1)
    assert validation_beside(str(coco_tree)) == str(coco_tree)
    for source, folder in ((train, "train2017"), (val, "val2017")):
        for number, shard in enumerate(source.shards):
            assert shard.labels.dtype == np.uint32
            for row, key in enumerate(shard.keys):
                data = source.read(number, row)
                assert data == (coco_tree / folder / f"{int(key):012d}.jpg").read_bytes()
                assert Image.open(io.BytesIO(data)).size == source.image_size(number, row)


def test_the_order_is_that_of_the_ids_hashes(coco_tree: Path) -> None:
    source = open_source(str(coco_tree), shard_size=10)
    keys = [str(image["id"]) for image in document_of(coco_tree)["images"]]
    found = [key for shard in source.shards for key in shard.keys]
    assert found == sorted(keys, key=lambda key: (xxhash.xxh3_64_intdigest(key.encode()), key))


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_are_those_that_pycocotools_reads(coco_tree: Path, split: str) -> None:
    from pycocotools.coco import COCO

    source = open_source(str(coco_tree), split=split)
    assert is_detection(source)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(source.annotation_file))
    for key, found in boxes_by_key(source).items():
        records = [
            record
            for record in coco.loadAnns(coco.getAnnIds(imgIds=[int(key)], iscrowd=False))
            if record["bbox"][2] > 0 and record["bbox"][3] > 0
        ]
        expected = {
            (x, y, x + width, y + height, record["category_id"], record["area"])
            for record in records
            for x, y, width, height in [record["bbox"]]
        }
        rows = zip(found.boxes.tolist(), found.labels.tolist(), found.area.tolist(), strict=True)
        assert {(*box, label, area) for box, label, area in rows} == expected
        assert len(found.boxes) == len(records)
        assert (found.image_id, found.size) == (
            int(key),
            tuple(coco.imgs[int(key)][side] for side in ("width", "height")),
        )
        assert (found.boxes.dtype, found.labels.dtype, found.area.dtype) == (np.float32, np.int64, np.float32)


_NUMBERS = st.one_of(
    st.floats(-50, 150, width=32), st.sampled_from([0, -0.0, 1e39, -1e300, 10**400, float("nan"), float("inf")])
)


@given(boxes=st.lists(st.tuples(st.tuples(_NUMBERS, _NUMBERS, _NUMBERS, _NUMBERS), st.booleans()), max_size=6))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(boxes=[((0, 0, 10, 0), False), ((5, 5, -3, 4), False), ((-10, -10, 500, 500), False), ((90, 94, 9, 9), False)])
def test_what_is_kept_is_what_the_reference_keeps(coco_tree: Path, tmp_path: Path, boxes: list[Any]) -> None:
    """The reference's rule, one box at a time: float32 corners, clipped, kept if right > left and bottom > top."""
    document = document_of(coco_tree)
    image = document["images"][0]
    document["images"] = [image]
    document["annotations"] = [
        {
            "id": 1 + number,
            "image_id": image["id"],
            "category_id": 2,
            "bbox": list(box),
            "area": 7.5,
            "iscrowd": int(crowd),
        }
        for number, (box, crowd) in enumerate(boxes)
    ]
    source = open_document(document, coco_tree, tmp_path)
    found = source.boxes(0, 0)
    expected, limits = [], np.array([image["width"], image["height"]] * 2, dtype=np.float32)
    for box, crowd in boxes:
        with np.errstate(over="ignore", invalid="ignore"):
            corners = np.array([float(max(min(number, 1e300), -1e300)) for number in box]).astype(np.float32)
            corners[2:] += corners[:2]
        clipped = np.clip(corners, 0, limits)
        if not crowd and np.isfinite(corners).all() and clipped[2] > clipped[0] and clipped[3] > clipped[1]:
            expected.append(clipped.tolist())
    assert sorted(found.boxes.tolist()) == sorted(expected)
    assert found.area.tolist() == [7.5] * len(expected)
    num_crowd = sum(crowd for _, crowd in boxes)
    assert (source.num_crowd, source.num_degenerate) == (num_crowd, len(boxes) - num_crowd - len(expected))
    assert source.num_without_boxes == (not expected)


def test_a_missing_area_is_that_of_the_box(coco_tree: Path, tmp_path: Path) -> None:
    document = document_of(coco_tree)
    image = document["images"][0]["id"]
    document["annotations"] = [
        {"id": 1 + number, "image_id": image, "category_id": 1, "bbox": [number, 0, 4, 5]} | extra
        for number, extra in enumerate([{}, {"area": None}, {"area": float("nan")}, {"area": -1}, {"area": 3}])
    ]
    found = boxes_by_key(open_document(document, coco_tree, tmp_path))[str(image)]
    assert found.area.tolist() == [20, 20, 20, 20, 3]


def test_what_comes_back_is_the_callers_own(coco_tree: Path) -> None:
    source = open_source(str(coco_tree))
    assert is_detection(source)
    number, row = next((0, row) for row in range(24) if len(source.boxes(0, row).boxes))
    before = source.boxes(number, row)
    changed = source.boxes(number, row)
    for array in (changed.boxes, changed.labels, changed.area):
        array[:] = 0
    assert source.boxes(number, row).boxes.tolist() == before.boxes.tolist() != changed.boxes.tolist()
    for bad in ((0, 24), (1, 0), (0, -1)):
        with pytest.raises(IndexError):
            source.boxes(*bad)
        with pytest.raises(IndexError):
            source.image_size(*bad)


# --- identity ---------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_identity_is_free_of_root_file_order_and_what_is_not_about_boxes(
    coco_tree: Path, tmp_path: Path, seed: int
) -> None:
    document, rng = document_of(coco_tree), random.Random(seed)
    original = open_document(document, coco_tree, tmp_path)
    for entries in (document["images"], document["annotations"], document["categories"]):
        rng.shuffle(entries)
    for number, record in enumerate(document["annotations"]):
        record |= {"id": 5 + number, "segmentation": [[1.0] * 6], "bbox": [int(value) for value in record["bbox"]]}
        if not record["iscrowd"]:
            del record["iscrowd"]
    document["info"] = {"seed": seed}
    root = tmp_path / f"elsewhere{seed}"
    shutil.copytree(coco_tree / "train2017", root / "train2017", dirs_exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(document, indent=1))
    other = open_source(str(root), shard_size=8)
    assert is_detection(other)
    assert source_identity(other) == source_identity(original)
    for (key, label, boxes), (other_key, other_label, other_boxes) in zip(
        samples(original), samples(other), strict=True
    ):
        assert (key, label) == (other_key, other_label)
        assert boxes.boxes.tolist() == other_boxes.boxes.tolist()
        assert boxes.labels.tolist() == other_boxes.labels.tolist()


def test_boxes_that_differ_in_little_keep_one_order(coco_tree: Path, tmp_path: Path) -> None:
    document = document_of(coco_tree)
    image = document["images"][0]["id"]
    twins = [([0.0, 1, 5, 6], 0, 9.0), ([0, 1, 5, 6], 0, 4.0), ([-0.0, 1, 5, 6], 1, 9.0), ([0, 1, 5, 6], 0, 1.0)]
    twins += [([0, 1, float("nan"), 6], 0, 2.0), ([0, 1, 5, 6.5], 0, 3.0)]
    document["annotations"] = [
        {"id": 1 + slot, "image_id": image, "category_id": 1, "bbox": box, "iscrowd": crowd, "area": area}
        for slot, (box, crowd, area) in enumerate(twins)
    ]
    identities, areas = set(), set()
    for seed in range(12):
        random.Random(seed).shuffle(document["annotations"])
        source = open_document(document, coco_tree, tmp_path)
        identities.add(source_identity(source))
        areas.add(tuple(boxes_by_key(source)[str(image)].area.tolist()))
    assert areas == {(1, 4, 9, 3)}
    for record in document["annotations"]:
        record["bbox"] = [abs(value) for value in record["bbox"]]
    identities.add(source_identity(open_document(document, coco_tree, tmp_path)))
    assert len(identities) == 1


@given(
    change=st.sampled_from(["bbox", "category_id", "iscrowd", "width", "height", "added", "removed", "moved"]),
    pick=st.integers(0, 10**6),
    where=st.integers(0, 3),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_a_box_category_or_size_changes_the_identity_and_the_labels_of_its_images(
    coco_tree: Path, tmp_path: Path, change: str, pick: int, where: int
) -> None:
    document = document_of(coco_tree)
    before = open_document(document, coco_tree, tmp_path)
    annotations = document["annotations"]
    record = annotations[pick % len(annotations)]
    changed = {record["image_id"]}
    if change == "bbox":
        record["bbox"][where] = np.nextafter(record["bbox"][where], np.inf)
    elif change == "category_id":
        record["category_id"] = 1 + record["category_id"] % 10
    elif change == "iscrowd":
        record["iscrowd"] = 1 - record["iscrowd"]
    elif change in ("width", "height"):
        image = document["images"][pick % len(document["images"])]
        image[change] += 1
        changed = {image["id"]}
    elif change == "added":
        annotations.append(record | {"id": 10**6})
    elif change == "removed":
        annotations.remove(record)
    else:
        record["image_id"] = document["images"][pick % 24]["id"]
        changed |= {record["image_id"]}
    after = open_document(document, coco_tree, tmp_path)
    labels = {key: label for key, label, _ in samples(before)}
    differing = {int(key) for key, label, _ in samples(after) if label != labels[key]}
    if change == "moved" and len(changed) == 1:  # to where it was
        changed = set()
    assert differing == changed
    assert (source_identity(before) != source_identity(after)) == bool(differing)


def test_labels_are_as_documented(coco_tree: Path, tmp_path: Path) -> None:
    document = document_of(coco_tree)
    document["images"] = document["images"][:1]
    identity, width, height = (document["images"][0][field] for field in ("id", "width", "height"))
    document["annotations"] = [
        {"id": 2, "image_id": identity, "category_id": 3, "bbox": [1.5, 2, 3, 4], "iscrowd": 1},
        {"id": 1, "image_id": identity, "category_id": 2, "bbox": [9, 8, 7, 6]},
    ]
    source = open_document(document, coco_tree, tmp_path)
    content = np.array([identity, width, height, 2, 0], "<i8").tobytes() + np.array([9, 8, 7, 6], "<f8").tobytes()
    content += np.array([3, 1], "<i8").tobytes() + np.array([1.5, 2, 3, 4], "<f8").tobytes()
    label = xxhash.xxh3_64_intdigest(content) % 2**32
    assert source.shards[0].labels.tolist() == [label]
    identity_hash = xxhash.xxh3_128_hexdigest(f"{identity}\0".encode() + label.to_bytes(4, "little"))
    assert source_identity(source).to_json() == {
        "kind": "coco",
        "num_classes": 11,
        "shard_counts": [1],
        "shard_hashes": [identity_hash],
    }


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def layout(coco_tree: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(coco_tree, tmp_path / "coco")


def layout_error(root: Path | str, split: str = "train") -> str:
    with pytest.raises(SourceError) as caught:
        open_source(str(root), split=split)
    return str(caught.value)


def test_missing_annotation_files(layout: Path) -> None:
    (layout / "annotations" / "instances_val2017.json").unlink()
    message = layout_error(layout, "val")
    assert message.startswith(
        f"{layout}: no annotations/instances_val*.json there, found annotations/instances_train2017.json. Download"
    )
    assert validation_beside(str(layout)) is None
    (layout / "annotations" / "instances_train2017.json").unlink()
    assert "no annotations/instances_train*.json there, found no annotation file" in layout_error(layout)
    shutil.rmtree(layout / "annotations")
    assert "no annotations/instances_train*.json there, found no annotation file" in layout_error(layout)


def test_two_annotation_files_for_a_split_and_none_of_the_folder(layout: Path) -> None:
    first = layout / "annotations" / "instances_train2017.json"
    shutil.copy(first, first.with_name("instances_train2014.json"))
    message = layout_error(layout)
    assert "2 files annotations/instances_train*.json: instances_train2014.json, instances_train2017.json" in message
    first.unlink()
    assert (
        "annotations/instances_train2014.json is there, but not the folder of its images, train2014/"
        in layout_error(layout)
    )
    (layout / "train2017").rename(layout / "train2014")
    assert open_source(str(layout)).kind == "coco"


def test_splits_may_be_called_train_and_val(layout: Path) -> None:
    for split in ("train", "val"):
        (layout / f"{split}2017").rename(layout / split)
        (layout / "annotations" / f"instances_{split}2017.json").rename(
            layout / "annotations" / f"instances_{split}.json"
        )
    assert [open_source(str(layout), split=split).kind for split in ("train", "val")] == ["coco", "coco"]
    message = layout_error(layout / "train")
    assert f"{layout / 'train'}: one folder of images of a COCO layout" in message
    assert message.endswith(f"Give {layout}.")


def test_a_folder_of_images_alone_is_sent_up(layout: Path) -> None:
    assert f"which holds annotations/. Give {layout}." in layout_error(layout / "train2017")
    assert "COCO's folder (with annotations/)" in layout_error(layout / "annotations" / "instances_train2017.json")


def test_an_imagenet_layout_with_a_folder_called_annotations_stays_one(digits_tree: Path, tmp_path: Path) -> None:
    root = shutil.copytree(digits_tree, tmp_path / "digits")
    (root / "annotations").mkdir()
    (root / "annotations" / "notes.json").write_text("{}")
    source = open_source(str(root))
    assert source.kind == "folder" and not is_detection(source)


def test_missing_images_are_named_with_a_count(layout: Path) -> None:
    images = sorted((layout / "train2017").iterdir())
    for path in images[:7]:
        path.unlink()
    images[7].unlink()
    images[7].symlink_to(layout / "nowhere.jpg")
    message = layout_error(layout)
    assert message.startswith(
        f"{layout / 'train2017'}: 8 images of the annotation file are missing: 000000000009.jpg, "
    )
    assert message.endswith("and 3 more. Download or copy them, or remove their records.")
    assert len(message.splitlines()) == 1


def test_images_may_lie_in_folders_and_be_links(layout: Path) -> None:
    document = document_of(layout)
    for number, image in enumerate(document["images"]):
        path = layout / "train2017" / image["file_name"]
        image["file_name"] = f"part{number % 3}/ü {image['file_name']}"
        moved = layout / "train2017" / image["file_name"]
        moved.parent.mkdir(exist_ok=True)
        if number % 2:
            path.rename(moved)
        else:
            moved.symlink_to(path)
    (layout / "annotations" / "instances_train2017.json").write_text(json.dumps(document))
    source = open_source(str(layout))
    assert source.read(0, 3) == source.read(0, 3) != b""
    document["images"][0]["file_name"] = "part9/x.jpg"
    document["images"][1]["file_name"] = "part1"
    (layout / "annotations" / "instances_train2017.json").write_text(json.dumps(document))
    assert "2 images of the annotation file are missing: part9/x.jpg, part1." in layout_error(layout)


def test_an_image_that_vanishes_later_is_an_error_then(layout: Path) -> None:
    source = open_source(str(layout))
    (layout / "train2017" / f"{int(source.shards[0].keys[0]):012d}.jpg").unlink()
    with pytest.raises(SourceError, match=r"cannot be read \(No such file or directory\); it was there when"):
        source.read(0, 0)


# --- files that are no COCO files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "not JSON (Expecting value: line 1 column 1 (char 0)). Copy or download the file again."),
        ('{"images": [', "not JSON ("),
        ("\x80", "not JSON ("),
        ('{"images": ' + "1" * 5000 + "}", "not JSON ("),
        ("[" * 100_000, "not a COCO file (nested too deep)"),
        ("[]", "holds a list, as files of results have, expected COCO's: an object with the lists images, annotations"),
        ("3", "holds 3, expected COCO's"),
        ("{}", "has no list images, annotations, categories, expected COCO's"),
        ('{"images": [], "categories": []}', "has no list annotations, expected COCO's"),
        ('{"images": {}, "annotations": [], "categories": null}', "has no list images, categories, expected"),
        ('{"images": [], "annotations": [], "categories": []}', "the list images and the list categories is empty"),
    ],
)
def test_json_that_is_no_coco_file(coco_tree: Path, tmp_path: Path, content: str, expected: str) -> None:
    message = error_of(content, coco_tree, tmp_path)
    assert message.startswith(f"{tmp_path / 'instances.json'}: {expected}")
    assert len(message) < 400


def test_an_annotation_file_that_cannot_be_read(coco_tree: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="the annotation file cannot be read"):
        CocoSource(tmp_path / "none.json", coco_tree / "train2017")
    with pytest.raises(SourceError, match="the annotation file cannot be read"):
        CocoSource(tmp_path, coco_tree / "train2017")
    with pytest.raises(ConfigError, match="shard_size: found 0, expected at least 1"):
        CocoSource(tmp_path / "none.json", coco_tree / "train2017", shard_size=0)


def test_other_encodings_of_json_are_read(coco_tree: Path, tmp_path: Path) -> None:
    text = json.dumps(document_of(coco_tree))
    identities = []
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "x.json").write_bytes(text.encode(encoding))
        identities.append(source_identity(CocoSource(tmp_path / "x.json", coco_tree / "train2017")))
    assert identities[0] == identities[1] == identities[2]


# --- entries ----------------------------------------------------------------------------------------------------------


def broken(tree: Path, where: str, position: int, **fields: object) -> Document:
    document = document_of(tree)
    document[where][position] |= fields
    return document


@pytest.mark.parametrize(
    ("where", "field", "value", "expected"),
    [
        (
            "images",
            "id",
            "7",
            "1 images whose id is not a whole number from 0 to 9223372036854775807: images[2] ('7').",
        ),
        ("images", "id", 2**63, "images whose id is not a whole number"),
        ("images", "id", True, "images[2] (True)"),
        ("images", "width", 0, "1 images whose width is not a whole number from 1 to 65535: images[2] (0)."),
        ("images", "height", 70000, "1 images whose height is not a whole number from 1 to 65535: images[2] (70000)."),
        ("images", "height", 70.5, "images[2] (70.5)"),
        ("images", "file_name", None, "1 images whose file_name is not text: images[2] (None)."),
        (
            "annotations",
            "id",
            -1,
            "annotations whose id is not a whole number from 0 to 9223372036854775807: annotations",
        ),
        ("annotations", "image_id", "x" * 999, "annotations[2] ('xxxxxxxxxxxx...xxxxxxxxxxxxx')"),
        ("annotations", "category_id", [[[[[[[[1]]]]]]]], "annotations[2] ([[[[[[[...]]]]]]])"),
        (
            "annotations",
            "iscrowd",
            2,
            "1 annotations whose iscrowd is not a whole number from 0 to 1: annotations[2] (2).",
        ),
        ("annotations", "area", "big", "1 annotations whose area is not a number: annotations[2] ('big')."),
        (
            "annotations",
            "bbox",
            [1, 2, 3],
            "bbox is not four numbers (left, top, width, height): annotations[2] ([1, 2, 3])",
        ),
        ("annotations", "bbox", [1, 2, 3, "4"], "annotations[2] ([1, 2, 3, '4'])"),
        ("annotations", "bbox", [1, 2, 3, True], "annotations[2] ([1, 2, 3, True])"),
        ("annotations", "bbox", "1234", "annotations[2] ('1234')"),
        ("annotations", "bbox", {"0": 1}, "annotations[2] ({'0': 1})"),
        (
            "categories",
            "id",
            100_000,
            "1 categories whose id is not a whole number from 0 to 99999: categories[2] (100000).",
        ),
        ("categories", "name", 4, "1 categories whose name is not text: categories[2] (4)."),
    ],
)
def test_entries_of_wrong_types_are_named(
    coco_tree: Path, tmp_path: Path, where: str, field: str, value: object, expected: str
) -> None:
    message = error_of(broken(coco_tree, where, 2, **{field: value}), coco_tree, tmp_path)
    assert expected in message
    assert message.startswith(f"{tmp_path / 'instances.json'}: 1 {where} whose {field} is not ")
    assert message.endswith("Correct the file, or make it again.")
    assert len(message.splitlines()) == 1 and len(message) < 400


@pytest.mark.parametrize(
    ("where", "field"),
    [
        ("images", "id"),
        ("images", "width"),
        ("images", "height"),
        ("images", "file_name"),
        ("annotations", "id"),
        ("annotations", "image_id"),
        ("annotations", "category_id"),
        ("annotations", "bbox"),
        ("categories", "id"),
        ("categories", "name"),
    ],
)
def test_missing_fields_are_named(coco_tree: Path, tmp_path: Path, where: str, field: str) -> None:
    document = document_of(coco_tree)
    for entry in document[where][1:8]:
        del entry[field]
    message = error_of(document, coco_tree, tmp_path)
    assert f"7 {where} whose {field} is not " in message
    assert f": {where}[1] (missing), {where}[2] (missing), " in message
    assert "and 2 more. Correct the file" in message


def test_several_wrong_columns_are_told_at_once(coco_tree: Path, tmp_path: Path) -> None:
    document = broken(coco_tree, "images", 0, width="x")
    document["annotations"][3]["bbox"] = None
    document["categories"][1]["id"] = 1.0
    lines = error_of(document, coco_tree, tmp_path).splitlines()
    assert [line.split(" is not ")[0].split(": ")[1] for line in lines] == [
        "1 images whose width",
        "1 categories whose id",
        "1 annotations whose bbox",
    ]
    document["images"][5] = 7
    assert "1 entries that are not objects: images[5] (7)." in error_of(document, coco_tree, tmp_path)


def test_ids_and_references_that_do_not_fit_are_told_at_once(coco_tree: Path, tmp_path: Path) -> None:
    document = document_of(coco_tree)
    images, annotations, categories = (document[name] for name in ("images", "annotations", "categories"))
    images.append(copy.deepcopy(images[0]))
    annotations[1]["id"] = annotations[0]["id"]
    annotations[2]["image_id"] = 123456
    annotations[3]["category_id"] = 77
    categories.append({"id": 3, "name": "again"})
    images[4]["file_name"] = "../val2017/000000000800.jpg"
    images[5]["file_name"] = "/etc/passwd"
    images[6]["file_name"] = ""
    images[7]["file_name"] = "a\0.jpg"
    images[8]["file_name"] = "\ud800.jpg"
    message = error_of(document, coco_tree, tmp_path)
    assert all(line.startswith(f"{tmp_path / 'instances.json'}: ") for line in message.splitlines())
    assert len(message.splitlines()) == 6
    assert "5 images whose file_name cannot be used: ../val2017/000000000800.jpg (holds a '..' component), " in message
    assert (
        "/etc/passwd (an absolute path),  (empty), a\\x00.jpg (holds a control character), \\ud800.jpg (not" in message
    )
    assert f"1 image ids that appear more than once: {images[0]['id']}. An id names one image" in message
    assert "1 category ids that appear more than once: 3." in message
    assert f"1 annotation ids that appear more than once: {annotations[0]['id']}." in message
    assert f"1 annotations of images that are not listed: annotation {annotations[2]['id']} (image 123456)." in message
    assert (
        f"1 annotations of categories that are not listed: annotation {annotations[3]['id']} (category 77)." in message
    )


def test_images_without_annotations_are_samples_like_any_other(coco_tree: Path, tmp_path: Path) -> None:
    document = document_of(coco_tree)
    document["annotations"] = []
    source = open_document(document, coco_tree, tmp_path)
    assert source.num_without_boxes == 24
    assert all(boxes.boxes.shape == (0, 4) and boxes.labels.shape == (0,) for _, _, boxes in samples(source))
    assert len({label for _, label, _ in samples(source)}) == 24


# --- categories -------------------------------------------------------------------------------------------------------


def with_categories(tree: Path, ids: list[int]) -> Document:
    document = document_of(tree)
    document["categories"] = [{"id": identity, "name": f"thing {identity}"} for identity in ids]
    for record in document["annotations"]:
        record["category_id"] = ids[record["category_id"] % len(ids)]
    return document


def test_gaps_like_cocos_are_fine(coco_tree: Path, tmp_path: Path) -> None:
    missing = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
    ids = [identity for identity in range(1, 91) if identity not in missing]
    source = open_document(with_categories(coco_tree, ids), coco_tree, tmp_path)
    assert source.num_classes == 91 and source.class_names is not None
    assert [identity for identity, name in enumerate(source.class_names) if not name] == [0, *missing]
    assert source.class_names[90] == "thing 90"
    for ids in ([0, 1], [1, 3], [0]):  # half of the outputs idle at most
        assert open_document(with_categories(coco_tree, ids), coco_tree, tmp_path).num_classes == ids[-1] + 1
    with pytest.warns(CocoWarning, match="2 categories with ids up to 4: .* so 3 outputs learn nothing"):
        open_document(with_categories(coco_tree, [1, 4]), coco_tree, tmp_path)


def test_wide_gaps_warn_once_and_zero_annotation_ids_too(coco_tree: Path, layout: Path) -> None:
    path = layout / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(with_categories(coco_tree, [1, 500])))
    with pytest.warns(CocoWarning) as caught:
        source = open_source(str(layout))
    assert source.num_classes == 501
    assert [str(warning.message) for warning in caught] == [
        f"{path}: 2 categories with ids up to 500: a detector has one output an id, so 499 outputs learn nothing. "
        "Renumber the categories from 1."
    ]
    assert caught[0].filename == __file__
    path.write_text(json.dumps(broken(coco_tree, "annotations", 0, id=0)))
    with pytest.warns(CocoWarning, match="an annotation has the id 0, which pycocotools takes for 'no match'"):
        open_source(str(layout))


def test_category_names_are_safe_to_print(coco_tree: Path, tmp_path: Path) -> None:
    source = open_document(broken(coco_tree, "categories", 0, name="a\x1b[2J\ud800"), coco_tree, tmp_path)
    assert source.class_names is not None and source.class_names[1] == "a\\x1b[2J\\ud800"


# --- anything at all --------------------------------------------------------------------------------------------------

_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, -(2**63), 10**400, 0, 1])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "..", "a/../b", "\0", "\ud800", "000000000009.jpg"]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.sampled_from(["id", "bbox", "image_id", "width", "name"]) | st.text(max_size=3), inner, max_size=4
        )
    ),
    max_leaves=8,
)
_FIELDS = ["id", "file_name", "width", "height", "image_id", "category_id", "bbox", "area", "iscrowd", "name"]
_EDITS = st.lists(
    st.tuples(
        st.sampled_from(["images", "annotations", "categories"]),
        st.integers(0, 60),
        st.sampled_from([*_FIELDS, "*entry", "*list", "*remove"]),
        _VALUES,
    ),
    min_size=1,
    max_size=4,
)


def open_or_refuse(document: object, tree: Path, folder: Path) -> None:
    """Whatever the file holds: a SourceError with a short message, or a source that keeps its promises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CocoWarning)
            source = open_document(document, tree, folder)
    except SourceError as error:
        lines = str(error).splitlines()
        assert len(lines) <= 15 and all(len(line) < 1500 and line.isprintable() for line in lines)
        return
    for number, shard in enumerate(source.shards):
        for row, _ in enumerate(shard.keys):
            found, (width, height) = source.boxes(number, row), source.image_size(number, row)
            assert np.isfinite(found.boxes).all() and np.isfinite(found.area).all()
            assert (found.boxes >= 0).all() and (found.boxes <= np.array([width, height] * 2)).all()
            assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
            assert (found.labels < source.num_classes).all() and (found.labels >= 0).all()
            assert source.read(number, row)


@given(edits=_EDITS)
@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(edits=[("annotations", 0, "bbox", [10**400, 0, 1, 1])])
@example(edits=[("annotations", 0, "area", 10**400)])
@example(edits=[("annotations", 0, "area", float("inf"))])
@example(edits=[("images", 0, "file_name", ".")])
@example(edits=[("images", 0, "file_name", "x" * 300 + "/" + "y" * 300)])
def test_an_edited_file_is_refused_or_good(coco_tree: Path, tmp_path: Path, edits: list[Any]) -> None:
    document = document_of(coco_tree)
    for name, position, field, value in edits:
        if field == "*list":
            document[name] = value
        elif isinstance(document[name], list) and document[name]:
            place = position % len(document[name])
            if field == "*entry":
                document[name][place] = value
            elif field == "*remove":
                del document[name][place]
            elif isinstance(document[name][place], dict):
                document[name][place][field] = value
    open_or_refuse(document, coco_tree, tmp_path)


@given(value=_VALUES)
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_refused_or_good(coco_tree: Path, tmp_path: Path, value: object) -> None:
    open_or_refuse(json.dumps(value), coco_tree, tmp_path)


@given(data=st.data())
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_refused_or_good(coco_tree: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(json.dumps(document_of(coco_tree)).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), len(content) - 1, len(content) // 2]))]
    path = tmp_path / "damaged.json"
    path.write_bytes(content)
    with warnings.catch_warnings(), contextlib.suppress(SourceError):
        warnings.simplefilter("ignore", CocoWarning)
        CocoSource(path, coco_tree / "train2017")


# --- other processes, size --------------------------------------------------------------------------------------------


def _facts(source: CocoSource) -> object:
    return [(key, label, found.boxes.tolist(), source.read(0, 0)) for key, label, found in samples(source)]


def test_a_source_travels_to_other_processes(coco_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(coco_tree.parent)
    source = open_source(coco_tree.name)  # relative names must keep their meaning
    assert is_detection(source)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        monkeypatch.chdir(tmp_path)
        assert pool.apply(_facts, (source,)) == _facts(source)
        assert pool.apply(source_identity, (source,)) == source_identity(source)


def test_a_source_is_small(coco_tree: Path, tmp_path: Path) -> None:
    """As large in memory as its numbers: no Python object a sample or a box."""
    document = document_of(coco_tree)
    names = [image["file_name"] for image in document["images"]]
    document["images"] = [
        {"id": number, "file_name": names[number % 24], "width": 640, "height": 480} for number in range(4000)
    ]
    document["annotations"] = [
        {"id": 1 + number, "image_id": number % 4000, "category_id": 1, "bbox": [number % 600, 1, 30, 40], "area": 1.5}
        for number in range(30000)
    ]
    source = open_document(document, coco_tree, tmp_path, shard_size=1024)
    num_bytes = len(pickle.dumps(source))
    assert num_bytes < 30000 * 24 + 4000 * 64 + 4000
