"""Accuracy of the teacher in a cache: its stored head on its stored features, without a teacher or an image.

A newcomer's trap: a cached view may be mixed from two images. It is right when the class it is given is the label of
the image with the larger share, so this number is lower than the teacher's accuracy on clean images, and should be.

Shape legend: n rows of a unit, C channels, K classes.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vkd_cache import console
from vkd_cache.cache.reader import Cache, Unit
from vkd_cache.errors import CacheFormatError, CorruptCacheError, IncompleteCacheError
from vkd_cache.metrics import TopK, top_k
from vkd_cache.runtime import JobSplit


def count_cached(cache: Cache, device: torch.device, split: JobSplit) -> Iterator[tuple[int, TopK, int]]:
    """Count this rank's share (every N-th published shard of each view).

    Yields:
        For each published view, in order: its number, counts, and how many images of these units were broken.

    Raises:
        IncompleteCacheError: nothing is published.
        CacheFormatError: the cache holds neither a head with `pooled` features, nor logits.
        CacheError: a unit cannot be read.
    """
    published = cache.published()
    if not published:
        raise IncompleteCacheError(f"{cache.url}: nothing is published yet. Run `vkd-cache extract` first.")
    head = _head(cache, device)
    total = sum(len(sorted(shards)[split.index :: split.count]) for shards in published.values())
    with console.track("evaluate cache", total, unit="units") as progress:
        for view, shards in published.items():
            counted, num_broken = TopK(), 0
            for shard in sorted(shards)[split.index :: split.count]:
                unit = cache.read(shard, view)
                num_broken += len(cache.record(shard, view).broken)
                if len(unit):
                    labels = torch.from_numpy(dominant_labels(unit, cache.url)).to(device)
                    counted += top_k(_unit_logits(unit, head, device), labels)
                progress.advance(1)
            yield view, counted, num_broken


def dominant_labels(unit: Unit, where: str = "cache") -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """(n,) int64 label of the image with the larger share of each view; of two equal shares, the row's own.

    Raises:
        CorruptCacheError: a partner that the unit does not hold.
    """
    label = unit.columns["label"].astype(np.int64)
    partner = unit.columns["partner"].astype(np.int64)
    position = np.searchsorted(unit.rows, partner)  # rows are in order, but those of broken images are missing
    known = position < len(unit)
    known[known] = unit.rows[position[known]] == partner[known]
    if not known.all():
        key = unit.keys[int(np.flatnonzero(~known)[0])]
        raise CorruptCacheError(f"{where}: shard {unit.id.shard}, view {unit.id.view}: no partner of key '{key}'.")
    return np.where(unit.columns["mix_lambda"].astype(np.float32) >= 0.5, label, label[position])


def _head(cache: Cache, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """The stored head on `device`; None where the cache stores logits."""
    nodes = {spec.name for spec in cache.manifest.nodes}
    if "logits" in nodes:
        return None
    head = cache.head() if "pooled" in nodes else None
    if head is None:
        raise CacheFormatError(
            f"{cache.url}: found nodes {', '.join(sorted(nodes))} and no head, expected something that tells classes. "
            "Extract with the node 'pooled' or 'logits' from a teacher that has a classifier."
        )
    weight, bias = head
    return weight.to(device), bias.to(device)


def _unit_logits(unit: Unit, head: tuple[Tensor, Tensor] | None, device: torch.device) -> Tensor:
    if head is None:
        return unit.node("logits").to(device)
    return functional.linear(unit.node("pooled").to(device, torch.float32), *head)
