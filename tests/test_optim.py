"""Decay groups, learning rates and weight averages of the reference recipe."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vkd_cache.errors import ConfigError
from vkd_cache.optim import WeightAverage, cosine_lr, parameter_groups
from vkd_cache.projector import KINDS
from vkd_cache.students import create_student

FACTS = json.loads((Path(__file__).parent / "reference" / "misc_facts.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_the_reference_s_but_for_the_projector(kind: str) -> None:
    student = create_student("deit_ti_distilled", 10, 24, input_px=32, projector=kind)
    decayed, spared = parameter_groups(student, 0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    named = dict(student.named_parameters())
    assert sorted(decayed["names"] + spared["names"]) == sorted(named)
    expected = {
        name
        for name, parameter in named.items()
        if parameter.ndim > 1 and name not in ("net.cls_token", "net.pos_embed") and not name.startswith("projector.")
    }
    assert set(decayed["names"]) == expected
    for group in (decayed, spared):
        assert all(named[name] is value for name, value in zip(group["names"], group["params"], strict=True))
    torch.optim.AdamW([decayed, spared], lr=1e-3)


def test_a_network_s_own_list_is_respected_and_frozen_parameters_are_left_out() -> None:
    student = create_student("swin_tiny_patch4_window7_224", 10, input_px=32)
    spared = parameter_groups(student, 0.05)[1]["names"]
    assert any("relative_position_bias_table" in name for name in spared)
    grid = nn.Module()
    grid.bias = nn.Parameter(torch.zeros(2, 2))
    assert parameter_groups(nn.ModuleDict({"grid": grid}), 0.05)[0]["weight_decay"] == 0
    frozen = nn.Linear(2, 2)
    frozen.weight.requires_grad_(False)
    (group,) = parameter_groups(frozen, 0.05)
    assert group["names"] == ["bias"]


def test_cosine_is_the_reference_s() -> None:
    facts = FACTS["lr_deit"]
    total = facts["ipe"] * facts["epochs"]
    for step, rate in facts["points"]:
        assert cosine_lr(step, total, facts["base"], facts["min"]) == pytest.approx(rate, rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.data())
def test_rates_rise_then_fall_within_their_bounds(total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    rates = [cosine_lr(step, total, 1.0, 0.1, warmup) for step in range(total + 2)]
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[:warmup] == pytest.approx([(step + 1) / (warmup + 1) for step in range(warmup)])
    assert rates[warmup] == 1.0
    assert rates[total] == rates[total + 1] == 0.1
    assert all(0 < rate <= 1 for rate in rates)
    with pytest.raises(ConfigError, match="shorter than the run"):
        cosine_lr(0, total, 1.0, 0.1, total)


def test_ema_averages_parameters_and_buffers_and_keeps_the_projector_orthonormal() -> None:
    torch.manual_seed(0)
    student = create_student("test_resnet", 4, 20, input_px=32)
    ema = WeightAverage(student, 0.75)
    ema.update(student)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    output = student(torch.randn(4, 3, 32, 32))
    assert output.projected is not None
    (output.logits.square().sum() + output.projected.sum()).backward()
    optimizer.step()
    ema.update(student)
    averaged = ema.module.state_dict()
    for name, after in student.state_dict().items():
        expected = 0.75 * before[name] + 0.25 * after if after.is_floating_point() else after
        assert torch.allclose(averaged[name], expected, atol=1e-6), name
    assert any(name.endswith("running_mean") and averaged[name].any() for name in averaged)
    weight = ema.module.projector.weight.detach()
    assert torch.allclose(weight @ weight.T, torch.eye(20), atol=1e-5)
    with pytest.raises(ConfigError, match="less than 1"):
        WeightAverage(student, 1.0)
