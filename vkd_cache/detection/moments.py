"""Mean and spread of each channel over all tokens of a batch, over all processes of a job.

A newcomer would add up squares and subtract: where the mean outweighs the spread, float32 then loses the spread. Here
only centred moments are joined (Chan's formula). One exchange carries the moments of every node: the fewer collectives
in the backward pass, the fewer that could meet DDP's own in another order on another process.

Shape legend: T tokens, C channels, W processes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vkd_cache.tokens import Tokens


class Moments(NamedTuple):
    """Of a set of tokens: number (), mean (C,), and spread (C,), the sum of squared distances from the mean."""

    number: Tensor
    mean: Tensor
    spread: Tensor

    def deviation(self) -> Tensor:
        """(C,) unbiased; 0, with slope 0, where a channel is constant."""
        variance = self.spread / (self.number - 1).clamp_min(1)
        # sqrt has no finite slope at 0
        constant = variance <= 0
        return variance.masked_fill(constant, 1).sqrt().masked_fill(constant, 0)


def centred_tokens(values: Tensor) -> tuple[Tensor, Moments]:
    """Tokens (T, C) that are all here less their mean, and their moments; differentiable; all 0 where there is none.

    Few passes over the tokens, forwards and backwards: they are the largest thing that distillation adds to a step.
    """
    centred, mean, spread = _Centred.apply(values)
    return centred, Moments(number=values.new_full((), len(values)), mean=mean, spread=spread)


class _Centred(torch.autograd.Function):
    """(centred, mean, spread); no tokens give sums of zero: that process takes part in the others' exchange."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = values.sum(0) / max(1, len(values))
        centred = values - mean
        ctx.save_for_backward(centred)
        return centred, mean, centred.square().sum(0)

    @staticmethod
    def backward(ctx: Any, of_centred: Tensor, of_mean: Tensor, of_spread: Tensor) -> Tensor:
        (centred,) = ctx.saved_tensors
        same_for_all = (of_mean - of_centred.sum(0)) / max(1, len(centred))  # centred tokens add up to 0
        return torch.addcmul(of_centred, centred, 2 * of_spread).add_(same_for_all)


def stored_moments(tokens: Tokens) -> Moments:
    """Moments of all valid tokens, float32, from the stored sums: the same whether all of them or a sample are here."""
    count = int(tokens.counts.sum())
    mean = tokens.total.sum(0, dtype=torch.float64) / max(count, 1)
    spread = tokens.squares.sum(0, dtype=torch.float64) - mean.square() * count
    return Moments(
        number=mean.new_full((), count, dtype=torch.float32), mean=mean.float(), spread=spread.clamp_min(0).float()
    )


def joint_moments(parts: Sequence[Moments]) -> list[Moments]:
    """Each of the moments over all processes, differentiable; what is given, in a job of one process.

    Every process has to call it with as many moments of the same widths.
    """
    processes = num_processes()
    if processes == 1:
        return list(parts)
    dtype = parts[0].mean.dtype
    own = torch.cat([torch.cat([part.number[None], part.mean, part.spread]).to(dtype) for part in parts])
    everyone = own.new_zeros((processes, len(own)))
    rank = torch.arange(processes, device=own.device) == dist.get_rank()
    everyone = sum_over_processes(torch.where(rank[:, None], own, everyone))
    widths = [1 + 2 * len(part.mean) for part in parts]
    return [_joined(rows) for rows in torch.split(everyone, widths, dim=1)]


def num_processes() -> int:
    """Processes of the job that a loss is spread over; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of `values` over all processes; differentiable: each process gets the sum of all their gradients."""
    if num_processes() == 1:
        return values
    summed: Tensor = _SumOverProcesses.apply(values)
    return summed


def _joined(rows: Tensor) -> Moments:
    """(W, 1 + 2C): count, mean and spread of each process."""
    counts = rows[:, :1]
    means, spreads = rows[:, 1:].chunk(2, dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count.clamp_min(1)
    return Moments(number=count, mean=mean, spread=(spreads + counts * (means - mean).square()).sum(0))


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        summed = values.contiguous().clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed)
        return summed
