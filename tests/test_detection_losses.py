"""Boxes, matching, the detector's own losses and its results: laws, and the reference's numbers."""

import itertools

import numpy as np
import pytest
import torch
from detection_samples import (
    REFERENCE,
    random_boxes,
    random_output,
    random_targets,
    reference,
    reference_run,
    reference_targets,
    targets,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from vkd_cache.detection.boxes import box_iou, cxcywh_from_xyxy, generalised_box_iou, xyxy_from_cxcywh
from vkd_cache.detection.criterion import DetectionCriterion
from vkd_cache.detection.focal import focal_losses
from vkd_cache.detection.matcher import match, match_layers, padded_targets, pair_costs
from vkd_cache.detection.postprocess import detections, to_coco
from vkd_cache.detection.token_labels import token_shares
from vkd_cache.errors import ConfigError

SEEDS = st.integers(0, 2**31)
LOSSES = {"loss_ce": "class", "loss_bbox": "box", "loss_giou": "giou"}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# boxes


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_boxes_formats_and_overlaps(seed: int) -> None:
    first, second = random_boxes(generator(seed), 2, 5)
    corners = xyxy_from_cxcywh(first), xyxy_from_cxcywh(second)
    torch.testing.assert_close(cxcywh_from_xyxy(corners[0]), first)
    for one, other in itertools.product(range(5), range(5)):
        (x0, y0, x1, y1), (u0, v0, u1, v1) = corners[0][one].tolist(), corners[1][other].tolist()
        common = max(0.0, min(x1, u1) - max(x0, u0)) * max(0.0, min(y1, v1) - max(y0, v0))
        union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - common
        around = (max(x1, u1) - min(x0, u0)) * (max(y1, v1) - min(y0, v0))
        pair = corners[0][one], corners[1][other]
        assert box_iou(*pair).item() == pytest.approx(common / union, abs=1e-5)
        assert generalised_box_iou(*pair).item() == pytest.approx(common / union - 1 + union / around, abs=1e-5)
    every = generalised_box_iou(corners[0][:, None], corners[1][None])
    assert every.shape == (5, 5)
    torch.testing.assert_close(every.diagonal(), generalised_box_iou(*corners))
    torch.testing.assert_close(generalised_box_iou(corners[0], corners[0]), torch.ones(5))


def test_boxes_without_area_give_numbers_and_slopes() -> None:
    point, line = torch.tensor([0.3, 0.3, 0.3, 0.3]), torch.tensor([0.1, 0.3, 0.5, 0.3])
    for first, second in itertools.product((point, line, torch.tensor([0.0, 0.0, 1.0, 1.0])), repeat=2):
        moved = first.clone().requires_grad_()
        value = generalised_box_iou(moved, second) + box_iou(moved, second)
        value.backward()
        assert value.isfinite() and moved.grad is not None and moved.grad.isfinite().all()


# matching


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(1, 5), st.lists(st.integers(0, 6), min_size=1, max_size=3))
def test_no_assignment_is_cheaper(seed: int, queries: int, counts: list[int]) -> None:
    draw = generator(seed)
    logits = torch.randn(len(counts), queries, 3, generator=draw)
    boxes = random_boxes(draw, len(counts), queries)
    wanted = random_targets(draw, tuple(counts), 3)
    costs = pair_costs(logits[None], boxes[None], *padded_targets(wanted, logits.device))[0]
    for image, (chosen_queries, chosen_boxes) in enumerate(match(logits, boxes, wanted)):
        cost, size = costs[image].double(), min(queries, counts[image])
        assert len(chosen_queries) == len(set(chosen_boxes.tolist())) == size
        assert chosen_queries.tolist() == sorted(set(chosen_queries.tolist()))
        best = min(
            (
                sum(cost[query, box].item() for query, box in zip(some_queries, some_boxes, strict=True))
                for some_queries in itertools.combinations(range(queries), size)
                for some_boxes in itertools.permutations(range(counts[image]), size)
            ),
            default=0.0,
        )
        assert cost[chosen_queries, chosen_boxes].sum().item() == pytest.approx(best, abs=1e-6)


