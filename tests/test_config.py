"""The configuration: what is read is what was written, flags win, and every mistake is named at once."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd_cache.config import SECTIONS, Config, config_to_json, find_pipeline, load_config, parse_view_range, suggestion
from vkd_cache.errors import ConfigError

FIELDS = [(section, field) for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)]


def valid_value(section: str, field: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
    """Any value that the field's own description allows."""
    hint = typing.get_type_hints(SECTIONS[section])[field.name]
    low, high = field.metadata["minimum"], field.metadata["maximum"]
    if field.metadata["choices"]:
        choice = st.sampled_from(field.metadata["choices"])
        return choice if hint is str else st.lists(choice, max_size=3).map(tuple)
    if hint is bool:
        return st.booleans()
    if hint in (int, tuple[int, ...]):
        whole = st.integers(0 if low is None else low, 2**31 if high is None else high)
        return whole if hint is int else st.lists(whole, max_size=3).map(tuple)
    if hint is str:
        return st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=20)
    return st.floats(0.0 if low is None else low, 1e6 if high is None else high)


any_config = st.fixed_dictionaries(
    {},
    optional={
        section: st.fixed_dictionaries(
            {}, optional={field.name: valid_value(section, field) for field in dataclasses.fields(kind)}
        )
        for section, kind in SECTIONS.items()
    },
)


def as_toml(document: dict[str, dict[str, Any]]) -> str:
    """JSON's values are TOML's here: strings, numbers, booleans, lists of strings."""
    lines = []
    for section, fields in document.items():
        lines.append(f"[{section}]")
        lines += [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(lines)


@settings(deadline=None, max_examples=50)
@given(document=any_config)
def test_a_file_and_flags_say_the_same(document: dict[str, dict[str, Any]], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(as_toml(document), encoding="utf-8")
    config = load_config(str(path))
    assert config == load_config(overrides=document)
    for section, fields in document.items():
        for name, value in fields.items():
            assert getattr(getattr(config, section), name) == value


@settings(deadline=None, max_examples=50)
@given(document=any_config, flags=any_config)
def test_defaults_then_file_then_flags(
    document: dict[str, dict[str, Any]], flags: dict[str, dict[str, Any]], tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "layers.toml"
    path.write_text(as_toml(document), encoding="utf-8")
    config = load_config(str(path), flags)
    default = Config()
    for section, field in FIELDS:
        layers = [flags.get(section, {}), document.get(section, {})]
        expected = next((layer[field.name] for layer in layers if field.name in layer), None)
        if expected is None:
            expected = getattr(getattr(default, section), field.name)
        assert getattr(getattr(config, section), field.name) == expected


def test_an_option_that_was_not_given_changes_nothing() -> None:
    assert load_config(overrides={"train": {"epochs": None, "lr": None}}) == Config()


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=lambda value: getattr(value, "name", value))
def test_every_field_is_documented_and_its_default_is_allowed(section: str, field: dataclasses.Field[Any]) -> None:
    assert field.metadata["doc"]
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    assert load_config(overrides={section: {field.name: default}}) == Config()


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=lambda value: getattr(value, "name", value))
def test_every_bound_and_choice_is_enforced(section: str, field: dataclasses.Field[Any]) -> None:
    low, high = field.metadata["minimum"], field.metadata["maximum"]
    wrong: list[object] = [{"a": 1}]
    wrong += [low - 1] if low is not None else []
    wrong += [2 * high + 1] if high is not None else []
    if field.metadata["choices"]:
        wrong += ["something else"] if isinstance(field.default, str) else [["something else"]]
    if typing.get_type_hints(SECTIONS[section])[field.name] is float:
        wrong += [float("nan")] if low is not None else []
    wrong += [True] if not isinstance(field.default, bool) else [1]
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"\[{section}\] {field.name}: found .*, expected "):
            load_config(overrides={section: {field.name: value}})


def test_all_mistakes_at_once_each_with_place_and_suggestion(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[veiws]\ncount = "2"\n[views]\nsize = 3\ncount = 4\n[train]\nepochs = "3"\nlr = -1\n[cache]\nbackend = "zar"\n'
    )
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), {"train": {"amp": "fp166"}})
    assert str(caught.value).splitlines() == [
        f"{path}: unknown section [veiws]; did you mean 'views'?",
        f"{path}: [views] unknown key 'size'; did you mean 'size_px'?",
        f'{path}: [views] count: found 4, expected a string, in quotes: "4"',
        f"{path}: [train] epochs: found '3', expected a whole number",
        f"{path}: [train] lr: found -1.0, expected from 0.0 to 1e+30",
        f"{path}: [cache] backend: found 'zar', expected one of zarr, webdataset; did you mean 'zarr'?",
        "command line: [train] amp: found 'fp166', expected one of off, bf16, fp16; did you mean 'fp16'?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[train\n", "not a TOML file"),
        (b"[train]\nlr = 1\nlr = 2\n", "not a TOML file"),
        (b"\xff\xfe", "not a TOML file"),
        (b"train = 3\n", r"\[train\] must be a table, found int"),
        (b"epochs = 3\n", r"unknown section \[epochs\]"),
    ],
)
def test_a_file_that_is_no_pipeline(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


def test_pipelines_are_found_by_name_and_by_path() -> None:
    for name in ("deit_tiny_imagenet", "deit_small_imagenet", "demo"):
        path = find_pipeline(name)
        assert path.name == f"{name}.toml"
        assert find_pipeline(f"{name}.toml") == find_pipeline(str(path)) == path
    with pytest.raises(ConfigError, match=r"did you mean 'demo'\?.*Installed: .*deit_small_imagenet"):
        find_pipeline("dmo")


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.parent.glob("pipelines/*.toml")), ids=lambda p: p.stem)
def test_every_pipeline_is_valid_and_opens_with_its_two_commands(path: Path) -> None:
    config = load_config(str(path))
    assert config.source.train and config.student.name
    head = path.read_text(encoding="utf-8").partition("\n[")[0]
    if config.loss.feature_weight == config.loss.logit_weight == 0:  # a teacher in the making has no first stage
        assert f"#     vkd-cache train {path.stem} --plain\n" in head
        return
    assert config.cache.url and config.teacher.name
    assert len(parse_view_range(config.views.count)) > 0
    assert f"#     vkd-cache extract {path.stem}\n#     vkd-cache train {path.stem}\n" in head


