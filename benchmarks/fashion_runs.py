"""Students of one teacher on Fashion-MNIST, trained by the real stages, each kept with its accuracy.

A newcomer's trap: nothing is done twice. Tars, teacher, caches and students lie in folders that are named after the
settings that decide them: the same call again reads the result, one that was cut off goes on where it stood, and other
settings make folders beside the old ones. Code is not among the settings, so each result says which commit made it.

    runs = FashionRuns(folder, source, Setting())
    runs.student(Variant(dtype="uint8"), seed=0)["top1"]
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from fashion_mnist import SPLITS, write_split
from harness import commit

from vkd_cache import console
from vkd_cache.cache.reader import open_cache
from vkd_cache.config import Config, load_config
from vkd_cache.errors import VkdCacheError
from vkd_cache.projector import OrthogonalProjector
from vkd_cache.runtime import JobSplit, write_atomic
from vkd_cache.stages.checkpoints import LAST, read_checkpoint
from vkd_cache.stages.extract import extract
from vkd_cache.stages.train import train
from vkd_cache.students import create_student

Overrides = dict[str, dict[str, Any]]
RESULT = "result.json"
PLAIN = {"feature_weight": 0.0, "logit_weight": 0.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained on what, the same for all variants.

    Attributes:
        taught: images that the teacher learns from.
        learnt: images that it teaches the students on, and whose labels they see: the first of `taught`.
        judged: test images.
        size_px: side of a view.
        recipe, mix_probability: of the students' views; the teacher learns from crops, not mixed.
        teacher, student: timm models.
        teacher_epochs, teacher_lr, teacher_batch_size: how the teacher is trained; AdamW, cosine, warm-up.
        epochs, lr, batch_size: how students are.
        feature_weight, logit_weight: of the loss terms that a variant has on.
        seed: of the order of images, of the views, and of the teacher's weights.
    """

    taught: int = 30000
    learnt: int = 200
    judged: int = 10000
    size_px: int = 32
    recipe: str = "none"
    mix_probability: float = 1.0
    teacher: str = "test_resnet"
    student: str = "test_efficientnet"
    teacher_epochs: int = 8
    teacher_lr: float = 4e-3
    teacher_batch_size: int = 128
    epochs: int = 48
    lr: float = 8e-3
    batch_size: int = 40
    feature_weight: float = 40.0
    logit_weight: float = 4.0
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """How one student learns.

    Attributes:
        feature, logit: which terms are on besides the labels' own; neither: no distillation.
        loss: further fields of [loss].
        views: views of each image; epoch e trains on view e mod views.
        dtype: stored type of the cache.
        live: from the teacher in memory, and no cache.
        killed: the projector of the released code (docs/losses.md): torch's Householder map, and weight decay on it.
    """

    feature: bool = True
    logit: bool = True
    loss: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    views: int = 8
    dtype: str = "uint8"
    live: bool = False
    killed: bool = False


