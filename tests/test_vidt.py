"""ViDT: the published names and the reference's numbers, and laws of what it is built from."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detection_samples import CANVAS, CONTENTS, reference, reference_images, reference_targets, reference_weights, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import recipe
from torch import Tensor, nn
from torch.nn import functional as F

from vkd_cache.detection import STRIDES, VIDT_NAMES, ViDT, ViDTOutput, create_vidt, valid_grids
from vkd_cache.detection.canvas import NODES, teacher_tokens
from vkd_cache.detection.checkpoint import load_vidt_weights
from vkd_cache.detection.criterion import DetectionCriterion
from vkd_cache.detection.deformable import DeformableAttention, logit, memory_of, sample
from vkd_cache.detection.distillation import TokenProjectors, detection_feature_loss
from vkd_cache.detection.swin import join_windows, nearest_mask, relative_index, shifted_regions, split_windows
from vkd_cache.errors import ConfigError

REFERENCE = Path(__file__).parent / "reference"
PUBLISHED: dict[str, Any] = json.loads((REFERENCE / "vidt_params.json").read_text(encoding="utf-8"))
ARRAYS = np.load(REFERENCE / "vidt_outputs.npz")
FLOAT32 = 1e-4  # of logits and tokens, as far as the reference's own float32 and float64 are apart
EVERY_HEAD = {"cross_scale_fusion": True, "iou_aware": True, "token_label": True}


# names


@pytest.mark.parametrize("body", ["nano", "tiny", "small", "base"])
def test_tensors_are_the_published_ones(body: str) -> None:
    facts = PUBLISHED[f"swin_{body}"]
    with torch.device("meta"):
        net = create_vidt(f"vidt_swin_{body}")
    rows = [row for row in facts["state_dict"] if "projector" not in row[0]]
    tensors = [(name, list(value.shape)) for name, value in net.state_dict().items()]
    assert tensors == [(row[0], row[1]) for row in rows]  # the order too
    assert {name for name, _ in net.named_buffers()} == {row[0] for row in rows if row[3] == "buffer"}
    assert sum(parameter.numel() for parameter in net.parameters()) == facts["n_params_without_projections"]
    for name, twin in ((row[0], row[4]) for row in rows if len(row) > 4):
        assert net.get_parameter(name) is net.get_parameter(twin)
    assert (list(net.config.depths), list(net.config.heads)) == (facts["depths"], facts["num_heads"])
    assert net.backbone.num_channels == facts["num_channels"]


@pytest.mark.parametrize(("body", "highest"), [("nano", 0.0), ("tiny", 0.2), ("small", 0.3), ("base", 0.3)])
def test_branches_are_dropped_as_often_as_in_the_reference(body: str, highest: float) -> None:
    with torch.device("meta"):
        net = create_vidt(f"vidt_swin_{body}", drop_path=highest)
    rates = [block.drop_path for layer in net.backbone.layers for block in layer.blocks]
    assert rates == pytest.approx(PUBLISHED[f"swin_{body}"]["drop_path"], abs=1e-6)


def test_fresh_weights_are_spread_like_the_references() -> None:
    torch.manual_seed(0)
    net = create_vidt("vidt_swin_nano")
    facts = PUBLISHED["init_stats_seed0_swin_nano"]
    published = {name: stats for name, stats in facts.items() if "projector" not in name}
    own = {name: value for name, value in net.state_dict().items() if value.is_floating_point()}
    assert published.keys() <= own.keys()
    for name, (mean, std, largest) in published.items():
        value = own[name]
        error = 5 * max(std, 1e-9) / value.numel() ** 0.5  # five deviations of a mean
        assert value.mean().item() == pytest.approx(mean, abs=2 * error + 1e-6), name
        assert value.std(correction=0).item() == pytest.approx(std, abs=2 * error + 1e-6), name
        assert value.abs().max().item() == pytest.approx(largest, rel=0.5, abs=1e-6), name


# the reference's numbers


@dataclasses.dataclass
class Run:
    """Case A: what comes out, and what is seen on the way under the reference's names."""

    net: ViDT
    output: ViDTOutput
    seen: dict[str, Tensor]


