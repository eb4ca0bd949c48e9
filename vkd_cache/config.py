"""The configuration: frozen sections, read from defaults < TOML pipeline < command-line flags.

Every field carries its documentation, its choices and its bounds, so the TOML reader, `docs/configuration.md` and the
tests read one description. All mistakes of a file are reported at once.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from vkd_cache.errors import ConfigError
from vkd_cache.fields import checked_value, option
from vkd_cache.fields import suggestion as suggestion  # of this module for everybody else
from vkd_cache.pipeline_file import find_pipeline as find_pipeline
from vkd_cache.pipeline_file import read_toml
from vkd_cache.urls import check_place, check_url

# Far beyond any run, and small enough that a stranger's file that asks for as much is refused, not obeyed.
MAX_VIEWS = 10**6
MAX_CLASSES = 2**20
MAX_SIDE_PX = 4096
_MAX_BATCH = 2**20
_MAX_WORKERS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the images are."""

    train: str = option(
        "", "folder of classes, one with train/ and val/, COCO's, or brace/glob pattern of tars, here or behind a URL"
    )
    val: str = option(
        "", "the same for evaluation; empty: val/ beside the training split, or COCO's, where there is one"
    )
    shard_size: int = option(
        1024, "samples per shard of a folder or COCO source (tar shards keep their own)", minimum=2, maximum=2**31
    )
    local_dir: str = option(
        "",
        "folder for copies of tars and units behind URLs, and the index of local tars; empty: in the user's cache "
        "folder",
    )
    local_gb: float = option(100.0, "bound of the copies in that folder, 10^9 bytes", minimum=1e-6, maximum=1e6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How views are planned."""

    recipe: str = option(
        "vkd",
        "view recipe; vidt and fast_detection are those for detection",
        choices=("vkd", "randaugment", "crop_flip", "none", "vidt", "fast", "fast_detection"),
    )
    count: str = option(
        "",
        "views: a count N (views 0..N-1) or a range A:B (views A..B-1); empty: 1 to extract, and a fresh view for "
        "every epoch when training without a cache",
    )
    size_px: int = option(224, "height and width of a view, pixels (not for detection)", minimum=8, maximum=MAX_SIDE_PX)
    seed: int = option(0, "cache seed: the root of every draw of the plan", minimum=0, maximum=2**63 - 1)
    flip_probability: float | None = option(
        None, "probability that a view is mirrored; empty: the recipe's own", minimum=0.0, maximum=1.0
    )
    mix_probability: float | None = option(
        None, "probability that a pair is mixed; empty: the recipe's own", minimum=0.0, maximum=1.0
    )
    mixup_alpha: float = option(0.8, "Mixup's Beta parameter; 0 turns Mixup off", minimum=0.0)
    cutmix_alpha: float = option(1.0, "CutMix's Beta parameter; 0 turns CutMix off", minimum=0.0)
    cutmix_switch: float = option(
        0.5, "probability of CutMix for a mixed pair when both are on", minimum=0.0, maximum=1.0
    )
    scales: tuple[int, ...] = option(
        tuple(range(480, 801, 16)), "detection: short sides of a view, one drawn, pixels", minimum=16, maximum=4096
    )
    max_size_px: int = option(1333, "detection: bound of a view's long side, pixels", minimum=16, maximum=8192)
    crop_scales: tuple[int, ...] = option(
        (400, 500, 600),
        "detection: short sides of the frame that half of the views are cropped in before the resize; empty: no crops",
        minimum=16,
        maximum=4096,
    )
    crop_min_px: int = option(384, "detection: least side of a crop in that frame, pixels", minimum=1, maximum=4096)
    crop_max_px: int = option(600, "detection: greatest side of a crop in that frame, pixels", minimum=1, maximum=4096)
    canvas_multiple_px: int = option(
        128, "detection: sides of a padded view are multiples of this, itself one of 16", minimum=16, maximum=4096
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Which network's features are cached."""

    name: str = option(
        "", "timm model name, package.module:callable that returns an nn.Module, or for detection vidt_swin_base etc."
    )
    weights: str = option(
        "", "safetensors or torch file with its weights; empty: timm's pretrained weights (a detector needs a file)"
    )
    num_classes: int = option(
        0, "classes of its head; 0: what the weights hold, else the source's", minimum=0, maximum=MAX_CLASSES
    )
    input_px: int = option(
        0,
        "side of its input; 0: the view's own (others are resized on the device); not for a detector",
        minimum=0,
        maximum=MAX_SIDE_PX,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What is stored, and how."""

    url: str = option("", "directory or fsspec URL of the cache")
    backend: str = option("zarr", "container of a unit", choices=("zarr", "webdataset"))
    dtype: str = option(
        "auto",
        "stored type of node values; auto measures the loss effect on the first unit",
        choices=("auto", "float32", "float16", "bfloat16", "uint8", "uint4", "int8"),
    )
    nodes: tuple[str, ...] = option(
        (),
        "teacher outputs to store; empty: pooled, or all six of a detector",
        choices=(
            "pooled", "logits", "feature_map", "patch_1", "patch_2", "patch_3", "patch_4", "body_det", "neck_det",
        ),
    )  # fmt: skip
    tokens: float = option(
        1.0, "share of each image's patch tokens to store (patch_1 to patch_4), a seeded sample", minimum=1e-4,
        maximum=1.0,
    )  # fmt: skip
    pixels: str = option(
        "none",
        "keep the finished 8-bit views too, which the teacher then sees and training reads instead of the images",
        choices=("none", "jpeg", "lossless"),
    )
    pixels_quality: int = option(90, "quality of pixels = jpeg", minimum=1, maximum=100)
    block_samples: int = option(
        0, "samples per tar member of the webdataset backend; 0: as the cache has that is there, else 1024", minimum=0,
        maximum=2**20,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """How the teacher is run."""

    batch_size: int = option(
        64,
        "samples per teacher batch; even, so that mixed pairs stay together; auto or 0: that of the cache if there is "
        "one, else the fastest one that fits into memory, by trial",
        minimum=0,
        maximum=_MAX_BATCH,
        zero_word="auto",
    )
    workers: int = option(
        2, "processes that decode and augment; 0: in the main process", minimum=0, maximum=_MAX_WORKERS
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto takes the GPU of the local rank where there is one")
    autocast: str = option("off", "type of the teacher's autocast", choices=("off", "float16", "bfloat16"))
    channels_last: bool = option(False, "run the teacher in channels-last memory format")
    compile: bool = option(False, "torch.compile the teacher")
    strict: bool = option(False, "stop at the first broken image instead of recording it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Which network is trained."""

    name: str = option(
        "", "deit_ti_distilled, deit_s_distilled, any timm classification model, or for detection vidt_swin_nano etc."
    )
    weights: str = option(
        "", "file to start from: a student's weights, or for detection a Swin body's; empty: random weights"
    )
    drop_path: float = option(0.0, "stochastic depth rate", minimum=0.0, maximum=0.99)
    sync_batchnorm: bool = option(False, "batch-norm statistics over all ranks (GPU only)")
    cross_scale_fusion: bool = option(False, "detection: fuse the patch maps of the body across their scales")
    iou_aware: bool = option(False, "detection: a head that predicts how well each box fits")
    token_label: bool = option(False, "detection: a class head on every patch token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The three terms of VkD's loss."""

    task_weight: float = option(
        1.0, "cross entropy against (mixed, smoothed) labels; detection: class, box and overlap losses", minimum=0.0
    )
    feature_weight: float = option(
        1.0, "projected student features against normalised teacher features; the reference's detectors: 4", minimum=0.0
    )
    logit_weight: float = option(
        1.0, "KL divergence from the teacher's probabilities; without effect on detection", minimum=0.0
    )
    temperature: float = option(1.0, "temperature of the logit loss", minimum=1e-3)
    smoothing: float = option(0.1, "label smoothing of the task loss", minimum=0.0, maximum=0.999)
    feature_loss: str = option(
        "smooth_l1", "distance of the feature loss", choices=("smooth_l1", "l2", "l1", "cosine", "log_sum")
    )
    normalisation: str = option(
        "layer_norm",
        "normalisation of the teacher side; detection standardises both sides whatever it says",
        choices=("layer_norm", "standardize", "whiten", "none"),
    )
    projector: str = option(
        "qr",
        "orthogonal map: qr (fast), or torch's own householder, matrix_exp, cayley; linear is unconstrained",
        choices=("qr", "householder", "matrix_exp", "cayley", "linear"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the student is trained."""

    epochs: int = option(300, "passes over the data", minimum=1, maximum=MAX_VIEWS)
    batch_size: int = option(
        512, "samples per step and process; even, so that mixed pairs stay together", minimum=2, maximum=_MAX_BATCH
    )
    lr: float = option(5e-4, "peak learning rate of AdamW", minimum=0.0, maximum=1e30)
    min_lr: float = option(5e-6, "learning rate at the end of the cosine", minimum=0.0, maximum=1e30)
    warmup_epochs: float = option(0.0, "linear warm-up from zero, epochs", minimum=0.0)
    weight_decay: float = option(0.05, "AdamW weight decay (not on norms, biases, tokens, projector)", minimum=0.0)
    beta1: float = option(0.9, "AdamW beta 1", minimum=0.0, maximum=0.9999999)
    beta2: float = option(0.999, "AdamW beta 2", minimum=0.0, maximum=0.9999999)
    eps: float = option(1e-8, "AdamW epsilon", minimum=0.0)
    clip_grad: float = option(0.0, "gradient norm clip; 0: off", minimum=0.0)
    accumulate: int = option(1, "batches per optimizer step", minimum=1, maximum=_MAX_BATCH)
    amp: str = option("off", "autocast of the student", choices=("off", "bf16", "fp16"))
    ema_decay: float = option(0.0, "decay of the weight average; 0: off", minimum=0.0, maximum=0.999999)
    compile: bool = option(False, "torch.compile the student")
    seed: int = option(0, "seed of the initial weights, the epoch order and dropout", minimum=0, maximum=2**63 - 1)
    workers: int = option(
        2, "processes that decode and render; 0: in the main process", minimum=0, maximum=_MAX_WORKERS
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    output: str = option("", "directory for checkpoints, logs and curves")
    resume: str = option("", "auto, or a checkpoint to continue from")
    live_teacher: bool = option(False, "run the teacher in memory instead of reading its cached features")
    open_shards: int = option(8, "shards shuffled together", minimum=1, maximum=_MAX_BATCH)
    digest_check: float = option(1.0, "share of replayed views whose digest is checked", minimum=0.0, maximum=1.0)
    log_every: int = option(10, "optimizer steps between log lines", minimum=1)
    checkpoint_every: int = option(0, "optimizer steps between checkpoints; 0: once an epoch", minimum=0)
    eval_every: int = option(1, "epochs between evaluations; 0: only at the end", minimum=0)
    tensorboard: bool = option(False, "write TensorBoard events beside the JSON lines")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a model is evaluated."""

    batch_size: int = option(0, "samples per batch; 0: 128, or 8 for detection", minimum=0, maximum=_MAX_BATCH)
    workers: int = option(2, "processes that decode; 0: in the main process", minimum=0, maximum=_MAX_WORKERS)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    crop_fraction: float = option(
        0.875, "side of the centre crop over the resized short side (224 of 256)", minimum=0.05, maximum=1.0
    )
    size_px: int = option(
        0, "detection: short side of an image, pixels; 0: the largest of [views] scales", minimum=0, maximum=4096
    )
    max_size_px: int = option(
        0, "detection: bound of the long side, pixels; 0: that of [views]", minimum=0, maximum=8192
    )
    output: str = option("", "detection: directory for detections.json and detections.png; empty: beside the weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment: both stages and the evaluation."""

    source: SourceConfig = SourceConfig()
    views: ViewsConfig = ViewsConfig()
    teacher: TeacherConfig = TeacherConfig()
    cache: CacheConfig = CacheConfig()
    extract: ExtractConfig = ExtractConfig()
    student: StudentConfig = StudentConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()


SECTIONS: dict[str, type] = typing.get_type_hints(Config)
_MAY_BE_URLS = {("source", "train"), ("source", "val"), ("cache", "url")}


def load_config(pipeline: str | None = None, overrides: Mapping[str, Mapping[str, object]] | None = None) -> Config:
    """Resolve defaults < pipeline file < `overrides` ({section: {field: value}}; None means not given).

    Raises:
        ConfigError: every unknown key, wrong type and value out of range, in one message.
    """
    values: dict[str, dict[str, object]] = {section: {} for section in SECTIONS}
    problems: list[str] = []
    if pipeline is not None:
        path = find_pipeline(pipeline)
        _read_document(read_toml(path), str(path), values, problems)
    for section, fields in (overrides or {}).items():
        given = {name: value for name, value in fields.items() if value is not None}
        _read_section(section, given, "command line", values, problems)
    problems += _url_problems(values)
    if problems:
        raise ConfigError("\n".join(problems))
    return Config(**{section: SECTIONS[section](**fields) for section, fields in values.items()})


def _url_problems(values: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    """URLs with credentials or mistyped ones, and URLs where only this machine's files will do."""
    for section, fields in values.items():
        for name, value in fields.items():
            if not isinstance(value, str) or ":" not in value:
                continue
            try:
                check_url(value, f"[{section}] {name}")
                if (section, name) in _MAY_BE_URLS:
                    check_place(value, f"[{section}] {name}")
            except ConfigError as error:
                yield str(error)
            else:
                if (section, name) not in _MAY_BE_URLS and "://" in value:
                    yield (
                        f"[{section}] {name}: found '{value}', expected a path of this machine. Only data and caches "
                        "can be behind URLs."
                    )


def config_to_json(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain JSON, for the file beside every output."""
    return dataclasses.asdict(config)


def parse_view_range(text: str) -> range:
    """`"4"` -> views 0..3; `"2:6"` -> views 2..5; nothing: view 0.

    Raises:
        ConfigError: neither form, or an empty range.
    """
    first, _, last = text.partition(":") if ":" in text else ("0", ":", text or "1")
    try:
        views = range(int(first), int(last))
    except ValueError:
        views = range(0)
    if not 0 <= views.start < views.stop <= MAX_VIEWS:
        raise ConfigError(
            f"[views] count: found '{text}', expected a count (4) or a range A:B with A < B (4:8), up to {MAX_VIEWS}."
        )
    return views


def _read_document(
    document: Mapping[str, object], where: str, values: dict[str, dict[str, object]], problems: list[str]
) -> None:
    for section, fields in document.items():
        if section not in SECTIONS:
            problems.append(f"{where}: unknown section [{section}]{suggestion(section, SECTIONS)}")
        elif not isinstance(fields, Mapping):
            problems.append(f"{where}: [{section}] must be a table, found {type(fields).__name__}")
        else:
            _read_section(section, fields, where, values, problems)


def _read_section(
    section: str,
    given: Mapping[str, object],
    where: str,
    values: dict[str, dict[str, object]],
    problems: list[str],
) -> None:
    known = {field.name: field for field in dataclasses.fields(SECTIONS[section])}
    hints = typing.get_type_hints(SECTIONS[section])
    for name, value in given.items():
        if name not in known:
            problems.append(f"{where}: [{section}] unknown key '{name}'{suggestion(name, known)}")
            continue
        try:
            values[section][name] = checked_value(value, hints[name], known[name].metadata)
        except ValueError as error:
            problems.append(f"{where}: [{section}] {name}: {error}")
