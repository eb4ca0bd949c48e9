"""Token distillation: the reference's terms, samples without bias, exact statistics, and two processes as one."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detection_samples import random_output, random_targets, reference, reference_run, reference_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from vkd_cache.detection.canvas import NODES, teacher_tokens
from vkd_cache.detection.criterion import DetectionCriterion
from vkd_cache.detection.distillation import TokenProjectors, detection_feature_loss
from vkd_cache.detection.moments import centred_tokens, stored_moments
from vkd_cache.detection.sampling import sample_places
from vkd_cache.errors import ConfigError
from vkd_cache.losses import FEATURE_LOSSES
from vkd_cache.normalisation import normalise_features
from vkd_cache.tokens import Tokens, tokens_from_rows

GRID = np.array([[2, 3], [1, 2]], np.int64)  # 6 and 2 valid tokens
SEEDS = st.integers(0, 2**31)


def rows(seed: int, channels: int = 4, grid: np.ndarray = GRID) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    spread = 0.5 + torch.rand(channels, generator=draw, dtype=torch.float64)
    return 0.7 + spread * torch.randn(int(grid.prod(1).sum()), channels, generator=draw, dtype=torch.float64)


def sampled(tokens: Tokens, places: tuple[tuple[int, ...], ...]) -> Tokens:
    index = np.array(list(itertools.chain(*places)), np.int64)
    return tokens.sampled(index, np.array([len(image) for image in places]))


def stored(tokens: Tokens, dtype: str) -> Tokens:
    """As a cache of that dtype holds them: symmetric int8 for each token, or half floats."""
    if dtype != "int8":
        return dataclasses.replace(tokens, values=tokens.values.to(getattr(torch, dtype)))
    scale = tokens.values.float().abs().amax(1, keepdim=True) / 127
    return dataclasses.replace(tokens, values=(tokens.values / scale).round().to(torch.int8), scale=scale)


# the reference


def reference_projectors() -> TokenProjectors:
    projectors = TokenProjectors(NODES, 256, 256, kind="matrix_exp")
    weights = reference_weights("student_tensors")
    projectors.load_state_dict({name: value for name, value in weights.items() if "projector" in name})
    return projectors


def test_the_terms_are_the_references_where_padding_counts_as_it_does_there() -> None:
    projectors = reference_projectors()
    student = projectors.project(reference_run("student_tensors").nodes)
    teacher = teacher_tokens(reference_run("teacher_tensors"), NODES)
    expected = dict(zip(NODES, reference()["A.f32"]["distil_terms_patch1-4_body_neck"], strict=True))
    for name, value in expected.items():
        term = detection_feature_loss({name: student[name]}, {name: teacher[name]}, eps=0)
        assert term.item() == pytest.approx(value, rel=1e-5)
    loss = detection_feature_loss(student, teacher)
    assert loss.item() == pytest.approx(reference()["A.f32"]["loss"]["loss_distil"], rel=1e-4)  # eps
    loss.backward()
    facts = reference()["A.f32"]["grad_of_loss_distil_alone_projectors"]
    for name, parameter in projectors.named_parameters():
        assert parameter.grad is not None
        # scale and bias learn nothing: the standardisation undoes them
        assert parameter.grad.norm().item() == pytest.approx(facts[name]["norm"], rel=1e-3, abs=1e-5)


# samples


@settings(deadline=None, max_examples=5)
@given(SEEDS, st.sampled_from(sorted(FEATURE_LOSSES)))
def test_the_mean_over_all_samples_is_the_loss_itself(seed: int, kind: str) -> None:
    tokens = tokens_from_rows(rows(seed), GRID)
    student = rows(seed + 1).requires_grad_()
    full = detection_feature_loss({"n": student}, {"n": tokens}, kind=kind)
    [slope] = torch.autograd.grad(full, student)
    chances = [itertools.combinations(range(6), 2), itertools.combinations(range(2), 1)]
    losses = [
        detection_feature_loss({"n": student}, {"n": sampled(tokens, places)}, kind=kind)
        for places in itertools.product(*chances)
    ]
    assert len({round(loss.item(), 9) for loss in losses}) > 1
    mean = torch.stack(losses).mean()
    torch.testing.assert_close(mean, full, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(mean, student)[0], slope, rtol=1e-9, atol=1e-12)


def test_the_statistics_of_a_sample_are_those_of_all_tokens() -> None:
    tokens = tokens_from_rows(rows(3), GRID)
    few = sampled(tokens, ((1, 4), (0,)))
    for part, whole_part in zip(stored_moments(few), stored_moments(tokens), strict=True):
        assert torch.equal(part, whole_part)
    _, exact = centred_tokens(tokens.values)
    torch.testing.assert_close(stored_moments(few).mean.double(), exact.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(stored_moments(few).deviation().double(), exact.deviation(), rtol=1e-5, atol=0)


def test_a_sample_of_everything_is_everything() -> None:
    tokens, student = tokens_from_rows(rows(4).float(), GRID), {"n": rows(5).float()}
    every = sampled(tokens, (tuple(range(6)), (0, 1)))
    assert detection_feature_loss(student, {"n": every}).item() == pytest.approx(
        detection_feature_loss(student, {"n": tokens}).item(), rel=1e-6
    )


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from(sorted(FEATURE_LOSSES)))
def test_the_loss_is_the_distance_of_standardised_tokens(seed: int, kind: str) -> None:
    teacher, student = rows(seed), rows(seed + 1)
    tokens = tokens_from_rows(teacher, GRID)
    sides = [normalise_features(side, "standardize", eps=1e-5) for side in (student, teacher)]
    expected = FEATURE_LOSSES[kind](*sides).mean()
    found = detection_feature_loss({"n": student}, {"n": tokens}, kind=kind)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    twice = detection_feature_loss({"n": student, "m": student}, {"m": tokens, "n": tokens}, kind=kind)
    torch.testing.assert_close(twice, 2 * found)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.floats(0.1, 50), st.floats(-20, 20))
def test_scale_and_shift_of_a_channel_do_not_matter(seed: int, scale: float, offset: float) -> None:
    """Within what the stored float32 sums resolve: a deviation's error grows with the square of mean / deviation."""
    teacher, student, shift = rows(seed), rows(seed + 1), offset * scale
    before = detection_feature_loss({"n": student}, {"n": tokens_from_rows(teacher, GRID)}, eps=0)
    moved = tokens_from_rows(teacher * scale + shift, GRID)
    after = detection_feature_loss({"n": student * scale - shift}, {"n": moved}, eps=0)
    torch.testing.assert_close(after, before, rtol=5e-4, atol=5e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_stored_types_give_nearly_the_same_loss(dtype: str, fraction: float) -> None:
    grid = np.array([[9, 11], [7, 6], [1, 5]], np.int64)
    teacher, student = rows(7, 32, grid).float(), rows(8, 32, grid).float()
    tokens = tokens_from_rows(teacher, grid)
    if fraction < 1:
        index = [sample_places(0, str(i), 0, "n", int(count), fraction) for i, count in enumerate(tokens.counts)]
        tokens = tokens.sampled(np.concatenate(index), np.array([len(places) for places in index]))
    expected = detection_feature_loss({"n": student}, {"n": tokens}).item()
    found = detection_feature_loss({"n": student}, {"n": stored(tokens, dtype)})
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-3)