def test_the_reference_recipe() -> None:
    """UPSTREAM.md's figures; the two students share one cache, and differ in nothing but name and output."""
    tiny, small = load_config("deit_tiny_imagenet"), load_config("deit_small_imagenet")
    assert (tiny.student.name, small.student.name) == ("deit_ti_distilled", "deit_s_distilled")
    assert dataclasses.replace(small, student=tiny.student, train=tiny.train) == tiny
    assert dataclasses.replace(small.train, output=tiny.train.output) == tiny.train
    train, loss, views = tiny.train, tiny.loss, tiny.views
    assert (train.epochs, train.batch_size, train.lr, train.min_lr) == (300, 512, 5e-4, 5e-6)
    assert (train.weight_decay, train.beta1, train.beta2, train.eps) == (0.05, 0.9, 0.999, 1e-8)
    assert (train.warmup_epochs, train.clip_grad, train.ema_decay, train.amp) == (0.0, 0.0, 0.0, "fp16")
    assert (loss.task_weight, loss.feature_weight, loss.logit_weight) == (1.0, 1.0, 1.0)
    assert (loss.temperature, loss.smoothing, loss.feature_loss) == (1.0, 0.1, "smooth_l1")
    assert loss.normalisation == "layer_norm"
    assert (views.recipe, views.size_px, views.mix_probability) == ("vkd", 224, None)
    assert (views.mixup_alpha, views.cutmix_alpha, views.cutmix_switch) == (0.8, 1.0, 0.5)
    assert (tiny.teacher.name, tiny.teacher.input_px) == ("regnety_160.deit_in1k", 224)
    assert (tiny.extract.autocast, tiny.student.drop_path, tiny.eval.crop_fraction) == ("float16", 0.0, 0.875)


def test_the_reference_recipe_of_detection() -> None:
    """UPSTREAM.md's figures; the two students share one cache, and differ in name, drop path and output."""
    nano, tiny = load_config("vidt_swin_nano_coco"), load_config("vidt_swin_tiny_coco")
    assert (nano.student.name, nano.student.drop_path) == ("vidt_swin_nano", 0.0)
    assert (tiny.student.name, tiny.student.drop_path) == ("vidt_swin_tiny", 0.2)
    assert dataclasses.replace(tiny, student=nano.student, train=nano.train) == nano
    assert dataclasses.replace(tiny.train, output=nano.train.output) == nano.train
    train, loss, views = nano.train, nano.loss, nano.views
    assert (train.epochs, train.batch_size, train.lr, train.min_lr) == (50, 2, 1e-4, 1e-7)
    assert (train.weight_decay, train.clip_grad, train.warmup_epochs, train.amp) == (1e-4, 0.1, 0.0, "off")
    assert (loss.task_weight, loss.feature_weight, loss.feature_loss) == (1.0, 4.0, "smooth_l1")
    assert (views.recipe, views.scales, views.max_size_px) == ("vidt", tuple(range(480, 801, 16)), 1333)
    assert (views.crop_scales, views.crop_min_px, views.crop_max_px) == ((400, 500, 600), 384, 600)
    assert (nano.teacher.name, nano.eval.size_px, nano.eval.max_size_px) == ("vidt_swin_base", 800, 1333)
    assert len(nano.cache.nodes) == 6


@given(first=st.integers(0, 1000), length=st.integers(1, 1000))
def test_view_ranges(first: int, length: int) -> None:
    assert parse_view_range(f"{first}:{first + length}") == range(first, first + length)
    assert parse_view_range(str(length)) == range(length)


@pytest.mark.parametrize(
    "text",
    [" ", "0", "-1", "3:3", "4:2", "-1:3", "a", "1:b", "1:2:3", "1.5", ":", "2:", ":2", "9" * 30, "0:2000000000"],
)
def test_view_ranges_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"\[views\] count: found '.*', expected a count"):
        parse_view_range(text)


def test_suggestion_is_silent_without_a_near_name() -> None:
    assert suggestion("qqqq", ["train", "views"]) == ""


@given(document=any_config)
@settings(deadline=None, max_examples=20)
def test_the_resolved_configuration_is_plain_json_and_reads_back(document: dict[str, dict[str, Any]]) -> None:
    config = load_config(overrides=document)
    assert load_config(overrides=json.loads(json.dumps(config_to_json(config)))) == config
