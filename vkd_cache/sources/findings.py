"""What is wrong with a data set, collected over all of it and told in one message.

A data set of a million files is opened in minutes: a user who has to mend it wants every kind of mistake at once, with
names enough to find them, not the first one of many.
"""

import dataclasses
import warnings

from vkd_cache.errors import SourceError
from vkd_cache.sources.keys import shown

_NUM_SHOWN = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """A kind of mistake: what was found, in the plural after a count, and what to do about it.

    Attributes:
        is_error: whether the data set cannot be used with it; else it is only said.
    """

    found: str
    cure: str
    is_error: bool = True


class PassedOverWarning(UserWarning):
    """Files of a data set that are not used, though somebody may have meant them."""


class Findings:
    """Mistakes seen so far in the data set at `where`."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._names: dict[Problem, list[str]] = {}
        self._counts: dict[Problem, int] = {}

    def add(self, problem: Problem, name: str) -> None:
        """Note that `name` has this problem; the first few names of each problem are kept."""
        count = self._counts.get(problem, 0)
        self._counts[problem] = count + 1
        if count < _NUM_SHOWN:
            self._names.setdefault(problem, []).append(name)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to say, not even a warning."""
        return not self._counts

    @property
    def total(self) -> int:
        """Mistakes of all kinds that are errors."""
        return sum(count for problem, count in self._counts.items() if problem.is_error)

    def raise_any(self) -> None:
        """Raise what was found, or warn of it if nothing of it is an error.

        Warns:
            PassedOverWarning: one for each kind of problem.

        Raises:
            SourceError: one line for each kind of problem, with a count, the first few names, and what to do.
        """
        remarks = self._lines(is_error=False)
        if errors := self._lines(is_error=True):
            raise SourceError("\n".join([*errors, *remarks]))
        for line in remarks:
            warnings.warn(line, PassedOverWarning, stacklevel=4)

    def _lines(self, *, is_error: bool) -> list[str]:
        return [
            f"{shown(self._where)}: {count} {problem.found}: {first_few(self._names[problem], count)}. {problem.cure}"
            for problem, count in self._counts.items()
            if problem.is_error == is_error
        ]


def first_few(names: list[str], count: int | None = None) -> str:
    """`a, b, c and 7 more`: the first names of a list that holds, or stands for, `count`."""
    total = len(names) if count is None else count
    text = ", ".join(shown(name) for name in names[:_NUM_SHOWN])
    return f"{text} and {total - _NUM_SHOWN} more" if total > _NUM_SHOWN else text
