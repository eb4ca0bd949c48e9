"""Loading weights into a ViDT: ours, the authors' ViDT and VkD files, always strictly.

A newcomer's trap: box heads have two names each, one of them inside the decoder. Files that cannot hold a tensor twice,
as safetensors, come with one of the two; files with both must agree.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vkd_cache.detection.vidt import VIDT_NAMES, ViDT, body_config
from vkd_cache.errors import CheckpointError
from vkd_cache.weights import WEIGHT_ENTRIES, bare_tensors, innermost, misfits

_NET = "net."  # the detector inside a student of ours
# of distillation, not of the detector: ours, then those of the reference's files
_PROJECTORS = (
    "projectors.", "patch_projector_1.", "patch_projector_2.", "patch_projector_3.", "patch_projector_4.",
    "body_det_projector.", "neck_det_projector.",
)
_TWIN = "transformer.decoder.bbox_embed."
_INDEX = ".relative_position_index"  # numbers that follow from the window alone
CLASS_HEAD, _DET, _PATCHES = "class_embed.0.weight", "backbone.det_token", "backbone.patch_embed.proj.weight"
_HEADS = {  # options, and how the names of their weights begin
    "cross_scale_fusion": "fusion.",
    "iou_aware": "iou_embed.",
    "token_label": "transformer.token_embed.",
}


def load_vidt_weights(model: ViDT, state: Mapping[str, Any], *, where: str) -> tuple[str, ...]:
    """Load the weights of a detector strictly.

    Args:
        model: of the same body, classes, [DET] tokens, layers and optional heads as the one that was saved.
        state: a state dict, plain or under `student`, `model` or `state_dict`; with prefixes of wrappers or not.
        where: what to call it in an error, normally its path.

    Returns:
        Names of entries that were set apart: projectors of a distillation.

    Raises:
        CheckpointError: no ViDT in it, another body, other numbers of classes, tokens or layers, other heads, or
            missing, unexpected or misshapen names.
    """
    named = vidt_weights(state, where=where)
    apart = tuple(name for name in named if name.startswith(_PROJECTORS))
    found = {name: value for name, value in named.items() if name not in apart}
    _refuse_another(found, model, where)
    own = model.state_dict()
    _complete_twins(found, where)
    problems = misfits(found, own, optional=_INDEX)
    if problems:
        raise CheckpointError(f"{where}: does not fit {_called(model)}: {'; '.join(problems)}.")
    for name, value in own.items():
        if name.endswith(_INDEX) and not torch.equal(found.setdefault(name, value).to(value), value):
            raise CheckpointError(f"{where}: '{name}' orders the tokens of a window in another way than Swin does.")
    model.load_state_dict(found, strict=True)
    return apart


def vidt_weights(state: Mapping[str, Any], *, where: str) -> dict[str, Tensor]:
    """The tensors of a ViDT file by their published names, projectors included.

    Raises:
        CheckpointError: no weights in it, or not those of a ViDT.
    """
    weights = innermost(state)
    if weights is state and not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{where}: found entries {', '.join(map(str, list(state)[:4])) or 'none'}, expected weights by name, or "
            f"one of the entries {', '.join(WEIGHT_ENTRIES)}."
        )
    named = bare_tensors(weights, where, CheckpointError)
    if any(name.startswith(_NET) for name in named):
        named = {name.removeprefix(_NET): value for name, value in named.items()}
    absent = [name for name in (_PATCHES, _DET, CLASS_HEAD) if name not in named or named[name].ndim < 2]
    if absent:
        raise CheckpointError(
            f"{where}: holds no ViDT ({absent[0]} is missing; found {', '.join(list(named)[:3]) or 'nothing'}), "
            "expected the weights of a whole detector."
        )
    return named


def vidt_classes(state: Mapping[str, Any], *, where: str) -> int:
    """Outputs of the class heads in a ViDT file.

    Raises:
        CheckpointError: no weights in it, or not those of a ViDT.
    """
    return len(vidt_weights(state, where=where)[CLASS_HEAD])


def vidt_heads(names: Iterable[str]) -> dict[str, bool]:
    """The optional parts that a ViDT file has weights for, as options of `create_vidt`, from the weights' names."""
    found = list(names)
    return {option: any(name.startswith(prefix) for name in found) for option, prefix in _HEADS.items()}


def _refuse_another(found: Mapping[str, Tensor], model: ViDT, where: str) -> None:
    """One plain sentence for what is not just a damaged file but another model."""
    config = model.config
    body, own_body = _body(found), (config.body_width, config.depths)
    if body != own_body:
        fitting = [name for name in VIDT_NAMES if (body_config(name).body_width, body_config(name).depths) == body]
        advice = f" It fits {fitting[0]}." if fitting else ""
        raise CheckpointError(
            f"{where}: holds a body of {_told(body)}, expected {_told(own_body)} as in {_called(model)}.{advice}"
        )
    layers = {name.split(".")[1] for name in found if name.startswith("class_embed.")}
    numbers = {
        "classes": (len(found[CLASS_HEAD]), config.num_classes),
        "[DET] tokens": (found[_DET].shape[1], config.num_queries),
        "decoder layers": (len(layers) - 1, config.num_layers),
        "channels in the neck": (found[CLASS_HEAD].shape[1], config.width),
    }
    heads = {
        "cross-scale fusion": ("fusion.", config.cross_scale_fusion),
        "IoU-aware heads": ("iou_embed.", config.iou_aware),
        "a token-label head": ("transformer.token_embed.", config.token_label),
    }
    wrong = [f"{has} {what}, expected {wanted}" for what, (has, wanted) in numbers.items() if has != wanted]
    for what, (prefix, wanted) in heads.items():
        has = any(name.startswith(prefix) for name in found)
        if has != wanted:
            wrong.append(f"{what}, expected none" if has else f"no {what.removeprefix('a ')}, expected some")
    if wrong:
        raise CheckpointError(f"{where}: found {'; '.join(wrong)}. Build {_called(model)} as it was trained.")


def _body(found: Mapping[str, Tensor]) -> tuple[int, tuple[int, ...]]:
    """Channels of the first stage and number of blocks of each."""
    split = [name.split(".") for name in found if name.startswith("backbone.layers.") and ".blocks." in name]
    blocks = {(name[2], name[4]) for name in split}
    stages = sorted({stage for stage, _ in blocks})
    return len(found[_PATCHES]), tuple(sum(stage == wanted for stage, _ in blocks) for wanted in stages)


def _complete_twins(found: dict[str, Tensor], where: str) -> None:
    """Give box heads both of their names, in place."""
    for name in [name for name in found if name.startswith((_TWIN, "bbox_embed."))]:
        short = name.removeprefix("transformer.decoder.")
        twin = _TWIN + short.removeprefix("bbox_embed.") if name == short else short
        if not torch.equal(found.setdefault(twin, found[name]), found[name]):
            long = f"transformer.decoder.{short}"
            raise CheckpointError(f"{where}: '{short}' and '{long}' differ, but are one tensor in a ViDT.")


def _told(body: tuple[int, tuple[int, ...]]) -> str:
    width, depths = body
    return f"{width} channels and {'-'.join(map(str, depths))} blocks"


def _called(model: ViDT) -> str:
    config = model.config
    own = (config.body_width, config.depths)
    return next(
        (name for name in VIDT_NAMES if (body_config(name).body_width, body_config(name).depths) == own), "this ViDT"
    )
