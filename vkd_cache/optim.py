"""Parameter groups, learning rate and weight average of the reference recipe.

A newcomer would decay the projector: its parameter is two-dimensional, so the usual rule does, and that is what kills
the reference's feature loss at the first step (docs/losses.md). Modules that say `never_decays` are left out.
"""

import copy
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from vkd_cache.errors import ConfigError

TOKEN_NAMES = ("cls_token", "dist_token", "pos_embed")


def parameter_groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: decayed, and not.

    Not decayed: 1-D parameters (norms, layer scales), biases, class, distillation and position embeddings, what a
    network's own `no_weight_decay()` names, and every parameter of a module with `never_decays` (the projector). Where
    the student has a rule of its own, `undecayed()`, that one decides alone.

    Args:
        student: or any module; frozen parameters are left out.
        weight_decay: of the decayed group.

    Returns:
        [{"params", "weight_decay", "names"}] * 2, decayed first; each non-empty group in the module's own order.
    """
    own_rule = getattr(student, "undecayed", None)
    spared = own_rule() if callable(own_rule) else _spared_names(student)
    decayed: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        (others if name in spared else decayed)[name] = parameter
    groups = ((decayed, weight_decay), (others, 0.0))
    return [
        {"params": list(members.values()), "weight_decay": decay, "names": list(members)}
        for members, decay in groups
        if members
    ]


def _spared_names(student: nn.Module) -> set[str]:
    spared = {
        name
        for name, parameter in student.named_parameters()
        if parameter.ndim <= 1 or name.endswith(".bias") or name.rpartition(".")[2] in TOKEN_NAMES
    }
    for prefix, module in student.named_modules():
        dot = f"{prefix}." if prefix else ""
        if getattr(module, "never_decays", False):
            spared |= {f"{dot}{name}" for name, _ in module.named_parameters()}
        declared = getattr(module, "no_weight_decay", None)
        if callable(declared):
            spared |= {f"{dot}{name}" for name in declared()}
    return spared


def cosine_lr(step: int, total_steps: int, base: float, minimum: float = 0.0, warmup_steps: int = 0) -> float:
    """The learning rate of optimizer update `step` (0-based): linear warm-up from zero, then a half cosine.

    During warm-up update k gets base * (k + 1) / (warmup_steps + 1), so none is wasted on a rate of zero; the cosine
    starts at `base` at update `warmup_steps` and would reach `minimum` at `total_steps`.

    Args:
        step: 0 <= step; from `total_steps` on the rate stays at `minimum`.
        total_steps: updates of the whole run, at least 1.
        base, minimum: rates at the top and at the end.
        warmup_steps: updates of the warm-up, fewer than `total_steps`.

    Source: the reference's cosine, without its lag of one update.

    Raises:
        ConfigError: a warm-up as long as the run, or a negative number.
    """
    if not 0 <= warmup_steps < total_steps or step < 0:
        raise ConfigError(
            f"learning rate: found update {step}, warm-up of {warmup_steps} and run of {total_steps} updates, expected "
            "a warm-up shorter than the run. Lower train.warmup_epochs or raise train.epochs."
        )
    if step < warmup_steps:
        return base * (step + 1) / (warmup_steps + 1)
    if step >= total_steps:
        return minimum
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return minimum + 0.5 * (base - minimum) * (1.0 + math.cos(math.pi * progress))


class WeightAverage(nn.Module):
    """An exponential moving average of parameters and floating-point buffers; integer buffers are copied.

    torch's AveragedModel counts its updates in a tensor and looks at it at every step, which on a GPU is a wait.

    Attributes:
        module: the averaged network.
        updates: how many there were; the first one copies.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: not wrapped in DDP or compiled.
            decay: in [0, 1).

        Raises:
            ConfigError: decay outside [0, 1).
        """
        super().__init__()
        if not 0 <= decay < 1:
            raise ConfigError(f"train.ema_decay: found {decay}, expected 0 or more and less than 1.")
        self.module = copy.deepcopy(model)
        self.updates = 0
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards `model`, after each optimizer update."""
        averaged, copied = _alike(self.module, model), {}
        if self.updates == 0:
            averaged, copied = {}, averaged
        for dtype, (means, values) in averaged.items():
            if dtype.is_floating_point:
                torch._foreach_lerp_(means, values, 1.0 - self._decay)
            else:
                copied[dtype] = means, values
        for means, values in copied.values():
            torch._foreach_copy_(means, values)
        self.updates += 1


def _alike(one: nn.Module, other: nn.Module) -> dict[torch.dtype, tuple[list[Tensor], list[Tensor]]]:
    """Parameters and buffers of both, side by side, by dtype."""
    found: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    theirs = itertools.chain(other.parameters(), other.buffers())
    for own, value in zip(itertools.chain(one.parameters(), one.buffers()), theirs, strict=True):
        pair = found.setdefault(own.dtype, ([], []))
        pair[0].append(own)
        pair[1].append(value)
    return found
