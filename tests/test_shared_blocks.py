"""What travels through shared blocks arrives as it was, stays so while anybody has it, and takes little memory."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_jobs import arrays_of, failing_with_a_block, pool_of, total

from vkd_cache.errors import SourceError
from vkd_cache.stages.shared_blocks import LARGE_BYTES, BorrowedBlocks, LendingBlocks, Parcel, private_empty
from vkd_cache.stages.worker_pool import TASKS_AHEAD


class Link:
    """Both sides of a line, in one process."""

    def __init__(self) -> None:
        self.lending, self.borrowed = LendingBlocks(), BorrowedBlocks()
        self.sizes: dict[int, int] = {}
        self.dropped: list[int] = []

    def send(self, result: Any) -> Any:
        parcel, descriptors, message = self.lending.pack(result)
        self.sizes |= dict(parcel.made)
        self.dropped.extend(parcel.dropped)
        assert len(message) < LARGE_BYTES * 4
        return self.borrowed.unpack(parcel, descriptors, message)

    def give_back(self) -> None:
        self.lending.returned(self.borrowed.returned())


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    return found.dtype == expected.dtype and np.array_equal(found, expected)


DTYPES = (np.uint8, np.int64, np.float16, np.bool_)


@settings(deadline=None, max_examples=30, database=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 200_000), st.booleans()), max_size=4)))
def test_everything_arrives_and_nothing_changes_while_it_is_held(results: list[list[tuple[Any, int, bool]]]) -> None:
    """Some results are kept for ever, some are gone at once."""
    link = Link()
    kept: list[tuple[Any, Any]] = []
    for number, arrays in enumerate(results):
        result = {}
        for place, (dtype, count, as_tensor) in enumerate(arrays):
            values = (np.arange(count) * (number + 3) % 251).astype(dtype)
            result[place] = torch.from_numpy(values) if as_tensor else values
        found = link.send(result)
        assert same(found, result)
        if number % 2:
            kept.append((found, result))
        del found
        link.give_back()
        assert all(same(*pair) for pair in kept)


def test_arrays_of_workers_arrive_whole_and_can_be_written_to() -> None:
    tasks = [(number, count) for number, count in enumerate((10, 40_000, 70_000, 40_000, 5, 90_000, 90_000, 90_000))]
    with pool_of(arrays_of, 2) as pool:
        held = list(pool.results(tasks))
    for task, found in zip(tasks, held, strict=True):
        assert same(found, arrays_of(task, private_empty))
        found["made"].zero_()
        assert int(found["made"].sum()) == 0


def test_an_array_made_in_a_block_is_not_copied() -> None:
    link = Link()
    pixels = link.lending.empty((LARGE_BYTES,))
    pixels.fill(7)
    found = link.send(pixels)
    pixels[0] = 9  # what a worker must never do, and proof that there is one copy
    assert found[0] == 9 and found[1] == 7


def test_a_view_of_a_result_keeps_its_block() -> None:
    link = Link()
    row = torch.from_numpy(link.send(np.full((4, LARGE_BYTES), 1, np.uint8)))[2]
    link.give_back()
    other = link.send(np.full((4, LARGE_BYTES), 2, np.uint8))
    assert int(row.sum()) == LARGE_BYTES and other[0, 0] == 2
    assert len(link.sizes) == 2


def test_blocks_are_used_again() -> None:
    """Whoever takes one batch at a time has a fixed number of blocks, whatever their sizes do."""
    link = Link()
    for step in range(40):
        link.send(np.zeros(200_000 + 100_000 * (step % 7), np.uint8))
        link.give_back()
    assert len(link.sizes) - len(link.dropped) == 1
    grown = [link.sizes[number] for number in sorted(link.sizes)]
    assert grown == sorted(grown) and len(grown) <= 2
    with pool_of(arrays_of, 1) as pool:
        for found in pool.results((number, 100_000) for number in range(30)):
            del found
        assert len(pool._workers[0]._borrowed._blocks) <= 4 * (TASKS_AHEAD + 2)  # four large arrays a result


def test_a_result_that_cannot_travel_costs_no_block() -> None:
    link = Link()
    for _ in range(3):
        with pytest.raises((TypeError, AttributeError)):
            link.send([link.lending.empty((LARGE_BYTES,)), np.zeros(LARGE_BYTES, np.uint8), lambda: None])
    link.send(np.zeros(LARGE_BYTES, np.uint8))
    assert len(link.sizes) == 1
    with pool_of(failing_with_a_block, 1) as pool:
        results = pool.results([1, 2])
        with pytest.raises(ValueError, match="number 1"):
            next(results)


def test_large_tasks_travel_in_blocks_that_are_used_again() -> None:
    """Whatever is still on its way is not written over; the thread that pins results hears of blocks, too."""
    for beside in (False, True):
        with pool_of(total, 2, beside=beside) as pool:
            tasks = (np.full(LARGE_BYTES + number, number % 200, np.uint8) for number in range(40))
            expected = [(LARGE_BYTES + number) * (number % 200) for number in range(40)]
            assert list(pool.results(tasks)) == expected
            for worker in pool._workers:
                assert next(worker._lending._numbers) <= TASKS_AHEAD + 2


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_are_closed() -> None:
    before = open_descriptors()
    link = Link()
    for size in (1, 2, 3):
        link.send(np.zeros(size * 2**20, np.uint8))
        link.give_back()
    del link
    assert open_descriptors() == before


def test_no_memory_is_an_error_that_says_so() -> None:
    with pytest.raises(SourceError, match=r"no room for the 1\d+ MB of a batch .*fewer --workers"):
        LendingBlocks().empty((2**60,))
    descriptor = os.memfd_create("too-large")
    os.ftruncate(descriptor, 2**60)
    with pytest.raises(SourceError, match=r"no room for the 1\d+ MB of a batch .*fewer --workers"):
        BorrowedBlocks().unpack(Parcel([(0, 2**60)], (), ()), [descriptor], b"")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
