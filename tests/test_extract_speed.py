"""What makes extraction fast, without a clock: batch sizes that fit and agree, nobody waits, and what limits is named.

Shape legend: b images.
"""

import dataclasses
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import speed_jobs
import torch
from conftest import PRELOAD
from detection_jobs import detection_config, write_detector
from extract_jobs import FORWARDS, contents
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vkd_cache.cache.reader import open_cache
from vkd_cache.cache.units import UnitId
from vkd_cache.cli import main
from vkd_cache.config import Config, load_config
from vkd_cache.errors import ConfigError, TeacherMemoryError
from vkd_cache.runtime import JobSplit
from vkd_cache.sources import open_source
from vkd_cache.stages.batch_size import LEAST_GAIN, Trial, beside_a_student, search
from vkd_cache.stages.extract import extract
from vkd_cache.stages.rendering import Renderer
from vkd_cache.stages.teaching import TeacherRun, start_teacher
from vkd_cache.stages.time_spent import KEPT_BUSY, WINDOW_S, Spent, TimeSpent, limit_of, shares
from vkd_cache.stages.transfer import model_input
from vkd_cache.stages.trial import Measured
from vkd_cache.stages.units import UnitAssembly, unit_tasks
from vkd_cache.teachers import DetectionTeacher, load_teacher
from vkd_cache.views.recipe import make_recipe

MakeConfig = Callable[..., Config]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOAD)
CPU = torch.device("cpu")


@pytest.fixture
def make(tiny_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """`tiny_config` with the mean colours as teacher and a cache in this test's folder."""

    def build(**sections: dict[str, Any]) -> Config:
        defaults: dict[str, dict[str, Any]] = {
            "teacher": {"name": "speed_jobs:watched", "weights": ""},
            "cache": {"url": str(tmp_path / "cache")},
            "extract": {"batch_size": "auto"},
        }
        names = defaults.keys() | sections.keys()
        return tiny_config(**{name: defaults.get(name, {}) | sections.get(name, {}) for name in names})

    return build


def log_of(config: Config) -> dict[str, Any]:
    """The last log of a run."""
    *_, path = sorted(Path(config.cache.url, "runs").iterdir())
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


# ------------------------------------------------------------------------------------------------------ the batch size


def test_auto_is_said_in_a_file_and_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[extract]\nbatch_size = "auto"\n')
    assert load_config(str(file)).extract.batch_size == 0
    assert load_config(None, {"extract": {"batch_size": "auto"}}).extract.batch_size == 0
    assert load_config(None, {"extract": {"batch_size": 48}}).extract.batch_size == 48
    with pytest.raises(ConfigError, match=r"batch_size: found 'automatic', expected a whole number or 'auto'"):
        load_config(None, {"extract": {"batch_size": "automatic"}})
    for value, code in (("automatic", 2), ("7.5", 2)):
        with pytest.raises(SystemExit) as ended:
            main(["extract", str(file), "--batch-size", value])
        assert ended.value.code == code
        assert f"'{value}' is neither a whole number nor 'auto'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:  # and a size that is one is taken: what is missing is all that is said
        main(["extract", str(file), "--batch-size", "auto"])
    assert "nothing says [source] train" in capsys.readouterr().err


@settings(deadline=None, max_examples=200)
@given(
    rates=st.lists(st.floats(0.1, 1e4), min_size=12, max_size=12),
    fits=st.integers(0, 4096),
    first=st.sampled_from([2, 16]),
    largest=st.sampled_from([16, 64, 2048]),
)
def test_the_search_finds_a_size_that_fits_and_that_doubling_does_not_beat(
    rates: list[float], fits: int, first: int, largest: int
) -> None:
    asked: list[int] = []

    def attempt(size: int) -> Trial:
        asked.append(size)
        rate = rates[size.bit_length() - 2]
        found = Measured(batch_size=size, images_per_s=rate, memory_bytes=size) if size <= fits else None
        return Trial(batch_size=size, measured=found)

    if fits < 2:
        with pytest.raises(TeacherMemoryError, match="even with batches of 2"):
            search(attempt, first, largest)
        return
    size, trials = search(attempt, first, largest)
    assert [trial.batch_size for trial in trials] == asked
    assert len(set(asked)) == len(asked)  # nothing is tried twice
    assert size % 2 == 0 and size <= min(fits, largest) and size in asked
    rate_of = {trial.batch_size: trial.rate for trial in trials}
    assert sum(trial.measured is None for trial in trials) <= first.bit_length()
    if 2 * size in rate_of:
        assert rate_of[2 * size] < LEAST_GAIN * rate_of[size]
    for smaller in (trial.batch_size for trial in trials if first <= trial.batch_size < size):
        assert rate_of[2 * smaller] >= LEAST_GAIN * rate_of[smaller]


def test_rows_that_only_pad_a_batch_do_not_count() -> None:
    found = Measured(batch_size=64, images_per_s=100.0, memory_bytes=1)
    assert Trial(batch_size=64, measured=found, filled=0.75).rate == 75.0
    assert Trial(batch_size=64, measured=None).rate == 0.0


def run_in(more_bytes: int, config: Config, said: Path) -> tuple[int | None, str]:
    process = CONTEXT.Process(target=speed_jobs.extract_in, args=(more_bytes, config, said))
    process.start()
    process.join()
    return process.exitcode, said.read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="a bound of address space, as Linux has it")
