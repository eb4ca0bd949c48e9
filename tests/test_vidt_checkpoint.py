"""Weights of a ViDT: ours, the authors' and wrapped ones load strictly; anything else is one clear message."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from detection_samples import reference_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vkd_cache.detection import ViDT, create_vidt
from vkd_cache.detection.canvas import NODES
from vkd_cache.detection.checkpoint import load_vidt_weights, vidt_classes
from vkd_cache.detection.distillation import TokenProjectors
from vkd_cache.errors import CheckpointError
from vkd_cache.weights import read_weights_file

CLASSES = 7


def net(seed: int = 0, name: str = "test_vidt", num_classes: int = CLASSES, **options: Any) -> ViDT:
    torch.manual_seed(seed)
    return create_vidt(name, num_classes, **options)


class StudentLike(nn.Module):
    """What a student of ours saves: the detector beside its projectors."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.projectors = net(), TokenProjectors(NODES, 64, 64)


def without_twins(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if "decoder.bbox_embed" not in name}


def renamed(state: Mapping[str, Tensor], change: Callable[[str], str]) -> dict[str, Tensor]:
    return {change(name): value for name, value in state.items()}


FILES: dict[str, Callable[[], Mapping[str, Any]]] = {
    "plain": lambda: net().state_dict(),
    "authors'": lambda: {"model": net().state_dict(), "epoch": 49, "args": {"lr": 1e-4}},
    "from DistributedDataParallel": lambda: {"model": renamed(net().state_dict(), "module.{}".format)},
    "compiled": lambda: renamed(net().state_dict(), "_orig_mod.{}".format),
    "one name a tensor": lambda: without_twins(net().state_dict()),
    "the other name": lambda: {
        name: value for name, value in net().state_dict().items() if not name.startswith("bbox_embed")
    },
    "without numbers that follow": lambda: {
        name: value for name, value in net().state_dict().items() if "position_index" not in name
    },
    "a student of ours": lambda: {"student": StudentLike().state_dict()},
    "an average": lambda: AveragedModel(net(), use_buffers=True).state_dict(),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_the_same_weights(kind: str) -> None:
    wanted, model = net().state_dict(), net(1)
    apart = load_vidt_weights(model, FILES[kind](), where="file.pth")
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert all(name.startswith("projectors.") for name in apart)
    assert bool(apart) == (kind == "a student of ours")
    head = model.bbox_embed[0].layers[0]
    assert head.weight is model.transformer.decoder.bbox_embed[0].layers[0].weight  # still one tensor


def test_the_published_projectors_are_known_and_set_apart() -> None:
    published = reference_weights("student_tensors")
    model = net(name="vidt_swin_nano", num_classes=91)
    apart = load_vidt_weights(model, {"model": published}, where="vkd.pth")
    assert len(apart) == 24  # six times scale, bias, parameter and base
    assert set(apart) == {name for name in published if "projector" in name}
    assert torch.equal(model.backbone.det_token, published["backbone.det_token"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_on_disk_load(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": net().state_dict()}, path)
    else:
        save_file(without_twins(net().state_dict()), path)
        assert load_file(path).keys() < net().state_dict().keys()
    document = read_weights_file(path, CheckpointError)
    model = net(1)
    load_vidt_weights(model, document, where=str(path))
    assert torch.equal(model.bbox_embed[2].layers[1].bias, net().bbox_embed[2].layers[1].bias)
    assert vidt_classes(document, where=str(path)) == CLASSES


def changed(**changes: Tensor | None) -> dict[str, Any]:
    """A good state dict with some tensors replaced; None: left out."""
    state = dict(net().state_dict())
    for name, value in changes.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


MISFITS: dict[str, tuple[Callable[[], ViDT], Callable[[], Mapping[str, Any]], str]] = {
    "another body": (
        net, lambda: net(name="test_vidt2").state_dict(),
        "holds a body of 32 channels and 1-1-2-1 blocks, expected 16 channels and 1-1-1-1 blocks as in test_vidt. "
        "It fits test_vidt2.",
    ),
    "other classes": (
        net, lambda: net(num_classes=91).state_dict(),
        f"found 91 classes, expected {CLASSES}. Build test_vidt as it was trained.",
    ),
    "a head too many": (
        net, lambda: net(iou_aware=True).state_dict(), "found IoU-aware heads, expected none.",
    ),
    "heads too few": (
        lambda: net(cross_scale_fusion=True, token_label=True), lambda: net().state_dict(),
        "found no cross-scale fusion, expected some; no token-label head, expected some.",
    ),
    "other tokens": (
        net, lambda: changed(**{"backbone.det_token": torch.zeros(1, 100, 16)}), "found 100 [DET] tokens, expected 16.",
    ),
    "other layers": (
        net,
        lambda: {name: value for name, value in net().state_dict().items() if not name.startswith("class_embed.2")},
        "found 1 decoder layers, expected 2.",
    ),
    "a stranger": (
        net, lambda: changed(**{"backbone.head.weight": torch.zeros(3)}),
        "does not fit test_vidt: 1 unexpected: backbone.head.weight.",
    ),
    "a gap": (
        net, lambda: changed(**{"input_proj.1.0.bias": None}),
        "does not fit test_vidt: 1 missing: input_proj.1.0.bias.",
    ),
    "another shape": (
        net, lambda: changed(**{"tgt_proj.1.bias": torch.zeros(65)}),
        "1 of another shape: tgt_proj.1.bias (found (65,), expected (64,)).",
    ),
    "two tensors for one": (
        net, lambda: changed(**{"bbox_embed.0.layers.0.bias": torch.ones(64)}),
        "'bbox_embed.0.layers.0.bias' and 'transformer.decoder.bbox_embed.0.layers.0.bias' differ, but are one tensor",
    ),
    "another window": (
        net,
        lambda: changed(
            **{"backbone.layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64)}
        ),
        "'backbone.layers.0.blocks.0.attn.relative_position_index' orders the tokens of a window in another way",
    ),
    "no weights": (
        net, lambda: {"epoch": 3, "optimizer": {}}, "found entries epoch, optimizer, expected weights by name, or one",
    ),
    "no detector": (
        net, lambda: {"patch_embed.proj.weight": torch.zeros(16, 3, 4, 4)},
        "holds no ViDT (backbone.patch_embed.proj.weight is missing; found patch_embed.proj.weight)",
    ),
    "no tensor": (
        net,
        lambda: {"model": {"backbone.det_token": "text"}},
        "entry 'backbone.det_token' is a str, expected a tensor",
    ),
    "nothing": (net, dict, "found entries none, expected weights by name"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_one_clear_message(kind: str) -> None:
    build, state, message = MISFITS[kind]
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        load_vidt_weights(model, state(), where="runs/file.pth")
    assert str(caught.value).startswith("runs/file.pth: ")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_body_of_no_name_of_ours_is_told_by_its_numbers() -> None:
    state = renamed(net().state_dict(), lambda name: name.replace("layers.1.blocks.0", "layers.1.blocks.5"))
    state |= net().state_dict()
    with pytest.raises(CheckpointError, match=r"holds a body of 16 channels and 1-2-1-1 blocks, .* as in test_vidt\.$"):
        load_vidt_weights(net(), state, where="file.pth")
