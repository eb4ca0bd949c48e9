"""Numbers that are not finite: a feature fails its unit with its key; a loss stops a run, its batch's keys written."""

import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from cache_samples import make_node, make_token_node, make_tokens, make_values
from conftest import SHARD_SIZE
from detection_jobs import write_detector
from detection_runs import CLASSES, config_builder
from extract_jobs import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from train_runs import assert_same_run, log, pipeline, run, run_cli

from vkd_cache.cache.check import check_unit
from vkd_cache.cache.codecs import decode_node, encode_node
from vkd_cache.cache.reader import open_cache
from vkd_cache.cache.units import UnitId, pack_unit, record_path, unit_path, unpack_unit
from vkd_cache.cli import cli
from vkd_cache.config import Config
from vkd_cache.errors import CorruptCacheError, TeacherError, VkdCacheError
from vkd_cache.guard import guarded
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import open_source
from vkd_cache.stages.checkpoints import read_checkpoint
from vkd_cache.stages.compare import compare
from vkd_cache.stages.extract import extract
from vkd_cache.stages.nonfinite import BatchPlace, Incident, StepNote, place_of
from vkd_cache.stages.run import prepare_run
from vkd_cache.stages.standing import MAX_BATCHES, LossWindow
from vkd_cache.stages.unit_tokens import as_stored, sampled_tokens, stored_dtype
from vkd_cache.stages.units import check_storable

Build = Callable[..., Config]
INF, NAN = math.inf, math.nan

# --- features -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fault:
    node: str
    value: float
    dtype: torch.dtype = torch.float32


FAULTS: list[Fault] = []  # what the teacher below has; empty: mended


class Worn(nn.Module):
    """Maps of mean colours, their means, and a head that no matrix describes; for white images one number is wrong."""

    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.head = nn.Linear(3, num_classes)
        self._white = torch.zeros(0, dtype=torch.bool)

    def forward_features(self, pixels: Tensor) -> Tensor:
        self._white = (pixels > 0.999).flatten(1).all(1)
        return self._spoilt("feature_map", nn.functional.adaptive_avg_pool2d(pixels, 4))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self._spoilt("pooled", features.mean((2, 3)))
        return pooled if pre_logits else self._spoilt("logits", self.head(pooled.float()).tanh())

    def forward(self, pixels: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(pixels))

    def _spoilt(self, node: str, values: Tensor) -> Tensor:
        for fault in FAULTS:
            if fault.node == node:
                values = values.to(fault.dtype).clone()
                values.flatten(1)[self._white, 1] = fault.value
        return values


def worn(num_classes: int) -> nn.Module:
    return Worn(num_classes)


