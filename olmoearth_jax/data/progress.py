"""A line now and then that says how far a long task is and when it will be done."""

from __future__ import annotations

import time
from collections.abc import Callable


class Progress:
    """Counts finished items of `total` and says rate and time left, every `interval` seconds.

    `what` names the items, for example 'tiles'. The last one is always reported.
    """

    def __init__(
        self, total: int, what: str, say: Callable[[str], None] | None, interval: float = 5.0
    ):
        self.total, self.what, self._say, self._interval = total, what, say, interval
        self.done = 0
        self._begun = self._last = time.monotonic()

    def step(self, count: int = 1) -> None:
        """Counts `count` more items as done."""
        self.done += count
        now = time.monotonic()
        if self._say is None or (now - self._last < self._interval and self.done < self.total):
            return
        self._last = now
        rate = self.done / max(now - self._begun, 1e-6)
        left = duration((self.total - self.done) / rate) if rate else "unknown"
        share = 100 * self.done / max(self.total, 1)
        self._say(
            f"{self.done} of {self.total} {self.what} ({share:.0f} %), {rate:.1f}/s, {left} left"
        )


def duration(seconds: float) -> str:
    """Seconds as '12 s', '3 min 05 s' or '2 h 07 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
