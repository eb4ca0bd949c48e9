"""Which tokens of an image are kept: a pure function of seed, sample, view and node.

A newcomer would draw from a generator that is handed along, and the places would depend on what was drawn before. Here
each (seed, key, view, node) has a counter-based stream of its own, of which only the raw bits are used: NumPy promises
those for ever, and no method that turns them into numbers.
"""

import hashlib
import math
import struct

import numpy as np
import numpy.typing as npt

from vkd_cache.errors import ConfigError

_SEED = struct.Struct("<Q")
_VIEW = struct.Struct("<QI")


def sample_places(seed: int, key: str, view: int, node: str, count: int, fraction: float) -> npt.NDArray[np.int64]:
    """Places of the tokens that are kept, uniform without replacement.

    Every token draws 64 bits, and those with the smallest stay: each subset of the size is equally likely.

    Args:
        seed: cache seed, in [0, 2**64).
        key: the sample's key.
        view: number of the view, from 0.
        node: name of the node; two nodes of one view draw independently.
        count: n >= 1, valid tokens of the image.
        fraction: in (0, 1].

    Returns:
        (m,) int64 ascending places in [0, n), m = max(1, ceil(fraction * n)).

    Raises:
        ConfigError: a fraction outside (0, 1], or no token to choose from.
    """
    if not (0 < fraction <= 1 and count >= 1):
        raise ConfigError(f"tokens: found {fraction} of {count} tokens, expected a fraction in (0, 1] of at least 1.")
    num_kept = min(count, max(1, math.ceil(fraction * count)))
    if num_kept == count:
        return np.arange(count, dtype=np.int64)
    message = _VIEW.pack(view, len(node)) + node.encode() + key.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(message, digest_size=16, key=_SEED.pack(seed)).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return np.sort(np.argpartition(words, num_kept - 1)[:num_kept]).astype(np.int64)