@pytest.fixture
def white(digits_tree: Path, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Three shards of training digits, one image of the second one white; and its key."""
    tree = tmp_path / "tree"
    for path in sorted(digits_tree.glob("train/*/*.jpg"))[:24]:
        (tree / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tree / path.parent.name)
    key = open_source(str(tree), shard_size=8).shards[1].keys[5]
    Image.new("RGB", (32, 32), "white").save(tree / f"{key}.jpg", "JPEG")
    yield tree, key
    FAULTS.clear()


def white_config(build: Build, tree: Path, url: Path, node: str, dtype: str) -> Config:
    return build(
        source={"train": str(tree), "shard_size": 8},
        views={"recipe": "crop_flip", "count": "1:3"},
        teacher={"name": "test_nonfinite:worn", "weights": ""},
        cache={"url": str(url), "nodes": (node,), "dtype": dtype},
    )


@pytest.mark.parametrize(
    ("fault", "dtype", "found"),
    [
        (Fault("pooled", NAN), "float32", "not finite"),
        (Fault("pooled", INF), "uint8", "not finite"),
        (Fault("pooled", 1e5), "float16", "not finite.*float16 holds no more than 6.55e"),
        (Fault("pooled", 3.4e38), "bfloat16", "not finite.*bfloat16 holds no more than 3.39e"),
        (Fault("pooled", 1e39, torch.float64), "float32", "not finite"),
        (Fault("pooled", 1e39, torch.float64), "auto", "not finite"),
        (Fault("feature_map", -INF), "float16", "not finite"),
        (Fault("feature_map", 1e39, torch.float64), "uint8", "not finite"),
        (Fault("logits", NAN), "uint8", "not finite"),
        (Fault("logits", torch.finfo(torch.float32).min), "uint8", r"larger than 3.4e\+38, which codec token_int8"),
    ],
    ids=lambda value: f"{value.node}={value.value:g}" if isinstance(value, Fault) else None,
)
def test_a_bad_feature_fails_its_unit_with_key_view_and_node(
    tiny_config: Build,
    white: tuple[Path, str],
    tmp_path: Path,
    fault: Fault,
    dtype: str,
    found: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The other units are published; and the same command, once the teacher is mended, makes what is missing."""
    tree, key = white
    config = white_config(tiny_config, tree, tmp_path / "cache", fault.node, dtype)

    def command(config: Config) -> int:
        return guarded(lambda: extract(config, JobSplit()).exit_code)

    extract(config, JobSplit(index=0, count=3))  # the manifest, and the codec, are there before the fault
    FAULTS.append(fault)
    assert command(config) == 3
    said = capsys.readouterr().err.replace("\n", " ")
    for view in (1, 2):
        where = f"shard 1, view {view}: node '{fault.node}' is "
        assert where in said
        assert f"for 1 samples, first key '{key}'" in said[said.index(where) :]
    assert re.search(found, said)
    assert open_cache(config.cache.url).published() == {view: frozenset({0, 2}) for view in (1, 2)}
    before = contents(Path(config.cache.url))
    assert command(config) == 3 and contents(Path(config.cache.url)) == before
    FAULTS.clear()
    assert command(config) == 0
    whole = white_config(tiny_config, tree, tmp_path / "whole", fault.node, dtype)
    assert command(whole) == 0
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


@settings(max_examples=40, deadline=None)
@given(
    codec=st.sampled_from(["float32", "float16", "bfloat16", "token_int8"]),
    share=st.sampled_from([1.0, 0.4]),
    bad=st.sampled_from([NAN, INF, -INF, 3.4028e38]),
    place=st.integers(0, 19),
    channel=st.integers(0, 4),
)
def test_a_bad_token_is_told_with_its_key_though_it_is_not_in_the_sample(
    codec: str, share: float, bad: float, place: int, channel: int
) -> None:
    """A number whose square is no float32 is not finite either: the sums of squares are stored."""
    keys = ["one", "two", "three"]
    tokens = make_tokens([(2, 3), (2, 4), (3, 2)])
    tokens.values[place, channel] = bad
    rows = tokens.values.split(tokens.counts.tolist())
    total = torch.stack([part.sum(0) for part in rows])
    tokens = dataclasses.replace(tokens, total=total, squares=torch.stack([part.square().sum(0) for part in rows]))
    spec = make_token_node(codec, tokens=share)
    stored = as_stored(sampled_tokens(tokens, spec, seed=0, keys=keys, view=2), codec)
    key = keys[int(np.searchsorted([6, 14], place, "right"))]
    with pytest.raises(TeacherError, match=f"node 'patch_1' is not finite for 1 samples, first key '{key}'"):
        check_storable([spec], {"patch_1": stored}, keys)


@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(["float32", "float16", "bfloat16", "sqrt_uint8", "sqrt_uint4", "token_int8"]),
    shape=st.sampled_from([(5,), (3, 2, 2)]),
    large=st.floats(min_value=0, max_value=1.7e308),
)
def test_what_passes_is_stored_and_comes_back_finite(codec: str, shape: tuple[int, ...], large: float) -> None:
    """No number is refused by the codec, or made infinite by it, that the check lets through."""
    values = make_values(4, shape).double()
    values[2].view(-1)[1] = large
    spec = make_node(codec, shape=shape)
    kept = values.to(stored_dtype(values, spec))
    try:
        check_storable([spec], {"pooled": kept}, list("abcd"))
    except TeacherError as error:
        assert "for 1 samples, first key 'c'" in str(error) and large > 65504
        return
    assert bool(decode_node(spec, encode_node(kept, codec)).isfinite().all())


# --- losses -------------------------------------------------------------------------------------------------------