def record(net: ViDT, seen: dict[str, Tensor]) -> Iterator[torch.utils.hooks.RemovableHandle]:
    def keep(name: str, found: object) -> None:
        parts = [part.flatten(1, -2) for part in found] if isinstance(found, tuple) else [found]
        seen[f"vidt.{name}"] = torch.cat(parts, 1).detach()  # patch tokens followed by [DET] tokens

    def watch(module: nn.Module, name: str) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda module, inputs, found: keep(name, found))

    yield watch(net.backbone.patch_embed, "patch_embed")
    for i, stage in enumerate(net.backbone.layers):
        yield from (watch(block, f"stage{i}.block{j}") for j, block in enumerate(stage.blocks))
        yield watch(stage.downsample, f"stage{i}.downsample")
    for i, layer in enumerate(net.transformer.decoder.layers):
        yield watch(layer.cross_attn, f"decoder{i}.cross_attn")
        yield watch(layer, f"decoder{i}")
    yield watch(net.transformer.reference_points, "init_reference")


def published_net() -> ViDT:
    """Loaded from a file's whole content as the reference saves it, projectors included."""
    net = create_vidt("vidt_swin_nano")
    load_vidt_weights(net, {"model": reference_weights("student_tensors")}, where="published.pth")
    return net.eval()


@pytest.fixture(scope="module")
def run() -> Run:
    net, seen = published_net(), {}
    handles = list(record(net, seen))
    output = net(*reference_images())
    for handle in handles:
        handle.remove()
    return Run(net, output, seen)


def check(name: str, found: Tensor, facts: dict[str, Any], tolerance: float) -> None:
    summary = recipe.summary(name, found.detach().numpy())
    assert summary["shape"] == facts["shape"], name
    assert np.abs(np.subtract(summary["first8"], facts["first8"])).max() < tolerance, name
    # each element's error, were they independent
    assert abs(summary["dot"] - facts["dot"]) / found.numel() ** 0.5 < tolerance, name
    assert abs(summary["absmax"] - facts["absmax"]) < tolerance, name


def test_everything_on_the_way_is_the_references(run: Run) -> None:
    facts = reference()["A.f32"]
    seen = dict(run.seen)
    seen["vidt.patch_embed"] = seen["vidt.patch_embed"].permute(0, 3, 1, 2)
    seen["vidt.init_reference"] = seen["vidt.init_reference"].sigmoid().expand(2, -1, -1)
    seen["vidt.inter_references"] = run.output.boxes
    assert seen.keys() == facts["intermediate"].keys()
    for name, summary in facts["intermediate"].items():
        check(name, seen[name], summary, FLOAT32)
    tokens = {f"patch{i}": level for i, level in enumerate(run.output.patches)}
    tokens |= {"body_det_token": run.output.body_det, "neck_det_token": run.output.neck_det}
    for name, value in tokens.items():
        check(f"vidt.{name}", value, facts["distil_tokens"][f"{name}_before_projection"], FLOAT32)


def test_maps_of_the_body_are_the_references(run: Run) -> None:
    with torch.no_grad():
        maps, det, positions = run.net.backbone(*reference_images())
    found = {f"feature{i}": level for i, level in enumerate(maps)}
    found |= {"det_tgt": det.transpose(1, 2), "det_pos": positions.transpose(1, 2)}
    assert found.keys() == reference()["A.f32"]["backbone"].keys()
    for name, value in found.items():
        check(f"vidt.{name}", value, reference()["A.f32"]["backbone"][name], 2e-5)


def test_predictions_are_the_references(run: Run) -> None:
    output = run.output
    for name, found, tolerance in (
        ("pred_logits", output.logits[-1], FLOAT32),
        ("pred_boxes", output.boxes[-1], 1e-5),
        ("aux_boxes", output.boxes[:-1], 1e-5),
        ("body_det_token", output.body_det, 2e-5),
        ("patch3_before_projection", output.patches[3], 2e-5),
        ("neck_det_last_layer", output.neck_det[-1], FLOAT32),
    ):
        expected = torch.from_numpy(ARRAYS[f"A.f32.{name}"])
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=tolerance)
    assert torch.equal(output.neck_det[0], output.body_det)
    for layer, facts in enumerate(reference()["A.f32"]["aux"]):
        check(f"vidt.aux{layer}.logits", output.logits[layer], facts["pred_logits"], FLOAT32)
        check(f"vidt.aux{layer}.boxes", output.boxes[layer], facts["pred_boxes"], 1e-5)


