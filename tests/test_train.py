"""Training: every flag has an effect, accumulation and averages are exact, and no teacher is ever near."""

import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_runs import log, pipeline, run, run_cli, same_value, weights

from vkd_cache.config import Config
from vkd_cache.errors import CacheMismatchError, ConfigError, VkdCacheError
from vkd_cache.optim import cosine_lr
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.checkpoints import read_checkpoint
from vkd_cache.stages.evaluate import EvalRequest, evaluate
from vkd_cache.stages.extract import extract
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.journal import read_log
from vkd_cache.stages.run import Run, prepare_run
from vkd_cache.stages.train import train

Build = Callable[..., Config]
PLAIN = {"feature_weight": 0.0, "logit_weight": 0.0}
SHORT = {"epochs": 1, "batch_size": 100}  # two steps


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 2e-5) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], rtol=tolerance, atol=tolerance) for name in one)


def fed(run: Run) -> list[FedBatch]:
    with run.feed(run.supply(live=False)) as feed:
        return list(feed.batches(epoch=0, step=0, workers=0))


# --- every option does something ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_tree(digits_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of each class, and nothing to evaluate on."""
    root = tmp_path_factory.mktemp("few")
    for path in sorted(digits_tree.glob("train/*/*.jpg")):
        folder = root / path.parent.name
        folder.mkdir(exist_ok=True)
        if len(list(folder.iterdir())) < 6:
            shutil.copy(path, folder)
    return root


