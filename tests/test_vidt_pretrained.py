"""A Swin classifier's weights in a ViDT's body: the same maps come out, and what does not fit is told."""

import re
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from vkd_cache.detection import ViDT, ViDTConfig
from vkd_cache.detection.pretrained import load_body_weights
from vkd_cache.errors import CheckpointError

WIDTH, DEPTHS, HEADS = 16, (2, 2, 2, 1), (1, 2, 4, 8)


def swin(width: int = WIDTH) -> SwinTransformer:
    torch.manual_seed(0)
    net = SwinTransformer(img_size=224, embed_dim=width, depths=DEPTHS, num_heads=HEADS, num_classes=9, window_size=7)
    with torch.no_grad():
        for parameter in net.parameters():  # fresh tables and norms would hide a mistake
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return net.eval()


def vidt() -> ViDT:
    torch.manual_seed(1)
    config = ViDTConfig(
        body_width=WIDTH, depths=DEPTHS, heads=HEADS, num_classes=4, num_queries=5, width=32, num_layers=1
    )
    return ViDT(config).eval()


def authors_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the Swin authors publish them: mergings with the stage before, one linear head, masks of shifted windows."""
    moved = {f"layers.{stage}.downsample.": f"layers.{stage - 1}.downsample." for stage in (1, 2, 3)}
    named = {}
    for name, value in state.items():
        for theirs, ours in moved.items():
            if name.startswith(theirs):
                name = name.replace(theirs, ours)
                break
        named[name.replace("head.fc.", "head.")] = value
    named["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    named["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    return named


@pytest.mark.parametrize("naming", ["timm", "authors"])
def test_maps_of_the_body_are_those_of_the_classifier(naming: str) -> None:
    """timm's Swin is an independent implementation, so this checks windows, shifts, biases and mergings too."""
    classifier, detector = swin(), vidt()
    expected: list[Tensor] = []
    for stage in list(classifier.layers)[1:]:
        stage.register_forward_hook(lambda module, inputs, output: expected.append(output.permute(0, 3, 1, 2)))
    state: dict[str, Any] = classifier.state_dict()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    apart = load_body_weights(detector, state if naming == "timm" else {"model": authors_names(state)}, where="f.pth")
    assert all(name.startswith(("norm.", "head.")) for name in apart)
    assert len(apart) == 4
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        classifier(images)
        maps, _, _ = detector.backbone(images, torch.zeros(1, 224, 224, dtype=torch.bool))
    for found, wanted in zip(maps[:3], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    after = detector.state_dict()
    kept = {name for name in after if torch.equal(after[name], before[name])}
    assert {name for name in after if not name.startswith("backbone.")} <= kept
    assert {"backbone.det_token", "backbone.det_pos_embed", "backbone.layers.3.downsample.reduction.weight"} <= kept
    assert "backbone.layers.2.downsample.reduction.weight" not in kept


def test_another_body_and_a_stranger_are_told() -> None:
    message = "f.pth: is no Swin classifier with the body of this ViDT (16 channels, 2-2-2-1 blocks, windows of 7): "
    strange = swin().state_dict() | {"layers.0.gate": torch.zeros(1)}
    for state, problem in (
        (swin(width=32).state_dict(), r"\d+ of another shape: patch_embed.proj.weight"),
        (strange, r"1 unexpected: layers.0.gate\.$"),
        ({"conv1.weight": torch.zeros(1)}, r"\d+ missing: patch_embed.proj.weight"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(message) + problem):
            load_body_weights(vidt(), state, where="f.pth")