def test_auto_finds_a_size_where_memory_is_short_and_a_fixed_one_says_what_to_do(
    make: MakeConfig, tmp_path: Path
) -> None:
    """A teacher that takes 64 MiB an image, in a process that has 850: torch's own allocator is what says no."""
    bound = 850 * 2**20  # threads reserve address space, too
    assert 8 * speed_jobs.IMAGE_BYTES < bound < 16 * speed_jobs.IMAGE_BYTES
    teacher = {"name": "speed_jobs:hungry"}
    elsewhere = {"url": str(tmp_path / "fixed"), "dtype": "float16"}
    fixed = make(teacher=teacher, extract={"batch_size": 16}, cache=elsewhere)
    code, said = run_in(bound, fixed, tmp_path / "said-fixed")
    assert code == 1
    assert "Error: out of memory on cpu with batches of 16" in said
    for cure in ("smaller [extract] batch_size (--batch-size)", "auto finds one that fits", "is intact"):
        assert cure in said
    assert "Traceback" not in said
    code, said = run_in(bound, make(teacher=teacher), tmp_path / "said")
    assert code == 0, said
    lines = [line.split() for line in said.splitlines() if line.startswith("extract:  ")]
    assert [line[1] for line in lines] == ["16", "8"]
    assert lines[0][-2:] == ["too", "little"] and "extract: batches of 8: " in said
    log = log_of(make())
    assert log["batch_size"] == 8
    tried = {trial["batch_size"]: trial["measured"] for trial in log["batch_sizes_tried"]}
    assert tried.keys() == {16, 8} and tried[16] is None and tried[8]["images_per_s"] > 0
    assert open_cache(str(tmp_path / "cache")).manifest.numerics["batch_size"] == 8