def test_half_precision_students_and_autocast_change_nothing() -> None:
    tokens, student = tokens_from_rows(rows(1).half(), GRID), rows(2).bfloat16()
    plain = detection_feature_loss({"n": student.float()}, {"n": tokens})
    with torch.autocast("cpu", torch.bfloat16):
        assert detection_feature_loss({"n": student}, {"n": tokens}).item() == plain.item()


# channels that say nothing


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("constant", [0.0, 3.14159, -1e4])
def test_constant_channels_give_a_finite_loss_and_gradient(dtype: str, constant: float) -> None:
    teacher, student = rows(1, 6).float(), rows(2, 6).float()
    teacher[:, 0] = constant
    student[:, 1] = constant
    student.requires_grad_()
    exact = tokens_from_rows(teacher, GRID)  # the statistics of what the teacher emitted, not of what was stored
    loss = detection_feature_loss({"n": student}, {"n": stored(exact, dtype)})
    loss.backward()
    assert student.grad is not None and student.grad.isfinite().all()
    assert loss.item() < 2
    # a teacher's channel without spread asks for nothing else than the mean
    alone = detection_feature_loss({"n": student[:, :1]}, {"n": stored(tokens_from_rows(teacher[:, :1], GRID), dtype)})
    target = normalise_features(student[:, :1], "standardize", eps=1e-5)
    torch.testing.assert_close(alone, F.smooth_l1_loss(target, torch.zeros_like(target)))