@pytest.fixture(scope="module")
def few_cache(tiny_config: Build, few_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("few-cache") / "cache"
    source = {"train": str(few_tree), "shard_size": 20}
    extract(tiny_config(source=source, cache={"url": str(url)}, views={"count": "2"}), JobSplit())
    return url


def trained(build: Build, tree: Path, cache: Path | None, output: Path, **sections: dict[str, Any]) -> Any:
    """What two steps of a small run leave: weights, average, the numbers of the log."""
    defaults: dict[str, dict[str, Any]] = {
        "source": {"train": str(tree), "shard_size": 20},
        "cache": {"url": str(cache or "")},
        "train": {"epochs": 2, "batch_size": 60, "output": str(output), "weight_decay": 0.3, "clip_grad": 0.0},
    }
    merged = {name: defaults.get(name, {}) | sections.get(name, {}) for name in {**defaults, **sections}}
    run(build(**merged))
    state = read_checkpoint(output / "last.pt")
    return state["student"], state["ema"], log(output)


@pytest.fixture(scope="module")
def base(tiny_config: Build, few_tree: Path, few_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("base")
    result = trained(tiny_config, few_tree, few_cache, output / "run")
    assert same_value(result, trained(tiny_config, few_tree, few_cache, output / "again"))
    return result


EFFECTS: list[tuple[str, str, Any]] = [
    ("train", "epochs", 3),
    ("train", "batch_size", 30),
    ("train", "lr", 2e-3),
    ("train", "min_lr", 5e-4),
    ("train", "warmup_epochs", 1.0),
    ("train", "weight_decay", 0.0),
    ("train", "beta1", 0.5),
    ("train", "beta2", 0.5),
    ("train", "eps", 1e-2),
    ("train", "clip_grad", 0.01),
    ("train", "amp", "bf16"),
    ("train", "amp", "fp16"),
    ("train", "ema_decay", 0.5),
    ("train", "seed", 1),
    ("student", "name", "test_resnet"),
    ("student", "drop_path", 0.5),
    ("loss", "task_weight", 0.5),
    ("loss", "feature_weight", 0.5),
    ("loss", "logit_weight", 0.5),
    ("loss", "temperature", 2.0),
    ("loss", "smoothing", 0.0),
    ("loss", "feature_loss", "log_sum"),
    ("loss", "normalisation", "standardize"),
    ("loss", "normalisation", "whiten"),
    ("loss", "projector", "linear"),
]


@pytest.mark.parametrize(("section", "name", "value"), EFFECTS)
def test_every_option_changes_the_result(
    tiny_config: Build, few_tree: Path, few_cache: Path, base: Any, tmp_path: Path, section: str, name: str, value: Any
) -> None:
    """The reference's learning rate, weight decay, schedule and seed do nothing; here each one does."""
    result = trained(tiny_config, few_tree, few_cache, tmp_path / "run", **{section: {name: value}})
    assert not same_value(result, base)
    assert all(math.isfinite(line["total"]) for line in result[2])
    if name != "ema_decay":
        assert not same_value(result[0], base[0])


def test_open_shards_and_accumulate_change_what_a_step_sees(
    tiny_config: Build, few_tree: Path, few_cache: Path, tmp_path: Path
) -> None:
    found = [
        trained(tiny_config, few_tree, few_cache, tmp_path / str(number), train={"batch_size": 20} | change)[0]
        for number, change in enumerate(({"open_shards": 1}, {"open_shards": 3}, {"open_shards": 3, "accumulate": 2}))
    ]
    assert not same_value(found[0], found[1]) and not same_value(found[1], found[2])


# --- the step -----------------------------------------------------------------------------------------------------


def test_the_learning_rate_is_the_cosine_at_every_step(tiny_config: Build, tmp_path: Path) -> None:
    rates = {"lr": 3e-3, "min_lr": 1e-4, "warmup_epochs": 0.5}
    run(tiny_config(loss=PLAIN, train={"batch_size": 32, "output": str(tmp_path)} | rates))
    lines = log(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["lr"] for line in lines] == [cosine_lr(step, 12, 3e-3, 1e-4, 3) for step in range(12)]
    assert lines[0]["lr"] == pytest.approx(3e-3 / 4)


def test_accumulated_batches_are_one_batch(tiny_config: Build, small_cache: Path, tmp_path: Path) -> None:
    """Two batches of 16 and one of 32, over a whole epoch, odd shards included."""
    for name, change in {"one": {"batch_size": 32}, "two": {"batch_size": 16, "accumulate": 2}}.items():
        settings = {"epochs": 1, "output": str(tmp_path / name), "clip_grad": 0.5, "eps": 1e-3} | change
        run(tiny_config(cache={"url": str(small_cache)}, train=settings))
    losses = [[line["total"] for line in log(tmp_path / name)] for name in ("one", "two")]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=2e-5)
    assert close(weights(tmp_path / "one"), weights(tmp_path / "two"), 1e-4)


def test_uneven_batches_count_by_their_samples(tiny_config: Build, small_cache: Path) -> None:
    """A gradient is the mean over samples, not the mean of the batches' means."""
    run = prepare_run(tiny_config(cache={"url": str(small_cache)}, train=SHORT | {"output": "unused"}), JobSplit())
    supply = run.supply(live=False)
    whole = fed(run)[0]
    found = []
    for cuts in ([0, 100], [0, 70, 72, 100], [0, 0, 100]):
        learner = run.learner(supply)
        parts = [(part, part.pixels) for part in (unmixed(whole, *cut) for cut in itertools.pairwise(cuts))]
        terms = learner.step(parts, supply, 1e-3, seed=0)
        found.append((learner.student.state_dict(), {name: float(value) for name, value in terms.items()}))
    for weights_found, terms_found in found[1:]:
        assert close(weights_found, found[0][0])
        assert terms_found == pytest.approx(found[0][1], rel=1e-5)


def unmixed(batch: FedBatch, start: int, stop: int) -> FedBatch:
    """Some rows of a batch, as if nothing had been mixed."""
    rendered = batch.rendered
    rows = slice(start, stop)
    part = dataclasses.replace(
        rendered,
        pixels=rendered.pixels[rows],
        label=rendered.label[rows],
        shard=rendered.shard[rows],
        row=rendered.row[rows],
        mix=None,
    )
    nodes = {name: node.select(rows) for name, node in batch.nodes.items()}
    return dataclasses.replace(batch, rendered=part, nodes=nodes)


def test_the_average_follows_the_weights(tiny_config: Build, small_cache: Path) -> None:
    settings = {"output": "unused", "ema_decay": 0.7, "batch_size": 64}
    config = tiny_config(cache={"url": str(small_cache)}, student={"name": "test_resnet"}, train=settings)
    run = prepare_run(config, JobSplit())
    supply = run.supply(live=False)
    learner = run.learner(supply)
    assert learner.ema is not None
    expected: dict[str, torch.Tensor] = {}
    for step, batch in enumerate(fed(run)):
        learner.step([(batch, batch.pixels)], supply, 1e-3, seed=step)
        for name, value in learner.student.state_dict().items():
            mean = expected.get(name, value) if value.is_floating_point() else value
            expected[name] = (mean * 0.7 + value * 0.3) if value.is_floating_point() else value.clone()
    assert step >= 3
    assert close(learner.ema.module.state_dict(), expected)
    assert not close(learner.ema.module.state_dict(), learner.student.state_dict())


def test_clipping_bounds_what_the_optimizer_sees(tiny_config: Build, small_cache: Path) -> None:
    norms: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.cat(gradients).norm()))

    for amp in ("off", "fp16"):
        settings = {"output": "unused", "clip_grad": 0.05, "batch_size": 64, "amp": amp}
        run = prepare_run(tiny_config(cache={"url": str(small_cache)}, train=settings), JobSplit())
        supply = run.supply(live=False)
        learner = run.learner(supply)
        learner.optimizer.register_step_pre_hook(note)
        for step, batch in enumerate(fed(run)):
            learner.step([(batch, batch.pixels)], supply, 1e-3, seed=step)
    assert norms == pytest.approx([0.05] * len(norms), rel=1e-3) and len(norms) >= 4


