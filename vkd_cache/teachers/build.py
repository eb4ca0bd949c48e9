"""Build the network of a teacher: a timm model or a callable of the user's, with weights that were trained.

A newcomer's trap: nothing here may leave a randomly initialised teacher. timm replaces the head by a random one when
another number of classes is asked for, so that combination is refused.
"""

import dataclasses
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vkd_cache.config import TeacherConfig
from vkd_cache.errors import TeacherError
from vkd_cache.teachers.weights import State, load_weights, mismatches, read_weights

_CALLABLE = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<attribute>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuiltTeacher:
    """A network with its weights, and what it expects.

    Attributes:
        model: maps normalised pixels (B, 3, input_px, input_px) to logits (B, K).
        input_px: side of its input, pixels.
        mean: per-channel mean of its normalisation, for pixels in [0, 1].
        std: per-channel standard deviation of the same.
    """

    model: nn.Module
    input_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def build(config: TeacherConfig, *, num_classes: int, view_px: int) -> BuiltTeacher:
    """The teacher that `config` names, with its weights; `num_classes` and `view_px` as in `load_teacher`.

    Raises:
        TeacherError: see `load_teacher`.
    """
    if not config.name:
        raise TeacherError("[teacher] name: found nothing, expected a timm model name or package.module:callable.")
    state = read_weights(config.weights) if config.weights else None
    # building a network draws its initial weights: the generator of the caller must not notice
    with torch.random.fork_rng(devices=[]):
        match = _CALLABLE.fullmatch(config.name)
        if match is not None:
            return _build_callable(config, match, state, num_classes, view_px)
        if state is None:
            return _build_pretrained(config, view_px)
        return _build_from_file(config, state, num_classes, view_px)


def names_code(name: str) -> bool:
    """Whether building the teacher called `name` runs code of the user's: `package.module:callable`."""
    return _CALLABLE.fullmatch(name) is not None


def _timm_cfg(name: str) -> Any:
    """What timm knows of a model; None for an architecture of which nothing was published.

    Raises:
        TeacherError: timm has no such model, or no such tag of it.
    """
    if timm.is_model(name):
        try:
            return timm.get_pretrained_cfg(name)
        except RuntimeError as error:  # the architecture is known, the tag is not
            known = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*")) or "none"
            raise TeacherError(
                f"[teacher] name: found '{name}', a tag that timm does not know. Expected one of {known}."
            ) from error
    near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=1)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    raise TeacherError(
        f"[teacher] name: found '{name}', which timm {timm.__version__} does not know{hint} Expected a timm model, "
        "or package.module:callable."
    )


def _build_pretrained(config: TeacherConfig, view_px: int) -> BuiltTeacher:
    cfg = _timm_cfg(config.name)
    available = int(cfg.num_classes) if cfg is not None else 0
    if cfg is not None and config.num_classes not in (0, available):
        raise TeacherError(
            f"[teacher] num_classes: found {config.num_classes}, but timm's pretrained '{config.name}' has {available} "
            "and another head would be random. Leave num_classes out, or give --teacher-weights FILE."
        )
    try:
        model = _create(config.name, pretrained=True, input_px=_input_sizes(config, view_px)[0])
    except (OSError, RuntimeError, ValueError) as error:  # no network, not on the hub, no pretrained tag
        raise TeacherError(
            f"[teacher] '{config.name}': timm's pretrained weights could not be had ({_first_line(error)}). Give "
            "--teacher-weights FILE (safetensors, or a torch file); a teacher with random weights teaches nothing."
        ) from error
    return _with_settings(model, config, view_px)


def _build_from_file(config: TeacherConfig, state: State, num_classes: int, view_px: int) -> BuiltTeacher:
    classes = config.num_classes or _classes_in(config.name, state, num_classes)
    sizes = _input_sizes(config, view_px)
    model = nn.Module()
    for input_px in sizes:  # of a model whose parameters depend on the input size: the size the file was saved at
        model = _create(config.name, pretrained=False, input_px=input_px, num_classes=classes)
        if not mismatches(model, state):
            break
    else:
        if len(sizes) > 1:
            model = _create(config.name, pretrained=False, input_px=sizes[0], num_classes=classes)
        state = _renamed_by_timm(model, state)
    load_weights(model, state, config.weights)
    return _with_settings(model, config, view_px)