def test_an_image_of_one_token_is_an_image() -> None:
    one = np.array([[1, 1]], np.int64)
    student = rows(1, 4, one).float().requires_grad_()
    loss = detection_feature_loss({"n": student}, {"n": tokens_from_rows(rows(2, 4, one).float(), one)})
    loss.backward()
    assert loss.item() == 0 and student.grad is not None and student.grad.isfinite().all()


# projectors


def test_projectors_are_orthogonal_and_learn() -> None:
    torch.manual_seed(0)
    projectors = TokenProjectors(("patch_1", "neck_det"), 3, 5)
    assert {name for name, _ in projectors.named_parameters()} == {
        f"{module}.{name}"
        for module in ("patch_projector_1", "neck_det_projector")
        for name in ("weight", "bias", "projector.directions")
    }
    nodes = {"patch_1": rows(1, 3).float(), "neck_det": rows(2, 3).float(), "body_det": rows(3, 3).float()}
    projected = projectors.project(nodes)
    assert projected.keys() == {"patch_1", "neck_det"}  # what has no projector stays out
    gram = [nodes["patch_1"] @ nodes["patch_1"].T, projected["patch_1"] @ projected["patch_1"].T]
    torch.testing.assert_close(*gram)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(projectors.project(nodes)["neck_det"], projected["neck_det"])
    teacher = {name: tokens_from_rows(rows(4, 5).float(), GRID) for name in projected}
    detection_feature_loss(projected, teacher).backward()
    for name, parameter in projectors.named_parameters():
        assert parameter.grad is not None and (parameter.grad.norm() > 1e-3) == name.endswith("directions")


def test_errors_say_what_does_not_fit() -> None:
    tokens = tokens_from_rows(rows(1), GRID)
    with pytest.raises(ConfigError, match=r"student gives a, the teacher b"):
        detection_feature_loss({"a": rows(2)}, {"b": tokens})
    with pytest.raises(ConfigError, match=r"n: found student tokens of shape \(7, 4\), expected \(8, 4\)"):
        detection_feature_loss({"n": rows(2)[:7]}, {"n": tokens})
    with pytest.raises(ConfigError, match="found 'huber', expected one of smooth_l1"):
        detection_feature_loss({"n": rows(2)}, {"n": tokens}, kind="huber")


# places


def test_places_are_a_function_of_what_they_are_for() -> None:
    """These numbers are in caches: they may never change."""
    assert sample_places(3, "000000000139", 2, "patch_1", 40, 0.2).tolist() == [0, 3, 17, 23, 27, 28, 36, 38]
    base = (3, "139", 2, "patch_1")
    again, *others = (
        sample_places(*given, 400, 0.1).tolist()
        for given in (base, (4, *base[1:]), (3, "138", *base[2:]), (3, "139", 1, "patch_1"), (*base[:3], "patch_2"))
    )
    assert again == sample_places(*base, 400, 0.1).tolist()
    assert all(again != other for other in others)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.floats(1e-3, 1), st.integers(0, 2**64 - 1), st.text(max_size=5))
def test_places_are_ascending_and_as_many_as_asked(count: int, fraction: float, seed: int, key: str) -> None:
    places = sample_places(seed, key, 1, "patch_4", count, fraction)
    assert places.dtype == np.int64 and len(places) == min(count, max(1, int(np.ceil(fraction * count))))
    assert (np.diff(places) > 0).all() and places[0] >= 0 and places[-1] < count


def test_every_subset_is_as_likely() -> None:
    """Chi-square over the 20 subsets of 3 places out of 6, seed fixed: 19 degrees of freedom, 99.9 % below 43.8."""
    draws = [tuple(sample_places(0, str(key), 0, "n", 6, 0.5).tolist()) for key in range(4000)]
    subsets = list(itertools.combinations(range(6), 3))
    counts = np.array([draws.count(subset) for subset in subsets])
    assert counts.sum() == 4000
    assert ((counts - 200) ** 2 / 200).sum() < 43.8


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="fraction"):
        sample_places(0, "k", 0, "n", 10, fraction)


# two processes