def test_a_cache_that_is_there_says_the_size(
    make: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More views, and a resumed job: nothing is tried, nothing is warned of, and it is the cache of one run."""
    extract(make(extract={"batch_size": 20}), JobSplit())
    extract(make(extract={"batch_size": 20}, views={"count": "2"}, cache={"url": str(tmp_path / "whole")}), JobSplit())
    FORWARDS.clear()
    capsys.readouterr()
    config = make(views={"count": "2"})
    extract(config, JobSplit())
    assert set(FORWARDS) == {4, 20}  # the four images that a teacher is checked with, and batches
    said = capsys.readouterr().err
    assert "batches of 20, as the cache was begun with" in said and "may differ" not in said
    log = log_of(config)
    assert log["batch_size"] == 20 and log["batch_sizes_tried"] == []
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_a_finished_job_and_a_dry_run_try_nothing(make: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    FORWARDS.clear()
    extract(make(), JobSplit(), dry_run=True)
    assert "batches of the size that trials find the fastest" in capsys.readouterr().out
    extract(make(extract={"batch_size": 20}), JobSplit())
    FORWARDS.clear()
    extract(make(), JobSplit())
    extract(make(), JobSplit(), dry_run=True)
    assert "batches of 20" in capsys.readouterr().out
    assert set(FORWARDS) == {4}


def test_of_workers_that_begin_together_one_decides(make: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """While this worker tries sizes, another one begins the cache, with batches of 24."""
    other = make(extract={"batch_size": 24})
    speed_jobs.MEANWHILE.append(lambda: extract(other, JobSplit(index=1, count=2)))
    extract(make(), JobSplit(index=0, count=2))
    assert "batches of 24, as the cache was begun with" in capsys.readouterr().err
    assert log_of(other)["batch_size"] == 24
    cache = open_cache(other.cache.url)
    assert cache.manifest.numerics["batch_size"] == 24
    logs = [json.loads(path.read_text()) for path in Path(other.cache.url, "runs").iterdir()]
    assert sorted(log["batch_size"] for log in logs) == [24, 24]
    assert len(cache.units) == 5


def test_a_live_teacher_takes_the_size_of_the_cache_it_is_compared_with(make: MakeConfig) -> None:
    assert beside_a_student(make(extract={"batch_size": 6})).batch_size == 6
    assert beside_a_student(make()).batch_size == 64
    extract(make(extract={"batch_size": 20}), JobSplit())
    assert beside_a_student(make()).batch_size == 20


# --------------------------------------------------------------------------------------------------- what limits a job

seconds = st.floats(0.0, 1e5)


@settings(deadline=None)
@given(spent=st.builds(Spent, wall=st.floats(0.0, 1e4), teacher=seconds, data=seconds, writer=seconds, writing=seconds))
def test_the_limit_is_what_the_teacher_was_idle_for(spent: Spent) -> None:
    found = shares(spent)
    assert all(0 <= share <= 1 for share in found.values())
    assert found["teacher"] + found["data"] + found["writer"] <= 1 + 1e-9
    limit = limit_of(spent)
    if found["teacher"] > KEPT_BUSY + 1e-9:  # whatever the host waited for meanwhile
        assert limit == "teacher"
    if limit != "teacher":
        assert found["teacher"] <= KEPT_BUSY + 1e-9
        assert found[limit] == max(found["data"], found["writer"])


@pytest.mark.parametrize(
    ("spent", "limit"),
    [
        (Spent(), "teacher"),
        (Spent(wall=10.0, teacher=9.8, data=0.1), "teacher"),
        (Spent(wall=10.0, teacher=9.8, data=9.0), "teacher"),  # a GPU was at work while the host waited for data
        (Spent(wall=10.0, teacher=7.0, data=2.9), "data"),
        (Spent(wall=10.0, teacher=8.3, data=9.9), "data"),  # a GPU: the host waited all the time, the GPU a sixth of it
        (Spent(wall=10.0, teacher=4.0, data=1.0, writer=4.0, writing=9.9), "writer"),
        (Spent(wall=10.0, teacher=9.9, writing=9.9), "teacher"),  # a writer that keeps up limits nothing
        (Spent(wall=10.0, teacher=8.0), "teacher"),  # nobody was waited for: the host launches its kernels
    ],
)
def test_limits_by_example(spent: Spent, limit: str) -> None:
    assert limit_of(spent) == limit


@settings(deadline=None)
@given(steps=st.lists(st.floats(0.01, 20.0), min_size=1, max_size=60))
def test_the_window_forgets_what_is_long_past(steps: list[float]) -> None:
    clock = [100.0]
    spent = TimeSpent(lambda: clock[0])
    spent.add("data", 5.0)  # workers starting: before the beginning
    assert spent.whole() == Spent() == spent.recent()
    spent.begin()
    for number, step in enumerate(steps):
        with spent.during("data" if number < len(steps) // 2 else "teacher"):
            clock[0] += step
        recent = spent.recent()
        # at least the window where so much has passed, and never more than a step and a mark beyond it
        assert recent.wall >= min(WINDOW_S, sum(steps[: number + 1])) - 1e-6
        assert recent.wall <= WINDOW_S + max(steps) + 0.25 + 1e-6
        assert recent.data + recent.teacher == pytest.approx(recent.wall, abs=1e-6)
    assert spent.whole().wall == pytest.approx(sum(steps))
    assert spent.whole().data == pytest.approx(sum(steps[: len(steps) // 2]))
    clock[0] += 2 * WINDOW_S
    with spent.during("teacher"):
        clock[0] += 1
    spent.recent()
    clock[0] += 2 * WINDOW_S
    assert spent.recent().data == pytest.approx(0.0, abs=1e-6)
    spent.end()
    clock[0] += 7
    assert spent.whole().wall == pytest.approx(sum(steps) + 4 * WINDOW_S + 1)


def test_a_run_says_and_logs_what_limited_it(make: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make(extract={"batch_size": 16})
    summary = extract(config, JobSplit())
    said = capsys.readouterr().err
    assert f"limited by the {summary.limit} (data and teacher share the cores) | data " in said
    assert f"extract: limited by the {summary.limit}: the teacher was at work for " in said
    log = log_of(config)["summary"]
    assert log["limit"] in ("teacher", "data", "writer")
    assert log["shares"].keys() == {"teacher", "data", "writer", "writing"}


# ----------------------------------------------------------------------------------------- nobody waits for the device


class NoWaiting(TorchDispatchMode):
    """A device without values: what would wait for one fails by itself; copies to the host are noted.

    A tensor on `meta` has a shape and nothing else, so that reading a number of it (item, a mask as index, a copy that
    waits) is an error, as it is a synchronisation on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.to_host: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        to_host = str(kwargs.get("device")) == "cpu" and isinstance(args[0], torch.Tensor) and args[0].is_meta
        if func is torch.ops.aten._to_copy.default and to_host:
            self.to_host.append(bool(kwargs.get("non_blocking")))
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


def batches_without_waiting(config: Config, nodes: tuple[str, ...], codec: str) -> tuple[NoWaiting, UnitAssembly]:
    """One unit's batches through a teacher on a device without values, and into their assembly.

    A detector's network runs on the CPU, for autocast knows no such device; its tokens are moved there.
    """
    source = open_source(config.source.train, shard_size=config.source.shard_size)
    recipe, nowhere = make_recipe(config.views), torch.device("meta")
    teacher = load_teacher(config.teacher, nodes=nodes, num_classes=source.num_classes, view_px=recipe.size_px)
    detects = isinstance(teacher, DetectionTeacher)
    run = start_teacher(teacher, config.extract, CPU if detects else nowhere)
    assembly = UnitAssembly(source, UnitId(0, 0), specs_of(run, codec), seed=config.views.seed)
    renderer = Renderer(source, recipe, config.views.seed)
    watched = NoWaiting()
    for task in unit_tasks(source, recipe, config.views.seed, UnitId(0, 0), config.extract.batch_size):
        batch = renderer[task]
        outputs = run(model_input(batch, batch.pixels)) if detects else {}
        pixels = batch.pixels.to(nowhere)
        with watched:
            if detects:
                outputs = {name: tokens.to(nowhere) for name, tokens in outputs.items()}
            else:
                outputs = run(model_input(batch, pixels))
            assembly.add(batch, outputs)
    return watched, assembly


def specs_of(run: TeacherRun, codec: str) -> list[Any]:
    from vkd_cache.cache.schema import NodeSpec

    layout, share = ("pooled", 1.0) if "pooled" in run.teacher.node_shapes else ("tokens", 0.5)
    return [
        NodeSpec(name=name, layout=layout, shape=shape, dtype=codec, codec=codec, tokens=share)
        for name, shape in run.teacher.node_shapes.items()
    ]


def test_no_batch_waits_for_the_device(tiny_config: MakeConfig) -> None:
    config = tiny_config(extract={"batch_size": 16, "channels_last": True})
    watched, assembly = batches_without_waiting(config, ("pooled",), "float16")
    assert watched.to_host == [True] * 3  # a copy for each of the three batches of 48 images
    columns, nodes, _ = assembly.finish()
    assert nodes["pooled"].dtype == torch.float16 and len(nodes["pooled"]) == len(columns["row"]) == 48


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("detector") / "teacher.pth")


