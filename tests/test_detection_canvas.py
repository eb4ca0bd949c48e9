"""Canvases: what a detector says about an image is its own affair, whatever else is in the batch or in the padding."""

import copy
import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from detection_samples import CANVAS, CONTENTS, random_targets, reference_images, reference_net
from reference import recipe
from torch import Tensor

from vkd_cache.detection import ViDT, create_vidt, valid_grids
from vkd_cache.detection.canvas import (
    NODES,
    PATCHES,
    CanvasBatch,
    DetectorOutput,
    compile_by_canvas,
    normalise_canvas,
    padding_mask,
    run_by_canvas,
    teacher_tokens,
)
from vkd_cache.detection.criterion import DetectionCriterion
from vkd_cache.detection.distillation import detection_feature_loss
from vkd_cache.errors import ConfigError
from vkd_cache.tokens import Tokens, join_tokens, tokens_from_maps, tokens_from_sequences

VIEWS = np.array([[100, 128], [60, 200], [128, 90], [64, 256], [17, 9]], np.int64)
CANVASES = np.array([[128, 128], [64, 256], [128, 128], [64, 256], [64, 64]], np.int64)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@functools.cache
def net() -> ViDT:
    torch.manual_seed(0)
    return create_vidt("test_vidt", num_classes=7, iou_aware=True, token_label=True).eval()


def batch_of(images: list[int], padding: float = 0.0) -> CanvasBatch:
    """Some of five images, [0, 1], with `padding` around their content."""
    height, width = CANVASES[images].max(0).tolist()
    pixels = torch.full((len(images), 3, height, width), padding)
    for row, image in enumerate(images):
        size = VIEWS[image].tolist()
        draw = torch.Generator().manual_seed(image)
        pixels[row, :, : size[0], : size[1]] = torch.rand(3, *size, generator=draw)
    return CanvasBatch(images=pixels, view_size=VIEWS[images], canvas=CANVASES[images])


@functools.cache
def run(images: tuple[int, ...]) -> DetectorOutput:
    with torch.no_grad():
        return run_by_canvas(net(), normalise_canvas(batch_of(list(images)), MEAN, STD))


def per_image(output: DetectorOutput, name: str, rows: Tensor | None = None) -> list[Tensor]:
    return list(torch.split(output.nodes[name] if rows is None else rows, output.grids[name].prod(1).tolist()))


def assert_same_image(one: DetectorOutput, i: int, other: DetectorOutput, j: int) -> None:
    near = {"rtol": 1e-4, "atol": 2e-5}  # products of other sizes add up in another order
    assert one.ious is not None and other.ious is not None
    for mine, theirs in ((one.logits, other.logits), (one.boxes, other.boxes), (one.ious, other.ious)):
        torch.testing.assert_close(mine[:, i], theirs[:, j], **near)
    for name in NODES:
        assert one.grids[name][i].tolist() == other.grids[name][j].tolist()
        torch.testing.assert_close(per_image(one, name)[i], per_image(other, name)[j], **near)
    assert one.token_logits is not None and other.token_logits is not None
    for name in PATCHES:
        labels = [per_image(side, name, (side.token_logits or {})[name]) for side in (one, other)]
        torch.testing.assert_close(labels[0][i], labels[1][j], **near)


@pytest.mark.parametrize("images", [(0, 1, 2, 3, 4), (3, 2, 4, 1, 0), (1, 2), (2, 0)])
def test_no_batch_mate_changes_an_image(images: tuple[int, ...]) -> None:
    together = run(images)
    for row, image in enumerate(images):
        assert_same_image(together, row, run((image,)), 0)


def test_a_canvas_of_ones_own_matters() -> None:
    """What the law above protects from: the same content with more padding gives other tokens (GroupNorm)."""
    batch = normalise_canvas(batch_of([0]), MEAN, STD)
    wider = torch.nn.functional.pad(batch.images, (0, 128))
    with torch.no_grad():
        other = run_by_canvas(
            net(), CanvasBatch(images=wider, view_size=batch.view_size, canvas=np.array([[128, 256]], np.int64))
        )
    assert (other.nodes["patch_1"] - run((0,)).nodes["patch_1"]).abs().max() > 1e-2


