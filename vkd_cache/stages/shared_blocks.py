"""Large arrays between the main process and a worker, through memory that both have mapped and that is used again.

Each side lends the other its blocks. A block is mapped once; from then on a batch of 77 MB costs neither a copy nor a
page fault in either process. All else in a result or a task, and every array below LARGE_BYTES, is in the message.

A newcomer's trap: a block is lent together with the array in it. It comes back, and is written to again, once nothing
on the other side refers to that array or to a tensor made of it; whoever keeps results keeps their blocks.
"""

import contextlib
import io
import itertools
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.reduction import ForkingPickler
from pickle import PickleBuffer
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache.errors import SourceError

LARGE_BYTES = 2**16  # from here on an array is put into a block: two copies through a socket cost more than a mapping
_STEP_BYTES = 2**20  # sizes of blocks are multiples of it, so that batches of about the same size share them

Pixels = npt.NDArray[np.uint8]
Empty = Callable[[tuple[int, ...]], Pixels]  # makes an array of a shape, its values undefined


def private_empty(shape: tuple[int, ...]) -> Pixels:
    """An array in memory of this process alone: an `Empty` for work that is done where its result is used."""
    return np.empty(shape, np.uint8)


class Parcel(NamedTuple):
    """A result or a task under way.

    Attributes:
        made: (number, bytes) of blocks that the other side does not know yet; their descriptors are sent separately.
        dropped: numbers of blocks that are no more.
        lent: (number, bytes used) of the block of every large array, in the order of the message.
    """

    made: Sequence[tuple[int, int]]
    dropped: Sequence[int]
    lent: Sequence[tuple[int, int]]


class Packed(NamedTuple):
    """What is sent: a parcel, descriptors of its new blocks (to be closed by whoever sends them), and the message."""

    parcel: Parcel
    descriptors: Sequence[int]
    message: bytes


class _Block(NamedTuple):
    number: int
    data: Pixels  # the whole block

    @property
    def address(self) -> int:
        return int(self.data.ctypes.data)


class LendingBlocks:
    """The blocks of one side, from which what it sends is taken."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._away: dict[int, _Block] = {}
        self._free: list[_Block] = []
        self._taken: list[_Block] = []  # for the result that is being worked on
        self._made: dict[int, int] = {}  # descriptors of blocks that the other side does not know yet
        self._dropped: list[int] = []

    def empty(self, shape: tuple[int, ...]) -> Pixels:
        """An array of undefined values that travels without being copied, as part of the next result; see `Empty`.

        Raises:
            SourceError: there is no memory for it.
        """
        num_bytes = math.prod(shape)
        if num_bytes < LARGE_BYTES:
            return private_empty(shape)
        return self._take(num_bytes).data[:num_bytes].reshape(shape)

    def returned(self, numbers: Iterable[int]) -> None:
        """Blocks that nothing on the other side refers to any more."""
        self._free.extend(self._away.pop(number) for number in numbers)

    def pack(self, result: Any) -> Packed:
        """A result as what is sent."""
        lent: list[tuple[int, int]] = []

        def in_message(buffer: PickleBuffer) -> bool:
            content = np.frombuffer(buffer.raw(), np.uint8)
            if content.nbytes < LARGE_BYTES:
                return True
            block = next((block for block in self._taken if block.address == content.ctypes.data), None)
            if block is None:
                block = self._take(content.nbytes)
                block.data[: content.nbytes] = content
            self._taken.remove(block)
            self._away[block.number] = block
            lent.append((block.number, content.nbytes))
            return False

        message = io.BytesIO()
        try:
            _Packer(message, 5, True, in_message).dump(result)
        except BaseException:
            self.returned([number for number, _ in lent])
            raise
        finally:
            self._free.extend(self._taken)  # for a result that never was, or that does without
            self._taken.clear()
        made = [(number, (self._away[number]).data.nbytes) for number in self._made if number in self._away]
        descriptors = [self._made.pop(number) for number, _ in made]
        parcel = Parcel(made, tuple(self._dropped), lent)
        self._dropped.clear()
        return Packed(parcel, descriptors, message.getvalue())

    def _take(self, num_bytes: int) -> _Block:
        self._free.sort(key=lambda block: block.data.nbytes)
        fitting = next((block for block in self._free if block.data.nbytes >= num_bytes), None)
        if fitting is not None:
            self._free.remove(fitting)
        elif self._free:  # in place of it comes one that is large enough
            self._drop(self._free.pop())
        block = fitting or self._make(-(-num_bytes // _STEP_BYTES) * _STEP_BYTES)
        self._taken.append(block)
        return block

    def _make(self, num_bytes: int) -> _Block:
        number = next(self._numbers)
        descriptor = -1
        try:
            descriptor = os.memfd_create(f"vkd-cache-{number}", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, num_bytes)
            data = np.frombuffer(mmap.mmap(descriptor, num_bytes), np.uint8)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise _no_room(num_bytes, error) from error
        self._made[number] = descriptor
        return _Block(number, data)

    def _drop(self, block: _Block) -> None:
        unknown = self._made.pop(block.number, None)
        if unknown is None:
            self._dropped.append(block.number)
        else:
            os.close(unknown)


class BorrowedBlocks:
    """The other side's blocks, as far as they are known here."""

    def __init__(self) -> None:
        self._blocks: dict[int, mmap.mmap] = {}
        self._back: deque[int] = deque()  # filled by whichever thread lets go of an array

    def unpack(self, parcel: Parcel, descriptors: Sequence[int], message: bytes) -> Any:
        """The result; large arrays in it, and tensors, lie in blocks, and can be written to.

        Args:
            parcel, message: as packed.
            descriptors: of the parcel's new blocks, in order; closed.

        Raises:
            SourceError: there is no memory for a block, or too many files are open.
        """
        with contextlib.ExitStack() as received:
            for descriptor in descriptors:
                received.callback(os.close, descriptor)
            for (number, num_bytes), descriptor in zip(parcel.made, descriptors, strict=True):
                try:
                    self._blocks[number] = mmap.mmap(descriptor, num_bytes)
                except OSError as error:
                    raise _no_room(num_bytes, error) from error
        for number in parcel.dropped:
            del self._blocks[number]
        return ForkingPickler.loads(message, buffers=[self._borrowed(*loan) for loan in parcel.lent])

    def _borrowed(self, number: int, num_bytes: int) -> Pixels:
        borrowed = np.frombuffer(self._blocks[number], np.uint8, num_bytes)
        weakref.finalize(borrowed, self._back.append, number).atexit = False
        return borrowed

    def returned(self) -> list[int]:
        """Blocks that nothing here refers to any more, since the last call: word to be sent to the other side."""
        return drained(self._back)


def _no_room(num_bytes: int, error: OSError) -> SourceError:
    return SourceError(
        f"there is no room for the {num_bytes / 1e6:.0f} MB of a batch between a data worker and the main process "
        f"({error.strerror}). Use fewer --workers or a smaller --batch-size."
    )


def drained(numbers: deque[int]) -> list[int]:
    """What is in the queue, which others fill meanwhile; taken out of it."""
    return [numbers.popleft() for _ in range(len(numbers))]


class _Packer(ForkingPickler):
    """Tensors travel as the arrays that they are; torch's own way is a connection and a handshake for each."""

    def reducer_override(self, value: Any) -> Any:
        plain = type(value) is torch.Tensor and value.device.type == "cpu" and not value.requires_grad
        if plain and value.layout == torch.strided and value.dtype != torch.bfloat16:
            return torch.from_numpy, (value.contiguous().numpy(),)
        return NotImplemented