def test_a_cost_is_the_weighted_sum_of_three() -> None:
    logits, boxes = torch.tensor([[0.3, -2.0]]), torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    wanted = targets([[0.6, 0.5, 0.2, 0.2]], [1])
    cost = pair_costs(logits[None, None], boxes[None, None], *padded_targets([wanted], logits.device))
    probability = torch.tensor(-2.0).sigmoid().item()
    of_class = 0.25 * (1 - probability) ** 2 * -np.log(probability) - 0.75 * probability**2 * -np.log(1 - probability)
    overlap = 1 / 3  # half of each box is common, and together they fill the box around them
    assert cost.item() == pytest.approx(2 * of_class + 5 * 0.1 - 2 * overlap, abs=1e-5)


def test_predictions_that_are_no_numbers_are_matched_all_the_same() -> None:
    """A run that diverges is told so by its loss, not by scipy."""
    logits, boxes = torch.full((1, 4, 3), torch.nan), torch.full((1, 4, 4), torch.nan)
    [(queries, _)] = match(logits, boxes, [targets([[0.5, 0.5, 0.2, 0.2]] * 2, [0, 1])])
    assert len(queries) == 2


def test_half_precision_matches_like_its_float32_values() -> None:
    draw = generator(3)
    logits, boxes = torch.randn(2, 2, 9, 4, generator=draw).half(), random_boxes(draw, 2, 2, 9).half()
    wanted = random_targets(draw, (3, 2), 4)
    both = match_layers(logits, boxes, wanted), match_layers(logits.float(), boxes.float(), wanted)
    for half, full in zip(*(itertools.chain(*layers) for layers in both), strict=True):
        assert [half[0].tolist(), half[1].tolist()] == [full[0].tolist(), full[1].tolist()]


# the reference's numbers


@pytest.mark.parametrize("case", ["A", "one_empty", "both_empty"])
def test_every_layer_has_the_losses_of_the_reference(case: str) -> None:
    facts = reference()["A.f32" if case == "A" else f"targets.{case}"]["loss"]
    output, wanted = reference_run("student_tensors"), reference_targets(case)
    found = DetectionCriterion().per_layer(output, wanted)
    for theirs, ours in LOSSES.items():
        # their final prediction has the bare name, the body's own is number 0
        expected = [facts[f"{theirs}_{layer}"] for layer in range(6)] + [facts[theirs]]
        torch.testing.assert_close(found[ours], torch.tensor(expected), rtol=2e-5, atol=2e-6)
    total = sum(DetectionCriterion()(output, wanted).values())
    weights = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    expected_total = sum(weight * v for key, weight in weights.items() for name, v in facts.items() if key in name)
    assert total.item() == pytest.approx(expected_total, rel=1e-5)
    if case == "A":
        weighted = reference()["A.f32"]["loss_total_weighted"] - 4 * facts["loss_distil"]
        assert total.item() == pytest.approx(weighted, rel=1e-5)


def test_every_layer_is_matched_like_the_reference() -> None:
    output, wanted = reference_run("student_tensors"), reference_targets()
    facts = reference()["A.f32"]["matcher_indices"]
    found = match_layers(output.logits, output.boxes, wanted)
    for layer, expected in zip(found, [*facts["aux"], facts["final"]], strict=True):
        assert [[queries.tolist(), boxes.tolist()] for queries, boxes in layer] == expected