def poison(cache_url: Path, unit: UnitId, row: int, node: str = "pooled", value: float = INF) -> None:
    """Publish a unit with one number that is not finite, sealed as any other."""
    cache = open_cache(str(cache_url))
    record = cache.record(*unit)
    arrays = unpack_unit(cache.read_file(record), cache.manifest)
    offsets = arrays.get(f"node.{node}.offsets")
    values = arrays[f"node.{node}"] = arrays[f"node.{node}"].copy()
    values[row if offsets is None else int(offsets[row]), 1] = value
    data = pack_unit(arrays, cache.manifest)
    digest = xxhash.xxh3_128_hexdigest(data)
    path = unit_path(unit, cache.manifest.backend, digest)
    (cache_url / path).write_bytes(data)
    bad = dataclasses.replace(record, files=((path, len(data), digest),))
    (cache_url / record_path(unit)).write_bytes(bad.to_bytes())


@pytest.fixture
def cache(small_cache: Path, tmp_path: Path) -> Path:
    """A cache to be damaged."""
    return shutil.copytree(small_cache, tmp_path / "cache")


def places(config: Config) -> list[BatchPlace]:
    """The batches of a run's first epoch, as its feed gives them."""
    prepared = prepare_run(config, JobSplit())
    with prepared.feed(prepared.supply(live=False)) as feed:
        return [place_of(batch) for batch in feed.batches(epoch=0, step=0, workers=0)]


def keys_of(config: Config, batch: BatchPlace) -> list[str]:
    shards = open_source(config.source.train, shard_size=config.source.shard_size).shards
    return [shards[shard].keys[row] for shard, row in zip(batch.shard.tolist(), batch.row.tolist(), strict=True)]


def failed(config: Config) -> tuple[str, dict[str, Any]]:
    """The message of a run that stops, and its report."""
    with pytest.raises(VkdCacheError) as caught:
        run(config)
    report = json.loads((Path(config.train.output) / "nonfinite.json").read_text())
    return str(caught.value), report


def assert_no_bad_checkpoint(output: Path) -> None:
    def check(value: Any) -> None:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for each in value:
                check(each)
        elif isinstance(value, Tensor) and value.is_floating_point():
            assert bool(value.isfinite().all())

    for path in output.glob("*.pt"):
        check(read_checkpoint(path))


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"accumulate": 2, "ema_decay": 0.9, "clip_grad": 1.0},
        {"amp": "bf16"},
    ],
    ids=["plain", "accumulated", "bf16"],
)
def test_a_run_that_diverges_names_the_first_bad_step(
    tiny_config: Build, small_cache: Path, tmp_path: Path, train: dict[str, Any]
) -> None:
    """Whether it looks at every step or hardly ever, it tells the same step, keys and numbers."""
    reports = []
    for log_every in (10**6, 1):
        output = tmp_path / str(log_every)
        settings = {"lr": 1e9, "min_lr": 1e9, "epochs": 3, "batch_size": 16, "log_every": log_every}
        config = tiny_config(cache={"url": str(small_cache)}, train=settings | {"output": str(output)} | train)
        said, report = failed(config)
        assert re.match(rf"train: step {report['step']}: the loss of its batch is not finite: total nan, task ", said)
        assert f"are in {output / 'nonfinite.json'}. Nothing is saved from here; there is no checkpoint yet." in said
        assert "Use a smaller --lr" in said and ("--amp off" in said) == ("amp" in train)
        assert not list(output.glob("*.pt")) and not list(output.glob(".*.tmp"))
        del report["written"]
        reports.append(report)
        assert [line["step"] for line in log(output)] == ([] if log_every > 1 else list(range(1, report["step"])))
    report = reports[0]
    assert reports[0] == reports[1]
    count = train.get("accumulate", 1)
    batches = places(config)
    step = report["step"]
    assert 2 <= step <= len(batches) // count
    for name, number in (("at", step), ("before", step - 1)):
        found = report[name]
        assert (found["step"], found["lr"]) == (number, 1e9)
        expected = batches[count * (number - 1) : count * number]
        assert [each["keys"] for each in found["batches"]] == [keys_of(config, each) for each in expected]
        assert [each["shards"] for each in found["batches"]] == [each.shard.tolist() for each in expected]
        assert [each["rows"] for each in found["batches"]] == [each.row.tolist() for each in expected]
        assert [(each["epoch"], each["batch"], each["view"]) for each in found["batches"]] == [
            (0, each.batch, each.view) for each in expected
        ]
    assert report["at"]["losses"]["total"] == "nan" and report["losses_of_ranks"] == [report["at"]["losses"]]
    assert all(math.isfinite(value) for value in report["before"]["losses"].values())
    assert (report["before"]["gradient_norm"] is None) == ("clip_grad" not in train)
    assert (report["amp"], report["epoch"], report["view"]) == (train.get("amp", "off"), 0, 0)


