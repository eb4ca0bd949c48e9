"""The student while it learns: model, optimizer, scaler and average, and one optimizer step over them.

Student and projector are one module and a step calls it once per batch, through DDP where there are several
processes, so gradients are averaged. Randomness inside the model (stochastic depth, dropout) is seeded anew at every
step from (train seed, step, rank): a resumed run needs no generator state to continue exactly.

Shape legend: b samples of a batch.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vkd_cache.config import Config
from vkd_cache.optim import WeightAverage, parameter_groups
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.ranks import broadcast_first, summed
from vkd_cache.stages.saved_student import start_student
from vkd_cache.stages.supply import Supply
from vkd_cache.stages.task import Task

SMALLEST_SCALE = 1e-4  # of a loss under fp16: from 65,536 it is 30 steps in a row whose gradients overflow
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """One student in training on one device.

    Attributes:
        student: the student with its projector, not wrapped.
        task: what the student sees and what its losses are.
        model: what a step calls: the student, wrapped by DDP when `world` > 1.
        ema: averaged student, or None.
        gradient_norm: norm of the last step's gradients before clipping, on the device; None without `clip_grad`.
    """

    def __init__(
        self, config: Config, task: Task, *, device: torch.device, world: int = 1, fresh: bool = True
    ) -> None:
        """`fresh`: start from `[student] weights`, where there are any; otherwise `load_state` follows.

        Raises:
            ConfigError, CheckpointError: a student that cannot be built, or weights that do not fit it.
        """
        self._config = config
        self._device = device
        self._world = world
        self.task = task
        torch.manual_seed(config.train.seed)
        student = task.create_student()
        if fresh and config.student.weights:
            start_student(student, config.student.weights)
        if config.student.sync_batchnorm and device.type == "cuda" and world > 1:
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
        self.student = student.to(device)
        self.ema = WeightAverage(self.student, config.train.ema_decay) if config.train.ema_decay > 0 else None
        self.model = self._wrapped(world)
        train = config.train
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.student, train.weight_decay),
            lr=train.lr,
            betas=(train.beta1, train.beta2),
            eps=train.eps,
            fused=True,  # other kernels take three times as long on a CPU, and under a scaler they wait for the GPU
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.amp == "fp16")
        self.gradient_norm: Tensor | None = None

    def _wrapped(self, world: int) -> nn.Module:
        model = self.task.compiled(self.student) if self._config.train.compile else self.student
        if world > 1:
            # a token that is expanded over the batch has such a gradient; nobody can do anything about it
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            ids = [self._device.index] if self._device.type == "cuda" else None
            model = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        return model

    def step(
        self, batches: Sequence[tuple[FedBatch, Tensor]], supply: Supply, lr: float, seed: int
    ) -> dict[str, Tensor]:
        """One optimizer step over `batches` of (batch, its pixels on the device).

        The gradient is that of the mean over all samples of these batches on all ranks, whatever their sizes: odd
        shards and broken images make some batches smaller.

        Returns:
            The mean of each loss term that is on, as tensors on the device, such that their mean over the ranks is
            the mean over all samples. Nothing waits for a GPU here.
        """
        self.model.train()
        torch.manual_seed(seed)
        self.gradient_norm = None
        sums: dict[str, Tensor] = {}
        alone = self._world == 1 and len(batches) == 1  # nothing to weigh
        for number, ((batch, pixels), share) in enumerate(zip(batches, self._shares(batches), strict=True), start=1):
            with self._synchronised(number == len(batches)):
                if len(batch) == 0:
                    self._pass_idly(pixels)
                    continue
                images = self.task.images(batch, pixels)
                terms = self.task.losses(self.outputs(images), batch, supply(batch, images))
                terms = terms if alone else {name: value * share for name, value in terms.items()}
                self.backward(terms["total"])
            for name, value in terms.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        if sums or self._world > 1:
            self.update(lr)
        return sums

    def backward(self, loss: Tensor, *, keep_graph: bool = False) -> None:
        """Add the gradients of `loss`, scaled under fp16, to those that are there."""
        self.scaler.scale(loss).backward(retain_graph=keep_graph)  # type: ignore[no-untyped-call]

    def update(self, lr: float) -> None:
        """Move the weights along the gradients, clear these, and move the average along."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self._config.train.clip_grad > 0:
            self.scaler.unscale_(self.optimizer)
            self.gradient_norm = nn.utils.clip_grad_norm_(self.student.parameters(), self._config.train.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.student)

    def _shares(self, batches: Sequence[tuple[FedBatch, Tensor]]) -> list[Any]:
        """Each batch's part of all samples of the step, times the number of ranks, over which DDP takes the mean.

        Joint losses are divided by what all ranks have: there a batch weighs by its samples on all of them together.
        """
        sizes = [len(batch) for batch, _ in batches]
        if self._world == 1:
            return [size / max(1, sum(sizes)) for size in sizes]
        everywhere = summed(torch.stack([torch.full((), float(size), device=self._device) for size in sizes]))
        total = everywhere.sum().clamp_min_(1)
        return [
            (everywhere[number] if self.task.joint else size * self._world) / total
            for number, size in enumerate(sizes)
        ]

    def _pass_idly(self, pixels: Tensor) -> None:
        """Take part in the other ranks' step with gradients of zero: every image of this batch is broken."""
        if self._world > 1:
            self.backward(self.task.idle_loss(self.outputs(self.task.idle_images(pixels))))

    def align_ranks(self) -> None:
        """Give every rank the first one's batch-norm statistics: they are what is saved, and so what to evaluate."""
        if self._world > 1:
            modules = [self.student, *([self.ema.module] if self.ema is not None else [])]
            broadcast_first([buffer for module in modules for buffer in module.buffers()])

    def outputs(self, images: Any) -> Any:
        """The student's outputs for the task's images in [0, 1], under the configured autocast."""
        dtype = AMP_DTYPES[self._config.train.amp]
        cast: Any = torch.autocast(self._device.type, dtype) if dtype is not None else contextlib.nullcontext()
        with cast:
            return self.task.outputs(self.model, images)

    def _synchronised(self, last: bool) -> Any:
        """DDP averages gradients once a step, at its last batch."""
        if last or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def is_finite(self) -> bool:
        """Whether everything that a checkpoint holds is finite; waits for the device."""
        modules = [self.student, *([self.ema.module] if self.ema is not None else [])]
        tensors = [value for module in modules for value in module.state_dict().values()]
        tensors += [value for held in self.optimizer.state.values() for value in held.values()]
        numbers = [value.detach() for value in tensors if value.is_floating_point() and value.numel()]
        extremes = [extreme.to(self._device) for value in numbers for extreme in value.aminmax()]  # nan if any is
        return bool(torch.stack(extremes).isfinite().all())

    def scale_has_sunk(self) -> bool:
        """Whether fp16's gradients have overflowed step after step, so that nothing is learnt; waits for the device.

        A single such step is no fault: the scaler leaves it out and halves the scale.
        """
        return self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE

    def state(self) -> dict[str, Any]:
        """Everything that a step changes."""
        return {
            "student": self.student.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state()` of a learner of the same configuration."""
        self.student.load_state_dict(state["student"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.updates = int(state["ema_updates"])
        # checkpoints of earlier releases were written by other kernels, whose state lies elsewhere
        groups = [{**group, "fused": True} for group in state["optimizer"]["param_groups"]]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of everything random inside the model at one step."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
