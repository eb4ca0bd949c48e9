"""The feed: every sample with its own params, features, label and partner, whatever the batches, ranks and workers."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vkd_cache.cache.reader import open_cache
from vkd_cache.config import Config
from vkd_cache.errors import CacheMismatchError, CorruptCacheError, IncompleteCacheError
from vkd_cache.runtime import JobSplit
from vkd_cache.stages.extract import extract
from vkd_cache.stages.feed import FedBatch
from vkd_cache.stages.run import Run, prepare_run
from vkd_cache.stages.unit_views import slots_of_rows
from vkd_cache.views.mixing import drop_partners, plan_mixing
from vkd_cache.views.recipe import RECIPES

Build = Callable[..., Config]
slow_fixtures = settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])


def batches(run: Run, *, epoch: int = 0, step: int = 0) -> Iterator[FedBatch]:
    """All batches of a run from the cache."""
    with run.feed(run.supply(live=False)) as feed:
        yield from feed.batches(epoch=epoch, step=step, workers=run.config.train.workers)


def run_of(build: Build, cache: Path | str, split: JobSplit | None = None, **sections: dict[str, Any]) -> Run:
    defaults = {"epochs": 1, "output": "unused", "batch_size": 16}
    config = build(cache={"url": str(cache)}, **(sections | {"train": defaults | sections.get("train", {})}))
    return prepare_run(config, split or JobSplit())


def places(batch: FedBatch) -> list[tuple[int, int]]:
    return list(zip(batch.rendered.shard.tolist(), batch.rendered.row.tolist(), strict=True))


@slow_fixtures
@given(
    size=st.sampled_from([2, 6, 16, 64]),
    open_shards=st.integers(1, 7),
    seed=st.integers(0, 2**63 - 1),
    world=st.integers(1, 3),
)
def test_every_sample_comes_with_its_own(
    tiny_config: Build, small_cache: Path, size: int, open_shards: int, seed: int, world: int
) -> None:
    cache = open_cache(str(small_cache))
    train = {"batch_size": size, "open_shards": open_shards, "seed": seed}
    dealt: list[tuple[int, int]] = []
    for rank in range(world):
        run = run_of(tiny_config, small_cache, JobSplit(index=rank, count=world), train=train)
        for batch in batches(run):
            rendered = batch.rendered
            assert len(batch) <= size and rendered.mix is not None
            for position, (shard, row) in enumerate(places(batch)):
                unit = cache.read(shard, 0) if (shard, row) not in dealt and row == 0 else None
                dealt.append((shard, row))
                partner = int(rendered.mix.partner[position])
                if unit is not None:
                    assert torch.equal(batch.nodes["pooled"].dense()[position], unit.node("pooled")[row])
                    assert rendered.columns["digest"][position] == unit.columns["digest"][row]
                    assert int(rendered.label[position]) == unit.columns["label"][row]
                    assert rendered.row[partner] == unit.columns["partner"][row]
                    assert rendered.mix.lam[position] == unit.columns["mix_lambda"][row]
                assert rendered.shard[partner] == shard and rendered.mix.partner[partner] == position
    assert len(dealt) == len(set(dealt))
    # the remainder is less than a step of all ranks; a lone sample of the odd shard takes a slot for two
    assert 203 - len(dealt) < world * size + 1


def test_epochs_take_turns_with_the_views_and_resume_anywhere(tiny_config: Build, small_cache: Path) -> None:
    run = run_of(tiny_config, small_cache, train={"epochs": 3, "batch_size": 64})
    everything = list(batches(run))
    assert [batch.rendered.view for batch in everything] == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert [batch.ends_epoch for batch in everything] == [False, False, True] * 3
    assert places(everything[0]) != places(everything[6])
    for start in (1, 3, 5, 8):
        rest = list(batches(run, epoch=start // 3, step=start % 3))
        assert [places(batch) for batch in rest] == [places(batch) for batch in everything[start:]]
        assert torch.equal(rest[0].pixels, everything[start].pixels)
        assert torch.equal(rest[0].nodes["pooled"].dense(), everything[start].nodes["pooled"].dense())
        assert np.array_equal(rest[0].rendered.mix.box, everything[start].rendered.mix.box)


def test_a_worker_process_gives_the_same(tiny_config: Build, small_cache: Path) -> None:
    here, there = (
        list(batches(run_of(tiny_config, small_cache, train={"workers": workers, "batch_size": 64})))
        for workers in (0, 1)
    )
    assert len(here) == len(there) == 3
    for one, other in zip(here, there, strict=True):
        assert places(one) == places(other)
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.nodes["pooled"].dense(), other.nodes["pooled"].dense())


def test_planned_views_are_the_cached_ones(tiny_config: Build, small_cache: Path) -> None:
    """The same plan with and without a cache: a live teacher sees what the cached one saw."""
    loss = {"feature_weight": 0.0, "logit_weight": 0.0}
    planned = run_of(tiny_config, "", views={"count": "2"}, loss=loss)
    for one, other in zip(batches(planned), batches(run_of(tiny_config, small_cache)), strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert all(
            np.array_equal(getattr(one.rendered.mix, field.name), getattr(other.rendered.mix, field.name))
            for field in dataclasses.fields(one.rendered.mix)
        )
        assert one.nodes == {}


def test_a_share_of_the_digests_is_checked(tiny_config: Build, small_cache: Path) -> None:
    run = run_of(tiny_config, small_cache, train={"digest_check": 0.25, "batch_size": 200})
    with run.feed(run.supply(live=False)) as feed:
        (task,) = feed._tasks(0, 0, False)
        (again,) = feed._tasks(0, 0, False)
    assert 30 <= task.check.sum() <= 70
    assert np.array_equal(task.check, again.check)


# --- broken images -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 40), data=st.data(), probability=st.sampled_from([0.0, 0.5, 1.0]))
def test_slots_without_broken_rows(count: int, data: st.DataObject, probability: float) -> None:
    broken = data.draw(st.sets(st.integers(0, count - 1)))
    recipe = dataclasses.replace(RECIPES["vkd"], mix_probability=probability)
    mix = drop_partners(plan_mixing(recipe, 3, [f"key{i}" for i in range(count)], 1), broken)
    rows = np.array(sorted(set(range(count)) - broken), np.int64)
    slots = slots_of_rows(mix, rows)
    assert len(slots) == (len(rows) + 1) // 2
    assert sorted(row for row in slots.reshape(-1).tolist() if row >= 0) == rows.tolist()
    for one, other in slots.tolist():
        for row, neighbour in ((one, other), (other, one)):
            assert row < 0 or mix.partner[row] in (row, neighbour)


@pytest.fixture(scope="module")
def damaged_tree(digits_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits with five images cut short."""
    root = tmp_path_factory.mktemp("damaged") / "digits"
    shutil.copytree(digits_tree, root)
    for path in sorted((root / "train").glob("*/*.jpg"))[:50:10]:
        path.write_bytes(path.read_bytes()[:60])
    return root