def _build_callable(
    config: TeacherConfig, match: re.Match[str], state: State | None, num_classes: int, view_px: int
) -> BuiltTeacher:
    factory = _import_callable(config.name, match["module"], match["attribute"])
    arguments: dict[str, Any] = {}
    try:
        signature = inspect.signature(factory)
        if "num_classes" in signature.parameters:
            arguments["num_classes"] = config.num_classes or num_classes
        signature.bind(**arguments)
    except (TypeError, ValueError) as error:  # arguments that nobody gives, or a builtin without a signature
        raise TeacherError(
            f"[teacher] '{config.name}': cannot be called without arguments, or with num_classes alone ({error}). "
            "Give a callable that builds the whole network."
        ) from error
    model = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise TeacherError(f"[teacher] '{config.name}': returned a {type(model).__name__}, expected an nn.Module.")
    if state is not None:
        load_weights(model, state, config.weights)
    return _with_settings(model, config, view_px)


def _import_callable(name: str, module: str, attribute: str) -> Callable[..., object]:
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise TeacherError(
            f"[teacher] '{name}': {error}. Expected package.module:callable, importable from here (put its folder on "
            "PYTHONPATH)."
        ) from error
    if not callable(found):
        raise TeacherError(f"[teacher] '{name}': found a {type(found).__name__}, expected a callable.")
    wrapped: Callable[..., object] = found
    return wrapped


def _create(name: str, *, pretrained: bool, input_px: int, num_classes: int | None = None) -> nn.Module:
    """timm's model; the size is passed on only where it is not the architecture's own."""
    cfg = _timm_cfg(name)
    arguments: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if cfg is not None and cfg.fixed_input_size and input_px != cfg.input_size[-1]:
        arguments["img_size"] = input_px
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise TeacherError(
            f"[teacher] '{name}': cannot be built for an input of {input_px} px ({_first_line(error)}). Leave input_px "
            "out: views are then resized to the model's own size."
        ) from error
    return model


def _input_sizes(config: TeacherConfig, view_px: int) -> list[int]:
    """Input sizes to try: what is asked for, else the architecture's own where it is fixed, and the view's."""
    cfg = _timm_cfg(config.name)
    if config.input_px:
        return [config.input_px]
    if cfg is not None and cfg.fixed_input_size:
        return list(dict.fromkeys((int(cfg.input_size[-1]), view_px)))
    return [view_px]


def _with_settings(model: nn.Module, config: TeacherConfig, view_px: int) -> BuiltTeacher:
    settings = getattr(model, "pretrained_cfg", None)
    cfg: Mapping[str, Any] = settings if isinstance(settings, Mapping) else {}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        size = getattr(model, "img_size", None)
    native = int(size[-1]) if isinstance(size, (tuple, list)) else size if isinstance(size, int) else None
    if native is None and cfg.get("fixed_input_size"):
        native = int(cfg["input_size"][-1])
    return BuiltTeacher(
        model=model,
        input_px=config.input_px or native or view_px,
        mean=_triple(getattr(model, "mean", None)) or _triple(cfg.get("mean")) or IMAGENET_DEFAULT_MEAN,
        std=_triple(getattr(model, "std", None)) or _triple(cfg.get("std")) or IMAGENET_DEFAULT_STD,
    )


def _triple(value: object) -> tuple[float, float, float] | None:
    if isinstance(value, Tensor):
        value = value.detach().flatten().tolist()
    if isinstance(value, (tuple, list)) and len(value) == 3:
        first, second, third = (float(v) for v in value)
        return first, second, third
    return None


def _classes_in(name: str, state: State, num_classes: int) -> int:
    """Rows of the classifier's weight in a file; 0 for an architecture without a head; else `num_classes`."""
    cfg = _timm_cfg(name)
    classifier = getattr(cfg, "classifier", None)
    if isinstance(classifier, (tuple, list)):
        classifier = classifier[0]
    weight = state.get(f"{classifier}.weight")
    if weight is not None:
        return int(weight.shape[0])
    return 0 if cfg is not None and cfg.num_classes == 0 else num_classes


def _renamed_by_timm(model: nn.Module, state: State) -> State:
    """`state` through timm's own filter of the architecture, for files in an older naming or of another input size."""
    module = sys.modules[type(model).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if convert is None:
        return state
    try:
        arguments = (state, model) if "model" in inspect.signature(convert).parameters else (state,)
        converted = convert(*arguments)
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError):
        return state  # not a file of this architecture at all: the strict load says how it differs
    return {str(key): value for key, value in converted.items()} if not mismatches(model, converted) else state


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
