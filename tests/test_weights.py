"""Files of weights: whatever is in them, the caller gets tensors by bare names, or one error of the kind it asked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vkd_cache.errors import CheckpointError, TeacherError, VkdCacheError
from vkd_cache.weights import bare_tensors, innermost, misfits, read_weights_file

ERRORS = (CheckpointError, TeacherError)


@settings(deadline=None, max_examples=60)
@given(
    cut=st.integers(0, 3000), noise=st.binary(max_size=40), safe=st.booleans(), legacy=st.booleans(),
    suffix=st.sampled_from(["pth", "safetensors"]), error=st.sampled_from(ERRORS),
)
def test_damaged_files_are_one_error(
    tmp_path_factory: pytest.TempPathFactory, cut: int, noise: bytes, safe: bool, legacy: bool, suffix: str,
    error: Any,
) -> None:
    path = tmp_path_factory.mktemp("damaged") / f"w.{suffix}"
    if safe:
        save_file({"weight": torch.ones(64)}, path)
    else:
        torch.save({"weight": torch.ones(64)}, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:cut] + noise)
    try:
        read_weights_file(path, error)  # the noise may lie where it does not matter
    except VkdCacheError as caught:
        assert type(caught) is error
        assert str(path) in str(caught)


@pytest.mark.parametrize("error", ERRORS)
def test_safetensors_are_known_by_content_and_home_is_found(
    error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"weight": torch.ones(3)}, tmp_path / "model.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert torch.equal(read_weights_file("~/model.pth", error)["weight"], torch.ones(3))
    with pytest.raises(error, match=r"~nobody-of-that-name/model\.pth: cannot be read"):
        read_weights_file("~nobody-of-that-name/model.pth", error)


class Unknown:
    """Something that reading would have to build."""


@pytest.mark.parametrize("zipped", [True, False])
def test_a_refusal_names_the_object_and_does_not_advise_to_run_it(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": Unknown()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(TeacherError, match=r"refused.*\(Unsupported global: .*\.Unknown was") as caught:
        read_weights_file(path, TeacherError)
    assert str(caught.value).isprintable()
    assert "weights_only" not in str(caught.value)
    assert "trust" not in str(caught.value)


def test_a_refusal_of_other_bytes_says_what_the_reader_met(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text("[source]\n")
    with pytest.raises(CheckpointError, match=r"refused.*\(Unsupported operand 91\)"):
        read_weights_file(tmp_path / "w.pth", CheckpointError)


def test_entries_are_followed_but_not_without_end() -> None:
    assert innermost({"model": {"student": {"a": 1}}, "epoch": 3}) == {"a": 1}
    assert innermost({"model": 3}) == {"model": 3}
    endless: dict[str, Any] = {}
    endless["model"] = endless
    assert innermost(endless) is endless


def test_names_lose_their_wrappers_and_stay_unique() -> None:
    one = torch.ones(1)
    state = {"module._orig_mod.a": one, "_orig_mod.module.b": one, "n_averaged": torch.tensor(3)}
    assert set(bare_tensors(state, "file", TeacherError)) == {"a", "b"}
    with pytest.raises(TeacherError, match=r"file: 'module\.a' names a tensor that another entry names too"):
        bare_tensors({"a": one, "module.a": one}, "file", TeacherError)


def test_misfits_name_a_few_of_each_kind() -> None:
    found = {"a": torch.ones(2), "b.count": torch.ones(1), "d": torch.ones(1)}
    expected = {"a": torch.ones(3), "c.count": torch.ones(1), **{f"m{i}": torch.ones(1) for i in range(5)}}
    assert misfits(expected, expected) == []
    assert misfits(found, expected, optional="count") == [
        "5 missing: m0, m1, m2 and 2 more",
        "2 unexpected: b.count, d",
        "1 of another shape: a (found (2,), expected (3,))",
    ]
    assert misfits(found, expected)[0] == "6 missing: c.count, m0, m1 and 3 more"
