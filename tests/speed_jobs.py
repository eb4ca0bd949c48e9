"""What the tests of extraction's speed run: a teacher whose memory is known, and jobs with little of it."""

import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from extract_jobs import Colours
from torch import Tensor, nn

from vkd_cache.config import Config
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract

IMAGE_BYTES = 2**26  # that `hungry` takes for each image of a batch
MEANWHILE: list[Callable[[], object]] = []  # done, once each, when a teacher below is given a batch


class Hungry(Colours):
    """Takes a known amount of memory for every image, in one piece, and gives it back."""

    def forward_features(self, pixels: Tensor) -> Tensor:
        torch.empty(len(pixels) * IMAGE_BYTES, dtype=torch.uint8)  # never touched: address space is all it takes
        return super().forward_features(pixels)


class Watched(Colours):
    """Lets the test do something in the middle of a batch."""

    def forward_features(self, pixels: Tensor) -> Tensor:
        if len(pixels) > 4:  # not the four probe images
            while MEANWHILE:
                MEANWHILE.pop()()
        return super().forward_features(pixels)


def plain(num_classes: int) -> nn.Module:
    """A network with nothing but a forward."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(16, num_classes))


def hungry(num_classes: int) -> Colours:
    """64 MiB an image."""
    return Hungry(num_classes)


def watched(num_classes: int) -> Colours:
    """A teacher whose batches can be interrupted."""
    return Watched(num_classes)


def extract_in(more_bytes: int, config: Config, said: Path) -> None:
    """Run in a process of its own that may take `more_bytes` of address space beyond what it has."""
    from vkd_cache.cli import guarded

    torch.set_num_threads(1)
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    size = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert size is not None
    limit = int(size[1]) * 1024 + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    code = guarded(lambda: extract(config, JobSplit()).exit_code)
    sys.stderr.flush()
    os._exit(code)