@pytest.mark.parametrize("codec", ["float16", "token_int8"])
def test_no_batch_of_a_detector_waits_for_the_device(
    coco_tree: Path, detector: Path, tmp_path: Path, codec: str
) -> None:
    config = detection_config(coco_tree, detector, tmp_path / "cache")
    watched, _ = batches_without_waiting(config, ("patch_3", "neck_det"), codec)
    assert watched.to_host and all(watched.to_host)


# ------------------------------------------------------------------------------------------------ how the teacher runs


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[object]]]:
    """Compiled graphs run as they are written; of each, the sizes that are symbols in it."""
    import torch._dynamo
    from torch._dynamo import config

    limits: Any = config
    before = limits.cache_size_limit
    found: list[list[object]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.append([value for value in inputs if not isinstance(value, torch.Tensor)])
        return graph.forward

    compile_method = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compile_method(self, backend=backend, fullgraph=True, **how)
    )
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()
    limits.cache_size_limit = before


@pytest.mark.filterwarnings("default")  # of the compiler's own modules
@pytest.mark.parametrize("teacher", [{}, {"name": "speed_jobs:plain", "weights": ""}], ids=["timm", "plain"])
def test_a_compiled_teacher_is_one_graph_of_fixed_shapes(
    tiny_config: MakeConfig, graphs: list[list[object]], teacher: dict[str, str]
) -> None:
    config = tiny_config(teacher=teacher, extract={"batch_size": 8, "compile": True})
    teachers = [load_teacher(config.teacher, nodes=("pooled",), num_classes=10, view_px=32) for _ in range(2)]
    plain = start_teacher(teachers[0], dataclasses.replace(config.extract, compile=False), CPU)
    run = start_teacher(teachers[1], config.extract, CPU)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for count in (8, 8, 3, 8):  # the last batch of a unit is filled up
        torch.testing.assert_close(run(images[:count])["pooled"], plain(images[:count])["pooled"])
    assert graphs == [[]]
    larger = dataclasses.replace(run, batch_size=12)  # as the search for a size does
    torch.testing.assert_close(larger(images)["pooled"], plain(images)["pooled"], rtol=1e-4, atol=1e-5)
    assert graphs == [[], []]
    assert run.numerics()["compiled"] is True