def test_half_precision_on_a_cpu(tiny_config: Build, small_cache: Path, tmp_path: Path) -> None:
    totals = {}
    for amp in ("off", "bf16", "fp16"):
        run(tiny_config(cache={"url": str(small_cache)}, train=SHORT | {"amp": amp, "output": str(tmp_path / amp)}))
        totals[amp] = [line["total"] for line in log(tmp_path / amp)]
        assert all(value.dtype in (torch.float32, torch.int64) for value in weights(tmp_path / amp).values())
    assert totals["bf16"] == pytest.approx(totals["off"], rel=0.02)
    assert totals["fp16"] == pytest.approx(totals["off"], rel=0.01)
    assert totals["bf16"] != totals["off"] != totals["fp16"]
    assert read_checkpoint(tmp_path / "fp16" / "last.pt")["scaler"]["scale"] >= 1.0
    assert read_checkpoint(tmp_path / "off" / "last.pt")["scaler"] == {}


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_student_is_the_same_student(tiny_config: Build, small_cache: Path, tmp_path: Path) -> None:
    """In a process of its own: the compiler leaves warnings and helper processes behind."""
    file = pipeline(
        tmp_path,
        source={"train": str(Path(tiny_config().source.train) / "train")},
        cache={"url": str(small_cache)},
        student={"name": "test_resnet"},
        train={"epochs": 1, "batch_size": 200, "compile": True, "workers": 0, "device": "cpu", "log_every": 1},
        eval={"workers": 0},
    )
    done = run_cli(["train", file, "--output", str(tmp_path / "compiled")])
    assert done.returncode == 0, done.stderr
    plain = tiny_config(
        cache={"url": str(small_cache)},
        student={"name": "test_resnet"},
        train={"epochs": 1, "batch_size": 200, "lr": 5e-4, "open_shards": 8, "output": str(tmp_path / "plain")},
    )
    run(plain)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "plain").keys()
    assert log(tmp_path / "compiled")[0]["total"] == pytest.approx(log(tmp_path / "plain")[0]["total"], rel=1e-4)