class Student(nn.Module):
    """One map for tokens and one for predictions; what every process has alike."""

    def __init__(self) -> None:
        super().__init__()
        self.projectors = TokenProjectors(("patch_1", "body_det"), 4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, nodes: dict[str, Tensor], logits: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return self.projectors.project(nodes), self.head(logits)


def seeded_student() -> Student:
    torch.manual_seed(1)
    student = Student()
    with torch.no_grad():
        student.head.weight.normal_()
    return student


COUNTS = ((2, 0, 3), (1,))  # boxes of the images of each process
GRIDS = (np.array([[2, 3], [1, 2], [3, 3]], np.int64), np.array([[2, 2]], np.int64))


def step(model: Callable[..., tuple[dict[str, Tensor], Tensor]], ranks: tuple[int, ...]) -> Tensor:
    """Loss of the images of some of the processes, as one batch."""
    outputs = [random_output(torch.Generator().manual_seed(rank), images=len(COUNTS[rank])) for rank in ranks]
    wanted = [random_targets(torch.Generator().manual_seed(9 + rank), COUNTS[rank], 4) for rank in ranks]
    grid = np.concatenate([GRIDS[rank] for rank in ranks])
    nodes = {
        name: torch.cat([rows(seed + rank, 4, GRIDS[rank]) for rank in ranks]).float()
        for name, seed in {"patch_1": 20, "body_det": 40}.items()
    }
    teacher = {
        "patch_1": tokens_from_rows(torch.cat([rows(60 + rank, 4, GRIDS[rank]) for rank in ranks]).float(), grid),
        "body_det": tokens_from_rows(torch.cat([rows(80 + rank, 4, GRIDS[rank]) for rank in ranks]).half(), grid),
    }
    teacher["patch_1"] = sampled(teacher["patch_1"], tuple((0, image[0] * image[1] - 1) for image in grid.tolist()))
    joined = dataclasses.replace(
        outputs[0],
        logits=torch.cat([output.logits for output in outputs], 1).detach(),
        boxes=torch.cat([output.boxes for output in outputs], 1).detach(),
    )
    projected, logits = model(nodes, joined.logits)
    terms = DetectionCriterion()(dataclasses.replace(joined, logits=logits), list(itertools.chain(*wanted)))
    return sum(terms.values(), torch.zeros(())) + detection_feature_loss(projected, teacher)


def empty_step(model: Callable[..., tuple[dict[str, Tensor], Tensor]]) -> Tensor:
    """What a process without images left adds to a step of the others: its part of every exchange, and 0."""
    output = random_output(torch.Generator().manual_seed(5), images=2)
    projected, logits = model({name: rows(1).float() for name in ("patch_1", "body_det")}, output.logits)
    nothing = np.zeros((0, 2), np.int64)
    none = torch.zeros(0, 4)
    teacher = Tokens(values=none, grid=nothing, offsets=np.zeros(1, np.int64), total=none, squares=none)
    terms = DetectionCriterion()(
        dataclasses.replace(output, logits=logits), random_targets(torch.Generator(), (0, 0), 4)
    )
    feature = detection_feature_loss(
        {name: part[:0] for name, part in projected.items()}, dict.fromkeys(projected, teacher)
    )
    assert feature.item() == 0
    return (sum(terms.values(), torch.zeros(())) + feature) * 0.0


def one_process(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    student = seeded_student()
    wrapped = nn.parallel.DistributedDataParallel(student)  # its hooks live as long as this name
    found = {}
    for name, idle in (("both", False), ("first", rank == 1)):
        student.zero_grad()
        loss = empty_step(wrapped) if idle else step(wrapped, (rank,))
        loss.backward()
        found[name] = {"loss": loss.detach()} | {key: value.grad.clone() for key, value in student.named_parameters()}
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_with_all_images(tmp_path: Path) -> None:
    """The mean over processes of losses and of gradients, which is what DDP forms, although their batches differ."""
    mp.spawn(one_process, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, ranks in {"both": (0, 1), "first": (0,)}.items():
        student = seeded_student()
        loss = step(student, ranks)
        loss.backward()
        losses = [rank[name].pop("loss").item() for rank in found]
        assert sum(losses) / 2 == pytest.approx(loss.item(), rel=1e-5)
        assert losses[0] != pytest.approx(losses[1], rel=1e-2)
        for key, parameter in student.named_parameters():
            assert torch.equal(found[0][name][key], found[1][name][key])
            torch.testing.assert_close(found[0][name][key], parameter.grad, rtol=1e-4, atol=1e-6)