def layouts_in(run: TeacherRun, images: Any) -> tuple[list[tuple[bool, bool]], Any]:
    """Of each convolution that ran, whether input and weight were laid out channels last; and what came out."""
    seen: list[tuple[bool, bool]] = []

    def note(layer: torch.nn.Module, given: tuple[torch.Tensor, ...], _: object) -> None:
        if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size != (1, 1) and layer.in_channels > 1:
            weight = layer.weight
            seen.append(tuple(t.is_contiguous(memory_format=torch.channels_last) for t in (given[0], weight)))  # type: ignore[arg-type]

    handles = [layer.register_forward_hook(note) for layer in run.teacher.modules()]
    outputs = run(images)
    for handle in handles:
        handle.remove()
    return seen, outputs


def test_channels_last_is_images_and_weights_alike(tiny_config: MakeConfig) -> None:
    config = tiny_config(extract={"batch_size": 8, "channels_last": True})
    teachers = [load_teacher(config.teacher, nodes=("pooled",), num_classes=10, view_px=32) for _ in range(2)]
    plain = start_teacher(teachers[0], dataclasses.replace(config.extract, channels_last=False), CPU)
    run = start_teacher(teachers[1], config.extract, CPU)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before, expected = layouts_in(plain, images)
    after, found = layouts_in(run, images)
    assert before and not any(weight for _, weight in before)
    assert after and all(input_ and weight for input_, weight in after)
    torch.testing.assert_close(found["pooled"], expected["pooled"], rtol=1e-4, atol=1e-5)
    assert run.numerics()["channels_last"] is True


@pytest.mark.parametrize("how", [{"channels_last": True}, {"autocast": "bfloat16"}])
def test_a_detector_takes_them_too(coco_tree: Path, detector: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    """And compiling: see test_detection_canvas and test_vidt."""
    config = detection_config(coco_tree, detector, tmp_path / "cache")
    source = open_source(config.source.train, shard_size=config.source.shard_size)
    recipe = make_recipe(config.views)
    (task, *_) = unit_tasks(source, recipe, config.views.seed, UnitId(0, 0), 4)
    batch = Renderer(source, recipe, config.views.seed)[task]
    found: list[dict[str, Any]] = []
    for asked in (config.extract, dataclasses.replace(config.extract, **how)):
        teacher = load_teacher(config.teacher, nodes=("patch_3", "neck_det"), num_classes=11, view_px=0)
        found.append(start_teacher(teacher, asked, CPU)(model_input(batch, batch.pixels)))
    error = 0.05 if "autocast" in how else 1e-3
    for name, tokens in found[0].items():
        difference = (found[1][name].dense().float() - tokens.dense()).norm() / tokens.dense().norm()
        assert difference <= error, (name, float(difference))
        assert np.array_equal(found[1][name].offsets, tokens.offsets)
