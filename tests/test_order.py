"""Laws of the epoch order: a pure function that deals every slot once, in equal steps, whatever the number of ranks."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd_cache.stages.order import EpochOrder

counts = st.lists(st.integers(0, 30), min_size=1, max_size=9)


def order(slot_counts, **kwargs):
    given_values = {"seed": 0, "epoch": 0, "slots_per_step": 3, "open_shards": 2} | kwargs
    return EpochOrder(slot_counts=slot_counts, **given_values)


def slots_of(steps):
    return [tuple(slot) for step in steps for slot in step.tolist()]


@settings(deadline=None, max_examples=80)
@given(counts, st.integers(1, 4), st.integers(0, 2**63 - 1), st.integers(0, 400))
def test_ranks_take_equal_steps_and_share_no_slot(slot_counts, world, seed, epoch):
    dealt = []
    for rank in range(world):
        mine = order(slot_counts, seed=seed, epoch=epoch, rank=rank, world=world)
        steps = list(mine.steps())
        assert len(steps) == mine.num_steps
        assert all(step.shape == (3, 2) for step in steps)
        dealt += slots_of(steps)
    everything = {(shard, slot) for shard, count in enumerate(slot_counts) for slot in range(count)}
    assert len(dealt) == len(set(dealt))
    assert set(dealt) <= everything
    assert len(everything) - len(dealt) < 3 * world  # the stated remainder


@settings(deadline=None, max_examples=60)
@given(counts, st.integers(1, 4), st.integers(0, 20))
def test_a_rank_knows_its_windows(slot_counts, world, epoch):
    for rank in range(world):
        mine = order(slot_counts, rank=rank, world=world, epoch=epoch)
        windows = mine.windows()
        known = {int(shard) for number in mine.own_windows() for shard in windows[number]} if mine.num_steps else set()
        opened = {shard for shard, _ in slots_of(mine.steps())}
        assert opened <= known
        assert all(opened & set(windows[number].tolist()) for number in mine.own_windows() if opened)


@settings(deadline=None, max_examples=60)
@given(counts, st.integers(0, 20), st.integers(1, 3))
def test_starting_later_gives_the_rest_of_the_same_order(slot_counts, start, world):
    mine = order(slot_counts, rank=world - 1, world=world)
    assert slots_of(mine.steps(start)) == slots_of(list(mine.steps())[start:])


def test_epochs_and_seeds_differ_and_the_remainder_moves():
    slot_counts = [10] * 7
    epochs = [slots_of(order(slot_counts, epoch=epoch, slots_per_step=4).steps()) for epoch in range(6)]
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert slots_of(order(slot_counts, seed=1).steps()) != slots_of(order(slot_counts, seed=2).steps())
    everything = {(shard, slot) for shard in range(7) for slot in range(10)}
    dropped = [everything - set(epoch) for epoch in epochs]
    assert all(len(d) == 2 for d in dropped)
    assert len(set.union(*dropped)) > 2


def test_a_step_mixes_the_shards_of_its_window_and_a_rank_opens_few():
    slot_counts = [64] * 8
    mine = order(slot_counts, slots_per_step=32, open_shards=4, world=2, rank=1)
    opened = {shard for shard, _ in slots_of(mine.steps())}
    assert len(opened) == 4
    assert all(len(set(step[:, 0].tolist())) > 1 for step in mine.steps())


def test_the_order_is_frozen():
    """A change of this order would break the exact resume of every interrupted run."""
    steps = np.array(list(order([4, 3, 5], seed=7, epoch=2, slots_per_step=2).steps()))
    assert steps.reshape(-1, 2).tolist() == FROZEN


FROZEN = [
    [0, 1], [0, 3], [0, 0], [1, 2], [1, 0], [1, 1],
    [0, 2], [2, 4], [2, 2], [2, 3], [2, 1], [2, 0],
]