def test_broken_images_are_left_out(tiny_config: Build, damaged_tree: Path, tmp_path: Path) -> None:
    source = {"train": str(damaged_tree)}
    config = tiny_config(source=source, cache={"url": str(tmp_path / "cache")})
    assert len(extract(config, JobSplit()).broken) == 5
    cached_run = run_of(tiny_config, tmp_path / "cache", source=source, train={"batch_size": 2})
    cached = [place for batch in batches(cached_run) for place in places(batch)]
    assert cached_run.views.num_broken == 5
    plain = {"feature_weight": 0.0, "logit_weight": 0.0}
    planned_run = run_of(tiny_config, "", source=source, loss=plain, train={"batch_size": 6})
    planned: list[tuple[int, int]] = []
    with planned_run.feed(planned_run.supply(live=False)) as feed:
        for batch in feed.batches(epoch=0, step=0, workers=0):
            planned += places(batch)
            assert len(batch.pixels) == len(batch.rendered.label) == len(batch.rendered.mix.partner) == len(batch)
            assert (batch.rendered.mix.partner < max(len(batch), 1)).all()
        assert len(feed.broken) == 5
    assert len(set(cached)) == len(cached) == 198
    assert set(planned) <= set(cached) and len(planned) > 198 - 6


# --- other pixels than the teacher saw ----------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["pixels", "size", "broken", "gone"])
def test_an_image_that_changed_is_noticed(
    tiny_config: Build, small_cache: Path, digits_tree: Path, tmp_path: Path, damage: str
) -> None:
    root = tmp_path / "digits"
    shutil.copytree(digits_tree, root)
    path = sorted((root / "train").glob("*/*.jpg"))[42]
    key = path.relative_to(root / "train").with_suffix("").as_posix()
    with Image.open(path) as opened:
        image = opened.copy()
    if damage == "pixels":
        image.rotate(90).resize(image.size).save(path, "JPEG", quality=90)
    elif damage == "size":
        image.resize((40, 41)).save(path, "JPEG")
    elif damage == "broken":
        path.write_bytes(path.read_bytes()[:100])
    run = run_of(tiny_config, small_cache, source={"train": str(root)}, train={"batch_size": 2})
    if damage == "gone":
        path.unlink()
    with pytest.raises(CorruptCacheError if damage != "gone" else Exception) as caught:
        list(batches(run))
    message = str(caught.value)
    assert key in message
    if damage in ("pixels", "size"):
        assert "view 0" in message
        assert message.count("Pillow ") == message.count("libjpeg ") == 2 and "{" not in message


def test_a_cache_of_other_data(tiny_config: Build, small_cache: Path, digits_tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "digits"
    shutil.copytree(digits_tree, root)
    path = next(iter(sorted((root / "train").glob("*/*.jpg"))))
    path.rename(path.with_name("renamed.jpg"))
    with pytest.raises(CacheMismatchError, match=r"another data set.*shard_hashes: \d of 5 shards differ, the first"):
        run_of(tiny_config, small_cache, source={"train": str(root)})
    path.with_name("renamed.jpg").unlink()
    with pytest.raises(CacheMismatchError, match=r"shard_counts: 1 of 5 shards differ, the first is shard 4"):
        run_of(tiny_config, small_cache, source={"train": str(root)})


def test_views_that_are_not_complete(
    tiny_config: Build, small_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(small_cache, cache)
    (cache / "records/view-0001/shard-000003.json").unlink()
    assert run_of(tiny_config, cache).views.views == [0]
    assert "not complete are not used: view 1: 4 of 5 units" in capsys.readouterr().err
    (cache / "records/view-0000/shard-000003.json").unlink()
    with pytest.raises(IncompleteCacheError, match=r"no view is complete .*view 0: 4 of 5 units"):
        run_of(tiny_config, cache)
