"""Students: the reference's numbers under the published names, any timm network, and strict loading."""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from reference import recipe
from safetensors.torch import save_file
from timm.layers import Format
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vkd_cache.errors import CheckpointError, ConfigError
from vkd_cache.losses import VkdLoss
from vkd_cache.projector import KINDS, OrthogonalProjector
from vkd_cache.students import Student, create_student, load_student_weights, read_torch_file
from vkd_cache.students.layout import Layout, probe_layout

REFERENCE = Path(__file__).parent / "reference"
FACTS: dict[str, Any] = json.loads((REFERENCE / "deit_forward.json").read_text())["models"]["deit_ti_distilled"]
ARRAYS = np.load(REFERENCE / "deit_forward.npz")


def published_state() -> dict[str, Tensor]:
    """The reference's weights under the published names."""
    return {
        row["name"]: torch.as_tensor(recipe.param(row["key"], row["shape"], row["kind"])) for row in FACTS["tensors"]
    }


def reference_image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(recipe.image("deit", (2, 3, 224, 224)), dtype=dtype)


def expect(found: Tensor, key: str, tolerance: float) -> None:
    wanted = torch.tensor(ARRAYS[f"deit_ti_distilled.{key}"], dtype=torch.float64)
    assert torch.allclose(found.detach().double(), wanted, rtol=0, atol=tolerance), key


@pytest.fixture(scope="module")
def reference_student() -> Student:
    student = create_student("deit_ti_distilled")
    assert load_student_weights(student, published_state()) == ()
    return student


@pytest.mark.parametrize(("dtype", "prefix", "tolerance"), [(torch.float32, "f32", 1e-5), (torch.float64, "f64", 1e-6)])
def test_evaluation_gives_the_reference_s_numbers(
    reference_student: Student, dtype: torch.dtype, prefix: str, tolerance: float
) -> None:
    student = copy.deepcopy(reference_student).to(dtype).eval()
    with torch.no_grad():
        tokens = student.net.forward_features(reference_image(dtype))
        output = student(reference_image(dtype))
    expect(output.logits, f"{prefix}.eval.avg_logits", tolerance)
    assert output.distill_logits is None
    assert output.projected is None
    if prefix == "f32":
        expect(tokens[:, 0], "f32.eval.cls", tolerance)
        expect(tokens[:, 1], "f32.eval.dist", tolerance)
        expect(tokens[:, [2, 99, 197]], "f32.eval.patch_first_last", tolerance)
        summary = recipe.summary("deit_ti_distilled.patch", tokens[:, 2:].numpy())
        assert summary["dot"] == pytest.approx(FACTS["outputs"]["f32.eval"]["patch"]["dot"], abs=1e-2)


def test_training_gives_the_reference_s_numbers_and_running_statistics(reference_student: Student) -> None:
    student = copy.deepcopy(reference_student).train()
    with torch.no_grad():
        output = student(reference_image())
    expect(output.logits, "f32.train.head", 1e-5)
    assert output.distill_logits is not None
    expect(output.distill_logits, "f32.train.head_dist", 1e-5)
    buffers = {name: value for name, value in student.net.state_dict().items() if "running" in name}
    assert len(buffers) == 6
    for name, value in buffers.items():
        expect(value, f"f32.train.after.{name}", 1e-5)


def test_mean_features_are_those_of_the_patches(reference_student: Student) -> None:
    student = Student(copy.deepcopy(reference_student.net), 192, projector="linear").eval()
    assert student.projector is not None
    nn.init.eye_(student.projector.unconstrained)
    with torch.no_grad():
        patches = student.net.forward_features(reference_image())[:, 2:]
        assert torch.allclose(student(reference_image()).projected, patches.mean(1), atol=1e-6)


@pytest.mark.parametrize(("name", "count"), [("deit_ti_distilled", 6_633_104), ("deit_s_distilled", 23_797_520)])
def test_sizes(name: str, count: int) -> None:
    assert sum(parameter.numel() for parameter in create_student(name).parameters()) == count


def test_names_order_and_initial_statistics_are_the_reference_s() -> None:
    torch.manual_seed(0)
    named = dict(create_student("deit_ti_distilled").net.named_parameters())
    assert list(named) == FACTS["named_parameters_order"]
    for name, expected in FACTS["init_stats_seed0"].items():
        values = named[name].detach().double()
        assert list(values.shape) == expected["shape"]
        count = values.numel()
        assert float(values.std(correction=0)) == pytest.approx(expected["std"], rel=8 / count**0.5, abs=1e-12), name
        assert float(values.mean()) == pytest.approx(expected["mean"], abs=8 * expected["std"] / count**0.5), name


TIMM = [
    ("test_vit", 32, Layout.TOKENS, False),
    ("test_resnet", 32, Layout.CHANNELS_FIRST, False),
    ("test_convnext", 32, Layout.CHANNELS_FIRST, False),
    ("test_mambaout", 64, Layout.CHANNELS_LAST, False),
    ("swin_tiny_patch4_window7_224", 32, Layout.CHANNELS_LAST, False),
    ("levit_128s", 224, Layout.TOKENS, True),
    ("deit_tiny_distilled_patch16_224", 32, Layout.TOKENS, True),
    ("sequencer2d_s", 64, Layout.CHANNELS_LAST, False),
]


