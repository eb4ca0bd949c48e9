"""Which orthogonal map the projector should use: speed, orthonormality over a training, gradients, final loss.

    python benchmarks/orthogonal.py --output benchmarks/results/orthogonal.json

Speed is of W and its gradient, forwards and backwards, at the widths of real students and teachers. The rest is of a
small regression: a student's layer and the map under test learn a random teacher's normalised features, with the
optimizer of the recipe. torch's own maps need seconds to minutes at real widths, so they are timed fewer times, and
train for fewer steps; the tables say so. No parameter is decayed here, so torch's Householder map lives
(docs/losses.md).
"""

import argparse
import sys
from collections.abc import Iterator

import torch
from harness import Report, Stopwatch, interleave, parse, parser
from orthogonal_maps import NAMES, SLOW, make_map
from torch import Tensor, nn
from torch.nn import functional as F

from vkd_cache.cli import guarded
from vkd_cache.optim import cosine_lr
from vkd_cache.runtime import resolve_device

TINY = {"repetitions": 2, "shapes": "12x4,6x6", "slow_shapes": "12x4", "steps": 8, "slow_steps": 4, "width": 6,
        "teacher_width": 12, "pool": 64}  # fmt: skip
ORTHONORMAL = 1e-5  # what a projector promises


def main() -> int:
    """Run the benchmark."""
    made = parser("Orthogonal maps: speed, orthonormality, gradients, final loss.", repetitions=2)
    made.add_argument("--shapes", default="3024x192,3024x384,256x256", help="of W, longer side first")
    made.add_argument("--slow-shapes", default="256x256,3024x192", help="those at which torch's own maps run, too")
    made.add_argument("--steps", type=int, default=10_000, help="optimizer steps of the regression")
    made.add_argument("--slow-steps", type=int, default=10_000, help="optimizer steps with torch's own maps")
    made.add_argument("--width", type=int, default=24, help="student width of the regression")
    made.add_argument("--teacher-width", type=int, default=96, help="teacher width of the regression")
    made.add_argument("--batch-size", type=int, default=64, help="samples per step of the regression")
    made.add_argument("--pool", type=int, default=4096, help="samples of the regression")
    made.add_argument("--lr", type=float, default=5e-4, help="the recipe's; AdamW, half a cosine to 1 % of it")
    made.add_argument("--device", default="auto", help="of the maps' speed; the regression runs on the CPU")
    options = parse(made, TINY)
    report = Report("orthogonal", options)
    device = torch.device(resolve_device(options.device))
    report.facts["device"] = device.type
    measure_speed(options, device, report)
    for name in NAMES:
        if name != "polar, Newton-Schulz":  # the same map as by eigenvectors, to the last digits
            measure_training(options, name, report)
    report.finish(options.output)
    return 0


def measure_speed(options: argparse.Namespace, device: torch.device, report: Report) -> None:
    """Milliseconds of W, forwards and backwards; torch's own maps once, the others `repetitions` times in turn."""
    for shape in options.shapes.split(","):
        rows, columns = (int(side) for side in shape.split("x"))
        start = nn.init.orthogonal_(torch.empty(rows, columns), generator=torch.Generator().manual_seed(options.seed))
        timed = {name: Timed(name, start, device) for name in NAMES if name not in SLOW}
        kinds = {f"{shape}, {name}": once for name, once in timed.items()}
        report.measure("ms", interleave(shape, kinds, options.repetitions))
        shipped = f"{shape}, {NAMES[0]}"
        for name in timed:
            if f"{shape}, {name}" != shipped and "linear" not in name:
                report.ratio(f"{name} / shipped, {shape}", f"{shape}, {name}", shipped)
        for name in SLOW:
            if shape in options.slow_shapes.split(","):
                report.measure("ms", {f"{shape}, {name}": [Timed(name, start, device)()]})