def test_what_is_remembered_is_bounded_and_its_means_do_not_depend_on_the_looks() -> None:
    """A look is due after so many batches, however seldom a log line is."""
    place = BatchPlace(epoch=0, batch=0, view=0, shard=np.zeros(2, np.int64), row=np.zeros(2, np.int64))
    incidents: list[Incident] = []

    def report(incident: Incident) -> VkdCacheError:
        incidents.append(incident)
        return VkdCacheError("stopped")

    def note(step: int, value: float, batches: int) -> StepNote:
        terms = {"total": torch.tensor(value), "task": torch.tensor(value / 3)}
        return StepNote(step=step, lr=1.0, batches=(place,) * batches, terms=terms)

    values = np.random.default_rng(0).standard_normal(3 * MAX_BATCHES).astype(np.float32).tolist()
    means = []
    for batches, looks in ((1, 0), (7, 1), (MAX_BATCHES, 5)):
        window = LossWindow(("total", "task"), JobSplit(), torch.device("cpu"), report)
        waiting = 0
        for step, value in enumerate(values, start=1):
            window.add(note(step, value, batches))
            waiting += batches
            assert window.is_full == (waiting >= MAX_BATCHES)
            if window.is_full or (looks and step % looks == 0):
                window.look(step)
                waiting = 0
                state = window.state()
                window.load(json.loads(json.dumps(state)))
        window.look(len(values))
        means.append(window.take())
    assert means[0] == means[1] == means[2]
    assert means[0]["total"] == pytest.approx(np.mean(values), abs=1e-6)
    assert not incidents
    for bad, first in itertools.product((NAN, INF, -INF), (1, 2, 9)):
        window = LossWindow(("total", "task"), JobSplit(), torch.device("cpu"), report)
        with pytest.raises(VkdCacheError, match="stopped"):
            for step in range(1, 13):
                window.add(note(step, bad if step in (first, 10) else 1.0, 1))
                if step % 4 == 0:
                    window.look(step)
        incident = incidents.pop()
        assert incident.step == first and incident.at is not None and incident.at.step == first
        assert (incident.before.step if incident.before is not None else 0) == first - 1


