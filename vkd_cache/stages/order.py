"""The order of an epoch: which slots a rank trains on at each step, as a pure function.

A slot is two samples that belong together (a matched pair, so that both members are decoded once and mixed in one
batch). Shards are shuffled; `open_shards` neighbours form a window; the slots of a window are shuffled together. The
sequence of all windows is cut into one contiguous stretch per rank, so a rank opens only its own shards, and every
rank takes the same number of steps. The remainder, fewer than `world * slots_per_step` slots at the end of the
sequence, is left out; it is another one in every epoch, because the sequence is shuffled anew.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """One rank's order of one epoch.

    Attributes:
        slot_counts: slots per shard, in shard order.
        seed: train seed.
        epoch: epoch number.
        rank, world: this process among all.
        slots_per_step: slots this rank trains on per step.
        open_shards: shards per window.
    """

    slot_counts: Sequence[int]
    seed: int
    epoch: int
    rank: int = 0
    world: int = 1
    slots_per_step: int
    open_shards: int = 8

    @property
    def num_steps(self) -> int:
        """Steps of the epoch, the same on every rank."""
        return sum(self.slot_counts) // (self.world * self.slots_per_step)

    def windows(self) -> list[npt.NDArray[np.int64]]:
        """Shard indices of each window, in the order they are opened by the whole job."""
        shards = _shuffled(len(self.slot_counts), self.seed, self.epoch, 0)
        return [shards[start : start + self.open_shards] for start in range(0, len(shards), self.open_shards)]

    def own_windows(self) -> range:
        """The windows, by their place in `windows()`, that this rank takes slots of."""
        ends = np.cumsum([sum(self.slot_counts[shard] for shard in shards) for shards in self.windows()])
        stretch = self.num_steps * self.slots_per_step
        first = int(np.searchsorted(ends, self.rank * stretch, side="right"))
        return range(first, int(np.searchsorted(ends, (self.rank + 1) * stretch, side="left")) + 1)

    def steps(self, start_step: int = 0) -> Iterator[npt.NDArray[np.int64]]:
        """The (slots_per_step, 2) array of (shard, slot) of each step from `start_step` on."""
        stretch = self.num_steps * self.slots_per_step
        begin = self.rank * stretch + start_step * self.slots_per_step
        end = (self.rank + 1) * stretch
        pending = np.empty((0, 2), np.int64)
        window_begin = 0
        for number, shards in enumerate(self.windows()):
            size = sum(self.slot_counts[shard] for shard in shards)
            low, high = max(begin - window_begin, 0), min(end - window_begin, size)
            window_begin += size
            if low >= high:
                continue
            pending = np.concatenate([pending, self._window_slots(number, shards)[low:high]])
            whole = len(pending) // self.slots_per_step * self.slots_per_step
            yield from pending[:whole].reshape(-1, self.slots_per_step, 2)
            pending = pending[whole:]

    def _window_slots(self, number: int, shards: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        slots = np.concatenate(
            [np.stack([np.full(self.slot_counts[s], s), np.arange(self.slot_counts[s])], axis=1) for s in shards]
        )
        return slots[_shuffled(len(slots), self.seed, self.epoch, number + 1)]


def _shuffled(count: int, seed: int, epoch: int, stream: int) -> npt.NDArray[np.int64]:
    """A permutation of range(count). Only Philox' raw bits are used: numpy promises those never change."""
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
    return np.argsort(bits.random_raw(count), kind="stable")