class FashionRuns:
    """Everything below one folder, for one process at a time.

    Args:
        folder: where it is kept.
        source: folder of the data set's four idx.gz files.
        setting: see there.
    """

    def __init__(self, folder: Path, source: Path, setting: Setting) -> None:
        self._folder = folder
        self._source = source
        self._setting = setting

    def teacher(self) -> dict[str, Any]:
        """Result of the teacher: `top1` on the test images, percent; `output`, the name of its folder."""
        setting = self._setting
        config = self._config(setting.taught, setting.teacher, setting.seed)
        config["train"] |= _schedule(setting.teacher_epochs, setting.teacher_lr, setting.teacher_batch_size)
        config["loss"] = dict(PLAIN)
        # it teaches on other views than it learns from
        config["views"] |= {"recipe": "crop_flip", "mix_probability": 0.0, "seed": setting.seed + 1}
        return self._trained("teacher", config)

    def cache(self, dtype: str, views: int) -> dict[str, Any]:
        """Result of an extraction over the students' images: `url`, `codec`, `bytes` and `bytes_per_view`."""
        config = self._config(self._setting.learnt)
        config |= self._taught() | {"cache": {"dtype": dtype}}
        config["views"]["count"] = str(views)
        place = self._place("cache", config)
        with self._kept(place) as result:
            if not result:
                config["cache"]["url"] = f"{place.name}/cache"
                summary = extract(self._resolved(config), JobSplit())
                if summary.units_failed:
                    raise VkdCacheError(f"fashion_runs: {summary.units_failed[0]}")
                cache = open_cache(str(place / "cache"))
                size = sum(path.stat().st_size for path in (place / "cache").rglob("*") if path.is_file())
                codec = ", ".join(node.codec for node in cache.manifest.nodes)
                result |= {"url": f"{place.name}/cache", "codec": codec, "bytes": size}
                result["bytes_per_view"] = size / (views * self._setting.learnt)
        return result

    def student(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Result of one student: `top1` on the test images, percent, `steps`, `seconds`, `cpu_s`, and of its projector
        `projector_norm` and `orthonormality_error`.
        """
        setting = self._setting
        config = self._config(setting.learnt, setting.student, seed)
        config["train"] |= _schedule(setting.epochs, setting.lr, setting.batch_size)
        distils = variant.feature or variant.logit
        config["loss"] = {
            "feature_weight": setting.feature_weight * variant.feature,
            "logit_weight": setting.logit_weight * variant.logit,
            **({"projector": "householder"} if variant.killed else {}),
            **variant.loss,
        }
        config["views"]["count"] = str(variant.views)
        if distils and variant.live:
            config |= self._taught()
            config["train"]["live_teacher"] = True
        elif distils:
            config["cache"] = {"url": self.cache(variant.dtype, variant.views)["url"]}
        with released_projector() if variant.killed else contextlib.nullcontext():
            return self._trained("student", config, "killed" if variant.killed else "")

    def _config(self, images: int, network: str = "", seed: int = 0) -> Overrides:
        """What all stages have in common; paths are below the folder."""
        setting = self._setting
        return {
            "source": {"train": self._tars("train", images), "val": self._tars("val", setting.judged)},
            "views": {
                "recipe": setting.recipe, "mix_probability": setting.mix_probability, "size_px": setting.size_px,
                "seed": setting.seed,
            },
            "student": {"name": network},
            "train": {
                "seed": seed, "workers": 0, "device": "cpu", "eval_every": 0, "log_every": 50, "resume": "auto",
            },
            "eval": {"batch_size": 250, "workers": 0, "device": "cpu", "crop_fraction": 1.0},
        }  # fmt: skip

    def _tars(self, split: str, count: int) -> str:
        """Pattern of the tars with the first `count` images of a split, below the folder."""
        name = f"{split}-{count}-{self._setting.seed}"
        if not (self._folder / name).is_dir():
            half = self._folder / f"{name}.half" / split
            if half.is_dir():
                for path in half.iterdir():
                    path.unlink()
            write_split(self._source, SPLITS[split], half, limit=count, seed=self._setting.seed)
            half.parent.rename(self._folder / name)
        return f"{name}/{split}/*.tar"

    def _taught(self) -> Overrides:
        """The sections of the teacher; live, it runs in the batches that a cache is made with."""
        weights = f"{self.teacher()['output']}/{LAST}"
        return {
            "teacher": {"name": self._setting.teacher, "weights": weights, "num_classes": 10},
            "extract": {"batch_size": self._setting.batch_size, "workers": 0, "device": "cpu"},
        }

    def _trained(self, kind: str, config: Overrides, how: str = "") -> dict[str, Any]:
        place = self._place(kind, config, how)
        with self._kept(place) as result:
            if not result:
                config["train"]["output"] = place.name
                started = time.process_time()
                summary = train(self._resolved(config), JobSplit())
                if summary.interrupted:
                    raise KeyboardInterrupt
                result |= {"top1": summary.score, "steps": summary.steps, "cpu_s": time.process_time() - started}
                result |= {"seconds": summary.seconds, "output": place.name}
                result |= _projector(place / LAST)
        return result

    def _place(self, kind: str, config: Overrides, how: str = "") -> Path:
        """The folder of a run, named after everything that decides it."""
        document = json.dumps([config, how], sort_keys=True, default=str)
        return self._folder / f"{kind}-{hashlib.sha256(document.encode()).hexdigest()[:12]}"

    @contextlib.contextmanager
    def _kept(self, place: Path) -> Iterator[dict[str, Any]]:
        """The result that lies in `place`, or an empty one, which is kept once the block has filled it."""
        path = place / RESULT
        result: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
        if result:
            yield result
            return
        console.set_quiet(True)
        try:
            yield result
        finally:
            console.set_quiet(False)
        result["commit"] = commit()[0]
        place.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(result, indent=1).encode() + b"\n")

    def _resolved(self, config: Overrides) -> Config:
        """The configuration with paths that lead somewhere."""
        below = {"source": ("train", "val"), "cache": ("url",), "teacher": ("weights",), "train": ("output",)}
        placed = {section: dict(fields) for section, fields in config.items()}
        for section, names in below.items():
            for name in names:
                if placed.get(section, {}).get(name):
                    placed[section][name] = str(self._folder / placed[section][name])
        return load_config(None, placed)


def _schedule(epochs: int, lr: float, batch_size: int) -> dict[str, Any]:
    """The fields of [train] that say how long and how fast."""
    warmup = min(1.0, epochs / 10)
    return {"epochs": epochs, "lr": lr, "min_lr": lr / 100, "warmup_epochs": warmup, "batch_size": batch_size}


@contextlib.contextmanager
def released_projector() -> Iterator[None]:
    """Within, projectors are decayed like any other matrix, as in the released code; torch's map does the rest."""
    OrthogonalProjector.never_decays = False
    try:
        yield
    finally:
        OrthogonalProjector.never_decays = True


def _projector(checkpoint: Path) -> dict[str, float]:
    """Of the projector in a checkpoint: norm of its weight and distance from orthonormal; empty without one."""
    state = read_checkpoint(checkpoint)
    config = state["config"]
    if state["teacher_width"] is None:
        return {}
    student = create_student(
        config["student"]["name"], state["num_classes"], state["teacher_width"],
        input_px=config["views"]["size_px"], projector=config["loss"]["projector"],
    )  # fmt: skip
    student.load_state_dict(state["student"])
    weight = student.projector.weight.detach()  # type: ignore[union-attr]
    if weight.shape[0] > weight.shape[1]:
        weight = weight.mT
    error = (weight @ weight.mT - torch.eye(len(weight))).abs().max()
    return {"projector_norm": float(weight.norm()), "orthonormality_error": float(error)}
