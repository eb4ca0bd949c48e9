"""The evidence campaign: runs every variant, keeps what is done, and tells noise from a difference."""

import gzip
import importlib
import json
import math
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vkd_cache.errors import ConfigError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def images_with_classes(folder: Path) -> Path:
    """Both splits in the format of Fashion-MNIST, 60 and 20 images: a class is a bright row."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 20)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 60, (count, 28, 28), np.uint8)
        images[np.arange(count), 2 * labels + 4] = 250
        for kind, packed in (
            ("images-idx3", struct.pack(">4I", 0x803, count, 28, 28) + images.tobytes()),
            ("labels-idx1", struct.pack(">2I", 0x801, count) + labels.tobytes()),
        ):
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(packed))
    return folder


def kept(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every result below a folder, with the time it was written."""
    return {path.parent.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*/result.json")}


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("evidence")


@pytest.fixture(scope="module")
def pairs(evidence: ModuleType) -> ModuleType:
    return sys.modules["pairs"]


def test_campaign_runs_every_variant_and_keeps_it(
    evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def campaign(*more: str) -> dict[str, Any]:
        """In this process, which has torch already."""
        places = ["--input", str(tmp_path / "idx"), "--folder", str(tmp_path / "kept"), "--page", str(page)]
        output = tmp_path / "found.json"
        options = ["--tiny", "--threads", "0", *places, *more, "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["evidence.py", *options])
        monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))  # the harness changes what is there
        assert evidence.main() == 0
        document: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return document

    images_with_classes(tmp_path / "idx")
    page = tmp_path / "page.md"
    page.write_text("# Mine\n", encoding="utf-8")
    document = campaign()
    found = document["measurements"]
    assert list(found) == list(evidence.VARIANTS)
    assert all(len(each["values"]) == 1 and each["unit"] == "top-1, %" for each in found.values())
    assert str(tmp_path) not in json.dumps(document)
    before = kept(tmp_path / "kept")
    norms = [norm for content, _ in before.values() if (norm := json.loads(content).get("projector_norm")) is not None]
    killed = [variant for variant in evidence.VARIANTS.values() if variant.killed]
    assert norms.count(0) == len(killed)  # exactly zero, as the released code's
    assert all(norm > 1 for norm in norms if norm)  # all others live
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Mine\n") and all(f"| {name} | " in text for name in evidence.VARIANTS)
    again = campaign("--only", "VkD; plain")
    assert kept(tmp_path / "kept") == before  # read, not made again
    assert again["measurements"] == {name: found[name] for name in ("VkD", "plain")}
    assert "VkD - plain" in again["facts"]


def test_a_variant_that_there_is_not_is_refused(evidence: ModuleType) -> None:
    with pytest.raises(ConfigError, match="found magic, expected some of plain;"):
        evidence.chosen("VkD; magic")


def test_every_pair_compares_variants_that_there_are(evidence: ModuleType) -> None:
    assert {name for pair in evidence.PAIRS for name in (pair.variant, pair.baseline)} <= set(evidence.VARIANTS)


def table(pairs: ModuleType, values: dict[str, list[float]], *, equal: bool = False) -> Any:
    return pairs.Table(values, [pairs.Pair("claim", "a", "b", equal)], dict.fromkeys(values, ""))


def test_noise_is_what_variant_and_seed_do_not_explain(pairs: ModuleType) -> None:
    rng = np.random.default_rng(1)
    effects = rng.normal(80, 5, (400, 1)) + rng.normal(0, 3, (1, 3))
    noise = pairs.noise_of_differences((effects + rng.normal(0, 0.5, (400, 3))).tolist())
    assert noise == pytest.approx(1.96 * math.sqrt(2 / 3) * 0.5, rel=0.1)
    assert pairs.noise_of_differences(effects.tolist()) == pytest.approx(0, abs=1e-9)
    assert math.isnan(pairs.noise_of_differences([[1.0], [2.0]]))


@pytest.mark.parametrize(
    ("shift", "equal", "verdict"),
    [
        (5.0, False, "holds"), (0.0, False, "within noise"), (-5.0, False, "does not hold: the other way round"),
        (5.0, True, "does not hold: better"), (0.0, True, "holds, within noise"), (-5.0, True, "does not hold: worse"),
    ],
)  # fmt: skip
def test_verdicts(pairs: ModuleType, shift: float, equal: bool, verdict: str) -> None:
    values = {"a": [80.1 + shift, 80.0 + shift, 80.2 + shift], "b": [80.0, 80.1, 80.2], "c": [70.0, 70.2, 70.1]}
    made = table(pairs, values, equal=equal)
    assert made.difference(made.pairs[0]).endswith(f", {verdict}")
    assert f"| a - b | {shift:+.2f} ± 0.10 | {verdict} |" in made.markdown()


def test_one_seed_says_nothing(pairs: ModuleType) -> None:
    made = table(pairs, {"a": [90.0], "b": [80.0]})
    assert "one seed says nothing" in made.difference(made.pairs[0])


def test_a_page_keeps_what_was_written_by_hand(pairs: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    pairs.write_part(page, "one")
    page.write_text(f"# Title\n\n{page.read_text(encoding='utf-8')}\nReading.\n", encoding="utf-8")
    pairs.write_part(page, "two")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n<!-- ") and text.endswith("\nReading.\n")
    assert "\ntwo\n" in text and "one" not in text
