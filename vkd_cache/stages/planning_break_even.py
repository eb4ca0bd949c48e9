"""When the cache pays: extraction once and cheap steps, against a live teacher in every step of every student.

    cache(n students, E epochs) = extract + n (cached_start + E cached_epoch)
    live (n students, E epochs) =           n (live_start   + E live_epoch)

The cache pays where the first is not above the second. All times are in seconds.
"""

import dataclasses
import math
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """What is paid once, a student, and an epoch; seconds.

    Attributes:
        extract_s: making the cache, once for all students.
        cached_start_s, live_start_s: of a training run, whatever its length.
        cached_epoch_s, live_epoch_s: of an epoch, with evaluations and checkpoints.
    """

    extract_s: float
    cached_start_s: float
    cached_epoch_s: float
    live_start_s: float
    live_epoch_s: float

    def cached_s(self, epochs: int, students: int = 1) -> float:
        """Extraction, and all students trained from the cache."""
        return self.extract_s + students * (self.cached_start_s + epochs * self.cached_epoch_s)

    def live_s(self, epochs: int, students: int = 1) -> float:
        """All students trained with the live teacher."""
        return students * (self.live_start_s + epochs * self.live_epoch_s)


def break_even_epochs(costs: Costs) -> int | None:
    """The least number of epochs from which on one student is there no later with the cache; None: there is none."""
    gain = costs.live_epoch_s - costs.cached_epoch_s
    owed = costs.extract_s + costs.cached_start_s - costs.live_start_s
    return _first(owed, gain, lambda epochs: costs.cached_s(epochs) <= costs.live_s(epochs))


def break_even_students(costs: Costs, epochs: int) -> int | None:
    """The least number of students, trained for `epochs` each, from which on the cache is no slower; None: no such."""
    gain = costs.live_s(epochs) - (costs.cached_start_s + epochs * costs.cached_epoch_s)
    pays: Callable[[int], bool] = lambda count: costs.cached_s(epochs, count) <= costs.live_s(epochs, count)  # noqa: E731
    return _first(costs.extract_s, gain, pays)


def _first(owed: float, gain: float, pays: Callable[[int], bool]) -> int | None:
    """The least count from 1 on with `owed <= count * gain`, for it and all larger ones."""
    if gain <= 0:
        return 1 if gain == 0 and owed <= 0 else None
    if not math.isfinite(owed / gain):
        return None
    count = max(1, math.ceil(owed / gain))
    # the quotient is rounded, and so are the sums that are compared
    while count > 1 and pays(count - 1):
        count -= 1
    while not pays(count):
        count += 1
    return count
