"""The student while it learns: model, losses, optimizer, scaler and average, and one optimizer step over them.

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
from vkd_cache.losses import VkdLoss, mix_targets
from vkd_cache.normalisation import Whitening
from vkd_cache.optim import make_ema, parameter_groups
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.ranks import broadcast_first, summed
from vkd_cache.stages.supply import Supply, TeacherOutput
from vkd_cache.stages.transfer import mixed_images
from vkd_cache.students import Student, create_student
from vkd_cache.views.blend import normalise

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TERMS = ("total", "task", "feature", "logit")


class Learner:
    """One student in training on one device.

    Attributes:
        student: the student with its projector, not wrapped.
        model: what a step calls: the student, wrapped by DDP when `world` > 1.
        ema: averaged student, or None.
    """

    def __init__(
        self,
        config: Config,
        *,
        num_classes: int,
        teacher_width: int | None,
        device: torch.device,
        world: int = 1,
        whitening: Whitening | None = None,
    ) -> None:
        self._config = config
        self._num_classes = num_classes
        self._device = device
        self._world = world
        torch.manual_seed(config.train.seed)
        student = create_student(
            config.student.name,
            num_classes,
            teacher_width,
            input_px=config.views.size_px,
            drop_path=config.student.drop_path,
            projector=config.loss.projector,
        )
        if config.student.sync_batchnorm and device.type == "cuda" and world > 1:
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
        self.student: Student = student.to(device)
        # made once: a tensor from numbers is a copy that waits for the GPU
        self._mean, self._std = (torch.tensor(v, device=device) for v in (student.mean, student.std))
        self.ema = make_ema(self.student, config.train.ema_decay) if config.train.ema_decay > 0 else None
        self.model = self._wrapped(world)
        train = config.train
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.student, train.weight_decay),
            lr=train.lr,
            betas=(train.beta1, train.beta2),
            eps=train.eps,
            fused=device.type == "cuda",  # the other kernels wait for the GPU under a gradient scaler
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.amp == "fp16")
        loss = config.loss
        self.loss = VkdLoss(
            task_weight=loss.task_weight,
            feature_weight=loss.feature_weight,
            logit_weight=loss.logit_weight,
            temperature=loss.temperature,
            feature_loss=loss.feature_loss,
            normalisation=loss.normalisation,
            whitening=whitening,
        )

    def _wrapped(self, world: int) -> nn.Module:
        model: nn.Module = self.student
        if self._config.train.compile:
            model = torch.compile(model)  # type: ignore[assignment]
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
        sums: dict[str, Tensor] = {}
        for number, ((batch, pixels), share) in enumerate(zip(batches, self._shares(batches), strict=True), start=1):
            with self._synchronised(number == len(batches)):
                if len(batch) == 0:
                    self._pass_idly(pixels)
                    continue
                images = mixed_images(pixels, batch.rendered.mix)
                terms = self.losses(batch, images, supply(batch, images))
                self.backward(terms["total"] * share)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.detach() * share
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
            nn.utils.clip_grad_norm_(self.student.parameters(), self._config.train.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.student)

    def _shares(self, batches: Sequence[tuple[FedBatch, Tensor]]) -> list[Any]:
        """Each batch's part of all samples of the step, times the number of ranks, over which DDP takes the mean."""
        sizes = [len(batch) for batch, _ in batches]
        if self._world == 1:
            return [size / max(1, sum(sizes)) for size in sizes]
        total = summed(torch.full((), float(sum(sizes)), device=self._device)).clamp_min_(1)
        return [size * self._world / total for size in sizes]

    def _pass_idly(self, pixels: Tensor) -> None:
        """Take part in the other ranks' step with gradients of zero: every image of this batch is broken."""
        if self._world == 1:
            return
        output = self.outputs(pixels.new_zeros(2, 3, *pixels.shape[1:3]).float())
        self.backward(sum(part.float().sum() for part in output if part is not None) * 0.0)

    def align_ranks(self) -> None:
        """Give every rank the first one's batch-norm statistics: they are what is saved, and so what to evaluate."""
        if self._world > 1:
            modules = [self.student, *([self.ema.module] if self.ema is not None else [])]
            broadcast_first([buffer for module in modules for buffer in module.buffers()])

    def losses(self, batch: FedBatch, images: Tensor, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Loss terms of one batch at the current weights; `images` (b, 3, H, W) in [0, 1] are mixed already."""
        return self.loss(self.outputs(images), self.targets(batch), teacher.features, teacher.logits)

    def outputs(self, images: Tensor) -> Any:
        """The student's outputs for `images` (b, 3, H, W) in [0, 1], under the configured autocast."""
        dtype = AMP_DTYPES[self._config.train.amp]
        cast: Any = torch.autocast(self._device.type, dtype) if dtype is not None else contextlib.nullcontext()
        with cast:
            return self.model(normalise(images, self._mean, self._std))

    def targets(self, batch: FedBatch) -> Tensor:
        """(b, K) task targets: lambda-weighted, smoothed one-hot labels."""
        label = batch.rendered.label.to(self._device, non_blocking=True)
        mix = batch.rendered.mix
        partner, lam = label, torch.ones(len(label), device=self._device)
        if mix is not None:
            partner = label[torch.from_numpy(mix.partner.astype("int64")).to(self._device, non_blocking=True)]
            lam = torch.from_numpy(mix.lam).to(self._device, non_blocking=True)
        return mix_targets(label, partner, lam, self._num_classes, self._config.loss.smoothing)

    def _synchronised(self, last: bool) -> Any:
        """DDP averages gradients once a step, at its last batch."""
        if last or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def is_finite(self) -> bool:
        """Whether all weights are finite; waits for the device."""
        return bool(torch.stack([parameter.detach().sum() for parameter in self.student.parameters()]).isfinite().all())

    def state(self) -> dict[str, Any]:
        """Everything that a step changes."""
        return {
            "student": self.student.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "ema_updates": int(self.ema.n_averaged) if self.ema is not None else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state()` of a learner of the same configuration."""
        self.student.load_state_dict(state["student"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(state["ema_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of everything random inside the model at one step."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