def test_results_are_those_of_the_reference() -> None:
    facts = np.load(REFERENCE / "vidt_outputs.npz")
    logits, boxes = (torch.from_numpy(facts[f"A.f32.pred_{what}"]) for what in ("logits", "boxes"))
    found = detections(logits, boxes, [(640, 480), (500, 375)])
    for i, image in enumerate(found):
        for what in ("scores", "labels", "boxes"):
            torch.testing.assert_close(
                getattr(image, what), torch.from_numpy(facts[f"A.post{i}.{what}"]), rtol=1e-5, atol=1e-4
            )
    results = to_coco(found, [7, 9])
    assert [result["image_id"] for result in results] == [7] * 100 + [9] * 100
    assert all(type(value) in (int, float) for row in results for value in (row["category_id"], *row["bbox"]))
    corners = found[1].boxes[3].tolist()
    expected = [*corners[:2], corners[2] - corners[0], corners[3] - corners[1]]
    assert results[103]["bbox"] == pytest.approx(expected, rel=1e-6)
    assert results[103]["score"] == pytest.approx(found[1].scores[3].item())


def test_fewer_predictions_than_a_hundred_are_all_results() -> None:
    [found] = detections(torch.randn(1, 3, 2, dtype=torch.float16), torch.full((1, 3, 4), 0.5), np.array([[10, 20]]))
    assert len(found.scores) == 6 and found.scores.dtype == torch.float32
    assert bool((found.scores.diff() <= 0).all())
    torch.testing.assert_close(found.boxes, torch.tensor([2.5, 5.0, 7.5, 15.0]).expand(6, 4))


# laws of the losses


def test_focal_loss_of_hard_targets_is_the_papers() -> None:
    logits = torch.linspace(-6, 6, 13)
    present, absent = focal_losses(logits, torch.ones(13)), focal_losses(logits, torch.zeros(13))
    probs = logits.double().sigmoid()
    torch.testing.assert_close(present.double(), -0.25 * (1 - probs) ** 2 * probs.log(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(absent.double(), -0.75 * probs**2 * (1 - probs).log(), rtol=1e-4, atol=1e-7)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.permutations(range(3)))
def test_the_order_of_the_images_does_not_matter(seed: int, order: list[int]) -> None:
    draw = generator(seed)
    output, wanted = random_output(draw, heads=True), random_targets(draw, (2, 0, 3), 4)
    rows = {}
    for name, labels in (output.token_logits or {}).items():
        parts = torch.split(labels, output.grids[name].prod(1).tolist())
        rows[name] = torch.cat([parts[i] for i in order])
    moved = type(output)(
        logits=output.logits[:, order],
        boxes=output.boxes[:, order],
        ious=None if output.ious is None else output.ious[:, order],
        token_logits=rows,
        nodes={},
        grids={name: grid[order] for name, grid in output.grids.items()},
    )
    before = DetectionCriterion()(output, wanted)
    after = DetectionCriterion()(moved, [wanted[i] for i in order])
    assert before.keys() == {"class", "box", "giou", "iou", "token_label"}
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (9, 0)])  # 9: more boxes than queries
def test_losses_and_gradients_are_numbers_whatever_there_is_to_find(counts: tuple[int, int]) -> None:
    draw = generator(1)
    output, wanted = random_output(draw, images=2, heads=True), random_targets(draw, counts, 4)
    terms = DetectionCriterion()(output, wanted)
    sum(terms.values(), torch.zeros(())).backward()
    leaves = [output.logits, output.boxes, output.ious, *(output.token_logits or {}).values()]
    for leaf in leaves:
        assert leaf is not None and leaf.grad is not None and leaf.grad.isfinite().all()
    assert all(value.isfinite() and value.dtype == torch.float32 for value in terms.values())
    assert (terms["box"].item() == 0) == (counts == (0, 0))


def test_weights_are_weights() -> None:
    output, wanted = random_output(generator(2), heads=True), random_targets(generator(4), (1, 2, 2), 4)
    ones = DetectionCriterion(class_weight=1, box_weight=1, giou_weight=1, iou_weight=1, token_weight=1)
    plain = ones(output, wanted)
    usual = DetectionCriterion()(output, wanted)
    for name, weight in {"class": 2, "box": 5, "giou": 2, "iou": 2, "token_label": 2}.items():
        torch.testing.assert_close(usual[name], plain[name] * weight)
    for name, each in DetectionCriterion().per_layer(output, wanted).items():
        torch.testing.assert_close(each.sum(), plain[name])