@pytest.mark.filterwarnings("default")  # of the compiler's own modules
def test_compiled_each_canvas_is_a_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of symbolic sizes, whose tracing takes many minutes."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 8)  # put back, whatever is set
    images = [0, 2, 4]
    compiled, sizes = copy.deepcopy(net()), []
    compile_method = compiled.compile
    monkeypatch.setattr(compiled, "compile", lambda **how: compile_method(backend=graphs, fullgraph=True, **how))

    def graphs(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        sizes.append([value for value in inputs if not isinstance(value, Tensor)])
        return graph.forward

    counters.clear()
    compile_by_canvas(compiled)
    with torch.no_grad():
        found = run_by_canvas(compiled, normalise_canvas(batch_of(images), MEAN, STD))
        run_by_canvas(compiled, normalise_canvas(batch_of(images), MEAN, STD))
    assert sizes == [[], []] and not counters["graph_break"]
    for i in range(len(images)):
        assert_same_image(found, i, run(tuple(images)), i)


def test_padding_is_zero_after_normalisation_whatever_it_was() -> None:
    clean, dirty = (normalise_canvas(batch_of([0, 1, 4], padding), MEAN, STD) for padding in (0.0, 0.7))
    assert torch.equal(clean.images, dirty.images)
    mask = padding_mask(VIEWS[[0, 1, 4]], (128, 256), torch.device("cpu"))
    for row, size in enumerate(VIEWS[[0, 1, 4]].tolist()):
        content = clean.images[row, :, : size[0], : size[1]]
        assert not mask[row, : size[0], : size[1]].any()
        assert int((~mask[row]).sum()) == size[0] * size[1]
        expected = (batch_of([0, 1, 4]).images[row, :, : size[0], : size[1]] - MEAN[:, None, None]) / STD[:, None, None]
        torch.testing.assert_close(content, expected)
    assert not clean.images.masked_select(mask[:, None]).any()


def test_nodes_hold_the_valid_tokens_in_the_order_of_the_caches() -> None:
    """Against the network's own maps, through the functions that a teacher's tokens are documented by."""
    batch = normalise_canvas(batch_of([0, 2]), MEAN, STD)
    with torch.no_grad():
        raw = net()(batch.images, padding_mask(batch.view_size, (128, 128), torch.device("cpu")))
    output = run((0, 2))
    grids = valid_grids(batch.view_size, (128, 128))
    expected: dict[str, Tokens] = {
        name: tokens_from_maps(maps, grid) for name, maps, grid in zip(PATCHES, raw.patches, grids, strict=True)
    }
    expected["body_det"] = tokens_from_sequences(raw.body_det, (1, 16))
    expected["neck_det"] = tokens_from_sequences(raw.neck_det.transpose(0, 1).flatten(1, 2), (3, 16))
    tokens = teacher_tokens(output, NODES)
    for name in NODES:
        for field in ("values", "total", "squares"):
            assert torch.equal(getattr(tokens[name], field), getattr(expected[name], field)), (name, field)
        assert tokens[name].grid.tolist() == expected[name].grid.tolist() == output.grids[name].tolist()
        assert tokens[name].offsets.tolist() == expected[name].offsets.tolist()
    layers = output.nodes["neck_det"].view(2, 3, 16, 64)
    assert torch.equal(layers[:, 0].flatten(0, 1), output.nodes["body_det"])


def test_teacher_tokens_of_a_batch_are_those_of_its_images() -> None:
    together = teacher_tokens(run((0, 1, 4)), ["patch_2", "neck_det"])
    assert together.keys() == {"patch_2", "neck_det"}
    for name, tokens in together.items():
        alone = join_tokens([teacher_tokens(run((image,)), [name])[name] for image in (0, 1, 4)])
        torch.testing.assert_close(tokens.values, alone.values, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(tokens.total, alone.total, rtol=1e-4, atol=1e-3)
        assert not tokens.values.requires_grad


def test_what_lies_in_the_padding_changes_no_loss() -> None:
    """Not even numbers that are none; the network reads its mask and the valid tokens alone leave it."""
    clean = batch_of([0, 1, 4])
    wanted = random_targets(torch.Generator().manual_seed(0), (2, 0, 1), 7)
    teacher = teacher_tokens(run((0, 1, 4)), NODES)
    student = create_vidt("test_vidt", num_classes=7, iou_aware=True, token_label=True).eval()
    losses = []
    for batch in (clean, dataclasses.replace(clean, images=batch_of([0, 1, 4], float("nan")).images)):
        with torch.no_grad():
            output = run_by_canvas(student, normalise_canvas(batch, MEAN, STD))
            feature = detection_feature_loss(output.nodes, teacher)
        losses.append({**DetectionCriterion()(output, wanted), "feature": feature})
    assert len(losses[0]) == 6
    for name, value in losses[0].items():
        assert value.isfinite() and losses[1][name].item() == value.item()


def test_gradients_reach_the_network_from_every_canvas() -> None:
    student = create_vidt("test_vidt", num_classes=7)
    output = run_by_canvas(student, normalise_canvas(batch_of([0, 1]), MEAN, STD))
    loss = output.nodes["patch_1"].square().sum() + output.logits.square().sum()
    loss.backward()
    gradient = student.get_parameter("input_proj.0.0.weight").grad
    assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0


def test_the_references_batch_is_a_batch_of_one_canvas() -> None:
    """Predictions of case A through canvases, and the share of its tokens that is padding there."""
    images, _ = reference_images()
    sizes = np.array(CONTENTS, np.int64)
    batch = CanvasBatch(images=images, view_size=sizes, canvas=np.tile(np.array(CANVAS, np.int64), (2, 1)))
    with torch.no_grad():
        output = run_by_canvas(reference_net("student_tensors"), batch)
    facts = np.load(recipe.__file__.replace("recipe.py", "vidt_outputs.npz"))
    np.testing.assert_allclose(output.logits[-1].numpy(), facts["A.f32.pred_logits"], atol=2e-4)
    np.testing.assert_allclose(output.boxes[-1].numpy(), facts["A.f32.pred_boxes"], atol=1e-5)
    dense = [2 * (224 // stride) * (256 // stride) for stride in (8, 16, 32)]
    padded = [1 - output.grids[name].prod(1).sum() / whole for name, whole in zip(PATCHES, dense, strict=False)]
    np.testing.assert_allclose(padded, [0.1651785671710968, 0.1651785671710968, 0.1339285671710968], atol=1e-6)


@pytest.mark.parametrize(("view", "canvas"), [([129, 10], [128, 128]), ([10, 10], [128, 192]), ([10, 129], [128, 128])])
def test_what_does_not_fit_its_canvas_is_refused(view: list[int], canvas: list[int]) -> None:
    images = torch.zeros(1, 3, 128, 128)
    batch = CanvasBatch(images=images, view_size=np.array([view]), canvas=np.array([canvas]))
    with pytest.raises(ConfigError, match=r"1 images of 128x128 px"):
        run_by_canvas(net(), batch)


def test_unknown_nodes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"found patch_5, a detector has patch_1"):
        teacher_tokens(run((0,)), ["patch_1", "patch_5"])
