"""Shared by the tests of training detectors: a small configuration, and a student without randomness."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from vkd_cache.config import Config, load_config

Build = Callable[..., Config]
CLASSES = 11
PLAIN = {"feature_weight": 0.0}
VIEWS = {
    "recipe": "vidt",
    "scales": (64, 80),
    "max_size_px": 112,
    "crop_scales": (64,),
    "crop_min_px": 32,
    "crop_max_px": 64,
    "canvas_multiple_px": 32,
    "seed": 5,
}


def config_builder(coco: Path, teacher: Path) -> Build:
    """Configurations of small runs of `test_vidt`, taught by the `test_vidt2` in the file `teacher`, on 24 images."""
    defaults: dict[str, dict[str, Any]] = {
        "source": {"train": str(coco), "shard_size": 8},
        "views": VIEWS,
        "teacher": {"name": "test_vidt2", "weights": str(teacher)},
        "cache": {"dtype": "float16"},
        "extract": {"batch_size": 4, "workers": 0, "device": "cpu"},
        "student": {"name": "test_vidt"},
        "loss": {"feature_weight": 4.0},
        "train": {
            "epochs": 1, "batch_size": 4, "lr": 1e-3, "workers": 0, "device": "cpu", "open_shards": 2, "log_every": 1,
            "digest_check": 1.0,
        },
        "eval": {"workers": 0, "device": "cpu"},
    }  # fmt: skip

    def config(**sections: dict[str, Any]) -> Config:
        return load_config(
            overrides={name: defaults.get(name, {}) | sections.get(name, {}) for name in {**defaults, **sections}}
        )

    return config


def still(module: nn.Module, _: object = None) -> None:
    """No dropout: ranks draw their own, so it could not be compared."""
    if isinstance(module, nn.Dropout):
        module.p = 0.0
    if isinstance(module, nn.MultiheadAttention):
        module.dropout = 0.0
