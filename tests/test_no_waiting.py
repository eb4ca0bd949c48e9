"""A training step never asks the device for a number: the host would wait for it, and the GPU then for the host.

Without a GPU the law is checked where such a question shows on any device: in the operators that turn a tensor's
content into a Python value or a shape, and in the methods that bring a tensor to the host. What asks on a CPU only,
where nobody waits, or is known to ask, stands in a list, with the words in its source that say so. With a GPU, CUDA
tells.
"""

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detection_jobs import write_detector
from detection_runs import CLASSES, VIEWS, config_builder
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vkd_cache import losses, orthonormal
from vkd_cache.config import Config
from vkd_cache.detection import criterion, matcher
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.nonfinite import StepNote
from vkd_cache.stages.run import Run, prepare_run
from vkd_cache.stages.standing import LossWindow
from vkd_cache.stages.supply import Supply, nodes_on_device
from vkd_cache.stages.transfer import ahead_on_device

Build = Callable[..., Config]
# operators whose result, or its shape, depends on what is in a tensor
ASKING_OPERATORS = (
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave",
)  # fmt: skip
ASKING_METHODS = ("cpu", "tolist", "numpy", "item", "__bool__", "__float__", "__int__", "__index__", "__array__")
# who may ask, and what in its source says that this is on a CPU, or why it has to
ALLOWED: dict[Callable[..., Any], str] = {
    losses.mix_targets: "is_cpu",
    orthonormal._factor._init_fn: "is_cpu",  # type: ignore[attr-defined]
    criterion._check: "is_cpu",
    matcher.match_layers: ".cpu()",  # the Hungarian method runs on the host; once a step
}
ALLOWED_CODE = {function.__code__ for function in ALLOWED}


def check_nobody_asks(what: str) -> None:
    """Fail unless one of those who may ask is on the stack; of those, only its own package's frames count."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code in ALLOWED_CODE:
            return
        frame = frame.f_back  # type: ignore[assignment]
    raise AssertionError(f"the step asks the device: {what}\n{''.join(traceback.format_stack(limit=12))}")


class NoQuestionsOfOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        masked = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1] if index is not None
        )
        if name in ASKING_OPERATORS or masked:
            check_nobody_asks(name)
        return func(*args, **(kwargs or {}))


class NoQuestionsOfMethods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ASKING_METHODS and args and isinstance(args[0], Tensor):
            check_nobody_asks(f"Tensor.{name}")
        if name in ("tensor", "as_tensor", "new_tensor") and not isinstance(args[-1], Tensor):
            # numbers of the host: a copy that waits, unless it goes through pinned memory later
            assert (kwargs or {}).get("device") is None and name != "new_tensor", f"{name} makes a device's tensor"
        return func(*args, **(kwargs or {}))


def prepared(config: Config) -> Run:
    return prepare_run(config, JobSplit())


def fed(run: Run, supply: Supply, count: int) -> list[tuple[FedBatch, Tensor]]:
    with run.feed(supply) as feed:
        batches = feed.batches(epoch=0, step=0, workers=0, pin_memory=run.device.type == "cuda")
        ahead = list(ahead_on_device(batches, run.device, nodes_on_device))
    return ahead[:count]


def two_steps(run: Run, *, live: bool = False) -> Iterator[Callable[[], None]]:
    """The first step, in which optimizer and libraries set themselves up, and another."""
    supply = run.supply(live=live)
    learner = run.learner(supply)
    count = run.config.train.accumulate
    batches = fed(run, supply, 2 * count)
    window = LossWindow(learner.task.terms, JobSplit(), run.device, lambda _: AssertionError())
    for step in range(2):
        group = batches[step * count : (step + 1) * count]
        assert len(group) == count

        def one(group: list[tuple[FedBatch, Tensor]] = group, step: int = step) -> None:
            terms = learner.step(group, supply, 1e-3, step)
            norm = learner.gradient_norm
            window.add(StepNote(step=step, lr=1e-3, batches=(), terms=terms, gradient_norm=norm))

        yield one
    window.look(2)


@pytest.fixture(scope="module")
def cache(tiny_config: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("bytes") / "cache"
    config = tiny_config(views={"count": "1"}, cache={"url": str(url), "dtype": "uint8"})
    assert extract(config, JobSplit()).exit_code == 0
    return url


FULL = {"ema_decay": 0.9, "clip_grad": 1.0, "batch_size": 16, "output": "unused"}
SETTINGS: dict[str, dict[str, Any]] = {
    "everything": {"train": {"accumulate": 2}},
    "bf16, hot logits": {"train": {"amp": "bf16"}, "loss": {"temperature": 2.0, "feature_weight": 0.5}},
    "whitened, cosine": {"loss": {"normalisation": "whiten", "feature_loss": "cosine"}},
    "without a teacher": {"loss": {"feature_weight": 0.0, "logit_weight": 0.0}},
}


def classification(tiny_config: Build, cache: Path, name: str, **train: Any) -> Run:
    sections = SETTINGS[name]
    return prepared(
        tiny_config(
            views={"count": "1"}, cache={"url": str(cache)}, loss=sections.get("loss", {}),
            train=FULL | sections.get("train", {}) | train,
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_no_step_from_a_cache_asks(tiny_config: Build, cache: Path, name: str) -> None:
    run = classification(tiny_config, cache, name)
    for step in two_steps(run):
        with NoQuestionsOfMethods(), NoQuestionsOfOperators():
            step()


def test_no_step_with_a_live_teacher_asks(tiny_config: Build) -> None:
    run = prepared(tiny_config(views={"count": "1"}, train=FULL))
    for step in two_steps(run, live=True):
        with NoQuestionsOfMethods(), NoQuestionsOfOperators():
            step()


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_no_step_of_a_detector_asks_but_for_its_matcher(coco_tree: Path, tmp_path: Path, share: float) -> None:
    weights = write_detector(tmp_path / "teacher.pt", "test_vidt2", CLASSES)
    build, url = config_builder(coco_tree, weights), str(tmp_path / "cache")
    views = VIEWS | {"count": "1"}
    config = build(views=views, cache={"url": url, "dtype": "int8", "tokens": share})
    assert extract(config, JobSplit()).exit_code == 0
    train = FULL | {"batch_size": 4}
    for step in two_steps(prepared(build(views=views, cache={"url": url}, train=train))):
        with NoQuestionsOfMethods(), NoQuestionsOfOperators():
            step()


def test_the_check_sees_questions() -> None:
    values = torch.arange(4.0)
    asking: list[Callable[[], object]] = [
        lambda: values.sum().item(),
        lambda: bool(values.sum() > 1),
        lambda: float(values[0]),
        lambda: values.tolist(),
        lambda: values.cpu(),
        lambda: values.nonzero(),
        lambda: values[values > 1],
        lambda: torch.equal(values, values),
        lambda: values.repeat_interleave(values.long()),
    ]
    for ask in asking:
        with pytest.raises(AssertionError, match="asks the device"), NoQuestionsOfMethods(), NoQuestionsOfOperators():
            ask()


@pytest.mark.parametrize("function", ALLOWED, ids=lambda function: function.__name__)
def test_who_may_ask_says_why(function: Callable[..., Any]) -> None:
    assert ALLOWED[function] in inspect.getsource(function)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, which tells who waits for it")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_no_step_waits_for_a_gpu(tiny_config: Build, cache: Path, name: str, amp: str) -> None:
    run = classification(tiny_config, cache, name, device="cuda", amp=amp)
    for number, step in enumerate(two_steps(run)):
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first one sets the libraries up
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