def test_in_double_precision_hardly_a_difference_is_left() -> None:
    """What is left in float32 is rounding: the same network in float64 is the reference's to nine digits."""
    images, mask = reference_images()
    with torch.no_grad():
        output = published_net().double()(images.double(), mask)
    facts = reference()["A.f64"]
    check("vidt.logits", output.logits[-1], facts["pred_logits"], 1e-9)
    check("vidt.boxes", output.boxes[-1], facts["pred_boxes"], 1e-9)


def test_gradients_are_the_references(run: Run) -> None:
    """Of the weighted total with VkD's term, padding counted as there; and the same parameters have none."""
    projectors = TokenProjectors(NODES, 256, 256, kind="matrix_exp")
    weights = reference_weights("student_tensors")
    projectors.load_state_dict({name: value for name, value in weights.items() if "projector" in name})
    teacher = create_vidt("vidt_swin_nano").eval()
    load_vidt_weights(teacher, reference_weights("teacher_tensors"), where="teacher.pth")
    with torch.no_grad():
        taught = teacher_tokens(whole(teacher(*reference_images())), NODES)
    output = whole(run.output)
    terms = DetectionCriterion()(output, reference_targets())
    total = sum(terms.values()) + 4 * detection_feature_loss(projectors(output.nodes), taught, eps=0)
    facts = reference()["A.f32"]
    assert total.item() == pytest.approx(facts["loss_total_weighted"], rel=1e-5)
    total.backward()
    named = dict(run.net.named_parameters(remove_duplicate=False))
    without = {name for name, parameter in named.items() if parameter.grad is None}
    assert without == set(facts["params_without_grad"])
    assert without == {name for name, parameter in named.items() if not parameter.requires_grad}
    for name, norm in facts["grad_norms_of_total"].items():
        if norm is not None and name in named:
            assert named[name].grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-5), name


# Summaries of the official implementation's outputs with all three optional parts, at two small images: (l2, dot).
OPTIONAL = {
    "logits": (622.5100703, 776.4564984),
    "boxes": (19.9450270, -7.1573024),
    "ious": (2.6106813, -4.6645751),
    "iou_aux0": (4.5311961, 1.5536904),
    "token0": (89.7291033, 36.4405435),  # coarse to fine, as its neck counts levels behind the fusion
    "token1": (159.8616571, 270.7159302),
    "token2": (311.7307027, -190.5994059),
    "token3": (617.3435019, 296.5996156),
}


def kind_of(name: str, value: Tensor) -> str:
    """The recipe's kind of a tensor with this name."""
    if "embed" in name.split(".")[-1] or "det_token" in name or "bias_table" in name:
        return "embed"
    if value.ndim > 1:
        return "weight"
    parent = name.rpartition(".")[0]
    if "norm" in parent or parent in {"tgt_proj.1", "query_pos_proj.1"}:
        return "norm_weight" if name.endswith("weight") else "norm_bias"
    return "prior_bias" if parent.startswith(("class_embed", "transformer.token_embed")) else "bias"


def test_optional_parts_are_the_references() -> None:
    net = create_vidt("vidt_swin_nano", **EVERY_HEAD).eval()
    state = net.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            key = "vidt:" + name.removeprefix("transformer.decoder." if "bbox_embed" in name else "")
            state[name] = torch.from_numpy(recipe.param(key, value.shape, kind_of(name, value)))
    net.load_state_dict(state)
    images, mask = torch.zeros(2, 3, 64, 96), torch.ones(2, 64, 96, dtype=torch.bool)
    for i, (height, width) in enumerate(((64, 80), (48, 96))):
        images[i, :, :height, :width] = torch.from_numpy(recipe.image(f"vidt.heads.{i}", (3, height, width)))
        mask[i, :height, :width] = False
    with torch.no_grad():
        output = net(images, mask)
    assert output.ious is not None
    assert output.token_logits is not None
    found = {"logits": output.logits[-1], "boxes": output.boxes[-1], "ious": output.ious[-1]}
    found["iou_aux0"] = output.ious[0]
    found |= {f"token{i}": level for i, level in enumerate(reversed(output.token_logits))}
    for name, (l2, dot) in OPTIONAL.items():
        summary = recipe.summary(f"vidt.heads.{name}", found[name].numpy())
        assert summary["l2"] == pytest.approx(l2, rel=1e-6), name
        assert abs(summary["dot"] - dot) / found[name].numel() ** 0.5 < 2e-5, name
    assert [level.shape[1:3] for level in output.token_logits] == [level.shape[2:] for level in output.patches]


# shapes, precision, compiling