class Timed:
    """One map at one shape: milliseconds forwards and backwards."""

    def __init__(self, name: str, start: Tensor, device: torch.device) -> None:
        self._rounds = 1 if name in SLOW else 3
        self._map = make_map(name, start)
        with torch.no_grad():  # a little away from where iterations would have nothing to do
            for parameter in self._map.parameters():
                parameter.add_(5e-4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).tril())
        self._map.to(device)
        self._gradient = torch.randn(start.shape, generator=torch.Generator().manual_seed(2)).to(device)
        self._device = device
        if name not in SLOW or device.type == "cuda":  # where the first call loads kernels
            self._once()

    def __call__(self) -> float:
        """Milliseconds of one round."""
        with Stopwatch(self._device) as watch:
            for _ in range(self._rounds):
                self._once()
        return 1e3 * watch.wall_s / self._rounds

    def _once(self) -> None:
        self._map.zero_grad(set_to_none=True)
        self._map.weight.backward(self._gradient)


def measure_training(options: argparse.Namespace, name: str, report: Report) -> None:
    """Train `repetitions` students, one a seed, and keep what became of them."""
    steps = options.slow_steps if name in SLOW else options.steps
    found = [regression(options, name, steps, seed) for seed in range(options.seed, options.seed + options.repetitions)]
    columns = {key: [each[key] for each in found] for key in found[0]}
    for key, values in columns.items():
        report.measure("error" if "error" in key else "ratio" if "/" in key else "loss", {f"{name}: {key}": values})
    report.facts[f"{name}: steps"] = steps
    if "linear" not in name:
        worst = max(columns["orthonormality error, worst"])
        report.facts[f"{name}: orthonormal to {ORTHONORMAL:g}"] = "yes" if worst <= ORTHONORMAL else f"NO, {worst:.2g}"


def regression(options: argparse.Namespace, name: str, steps: int, seed: int) -> dict[str, float]:
    """What one training shows: losses, the worst orthonormality error, gradients, and the ratio of singular values."""
    draw = torch.Generator().manual_seed(seed)
    inputs, targets = teacher_features(options, draw)
    hidden = 2 * options.width
    body = nn.Sequential(nn.Linear(inputs.shape[1], hidden), nn.GELU(), nn.Linear(hidden, options.width))
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / max(parameter.shape) ** 0.5)
    start = nn.init.orthogonal_(torch.empty(options.teacher_width, options.width), generator=draw)
    orthogonal = make_map(name, start)
    parameters = [*body.parameters(), *orthogonal.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)
    moved = next(orthogonal.parameters())
    errors, norms, losses = [], [], []
    for step, rows in enumerate(batches(options, steps, draw)):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, options.steps, options.lr, 0.01 * options.lr)
        weight = orthogonal.weight
        loss = F.smooth_l1_loss(body(inputs[rows]) @ weight.mT, targets[rows])
        loss.backward()
        norms.append(moved.grad.norm())
        errors.append((weight.detach().mT @ weight.detach() - torch.eye(options.width)).abs().max())
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    tail = max(1, min(100, steps // 10))
    early = min(options.slow_steps, steps)
    first, last = torch.stack(norms[:tail]).mean(), torch.stack(norms[-tail:]).mean()
    return {
        f"loss around step {early}": float(torch.stack(losses[early - tail : early]).mean()),
        "loss at the end": float(torch.stack(losses[-tail:]).mean()),
        "orthonormality error, worst": float(torch.stack(errors).max()) + 1e-12,
        "parameter's gradient, end / begin": float(last / first),
        "singular values of the parameter, largest / smallest": condition(moved.detach()),
    }


def teacher_features(options: argparse.Namespace, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs (pool, 32), and a random two-layer network's features of them, normalised."""
    inputs = torch.randn(options.pool, 32, generator=draw)
    hidden = torch.relu(inputs @ torch.randn(32, 128, generator=draw) / 32**0.5)
    features = torch.relu(hidden @ torch.randn(128, options.teacher_width, generator=draw) / 128**0.5)
    return inputs, F.layer_norm(features, features.shape[-1:])


def batches(options: argparse.Namespace, steps: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Rows of `steps` batches."""
    for _ in range(steps):
        yield torch.randint(0, options.pool, (options.batch_size,), generator=draw)


def condition(parameter: Tensor) -> float:
    """Largest over smallest singular value."""
    values = torch.linalg.svdvals(parameter.double())
    return float(values[0] / values[-1].clamp_min(1e-30))


if __name__ == "__main__":
    sys.exit(guarded(main))
