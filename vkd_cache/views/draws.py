"""Counter-based random draws: every number of a plan is a pure function of (seed, key, view).

A newcomer's trap: there is no generator state to save. Two `Draws` of the same seed give the same numbers in the same
order in any process; what differs between views is only the seed, which is a keyed hash of (key, view).
"""

import hashlib
import math
import statistics
import struct

_KEY = struct.Struct("<Q")
_VIEW = struct.Struct("<Q")
_COUNTER = struct.Struct("<QQ")
_WORDS = struct.Struct("<8Q")
_WORDS_PER_BLOCK = 8
_TO_UNIT = 2.0**-53
_STANDARD_NORMAL = statistics.NormalDist()


def view_seed(seed: int, key: str, view: int) -> int:
    """The seed of one view of one sample.

    Args:
        seed: cache seed, in [0, 2**64).
        key: the sample's key.
        view: number of the view, from 0.

    Returns:
        A uint64: BLAKE2b of view and key, keyed with the cache seed.
    """
    message = _VIEW.pack(view) + key.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(message, digest_size=8, key=_KEY.pack(seed)).digest(), "little")


class Draws:
    """The stream of random numbers that belongs to one seed.

    Block c of eight 64-bit words is the BLAKE2b digest of (seed, c), so that one hash serves eight draws.

    Args:
        seed: in [0, 2**64).
    """

    __slots__ = ("_block", "_next", "_seed", "_words")

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._block = 0
        self._next = _WORDS_PER_BLOCK
        self._words: tuple[int, ...] = ()

    def word(self) -> int:
        """The next uniform uint64."""
        if self._next == _WORDS_PER_BLOCK:
            digest = hashlib.blake2b(_COUNTER.pack(self._seed, self._block), digest_size=64).digest()
            self._words = _WORDS.unpack(digest)
            self._block += 1
            self._next = 0
        value: int = self._words[self._next]
        self._next += 1
        return value

    def uniform(self) -> float:
        """Uniform in [0, 1), a multiple of 2**-53."""
        return (self.word() >> 11) * _TO_UNIT

    def integer(self, low: int, high: int) -> int:
        """Uniform integer in [low, high); the bias is below (high - low) / 2**64.

        Raises:
            ValueError: the range is empty.
        """
        if high <= low:
            raise ValueError(f"integer: found the empty range [{low}, {high}), expected low < high.")
        return low + ((self.word() * (high - low)) >> 64)

    def normal(self, mean: float, std: float) -> float:
        """Gaussian draw, by inverting the distribution function at the middle of a cell of width 2**-53."""
        return mean + std * _STANDARD_NORMAL.inv_cdf(((self.word() >> 11) + 0.5) * _TO_UNIT)

    def beta(self, a: float, b: float) -> float:
        """Beta(a, b) draw in [0, 1], for finite a, b > 0.

        Source: Jöhnk (1964) where a and b are at most 1, else two gamma draws. Both are exact in distribution.

        Raises:
            ValueError: a or b is not a positive finite number.
        """
        if not (0.0 < a < math.inf and 0.0 < b < math.inf):
            raise ValueError(f"beta: found a={a}, b={b}, expected two positive finite numbers.")
        if a > 1.0 or b > 1.0:
            first, second = self._gamma(a), self._gamma(b)
            return first / (first + second) if first + second > 0.0 else 0.5
        while True:
            # 1 - uniform is in (0, 1], so that the logarithms are finite
            log_x = math.log(1.0 - self.uniform()) / a
            log_y = math.log(1.0 - self.uniform()) / b
            x, y = math.exp(log_x), math.exp(log_y)
            if x + y > 1.0:
                continue
            if x + y > 0.0:
                return x / (x + y)
            # both underflow for tiny a and b: the ratio is still defined through the logarithms
            return 1.0 / (1.0 + math.exp(min(log_y - log_x, 700.0)))

    def _gamma(self, shape: float) -> float:
        """Gamma(shape, 1) draw. Source: Marsaglia and Tsang (2000), with their boost for shapes below 1."""
        if shape < 1.0:
            return self._gamma(shape + 1.0) * math.exp(math.log(1.0 - self.uniform()) / shape)
        d = shape - 1.0 / 3.0
        c = 1.0 / math.sqrt(9.0 * d)
        while True:
            z = self.normal(0.0, 1.0)
            v = (1.0 + c * z) ** 3
            if v > 0.0 and math.log(1.0 - self.uniform()) < 0.5 * z * z + d - d * v + d * math.log(v):
                return d * v