@pytest.mark.parametrize(("name", "size_px", "layout", "two_heads"), TIMM)
def test_any_timm_network_is_a_student(name: str, size_px: int, layout: Layout, two_heads: bool) -> None:
    student = create_student(name, 5, 7, input_px=size_px)
    assert student.layout is layout
    assert student.training
    output = student(torch.randn(2, 3, size_px, size_px))
    assert output.logits.shape == (2, 5)
    assert (output.distill_logits is not None) == two_heads
    assert output.projected is not None
    assert output.projected.shape == (2, 7)
    VkdLoss()(output, torch.full((2, 5), 0.2), torch.randn(2, 7), torch.randn(2, 5))["total"].backward()
    unused = [name for name, parameter in student.named_parameters() if parameter.grad is None]
    assert not unused
    student.eval()
    with torch.no_grad():
        assert student(torch.randn(1, 3, size_px, size_px)).distill_logits is None


def test_drop_path_and_image_size_reach_the_network() -> None:
    for name in ("deit_ti_distilled", "test_vit"):
        student = create_student(name, 5, input_px=32, drop_path=0.3)
        rates = [module.drop_prob for module in student.modules() if type(module).__name__ == "DropPath"]
        steps = torch.linspace(0, 0.3, 12 if name == "deit_ti_distilled" else 6)[1:]  # by block, none at the first
        assert rates == pytest.approx([float(rate) for rate in steps for _ in range(2)])
        assert student(torch.randn(2, 3, 32, 32)).logits.shape == (2, 5)


