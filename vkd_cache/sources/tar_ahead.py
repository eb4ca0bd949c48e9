"""A few threads that fetch what is going to be needed, in order.

A newcomer's trap: what goes wrong here is not told here. Whoever needs the thing asks for it again, meets the same
error, and can say what it was needed for.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence

from vkd_cache.errors import VkdCacheError


class ReadAhead:
    """Fetches wanted numbers; daemon threads, which end when nothing is left to fetch, and with the process."""

    def __init__(self, fetch: Callable[[int], None], num_threads: int) -> None:
        """`fetch`: has something at hand from now on; repeating it costs little."""
        self._fetch = fetch
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self._wanted: deque[int] = deque()
        self._busy: set[int] = set()
        self._alive = 0

    def want(self, numbers: Sequence[int]) -> None:
        """Fetch these, in this order; what was wanted before and has not been begun is forgotten."""
        with self._lock:
            self._wanted = deque(number for number in numbers if number not in self._busy)
            new = min(self._num_threads - self._alive, len(self._wanted))
            self._alive += new
        for _ in range(new):
            threading.Thread(target=self._work, daemon=True, name="read-ahead").start()

    def _work(self) -> None:
        number = -1
        while True:
            with self._lock:
                self._busy.discard(number)
                if not self._wanted:
                    self._alive -= 1
                    return
                number = self._wanted.popleft()
                self._busy.add(number)
            try:
                self._fetch(number)
            except (VkdCacheError, OSError):
                with self._lock:
                    self._wanted.clear()