def test_the_iou_head_learns_the_overlap_and_moves_no_box() -> None:
    draw = generator(5)
    output, wanted = random_output(draw, layers=1, images=1, heads=True), random_targets(draw, (2,), 4)
    found = DetectionCriterion().per_layer(output, wanted)["iou"]
    [(queries, boxes)] = match(output.logits[0].detach(), output.boxes[0].detach(), wanted)
    pairs = output.boxes[0, 0, queries].detach(), wanted[0].boxes[boxes]
    overlap = box_iou(*(xyxy_from_cxcywh(side) for side in pairs))
    assert output.ious is not None
    expected = F.binary_cross_entropy_with_logits(output.ious[0, 0, queries, 0], overlap, reduction="sum") / 2
    torch.testing.assert_close(found[0], expected)
    [slope] = torch.autograd.grad(found[0], output.boxes, allow_unused=True)
    assert slope is None


def test_token_labels_are_shares_of_the_area_and_the_first_box_wins() -> None:
    image = targets([[0.25, 0.5, 0.5, 1.0], [0.5, 0.25, 1.0, 0.5]], [2, 3])  # left half; top half
    shares = token_shares(image, (2, 4), 4).view(2, 4, 4)
    assert shares[..., 2].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert shares[..., 3].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert shares[..., 0].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]  # any box
    quarter = token_shares(targets([[0.25, 0.25, 0.5, 0.5]], [0]), (1, 1), 3)
    assert quarter.tolist() == [[0.25, 0, 0]]
    assert token_shares(targets([], []), (3, 2), 5).tolist() == [[0.0] * 5] * 6


def test_token_label_loss_by_hand() -> None:
    """Focal: mean over an image's tokens, sum over classes; dice: one share for each image; both summed over levels."""
    draw = generator(8)
    output, wanted = random_output(draw, images=2, heads=True), random_targets(draw, (2, 1), 4)
    expected = 0.0
    assert output.token_logits is not None
    for name, rows in output.token_logits.items():
        grid = output.grids[name].tolist()
        for image, logits in enumerate(torch.split(rows.detach().double(), [h * w for h, w in grid])):
            shares = token_shares(wanted[image], grid[image], 4).double()
            expected += focal_losses(logits, shares).sum().item() / len(logits)
            probs = logits.sigmoid()
            expected += 1 - (2 * (probs * shares).sum().item() + 1) / (probs.sum() + shares.sum() + 1).item()
    found = DetectionCriterion()(output, wanted)["token_label"].item()
    assert found == pytest.approx(2 * expected / 3, rel=1e-5)  # weight 2, three boxes


def test_errors_say_what_is_wrong() -> None:
    output = random_output(generator(0), images=1)
    with pytest.raises(ConfigError, match=r"boxes of 2 images, predictions for 1"):
        DetectionCriterion()(output, [targets([], [])] * 2)
    for label in (-1, 4):
        with pytest.raises(ConfigError, match=rf"found labels \[{label}\], expected 0\.\.3"):
            DetectionCriterion()(output, [targets([[0.5, 0.5, 0.1, 0.1]], [label])])


def test_targets_may_be_half_precision_predictions_too() -> None:
    """Under autocast the heads emit half floats; the losses are those of the same numbers in float32."""
    draw = generator(6)
    output, wanted = random_output(draw), random_targets(draw, (2, 1, 0), 4)
    half = {"logits": output.logits.detach().bfloat16(), "boxes": output.boxes.detach().bfloat16()}
    kept = {"nodes": {}, "grids": {}}
    with torch.autocast("cpu", torch.bfloat16):
        found = DetectionCriterion()(type(output)(**half, **kept), wanted)
    full: dict[str, Tensor] = {name: value.float() for name, value in half.items()}
    for name, value in DetectionCriterion()(type(output)(**full, **kept), wanted).items():
        assert found[name].item() == value.item()