class MapNet(nn.Module):
    """A network whose map may be as wide as it has channels; it does not say which axis is which."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.num_features = 4
        self.channels_last = channels_last
        self.convolution = nn.Conv2d(3, 4, 8, stride=8)

    def forward_features(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.convolution(pixels)
        return found.permute(0, 2, 3, 1) if self.channels_last else found

    def forward_head(self, features: Tensor) -> Tensor:
        return features.mean(dim=(1, 2) if self.channels_last else (2, 3))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("input_px", [16, 32])
def test_layout_is_right_where_height_equals_channels(channels_last: bool, input_px: int) -> None:
    net = MapNet(channels_last)
    expected = Layout.CHANNELS_LAST if channels_last else Layout.CHANNELS_FIRST
    assert probe_layout(net, input_px) == (expected, 4)
    student = Student(net, 4, input_px=input_px, projector="linear")
    assert student.projector is not None
    nn.init.eye_(student.projector.unconstrained)
    output = student(torch.randn(2, 3, input_px, input_px))
    assert torch.allclose(output.projected, output.logits, atol=1e-6)


@pytest.mark.parametrize("declared", ["NHWC", "NCHW", Format.NHWC, Format.NCHW])
def test_a_network_that_says_its_layout_is_believed_without_a_second_run(declared: str) -> None:
    net = MapNet(Format(declared) is Format.NHWC)
    net.output_fmt = declared
    runs: list[int] = []
    net.convolution.register_forward_hook(lambda *_: runs.append(1))
    expected = Layout.CHANNELS_LAST if net.channels_last else Layout.CHANNELS_FIRST
    assert probe_layout(net, 32) == (expected, 4)
    assert len(runs) == 1


def test_a_student_is_normalised_as_its_network_is() -> None:
    assert create_student("test_vit", 5, input_px=32).mean == (0.5, 0.5, 0.5)
    assert create_student("deit_ti_distilled", 5, input_px=32).std == (0.229, 0.224, 0.225)


def test_wrong_students_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean deit_ti_distilled"):
        create_student("deit_ti_destilled")
    with pytest.raises(ConfigError, match="multiple of 16"):
        create_student("deit_ti_distilled", input_px=40)
    with pytest.raises(ConfigError, match="no patch tokens"):
        create_student("pit_ti_distilled_224", 5, 7, input_px=64)
    with pytest.raises(ConfigError, match="expected one of qr"):
        create_student("test_vit", 5, 7, input_px=32, projector="svd")


def test_compiled_and_under_ddp_it_is_the_same_student(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = create_student("test_vit", 5, 7, input_px=32)
    pixels, targets = torch.randn(2, 3, 32, 32), torch.full((2, 5), 0.2)
    teacher = torch.randn(2, 7)
    loss = VkdLoss(logit_weight=0)

    def gradients(module: nn.Module) -> list[Tensor]:
        student.zero_grad(set_to_none=True)
        loss(module(pixels), targets, teacher)["total"].backward()
        return [parameter.grad for parameter in student.parameters() if parameter.grad is not None]

    expected = gradients(student)
    compiled = gradients(torch.compile(student, backend="aot_eager", fullgraph=True))
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = gradients(nn.parallel.DistributedDataParallel(student))
    finally:
        dist.destroy_process_group()
    assert len(expected) == len(list(student.parameters()))
    for other in (compiled, wrapped):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, other, strict=True))


def small_student(projector: str | None = "qr") -> Student:
    width = None if projector is None else 20
    return create_student("test_resnet", 5, width, input_px=32, projector=projector or "qr")


def same_network(a: Student, b: Student) -> bool:
    return all(torch.equal(value, b.net.state_dict()[name]) for name, value in a.net.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "module.net.", "_orig_mod.module."])
@pytest.mark.parametrize("nesting", [None, "student", "model", "state_dict"])
def test_checkpoints_load_whatever_wraps_them(prefix: str, nesting: str | None) -> None:
    saved, other = small_student(None), small_student(None)
    state: dict[str, Any] = {prefix + name: value for name, value in saved.net.state_dict().items()}
    load_student_weights(other, {nesting: state, "epoch": 3} if nesting else state)
    assert same_network(saved, other)


@pytest.mark.parametrize("saved_kind", [*KINDS, None])
@pytest.mark.parametrize("own_kind", ["qr", "householder", None])
def test_projector_entries_are_loaded_or_left_aside(saved_kind: str | None, own_kind: str | None) -> None:
    saved, other = small_student(saved_kind), small_student(own_kind)
    before = None if other.projector is None else other.projector.weight.detach()
    left = load_student_weights(other, {f"module.{name}": value for name, value in saved.state_dict().items()})
    assert same_network(saved, other)
    if other.projector is not None and before is not None:
        # torch's three maps share names and shapes: entries of one are taken by another, as the reference would
        same_names = saved_kind in ("householder", "matrix_exp", "cayley") and own_kind == "householder"
        taken = saved.projector if saved.projector is not None and (same_names or saved_kind == own_kind) else None
        expected = before if taken is None else taken.weight.detach()
        assert torch.allclose(other.projector.weight, expected, atol=1e-6)
        assert bool(left) == (taken is None and saved_kind is not None)
    else:
        assert bool(left) == (saved_kind is not None)


def test_published_projector_entries_load_into_the_reference_kind() -> None:
    state = published_state()
    projector = OrthogonalProjector(192, 200, "householder").state_dict()
    base = "parametrizations.weight.0.base"
    state |= {f"projector.{name}": value for name, value in projector.items()}
    student = create_student("deit_ti_distilled", 1000, 200, projector="householder")
    assert load_student_weights(student, {"model": {f"module.{name}": value for name, value in state.items()}}) == ()
    assert student.projector is not None
    assert torch.equal(student.projector.state_dict()[base], projector[base])


def test_misfits_are_refused_by_name() -> None:
    student = small_student()
    state = dict(student.state_dict())
    del state[next(iter(state))]
    state["net.extra"] = torch.zeros(1)
    state["net.fc.weight"] = torch.zeros(9, 96)
    expected = r"1 missing: .* 1 unexpected: net.extra; 1 of another shape: .*\(9, 96\)"
    with pytest.raises(CheckpointError, match=expected):
        load_student_weights(student, state, where="run/last.pt")
    with pytest.raises(CheckpointError, match=r"run/last.pt: found entries epoch, expected weights"):
        load_student_weights(student, {"epoch": 1}, where="run/last.pt")
    with pytest.raises(CheckpointError, match="is a int, expected a tensor"):
        load_student_weights(student, {"student": {"a": 1}})


def test_the_average_is_taken_when_asked_for() -> None:
    saved, averaged, other = small_student(), small_student(), small_student()
    ema = AveragedModel(averaged, use_buffers=True).state_dict()
    load_student_weights(other, {"student": saved.state_dict(), "ema": averaged.state_dict()}, ema=True)
    assert same_network(averaged, other)
    load_student_weights(other, {"student": saved.state_dict(), "ema": ema})
    assert same_network(saved, other)
    load_student_weights(other, {"student": saved.state_dict(), "student_ema": ema}, ema=True)
    assert same_network(averaged, other)
    with pytest.raises(CheckpointError, match="holds no weight average"):
        load_student_weights(other, {"student": saved.state_dict(), "ema": None}, ema=True)


class Surprise:
    """Something that unpickling would have to build."""


def test_files_are_read_without_running_them(tmp_path: Path) -> None:
    student = small_student()
    torch.save({"model": student.state_dict(), "args": argparse.Namespace(lr=1.0), "epoch": 3}, tmp_path / "a.pth")
    save_file(student.state_dict(), tmp_path / "a.safetensors")
    for file in ("a.pth", "a.safetensors"):
        other = small_student()
        assert load_student_weights(other, read_torch_file(tmp_path / file)) == ()
        assert same_network(student, other)
    torch.save({"model": Surprise()}, tmp_path / "evil.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:1000])
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    for file, message in (
        ("evil.pth", r"refused, for it is not a torch file of tensors and plain values \(.*Surprise"),
        ("short.pth", "or a damaged one"),
        ("text.pth", "or a damaged one"),
        ("text.safetensors", "or a damaged one"),
        ("list.pth", "holds a list"),
        ("none.pth", r"cannot be read \(No such file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_torch_file(tmp_path / file)
