"""Teachers: loading, the refusals, the taps and the promise that nothing about them ever moves."""

import argparse
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from vkd_cache.config import TeacherConfig
from vkd_cache.errors import TeacherError
from vkd_cache.teachers import Teacher, load_teacher

CLASSES = 7
SIDE_PX = 32
NODES = ("pooled", "logits", "feature_map")


def make_model(name: str, seed: int = 0, **arguments: Any) -> nn.Module:
    """A timm model whose batch-norm statistics and head are not those of an untrained one."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, num_classes=CLASSES, **arguments).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("running_mean", "bias", "gamma", "ls1")):
                value.normal_(std=0.2)
            elif name.endswith("weight") and value.ndim == 2:
                value.normal_(std=0.1)
    return model


def save(model: nn.Module, path: Path) -> str:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return str(path)


def load(name: str, weights: str = "", nodes: tuple[str, ...] = ("pooled",), **more: Any) -> Teacher:
    config = TeacherConfig(name=name, weights=weights, **more)
    return load_teacher(config, nodes=nodes, num_classes=CLASSES, view_px=SIDE_PX)


def pixels(count: int = 3, side_px: int = SIDE_PX) -> Tensor:
    return torch.rand(count, 3, side_px, side_px, generator=torch.Generator().manual_seed(5))


# --- callables that tests load by name: `test_teachers:<name>` ---------------------------------------------------


class Plain(nn.Module):
    """No timm interface: the last linear layer gives the output."""

    mean = (0.1, 0.2, 0.3)
    std = torch.tensor([0.4, 0.5, 0.6])

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.body = nn.Conv2d(3, 12, 4, stride=4)
        self.unused = nn.Linear(3, 3)
        self.hidden = nn.Linear(12, 9)
        self.last = nn.Linear(9, num_classes, bias=False)

    def features(self, x: Tensor) -> Tensor:
        return functional.relu(self.hidden(self.body(x).mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


class Softcap(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * torch.tanh(super().forward(x) / 2.0)


class AuxiliaryAfter(Plain):
    """A second head runs after the one whose output is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        logits = self.last(features)
        self.auxiliary(2 * features)
        return logits