# --- students, teachers, losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "heads"),
    [("deit_ti_distilled", 2), ("deit_tiny_distilled_patch16_224", 2), ("test_resnet", 1), ("test_vit", 1)],
)
def test_students_of_all_kinds(
    tiny_config: Build, few_tree: Path, few_cache: Path, tmp_path: Path, student: str, heads: int
) -> None:
    """Widths below, equal to and above the teacher's 96, one head or two."""
    source = {"train": str(few_tree), "val": str(few_tree), "shard_size": 20}
    config = tiny_config(
        source=source,
        cache={"url": str(few_cache)},
        student={"name": student},
        train={"epochs": 1, "batch_size": 30, "output": str(tmp_path)},
    )
    summary = run(config)
    assert summary.steps == 2 and summary.score is not None
    names = weights(tmp_path)
    assert any("head_dist" in name for name in names) == (heads == 2)
    (result,) = evaluate(config, EvalRequest(checkpoint=str(tmp_path / "last.pt")), JobSplit())
    assert result.top1 == summary.score


@pytest.mark.parametrize("off", ["task_weight", "feature_weight", "logit_weight"])
def test_any_term_may_be_off(tiny_config: Build, few_tree: Path, few_cache: Path, tmp_path: Path, off: str) -> None:
    result = trained(tiny_config, few_tree, few_cache, tmp_path / "run", loss={off: 0.0})
    assert off.removesuffix("_weight") not in result[2][0]
    assert ("projector.directions" in result[0]) == (off != "feature_weight")


def test_live_teacher_with_and_without_a_cache(tiny_config: Build, small_cache: Path, tmp_path: Path) -> None:
    """The same plan: three runs that differ in where the teacher's numbers come from, and in their last digits only."""
    settings = {"batch_size": 100, "epochs": 2}
    urls = {"cached": str(small_cache), "live": str(small_cache), "planned": "", "absent": str(tmp_path / "none")}
    losses = {}
    for name, url in urls.items():
        run(
            tiny_config(
                cache={"url": url},
                views={"count": "2"},
                train=settings | {"output": str(tmp_path / name), "live_teacher": name != "cached"},
            )
        )
        losses[name] = [line["total"] for line in log(tmp_path / name)]
    assert losses["live"] == losses["planned"] == losses["absent"]
    assert losses["cached"] == pytest.approx(losses["live"], rel=1e-3)
    assert losses["cached"] != losses["live"]


NO_TEACHER = """
import atexit, gc, json, sys
import torch
counts = []
def count(module, _):
    if not counts and type(module).__name__ == "Student":
        everything = [o for o in gc.get_objects() if isinstance(o, torch.nn.Module)]
        counts.append(sum(p.numel() for p in {id(p): p for m in everything for p in m.parameters()}.values()))
        counts.append(sum(p.numel() for p in module.parameters()))
torch.nn.modules.module.register_module_forward_pre_hook(count)
def report():
    print(json.dumps({"modules": sorted(m for m in sys.modules if m.startswith("vkd_cache")), "counts": counts}))
atexit.register(report)
from vkd_cache import cli
cli.main(sys.argv[1:])
"""


