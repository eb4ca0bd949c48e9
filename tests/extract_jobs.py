"""What the tests of extraction share: teachers with a fault, jobs in processes of their own, and a cache as bytes."""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from vkd_cache.config import Config
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract

FORWARDS: list[int] = []  # batch sizes that the teachers below have seen in this process
VANISHING: list[Path] = []  # removed when a teacher is built, which is after the source was scanned


class Colours(nn.Module):
    """Mean colours of an image and of its quarters, never negative, with a linear head."""

    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)

    def __init__(self, num_classes: int, white: float = 1.0) -> None:
        super().__init__()
        self.white = white
        generator = torch.Generator().manual_seed(3)
        self.head = nn.Linear(15, num_classes)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(num_classes, 15, generator=generator))
            self.head.bias.zero_()

    def forward_features(self, pixels: Tensor) -> Tensor:
        FORWARDS.append(len(pixels))
        quarters = nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)
        features = torch.cat([pixels.mean((2, 3)), quarters], 1)
        is_white = (features[:, :3] > 0.999).all(1, keepdim=True)
        return torch.where(is_white, features * self.white, features)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features if pre_logits else self.head(features)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, pixels: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(pixels))


def colours(num_classes: int) -> nn.Module:
    """A teacher without a fault."""
    for path in VANISHING:
        path.unlink()
    return Colours(num_classes)


def blinded_by_white(num_classes: int) -> nn.Module:
    """Infinite features for white images."""
    return Colours(num_classes, white=float("inf"))


def large_on_white(num_classes: int) -> nn.Module:
    """Features of white images that float16 cannot hold."""
    return Colours(num_classes, white=1e5)


def negative_on_white(num_classes: int) -> nn.Module:
    """Negative features for white images."""
    return Colours(num_classes, white=-1.0)


class Curved(Colours):
    """A head that no matrix describes."""

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features if pre_logits else self.head(features).tanh()


def curved(num_classes: int) -> nn.Module:
    """A teacher whose logits are not linear in its pooled features."""
    return Curved(num_classes)


def contents(url: Path) -> dict[str, bytes]:
    """The files of a cache by path, without logs of runs and what a killed run left."""
    files = (path for path in sorted(url.rglob("*")) if path.is_file())
    named = {path.relative_to(url).as_posix(): path for path in files}
    return {
        name: path.read_bytes() for name, path in named.items() if name.split("/")[0] not in ("runs", ".incomplete")
    }


def extract_alone(config: Config, split: JobSplit, said: Path, max_file_bytes: int = 0) -> None:
    """Run in a process of its own; it ends with the command's exit code, and what it says goes to the file `said`."""
    import resource

    from vkd_cache.cli import guarded

    torch.set_num_threads(1)
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    if max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    code = guarded(lambda: extract(config, split).exit_code)
    sys.stderr.flush()
    os._exit(code)
