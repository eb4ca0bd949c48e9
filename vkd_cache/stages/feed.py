"""What a student is fed: for every step, rendered views and, from a cache, the teacher's outputs for the same views.

Worker processes render images and know nothing of features. This process reads each unit once, sends its stored view
params along with the render tasks, and joins node values to the rendered batches by position. Both members of a pair
are always in one batch.

Shape legend: b samples of a batch, C width of a node.
"""

import contextlib
import dataclasses
import itertools
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from vkd_cache import console
from vkd_cache.errors import CorruptCacheError
from vkd_cache.sources import read_ahead
from vkd_cache.stages.joining import Nodes, Part, joined_columns, joined_mix, joined_nodes, joined_pixels
from vkd_cache.stages.order import EpochOrder
from vkd_cache.stages.rendering import RenderedBatch, Renderer, RenderTask, keep_rows, render_loader
from vkd_cache.stages.unit_views import CachedViews, ShardView, Views

SHOWN_BROKEN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which steps this rank is fed.

    Attributes:
        epochs: number of epochs; epoch e shows view number e modulo the number of views.
        batch_size: samples per batch of this rank; even.
        seed: train seed.
        open_shards: shards shuffled together.
        rank, world: this process among all.
        digest_check: share of replayed views whose pixel digest is compared, 0 to 1.
    """

    epochs: int
    batch_size: int
    seed: int
    open_shards: int
    rank: int = 0
    world: int = 1
    digest_check: float = 0.0


@dataclasses.dataclass(slots=True, kw_only=True)
class FedBatch:
    """One batch for the student.

    Attributes:
        epoch, step: its place; `step` counts batches within the epoch.
        ends_epoch: whether it is the last one of its epoch.
        rendered: the views; all rows are usable.
        nodes: node values (b, ...), or tokens of b images, by name; empty without a cache.
    """

    epoch: int
    step: int
    ends_epoch: bool
    rendered: RenderedBatch
    nodes: Nodes

    def __len__(self) -> int:
        return len(self.rendered.row)

    @property
    def pixels(self) -> torch.Tensor:
        """(b, H, W, 3) uint8 views, not mixed yet."""
        return self.rendered.pixels


class Feed:
    """All batches of one rank from a given step on; a context manager, because it holds a reading thread.

    Attributes:
        broken: keys of the broken images that this rank has met; a cache's are left out before.
    """

    def __init__(self, renderer: Renderer, views: Views, schedule: Schedule, nodes: Sequence[str] = ()) -> None:
        self._renderer = renderer
        self._views = views
        self._schedule = schedule
        self._nodes = tuple(nodes)
        self._open: OrderedDict[tuple[int, int], Future[ShardView]] = OrderedDict()
        self.broken: set[str] = set()
        self._pending: deque[tuple[int, int, bool, Nodes]] = deque()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="units")

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown(cancel_futures=True)

    def view_of(self, epoch: int) -> int:
        """The view that an epoch shows: the views take turns."""
        return self._views.views[epoch % len(self._views.views)]

    def order(self, epoch: int) -> EpochOrder:
        """This rank's order of one epoch."""
        schedule = self._schedule
        return EpochOrder(
            slot_counts=self._views.slot_counts(self.view_of(epoch)),
            seed=schedule.seed,
            epoch=epoch,
            rank=schedule.rank,
            world=schedule.world,
            slots_per_step=schedule.batch_size // 2,
            open_shards=schedule.open_shards,
        )

    def batches(self, *, epoch: int, step: int, workers: int, pin_memory: bool = False) -> Iterator[FedBatch]:
        """Batches from (epoch, step) to the end of the last epoch.

        Raises:
            CorruptCacheError: a replayed view has other pixels than the teacher saw, or a unit is damaged.
            SourceError: an image that is in the cache cannot be read any more.
        """
        tasks = self._tasks(epoch, step, pin_memory)
        loader = render_loader(self._renderer, tasks, workers=workers, pin_memory=pin_memory)
        with contextlib.closing(loader):  # so that workers stop before an error is shown
            for rendered in loader:
                at_epoch, at_step, ends_epoch, nodes = self._pending.popleft()
                if rendered.error is not None:
                    raise rendered.error
                if rendered.broken:
                    if isinstance(self._views, CachedViews):
                        raise self._broken_replay(rendered)
                    self._note_broken(rendered)
                    keep_rows(rendered, np.flatnonzero(rendered.ok))
                yield FedBatch(epoch=at_epoch, step=at_step, ends_epoch=ends_epoch, rendered=rendered, nodes=nodes)

    def _tasks(self, epoch: int, step: int, pin_memory: bool) -> Iterator[RenderTask]:
        for at_epoch in range(epoch, self._schedule.epochs):
            order = self.order(at_epoch)
            view = self.view_of(at_epoch)
            windows = order.windows()[: order.own_windows().stop]  # the next one may be another rank's
            place = {shard: number for number, shards in enumerate(windows) for shard in shards.tolist()}
            ahead = -1
            for number, slots in enumerate(order.steps(step), start=step):
                reached = max(place[shard] for shard in slots[:, 0].tolist())
                if reached > ahead:
                    self._read_ahead(windows[reached : reached + 2], view)
                    ahead = reached
                task, nodes = self._task(slots, view, at_epoch, number)
                if pin_memory:  # else the copy to a GPU waits for the GPU
                    nodes = {name: values.pin_memory() for name, values in nodes.items()}
                self._pending.append((at_epoch, number, number + 1 == order.num_steps, nodes))
                yield task
            step = 0

    def _read_ahead(self, windows: Sequence[npt.NDArray[np.int64]], view: int) -> None:
        """Start reading the units of a window and of the next, and their images; forget what lies further back."""
        now, *soon = (shards.tolist() for shards in windows)
        if self._views.reads_images:
            read_ahead(self._renderer.source, now, [*itertools.chain(*soon)])
        for shard in np.concatenate(windows).tolist():
            self._unit(shard, view)
        # the window being left may still have slots in the batch that crosses over: hence three
        while len(self._open) > 3 * self._schedule.open_shards:
            self._open.popitem(last=False)

    def _unit(self, shard: int, view: int) -> Future[ShardView]:
        if (shard, view) not in self._open:
            self._open[shard, view] = self._reader.submit(self._views.open, shard, view)
        self._open.move_to_end((shard, view))
        return self._open[shard, view]

    def _task(
        self, slots: npt.NDArray[np.int64], view: int, epoch: int, step: int
    ) -> tuple[RenderTask, Nodes]:
        units = {shard: self._unit(shard, view).result() for shard in sorted(set(slots[:, 0].tolist()))}
        pairs = np.empty((len(slots), 2), np.int64)
        for number, content in units.items():
            here = slots[:, 0] == number
            pairs[here] = content.slots[slots[here, 1]]
        used = pairs.reshape(-1) >= 0
        shard, row = np.repeat(slots[:, 0], 2)[used], pairs.reshape(-1)[used]
        parts = [
            Part(content, position, row[position])
            for content, position in ((content, np.flatnonzero(shard == number)) for number, content in units.items())
        ]
        columns = joined_columns(parts, len(row))
        digest = columns.pop("digest", None)
        task = RenderTask(
            tag=(epoch, step),
            shard=shard,
            row=row,
            view=view,
            mix=joined_mix(parts, len(row)),
            params=columns or None,
            digest=None if digest is None else digest.astype(np.uint64),
            check=None if digest is None else _chosen(len(row), self._schedule, epoch, step),
            stored=joined_pixels(parts, len(row)),
        )
        return task, joined_nodes(parts, len(row), self._nodes)

    def _broken_replay(self, rendered: RenderedBatch) -> CorruptCacheError:
        """An image that the teacher saw must still be there; one that nobody has seen yet may be broken."""
        source = self._renderer.source
        return CorruptCacheError(
            f"{source.location}: image of key '{self._key(rendered, 0)}' is broken ({rendered.broken[0][1]}), but the "
            f"teacher saw view {rendered.view} of it whole. Restore the file, or extract anew."
        )

    def _note_broken(self, rendered: RenderedBatch) -> None:
        """Remember each broken image, and say of the first few that they are left out."""
        for number, (_, reason) in enumerate(rendered.broken):
            key = self._key(rendered, number)
            if key not in self.broken and len(self.broken) < SHOWN_BROKEN:
                console.warn(f"{self._renderer.source.location}: '{key}' is broken ({reason}) and left out")
            self.broken.add(key)

    def _key(self, rendered: RenderedBatch, number: int) -> str:
        position = rendered.broken[number][0]
        return self._renderer.source.shards[int(rendered.shard[position])].keys[int(rendered.row[position])]


def _chosen(count: int, schedule: Schedule, epoch: int, step: int) -> npt.NDArray[np.bool_]:
    """Which digests of a batch to check: an independent share of every step, the same when it is repeated."""
    key = np.array([schedule.seed, schedule.rank], np.uint64)
    bits = np.random.Philox(key=key, counter=np.array([0, 0, epoch, step], np.uint64)).random_raw(count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53 < schedule.digest_check