class FixedSize(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(64 * 64, 12)

    def features(self, x: Tensor) -> Tensor:
        return self.wide(x.mean(1).flatten(1))


class Dropping(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.dropout(self.features(x), 0.5))


class NoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Conv2d(3, CLASSES, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


class Loose(nn.Module):
    """timm's interface over tokens whose grid is not stated."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, CLASSES)

    def forward_features(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.mean(1) if pre_logits else self.head(x.mean(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def headless() -> nn.Module:
    return timm.create_model("test_vit", num_classes=0, img_size=SIDE_PX)


def needs_arguments(num_classes: int, width: int) -> nn.Module:
    return nn.Linear(width, num_classes)


class Diverged(Plain):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.hidden.weight[0, 0] = float("nan")


def not_a_module() -> int:
    return 3


# --- nodes and heads ---------------------------------------------------------------------------------------------

LINEAR_HEADS = ["test_resnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_vit", "test_byobnet"]


@pytest.mark.parametrize("name", LINEAR_HEADS)
def test_nodes_of_timm_models_are_the_models_own(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    teacher = load(name, save(model, tmp_path / "w.safetensors"), NODES)
    cfg = model.pretrained_cfg
    side_px = cfg["input_size"][-1] if cfg["fixed_input_size"] else SIDE_PX
    assert teacher.nodes == NODES
    assert teacher.identity["input_px"] == side_px
    images = pixels(side_px=side_px)
    found = teacher(images)
    assert {node: tuple(value.shape[1:]) for node, value in found.items()} == teacher.node_shapes
    normalised = (images - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(normalised))
        features = model.forward_features(normalised)
    assert teacher.head is not None
    weight, bias = teacher.head
    torch.testing.assert_close(functional.linear(found["pooled"], weight, bias), found["logits"])
    assert teacher.identity["width"] == weight.shape[1] == found["pooled"].shape[1]
    assert teacher.identity["num_classes"] == CLASSES
    channels = model.num_features
    assert found["feature_map"].shape[:2] == (3, channels)
    if features.ndim == 3:  # patch tokens in row order, without the class token
        expected = features[:, 1:].transpose(1, 2).reshape(3, channels, 10, 10)
    elif name == "test_mambaout":  # (B, H, W, C)
        expected = features.permute(0, 3, 1, 2)
    else:
        expected = features
    torch.testing.assert_close(found["feature_map"], expected)


def test_pooled_alone_needs_no_logits_where_the_head_is_linear(tmp_path: Path) -> None:
    teacher = load("test_resnet", save(make_model("test_resnet"), tmp_path / "w.safetensors"))
    assert teacher.nodes == ("pooled",)
    assert set(teacher(pixels())) == {"pooled"}
    tensors = teacher.head_tensors()
    assert tensors is not None
    assert tensors["weight"].shape == (CLASSES, 96)
    assert tensors["bias"].shape == (CLASSES,)


def test_two_heads_store_logits(tmp_path: Path) -> None:
    name = "deit_tiny_distilled_patch16_224"
    model = make_model(name, img_size=SIDE_PX)
    teacher = load(name, save(model, tmp_path / "w.safetensors"), ("pooled",), input_px=SIDE_PX)
    assert teacher.head is None
    assert teacher.head_tensors() is None
    assert teacher.nodes == ("pooled", "logits")
    mapped = load(name, save(model, tmp_path / "w.safetensors"), ("feature_map",), input_px=SIDE_PX)
    assert mapped.node_shapes == {"feature_map": (192, 2, 2)}  # both prefix tokens left out


def test_logits_only() -> None:
    teacher = load("test_teachers:NoLinear", nodes=("logits",))
    assert teacher.nodes == ("logits",)
    assert teacher.head is None
    assert teacher.identity["width"] is None


def test_plain_callable_is_tapped_before_its_last_linear_layer() -> None:
    teacher = load("test_teachers:Plain", nodes=("pooled", "logits"), num_classes=5)
    found = teacher(pixels())
    assert teacher.head is not None
    weight, bias = teacher.head
    assert weight.shape == (5, 9)
    assert not bias.any()
    torch.testing.assert_close(functional.linear(found["pooled"], weight), found["logits"])
    model = Plain(5)
    normalised = (pixels() - torch.tensor(Plain.mean).view(3, 1, 1)) / Plain.std.view(3, 1, 1)
    torch.testing.assert_close(found["logits"], model(normalised).detach())
    torch.testing.assert_close(found["pooled"], model.features(normalised).detach())
    assert teacher.identity["mean"] == [0.1, 0.2, 0.3]


def test_the_head_is_the_layer_whose_output_is_returned() -> None:
    teacher = load("test_teachers:AuxiliaryAfter")
    assert teacher.head is not None
    assert torch.equal(teacher.head[0], teacher.model.last.weight)


def test_callable_with_a_head_that_is_not_linear_stores_logits() -> None:
    teacher = load("test_teachers:Softcap")
    assert teacher.head is None
    assert teacher.nodes == ("pooled", "logits")
    assert teacher.node_shapes == {"pooled": (9,), "logits": (CLASSES,)}


@pytest.mark.parametrize(
    ("name", "nodes", "message"),
    [
        ("test_teachers:NoLinear", ("pooled",), "cannot tap 'pooled'.*node 'logits' only"),
        ("test_teachers:Plain", ("feature_map",), "no node 'feature_map'"),
        ("test_teachers:Loose", ("feature_map",), r"\(1024, 3\) per image and it states no patch grid"),
        ("test_teachers:FixedSize", ("pooled",), r"cannot run on images of 32x32 px \(.*input_px"),
        ("test_teachers:Dropping", ("pooled",), "random in evaluation mode"),
        ("test_teachers:not_a_module", ("pooled",), "returned a int, expected an nn.Module"),
        ("test_teachers:needs_arguments", ("pooled",), "cannot be called .*missing a required argument: 'width'"),
        ("builtins:type", ("pooled",), "cannot be called"),
        ("test_teachers:Diverged", ("pooled",), "not finite.*weights"),
        ("test_teachers:CLASSES", ("pooled",), "found a int, expected a callable"),
        ("test_teachers:absent", ("pooled",), "no attribute 'absent'"),
        ("absent_package:model", ("pooled",), "No module named 'absent_package'.*PYTHONPATH"),
        ("test_resnet_", ("pooled",), "does not know; did you mean 'test_resnet'"),
        ("resnet10t.none", ("pooled",), r"a tag that timm does not know\. Expected one of resnet10t\.c3_in1k"),
        ("", ("pooled",), "found nothing, expected a timm model name"),
        ("test_resnet", ("pool",), "nodes: found .*expected some of pooled, logits, feature_map"),
    ],
)
def test_refusals(name: str, nodes: tuple[str, ...], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        load(name, nodes=nodes)


# --- weights -----------------------------------------------------------------------------------------------------


def containers(model: nn.Module) -> dict[str, Any]:
    """One state dict in all the wrappings it is found in."""
    state = dict(model.state_dict())
    parallel = {f"module.{name}": value for name, value in state.items()}
    compiled = {f"_orig_mod.{name}": value for name, value in state.items()}
    return {
        "plain": state,
        "model": {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1, nested={"a": [1, 2]})},
        "state_dict": {"state_dict": state, "metric": 0.5},
        "student": {"student": parallel},
        "deep": {"state_dict": {"model": parallel}},
        "module": parallel,
        "compiled": compiled,
        "both": {f"module.{name}": value for name, value in compiled.items()},
        "ours": {
            "format": "vkd-cache checkpoint",
            "version": 2,
            "student": {f"net.{name}": value for name, value in state.items()} | {"projector.weight": torch.ones(2)},
            "ema": None,
            "config": {"student": {"name": "test_resnet"}},
        },
    }


def test_identity_does_not_depend_on_the_file(tmp_path: Path) -> None:
    model = make_model("test_resnet")
    expected = load("test_resnet", save(model, tmp_path / "w.safetensors"))
    misnamed = save(model, tmp_path / "safetensors.pth")
    assert load("test_resnet", misnamed).identity == expected.identity
    for name, document in containers(model).items():
        path = tmp_path / f"{name}.pth"
        torch.save(document, path)
        teacher = load("test_resnet", str(path))
        assert teacher.identity == expected.identity, name
        torch.testing.assert_close(teacher(pixels()), expected(pixels()), rtol=0, atol=0)


def test_legacy_torch_files_are_read(tmp_path: Path) -> None:
    model = make_model("test_resnet")
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load("test_resnet", str(tmp_path / "old.pth")).identity["num_classes"] == CLASSES


def test_other_weights_are_another_identity(tmp_path: Path) -> None:
    model = make_model("test_resnet")
    first = load("test_resnet", save(model, tmp_path / "a.safetensors")).identity
    with torch.no_grad():
        model.state_dict()["bn1.running_var"][0] += 1e-3  # a buffer, not a parameter
    second = load("test_resnet", save(model, tmp_path / "b.safetensors")).identity
    assert first["weights_sha256"] != second["weights_sha256"]
    assert first | {"weights_sha256": ""} == second | {"weights_sha256": ""}


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_runs_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, target = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({"model": Bomb(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(TeacherError, match=r"refused.*mkdir") as caught:
        load("test_resnet", str(path))
    assert "weights_only=False" not in str(caught.value)
    path.write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(TeacherError, match=r"evil\.pth"):
        load("test_resnet", str(path))
    assert not target.exists()


@settings(deadline=None, max_examples=60)
@given(cut=st.integers(0, 3000), noise=st.binary(max_size=40), safe=st.booleans())
def test_damaged_files_are_one_message(
    tmp_path_factory: pytest.TempPathFactory, cut: int, noise: bytes, safe: bool
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "w.pth"
    state = {"weight": torch.ones(64)}
    if safe:
        save_file(state, path)
    else:
        torch.save(state, path)
    path.write_bytes(path.read_bytes()[:cut] + noise)
    with pytest.raises(TeacherError, match=re.escape(str(path))):
        load("test_resnet", str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, "holds no weights, expected a state dict"),
        (lambda state: state | {"note": "text"}, "entry 'note' is a str, expected a tensor"),
        (lambda state: {k: v for k, v in state.items() if "bn1" not in k}, r"\d+ missing: bn1.weight, .* and \d+ more"),
        (
            lambda state: state | {f"extra{i}": torch.ones(1) for i in range(9)},
            "9 unexpected: extra0, extra1, extra2 and 6 more",
        ),
        (lambda state: state | {"fc.bias": torch.ones(3)}, r"fc.bias \(found \(3,\), expected \(7,\)\)"),
    ],
)
def test_state_dicts_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(change(dict(make_model("test_resnet").state_dict())), path)
    with pytest.raises(TeacherError, match=message) as caught:
        load("test_resnet", str(path))
    assert len(str(caught.value)) < 600 + len(str(path))


def test_only_the_counters_of_batch_norm_may_be_missing(tmp_path: Path) -> None:
    state = make_model("test_resnet").state_dict()
    torch.save({name: value for name, value in state.items() if "num_batches" not in name}, tmp_path / "w.pth")
    assert load("test_resnet", str(tmp_path / "w.pth")).head is not None


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"cannot be read \(No such file"):
        load("test_resnet", str(tmp_path / "absent.pth"))
    with pytest.raises(TeacherError, match=r"cannot be read \(Is a directory"):
        load("test_resnet", str(tmp_path))


def test_number_of_classes_comes_from_the_weights(tmp_path: Path) -> None:
    weights = save(make_model("test_convnext"), tmp_path / "w.safetensors")
    config = TeacherConfig(name="test_convnext", weights=weights)
    assert load_teacher(config, nodes=["pooled"], num_classes=31, view_px=64).identity["num_classes"] == CLASSES
    with pytest.raises(TeacherError, match=r"head.fc.weight \(found \(7, 64\), expected \(9, 64\)\)"):
        load("test_convnext", weights, num_classes=9)


def test_input_size_of_a_vit_is_that_of_its_weights(tmp_path: Path) -> None:
    small = save(make_model("test_vit", img_size=SIDE_PX), tmp_path / "small.safetensors")
    own = save(make_model("test_vit"), tmp_path / "own.safetensors")
    assert load("test_vit", small).identity["input_px"] == SIDE_PX
    assert load("test_vit", own).identity["input_px"] == 160
    resampled = load("test_vit", own, ("feature_map",), input_px=64)  # position embedding through timm's own resampling
    assert resampled.node_shapes == {"feature_map": (64, 4, 4)}


def test_without_weights_timm_is_asked_and_nothing_is_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TeacherError, match=r"could not be had.*Give --teacher-weights FILE"):
        load("test_resnet")
    with pytest.raises(TeacherError, match=r"num_classes: found 7, but .* has 1000 and another head would be random"):
        load("test_resnet", num_classes=CLASSES)


# --- frozen ------------------------------------------------------------------------------------------------------


def test_frozen_whatever_its_owner_does(tmp_path: Path) -> None:
    teacher = load("test_efficientnet", save(make_model("test_efficientnet"), tmp_path / "w.safetensors"), NODES)
    before = teacher(pixels())
    owner = nn.Sequential(teacher)
    owner.train()
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    images = pixels().requires_grad_()
    after = teacher(images)
    for node in NODES:
        assert torch.equal(before[node], after[node])
        assert not after[node].requires_grad
        assert not after[node].is_inference()  # a live teacher's features take part in a loss that is differentiated
    assert not any(value.requires_grad for value in teacher.parameters())


def test_loading_leaves_the_callers_generator_alone(tmp_path: Path) -> None:
    weights = save(make_model("test_resnet"), tmp_path / "w.safetensors")
    for name, file in {"test_resnet": weights, "test_teachers:Plain": ""}.items():
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        load(name, file)
        assert torch.equal(torch.rand(4), expected)


def test_views_of_another_size_are_resized_as_torchvision_does() -> None:
    from torchvision.transforms.v2.functional import resize

    images = (pixels(side_px=40) > 0.5).float()
    for side_px in (24, 64):
        teacher = load("test_teachers:Plain", nodes=("logits",), input_px=side_px)
        resized = resize(images, [side_px, side_px], interpolation=3, antialias=True)
        assert side_px == 24 or resized.min() < 0  # bicubic overshoots at edges
        torch.testing.assert_close(teacher(images), teacher(resized.clamp(0, 1)))
        assert teacher.identity["input_px"] == side_px


def test_identity_is_json(tmp_path: Path) -> None:
    identity = load("test_resnet", save(make_model("test_resnet"), tmp_path / "w.safetensors")).identity
    assert json.loads(json.dumps(identity)) == identity
    assert re.fullmatch("[0-9a-f]{64}", identity["weights_sha256"])
    assert identity["timm"] == timm.__version__


def test_a_feature_extractor_without_head_has_pooled_only(tmp_path: Path) -> None:
    teacher = load("test_teachers:headless", nodes=("pooled", "feature_map"))
    assert teacher.nodes == ("pooled", "feature_map")
    assert teacher.head is None
    assert teacher.identity["num_classes"] == 0
    with pytest.raises(TeacherError, match="has no classifier"):
        load("test_teachers:headless", nodes=("logits",))
    weights = save(teacher.model, tmp_path / "w.safetensors")
    with pytest.raises(TeacherError, match=r"2 missing: head\.weight, head\.bias"):
        load("test_vit", weights, input_px=SIDE_PX)  # an architecture with a head, a file without