def test_the_process_that_trains_has_no_teacher(
    tiny_config: Build, small_cache: Path, digits_tree: Path, teacher_file: Path, tmp_path: Path
) -> None:
    """Not imported, not in memory, and its file is gone."""
    gone = shutil.copy(teacher_file, tmp_path / "teacher.pt")
    Path(gone).unlink()
    file = pipeline(
        tmp_path,
        source={"train": str(digits_tree)},
        teacher={"name": "test_resnet", "weights": str(gone)},
        cache={"url": str(small_cache)},
        student={"name": "test_vit"},
        train={"epochs": 1, "batch_size": 64, "workers": 0, "device": "cpu", "output": str(tmp_path / "run")},
        eval={"workers": 0},
    )
    done = subprocess.run(
        [sys.executable, "-c", NO_TEACHER, "train", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "vkd_cache.stages.train" in report["modules"]
    assert not [name for name in report["modules"] if "teacher" in name or "teaching" in name]
    everything, student = report["counts"]
    assert everything == student > 0
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(document["cache_fingerprint"]) == 64
    assert document["config"]["views"]["seed"] == 5 and document["config"]["views"]["size_px"] == 32
    assert document["versions"]["torch"] == torch.__version__.partition("+")[0] or document["versions"]["torch"]


def test_whitening_takes_its_statistics_from_the_cache(tiny_config: Build, small_cache: Path, tmp_path: Path) -> None:
    whiten = {"normalisation": "whiten"}
    run = prepare_run(
        tiny_config(cache={"url": str(small_cache)}, loss=whiten, train=SHORT | {"output": str(tmp_path)}), JobSplit()
    )
    learner = run.learner(run.supply(live=False))
    assert learner.task.loss.whitening is not None
    features = torch.cat([run.cached.read(shard, 0).node("pooled").float() for shard in range(5)])
    white = (features - learner.task.loss.whitening.mean) @ learner.task.loss.whitening.matrix
    alive = torch.linalg.matrix_rank(torch.cov(features.mT)).item()
    assert torch.linalg.matrix_norm(torch.cov(white.mT)).item() == pytest.approx(math.sqrt(alive), rel=0.05)
    live = {"live_teacher": True, "output": str(tmp_path)}
    with pytest.raises(ConfigError, match="whiten takes the teacher's statistics from the first units of a cache"):
        train(tiny_config(loss=whiten, train=SHORT | live), JobSplit())


# --- what is left behind -------------------------------------------------------------------------------------------


def test_best_and_last_differ(tiny_config: Build, small_cache: Path, tmp_path: Path) -> None:
    """A learning rate that ends too high: the best student is not the last one, and eval reads both."""
    settings = {"epochs": 5, "batch_size": 64, "lr": 2e-2, "seed": 3, "ema_decay": 0.5, "tensorboard": True}
    config = tiny_config(
        cache={"url": str(small_cache)}, loss=PLAIN, views={"count": "1"}, train=settings | {"output": str(tmp_path)}
    )
    summary = run(config)
    evaluations = log(tmp_path, "eval")
    assert len(evaluations) == 5 and summary.score == evaluations[-1]["top1"]
    scores = [max(line["top1"], line["ema_top1"]) for line in evaluations]
    assert summary.best_score == max(scores)
    best = read_checkpoint(tmp_path / "best.pt")["standing"]
    assert best["step"] == evaluations[scores.index(max(scores))]["step"]
    results = [
        evaluate(config, EvalRequest(checkpoint=str(tmp_path / "best.pt"), ema=ema), JobSplit())[0].top1
        for ema in (False, True)
    ]
    assert max(results) == summary.best_score
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_dry_run_writes_nothing(
    tiny_config: Build, small_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(cache={"url": str(small_cache)}, train={"output": str(tmp_path / "run")})
    train(config, JobSplit(), dry_run=True)
    said = capsys.readouterr().out
    assert "2 of recipe vkd at 32 px" in said and "2 epochs of 12" in said
    for change, match in (({"student": {"name": "test_vitt"}}, "did you mean test_vit"), ({}, "takes 300 samples")):
        settings = {"batch_size": 300, "output": str(tmp_path / "run")}
        wrong = tiny_config(cache={"url": str(small_cache)}, train=settings, **change)
        with pytest.raises(ConfigError, match=match):
            train(wrong, JobSplit(), dry_run=True)
    assert not (tmp_path / "run").exists()


def test_broken_images_are_skipped_and_counted(
    tiny_config: Build, few_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the images: some batches of two have one left, some none at all."""
    root = tmp_path / "tree"
    shutil.copytree(few_tree, root)
    for path in sorted(root.glob("*/*.jpg"))[::2]:
        path.write_bytes(b"no image")
    settings = {"batch_size": 2, "epochs": 1, "amp": "fp16", "clip_grad": 1.0, "output": str(tmp_path / "run")}
    summary = run(tiny_config(source={"train": str(root)}, loss=PLAIN, train=settings))
    assert summary.broken == 30 and summary.steps == 30
    assert 15 <= len([line for line in log(tmp_path / "run") if "total" in line]) < 30
    said = capsys.readouterr().err
    assert "30 broken images were left out" in said
    assert said.count("is broken (") == 5  # the first few by name


# --- errors -------------------------------------------------------------------------------------------------------


def refused(build: Build, output: Path, match: str, kind: type[Exception] = ConfigError, **sections: Any) -> None:
    merged = sections | {"train": SHORT | {"output": str(output)} | sections.get("train", {})}
    with pytest.raises(kind, match=match):
        train(build(**merged), JobSplit())
    assert not (output / "last.pt").exists()


def test_what_a_run_cannot_begin_with(
    tiny_config: Build, small_cache: Path, digits: Any, digits_tars: Path, tmp_path: Path
) -> None:
    cache = {"url": str(small_cache)}
    refused(tiny_config, tmp_path, "batch_size: found 7, expected an even", train={"batch_size": 7}, loss=PLAIN)
    refused(tiny_config, tmp_path, "one step takes 206 samples", train={"batch_size": 206}, cache=cache)
    refused(tiny_config, tmp_path, "warm-up shorter than the run", train={"warmup_epochs": 1.0}, cache=cache)
    refused(tiny_config, tmp_path, "all three weights are 0", loss=PLAIN | {"task_weight": 0.0})
    refused(tiny_config, tmp_path, "ask for a teacher: give --cache, or --live-teacher")
    refused(tiny_config, tmp_path, r"\[teacher\] name is empty", teacher={"name": ""}, train={"live_teacher": True})
    tars = {"train": str(digits_tars / "train-00000.tar")}
    refused(tiny_config, tmp_path, "was made from another data set", CacheMismatchError, source=tars, cache=cache)


def test_labels_and_logits_of_other_classes(
    tiny_config: Build, digits_tree: Path, digits_tars: Path, tmp_path: Path
) -> None:
    root = tmp_path / "half"
    for path in sorted(digits_tree.glob("train/*/*.jpg")):
        if path.parent.name < "digit5":
            (root / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / path.parent.name)
    val = {"train": str(root), "val": str(digits_tars / "val-00000.tar")}
    refused(tiny_config, tmp_path / "a", "has 10 classes, .* has 5, and the student", source=val, loss=PLAIN)
    source, cache = {"train": str(root)}, {"url": str(tmp_path / "cache")}
    extract(tiny_config(source=source, cache=cache, teacher={"num_classes": 10}), JobSplit())
    refused(tiny_config, tmp_path / "b", "the teacher has 10 classes, .* has 5", source=source, cache=cache)
    settings = SHORT | {"batch_size": 50, "output": str(tmp_path / "c")}
    assert run(tiny_config(source=source, cache=cache, loss={"logit_weight": 0.0}, train=settings)).steps == 2


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config: Build, small_cache: Path, tmp_path: Path) -> None:
    settings = {"epochs": 6, "batch_size": 100, "lr": 1e30, "min_lr": 1e30, "log_every": 1000}
    config = tiny_config(
        cache={"url": str(small_cache)}, student={"name": "test_vit"}, train=settings | {"output": str(tmp_path)}
    )
    with pytest.raises(VkdCacheError, match=r"step \d+: the (loss of|weights).*(nan|not finite).*smaller --lr"):
        run(config)
    for path in tmp_path.glob("*.pt"):
        assert all(np.isfinite(value.numpy()).all() for value in weights(tmp_path, path.name).values())
    assert all(math.isfinite(line.get("total", 0.0)) for line in read_log(tmp_path / "log.jsonl"))


def test_a_changed_image_stops_the_program(small_cache: Path, digits_tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "digits"
    shutil.copytree(digits_tree, root)
    path, other = sorted((root / "train").glob("*/*.jpg"))[20:22]
    shutil.copy(other, path)
    file = pipeline(
        tmp_path,
        source={"train": str(root)},
        cache={"url": str(small_cache)},
        student={"name": "test_vit"},
        train={"epochs": 1, "batch_size": 2, "workers": 1, "device": "cpu", "digest_check": 1.0},
        eval={"workers": 0},
    )
    done = run_cli(["train", file, "--output", str(tmp_path / "run")])
    assert done.returncode == 1
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert path.stem in message and "view 0" in message
    assert "when the cache was made" in message and message.count("Pillow") == 2
    assert "Traceback" not in done.stderr