def tiny(name: str = "test_vidt", **options: Any) -> ViDT:
    torch.manual_seed(3)
    net = create_vidt(name, 5, **options)
    with torch.no_grad():
        for parameter in net.parameters():  # heads that start at zero would hide what is before them
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net


def canvas(*content: tuple[int, int], side: tuple[int, int] = (64, 96)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images, mask = torch.zeros(len(content), 3, *side), torch.ones(len(content), *side, dtype=torch.bool)
    for i, (height, width) in enumerate(content):
        images[i, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        mask[i, :height, :width] = False
    return images, mask


@pytest.mark.parametrize("name", ["test_vidt", "test_vidt2"])
@pytest.mark.parametrize("side", [(64, 64), (96, 96), (128, 64), (70, 91), (17, 160)])
@pytest.mark.parametrize("options", [{}, EVERY_HEAD], ids=["plain", "every head"])
def test_shapes_of_small_canvases(name: str, side: tuple[int, int], options: dict[str, bool]) -> None:
    net = tiny(name, **options)
    output = net(*canvas((side[0] - 16, side[1]), side, side=side))
    layers, queries, width = net.num_layers + 1, net.num_queries, net.width
    assert output.logits.shape == (layers, 2, queries, net.num_classes)
    assert output.boxes.shape == (layers, 2, queries, 4)
    assert output.body_det.shape == (2, queries, width)
    assert output.neck_det.shape == (layers, 2, queries, width)
    assert [level.shape for level in output.patches] == [
        (2, width, -(-side[0] // stride), -(-side[1] // stride)) for stride in STRIDES
    ]
    assert (output.ious is None, output.token_logits is None) == ((False, False) if options else (True, True))
    everything = [part for part in output if isinstance(part, Tensor)]
    everything += [*output.patches, *(output.token_logits or [])]
    assert all(part.isfinite().all() for part in everything)
    sum(part.square().mean() for part in everything).backward()
    waiting = {name for name, parameter in net.named_parameters() if parameter.requires_grad and parameter.grad is None}
    assert waiting == set()  # DistributedDataParallel waits for each of them
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters() if parameter.requires_grad)


def test_an_image_that_is_all_padding_gives_numbers() -> None:
    """Batches are filled up with such images."""
    net = tiny(**EVERY_HEAD).eval()
    filled = net(*canvas((64, 80), (0, 0)))
    alone = net(*canvas((64, 80)))
    assert all(part.isfinite().all() for part in filled if isinstance(part, Tensor))
    torch.testing.assert_close(filled.logits[:, :1], alone.logits, rtol=0, atol=1e-5)


def test_heads_start_where_the_reference_starts() -> None:
    net = create_vidt("test_vidt", 5)
    output = net(*canvas((64, 96)))
    chances = output.logits.sigmoid()
    assert 0.001 < chances.mean() < 0.1  # 0.01 was asked for
    sizes = output.boxes[..., 2:]
    torch.testing.assert_close(sizes, torch.full_like(sizes, -2.0).sigmoid())
    assert torch.equal(output.boxes[0, ..., :2], output.boxes[-1, ..., :2])


def test_bfloat16_autocast_runs_and_stays_close() -> None:
    net = tiny()
    images, mask = canvas((64, 80), (48, 96))
    net.eval()
    exact = net(images, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(images, mask)
    assert output.boxes.dtype == torch.float32
    assert (output.boxes - exact.boxes).abs().max() < 0.03
    assert (output.logits.float() - exact.logits).abs().mean() < 0.1
    (output.logits.float().sum() + output.boxes.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters() if parameter.requires_grad)


def test_evaluation_is_without_chance_and_training_is_not() -> None:
    net, (images, mask) = tiny(drop_path=0.5), canvas((64, 80))
    net.eval()
    assert torch.equal(net(images, mask).logits, net(images, mask).logits)
    net.train()
    assert not torch.equal(net(images, mask).logits, net(images, mask).logits)


def test_a_dropped_branch_is_dropped_for_the_whole_sample() -> None:
    block = tiny(drop_path=0.9).backbone.layers[3].blocks[0].train()
    patches, det = torch.randn(64, 2, 2, 128), torch.randn(64, 16, 128)
    context = (torch.zeros(64, 2, 2, 128), torch.zeros(64, 1, 1, 20))
    refined, refined_det = block(patches, det, torch.zeros(1, 16, 64), shifted_regions((2, 2), 7, det.device), context)
    still = (refined == patches).flatten(1).all(1)
    assert 0 < still.sum() < 64
    assert torch.equal(still, (refined_det == det).flatten(1).all(1))


@pytest.mark.filterwarnings("default")  # of the compiler's own modules
def test_every_part_is_one_graph() -> None:
    net, memory = tiny().eval(), level_memory(2, 64)
    stage, mask = net.backbone.layers[3], torch.zeros(2, 4, 6, dtype=torch.bool)
    for part, inputs in (
        (stage, (torch.randn(2, 2, 3, 128), torch.randn(2, 16, 128), torch.randn(1, 16, 64), mask)),
        (net.transformer, (torch.randn(2, 16, 64), torch.randn(1, 16, 64), memory)),
    ):
        compiled = torch.compile(part, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), part(*inputs), rtol=0, atol=1e-5)
    attention = net.transformer.decoder.layers[0].cross_attn
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    queries, boxes = torch.randn(2, 16, 64, requires_grad=True), torch.rand(2, 16, 4, 4)
    found, wanted = compiled(queries, boxes, memory), attention(queries, boxes, memory)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    slopes = [torch.autograd.grad(output.square().sum(), queries)[0] for output in (found, wanted)]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-5)


# parts


def level_memory(batch: int, width: int, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(0)
    sizes = ((5, 7), (3, 4), (2, 2), (1, 1))
    maps = [torch.randn(batch, width, *size, generator=generator, dtype=dtype) for size in sizes]
    return memory_of(maps, [torch.zeros(batch, *size, dtype=torch.bool) for size in sizes])


def read_by_grid_sample(values: Tensor, sizes: Any, places: Tensor, weights: Tensor) -> Tensor:
    """The same weighted sum through torch's own bilinear reading, one level after the other."""
    batch, _, heads, width = values.shape
    total: Any = 0
    for level, part in enumerate(torch.split(values, [height * width for height, width in sizes], 1)):
        maps = part.permute(0, 2, 3, 1).reshape(batch * heads, width, *sizes[level])
        grid = places[:, :, :, level].transpose(1, 2).flatten(0, 1) * 2 - 1
        seen = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)
        total = total + (seen * weight[:, None]).sum(-1)
    return total.view(batch, heads * width, -1).transpose(1, 2)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 3), st.floats(0.2, 3))