@pytest.mark.parametrize(
    "change",
    [{"train": {"lr": 1e30, "min_lr": 1e30, "weight_decay": 1e10}}, {"loss": {"task_weight": 1e25}}],
    ids=["weights", "squares of gradients"],
)
def test_what_is_not_finite_is_never_saved(
    tiny_config: Build, small_cache: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """The first step's loss is finite, what it leaves behind is not."""
    settings = {"epochs": 1, "checkpoint_every": 1, "output": str(tmp_path), "log_every": 50}
    config = tiny_config(cache={"url": str(small_cache)}, **change | {"train": settings | change.get("train", {})})
    said, report = failed(config)
    assert said.startswith("train: step 1: weights, or what the optimizer knows of their gradients, are not finite.")
    assert "The keys of its batch ('" in said
    assert report["found"].startswith("weights") and report["step"] == report["at"]["step"] == 1
    assert report["before"] is None and math.isfinite(report["at"]["losses"]["total"])
    assert not list(tmp_path.glob("*.pt"))


def test_each_part_of_a_checkpoint_is_looked_at(tiny_config: Build, small_cache: Path) -> None:
    config = tiny_config(
        cache={"url": str(small_cache)},
        student={"name": "test_resnet"},
        train={"ema_decay": 0.5, "output": "unused", "batch_size": 32},
    )
    prepared = prepare_run(config, JobSplit())
    supply = prepared.supply(live=False)
    learner = prepared.learner(supply)
    with prepared.feed(supply) as feed:
        batch = next(feed.batches(epoch=0, step=0, workers=0))
    learner.step([(batch, batch.pixels)], supply, 1e-3, seed=0)
    assert learner.is_finite() and learner.ema is not None
    statistics = next(buffer for name, buffer in learner.student.named_buffers() if name.endswith("running_var"))
    averaged = next(learner.ema.module.parameters())
    moments = [state["exp_avg_sq"] for state in learner.optimizer.state.values()]
    for tensor in (next(learner.student.parameters()), statistics, averaged, moments[-1]):
        kept = tensor.detach().clone()
        tensor.data.view(-1)[0] = INF
        assert not learner.is_finite()
        tensor.data.copy_(kept)
    assert learner.is_finite()


def test_fp16_a_skipped_step_is_no_bad_loss_but_nothing_but_skipped_steps_is(
    tiny_config: Build, small_cache: Path, tmp_path: Path
) -> None:
    """Gradients that overflow float16 halve the scale and leave the step out; without end, nothing would be learnt."""
    settings = {"amp": "fp16", "clip_grad": 1.0, "batch_size": 4, "log_every": 40, "output": str(tmp_path)}
    config = tiny_config(cache={"url": str(small_cache)}, train=settings, loss={"task_weight": 1e30})
    said, report = failed(config)
    assert "the loss scale has sunk to nothing" in said and "--amp bf16 or off" in said
    assert report["found"].startswith("a loss scale") and report["amp"] == "fp16"
    assert all(math.isfinite(value) for value in report["at"]["losses"].values())
    assert report["at"]["gradient_norm"] in ("inf", "nan")
    assert 30 <= report["step"] <= 40
    assert_no_bad_checkpoint(tmp_path)


def test_a_poisoned_feature_is_named_and_the_run_goes_on_once_it_is_mended(
    tiny_config: Build, cache: Path, tmp_path: Path
) -> None:
    def config(output: str, **train: Any) -> Config:
        settings = {"checkpoint_every": 1, "ema_decay": 0.5, "epochs": 1, "log_every": 10, "batch_size": 32}
        settings |= {"output": str(tmp_path / output)}
        return tiny_config(cache={"url": str(cache)}, train=settings | train)

    run(config("whole"))
    fourth = places(config("unused"))[3]
    unit, row = UnitId(int(fourth.shard[5]), 0), int(fourth.row[5])
    poison(cache, unit, row)
    (finding,) = check_unit(open_cache(str(cache)), unit)
    assert finding.is_error and finding.message == "node 'pooled' holds inf or nan."
    said, report = failed(config("run"))
    key = keys_of(config("unused"), fourth)[5]
    found = {"shard": unit.shard, "row": row, "view": 0, "node": "pooled", "key": key}
    assert report["unusable_features"] == [found] and report["step"] == 4
    assert f"The features stored for key '{key}' (shard {unit.shard}, view 0, node 'pooled') are not finite" in said
    assert "run vkd-cache verify --repair" in said and "the last checkpoint is intact" in said
    assert key in report["at"]["batches"][0]["keys"]
    assert report["at"]["losses"]["feature"] == "nan" and math.isfinite(report["at"]["losses"]["task"])
    assert read_checkpoint(tmp_path / "run" / "last.pt")["standing"]["step"] == 3
    assert_no_bad_checkpoint(tmp_path / "run")
    again, _ = failed(config("run", resume="auto"))  # no way around it
    assert again == said
    assert cli.main(["verify", str(cache), "--repair"], standalone_mode=False) == 3
    summary = extract(tiny_config(cache={"url": str(cache)}, views={"count": "2"}), JobSplit())
    assert (summary.exit_code, summary.units_published) == (0, 1)
    run(config("run", resume="auto"))
    assert not list((tmp_path / "run").glob("nonfinite*"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_poisoned_features_stop_whitening_and_compare(
    tiny_config: Build, cache: Path, tmp_path: Path
) -> None:
    poison(cache, UnitId(0, 0), 3, value=NAN)
    settings = {"output": str(tmp_path / "out"), "batch_size": 16}
    config = tiny_config(cache={"url": str(cache)}, train=settings, loss={"normalisation": "whiten"})
    with pytest.raises(CorruptCacheError, match="node 'pooled' of shard 0, view 0 is not finite"):
        run(config)
    config = tiny_config(cache={"url": str(cache)}, train=settings)
    with pytest.raises(VkdCacheError, match=r"^compare: step \d+: .* live total .*cached total nan.*The features"):
        compare(config, steps=12)
    report = json.loads((tmp_path / "out" / "nonfinite.json").read_text())
    assert report["command"] == "compare" and report["at"]["losses"]["cached total"] == "nan"
    assert math.isfinite(report["at"]["losses"]["live total"])
    assert [each["row"] for each in report["unusable_features"]] == [3]


def test_a_live_teacher_is_pointed_at(tiny_config: Build, white: tuple[Path, str], tmp_path: Path) -> None:
    tree, key = white
    FAULTS.append(Fault("pooled", NAN))
    config = tiny_config(
        source={"train": str(tree), "shard_size": 8},
        views={"recipe": "crop_flip"},
        teacher={"name": "test_nonfinite:worn", "weights": ""},
        loss={"logit_weight": 0.0},
        train={"live_teacher": True, "batch_size": 6, "log_every": 3, "epochs": 1, "output": str(tmp_path / "run")},
    )
    said, report = failed(config)
    assert "The task loss is finite: look at the teacher's outputs for these keys first." in said
    assert report["live_teacher"] and report["unusable_features"] == []
    assert key in report["at"]["batches"][0]["keys"] and report["at"]["losses"]["feature"] == "nan"


def test_a_report_that_cannot_be_written_hides_nothing(tiny_config: Build, cache: Path, tmp_path: Path) -> None:
    poison(cache, UnitId(0, 0), 3)
    (tmp_path / "run" / "nonfinite.json" / "in the way").mkdir(parents=True)
    config = tiny_config(cache={"url": str(cache)}, train={"output": str(tmp_path / "run")})
    with pytest.raises(VkdCacheError, match=r"could not be written to .*nonfinite.json \(.*\).*The features stored"):
        run(config)


def test_detection_names_the_image(coco_tree: Path, tmp_path: Path) -> None:
    teacher = write_detector(tmp_path / "teacher.pt", "test_vidt2", CLASSES)
    url = tmp_path / "cache"
    build = config_builder(coco_tree, teacher)
    cached = {"url": str(url), "dtype": "float16", "nodes": ("neck_det", "patch_4")}
    assert extract(build(cache=cached), JobSplit()).exit_code == 0
    poison(url, UnitId(1, 0), 2, node="patch_4", value=NAN)
    config = build(cache=cached, train={"output": str(tmp_path / "run"), "accumulate": 2, "log_every": 100})
    said, report = failed(config)
    assert [(each["shard"], each["row"], each["node"]) for each in report["unusable_features"]] == [(1, 2, "patch_4")]
    assert f"key '{report['unusable_features'][0]['key']}'" in said
    assert len(report["at"]["batches"]) == 2
    assert report["at"]["losses"]["feature"] == "nan" and math.isfinite(report["at"]["losses"]["class"])


def test_two_ranks_stop_together(tiny_config: Build, cache: Path, digits_tree: Path, tmp_path: Path) -> None:
    """The one whose loss is finite, too: each leaves its own keys, and both say the same."""
    poison(cache, UnitId(3, 0), 11)
    output = tmp_path / "run"
    train = {"batch_size": 10, "epochs": 1, "workers": 0, "device": "cpu", "log_every": 100, "open_shards": 5}
    file = pipeline(
        tmp_path,
        source={"train": str(digits_tree), "shard_size": SHARD_SIZE},
        cache={"url": str(cache)},
        student={"name": "test_vit"},
        train=train | {"output": str(output), "checkpoint_every": 2, "lr": 1e-3},
        eval={"workers": 0, "device": "cpu"},
    )
    done = run_cli(["train", file], processes=2)
    assert done.returncode == 1
    reports = [json.loads((output / f"nonfinite-rank{rank}.json").read_text()) for rank in range(2)]
    step = reports[0]["step"]
    said = f"Error: train: step {step}: the loss of its batch is not finite on 1 of 2 ranks, on rank "
    assert said in done.stderr and "nonfinite-rank*.json" in done.stderr
    assert "stages/loop.py" not in done.stderr  # torchrun has a traceback of its own
    assert reports[1]["step"] == step and reports[0]["losses_of_ranks"] == reports[1]["losses_of_ranks"]
    (bad,) = (report for report in reports if report["at"]["losses"]["total"] == "nan")
    (good,) = (report for report in reports if report is not bad)
    assert f"{said}{bad['rank']}: total nan" in done.stderr
    assert [(each["shard"], each["row"]) for each in bad["unusable_features"]] == [(3, 11)]
    assert bad["unusable_features"][0]["key"] in done.stderr
    assert good["unusable_features"] == [] and math.isfinite(good["at"]["losses"]["total"])
    assert not set(bad["at"]["batches"][0]["keys"]) & set(good["at"]["batches"][0]["keys"])
    saved = list(output.glob("last.pt"))
    assert bool(saved) == (step > 2)
    assert_no_bad_checkpoint(output)