def test_places_are_read_bilinearly_and_zero_outside(seed: int, batch: int, reach: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    memory = level_memory(batch, 6, torch.float64)
    values = memory.tokens.unflatten(-1, (2, 3)).requires_grad_()
    places = (0.5 + reach * (torch.rand(batch, 3, 2, 4, 5, 2, generator=generator, dtype=torch.float64) - 0.5))
    weights = torch.rand(batch, 3, 2, 4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    inputs = (values, places.requires_grad_(), weights)
    found = sample(values, memory.sides, memory.starts, places, weights)
    expected = read_by_grid_sample(values, memory.sizes, places, weights)
    torch.testing.assert_close(found, expected)
    direction = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for own, theirs in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize("far", [1e12, -1e12, float("inf"), float("-inf"), float("nan")])
def test_places_far_away_read_nothing_and_break_nothing(far: float) -> None:
    memory = level_memory(1, 6)
    places = torch.full((1, 3, 2, 4, 5, 2), far)
    weights = torch.ones(1, 3, 2, 4, 5)
    found = sample(memory.tokens.unflatten(-1, (2, 3)), memory.sides, memory.starts, places, weights)
    assert found.isnan().all() if np.isnan(far) else (found == 0).all()


def test_padding_is_not_seen() -> None:
    torch.manual_seed(0)
    attention, memory = DeformableAttention(8, 4, 2, 3), level_memory(2, 8)
    padding = torch.rand(memory.padding.shape) < 0.5
    other = torch.where(padding[..., None], torch.full_like(memory.tokens, 7.0), memory.tokens)
    queries, boxes = torch.randn(2, 4, 8), torch.rand(2, 4, 4, 4)
    seen = [
        attention(queries, boxes, memory._replace(tokens=tokens, padding=padding)) for tokens in (memory.tokens, other)
    ]
    assert torch.equal(*seen)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_valid_grids_are_those_of_the_resized_mask(data: st.DataObject) -> None:
    side = data.draw(st.tuples(st.integers(8, 400), st.integers(8, 400)))
    sizes = data.draw(
        st.lists(st.tuples(st.integers(1, side[0]), st.integers(1, side[1])), min_size=1, max_size=3)
    )
    mask = torch.ones(len(sizes), *side, dtype=torch.bool)
    for i, (height, width) in enumerate(sizes):
        mask[i, :height, :width] = False
    grids = valid_grids(np.array(sizes, np.int64), side)
    for level, grid in enumerate(grids):
        assert grid.dtype == np.int64
        size = [-(-side[axis] // 4) for axis in range(2)]
        for _ in range(level + 1):
            size = [-(-length // 2) for length in size]
        resized = ~nearest_mask(mask, (size[0], size[1]))
        assert grid.tolist() == [[int(one[:, 0].sum()), int(one[0].sum())] for one in resized]
        assert int(resized.sum()) == int(grid.prod(1).sum())


def test_valid_grids_of_the_reference() -> None:
    grids = valid_grids(np.array(CONTENTS, np.int64), CANVAS)
    assert [grid.tolist() for grid in grids] == [
        [[24, 32], [28, 26]], [[12, 16], [14, 13]], [[6, 8], [7, 7]], [[4, 4], [4, 4]]
    ]
    tokens = [28 * 32, 14 * 16, 7 * 8, 4 * 4]
    padded = [1 - grid.prod(1).sum() / (2 * count) for grid, count in zip(grids, tokens, strict=True)]
    assert padded == pytest.approx(reference()["A.f32"]["padded_token_fraction"], abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(2, 7))
def test_windows_are_put_back_where_they_came_from(height: int, width: int, window: int) -> None:
    size = (height * window, width * window)
    tokens = torch.arange(2 * size[0] * size[1]).view(2, *size, 1)
    windows = split_windows(tokens, window)
    assert windows.shape == (2, height * width, window**2, 1)
    assert torch.equal(windows[0, 0, : window + 1, 0], torch.tensor([*range(window), size[1]]))
    assert torch.equal(join_windows(windows, window, size), tokens)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 7))
def test_tokens_carried_around_the_edge_see_no_others(height: int, width: int, window: int) -> None:
    padded = (height + -height % window, width + -width % window)
    place = torch.stack(torch.meshgrid(*map(torch.arange, padded), indexing="ij"), -1)
    shift = window // 2
    windows = split_windows(place.roll((-shift, -shift), (0, 1))[None], window)[0]
    carried = windows < shift  # these rows and columns are first again only behind the last ones
    apart = (carried[:, None] != carried[:, :, None]).any(-1)
    assert torch.equal(shifted_regions((height, width), window, torch.device("cpu")), apart)


def test_every_offset_in_a_window_has_its_own_bias() -> None:
    index = relative_index(3)
    place = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    offsets = (place[:, None] - place[None]).flatten(0, 1)
    assert len(set(zip(index.flatten().tolist(), map(tuple, offsets.tolist()), strict=True))) == 25
    assert sorted(set(index.flatten().tolist())) == list(range(25))


def test_logits_undo_the_sigmoid_and_stay_finite() -> None:
    share = torch.tensor([0.0, 1e-7, 0.2, 0.5, 0.999, 1.0])
    assert logit(share).abs().max() < 11.6
    torch.testing.assert_close(logit(share)[2:5].sigmoid(), share[2:5])


# errors


def test_errors_name_what_was_expected() -> None:
    with pytest.raises(ConfigError, match="'vidt_swin_huge', expected one of vidt_swin_nano, "):
        create_vidt("vidt_swin_huge")
    for options, message in (
        ({"width": 100}, "found width 100, expected a multiple of 32 and of 8 heads"),
        ({"num_queries": 0}, "found num_queries 0, expected at least 1"),
        ({"num_layers": 0}, "found num_layers 0"),
        ({"drop_path": 1.0}, r"found drop_path 1.0, expected a number in \[0, 1\)"),
        ({"heads": (1, 2, 4, 5)}, "found 5 heads in stage 4, expected a divisor of its 128 channels"),
    ):
        with pytest.raises(ConfigError, match=message):
            ViDT(dataclasses.replace(create_vidt("test_vidt").config, **options))
    with pytest.raises(ConfigError, match="found num_classes 0"):
        create_vidt("test_vidt", 0)


def test_names_are_all_built() -> None:
    assert {name for name in VIDT_NAMES if name.startswith("test")} == {"test_vidt", "test_vidt2"}
    small, large = (sum(p.numel() for p in create_vidt(name, 11).parameters()) for name in VIDT_NAMES[-2:])
    assert small < large < 2_000_000
