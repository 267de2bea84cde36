"""The share of time in which some thread of this process holds Python's lock.

A second thread sleeps for random (exponential) times and notes how late it goes on. What wakes at
such times sees a state as often as it lasts: if the lock is free, the thread goes on at once, if it
is held, only when the holder lets go of it (or after the switch interval of 5 ms). So the share of
late wakes is the share of time in which the lock is held. What counts as late, and how many wakes
are late anyway because the machine is busy, is found in the same process with two loads that are
known: hashing a large buffer, which leaves the lock free, and a loop in Python, which holds it.

Wakes that would fall in the wait of a late one count as late, too. Where the system allows it the
thread goes before all others, so that work of other processes does not make it late. Too short to
be seen are holds of less than the usual lateness of a wake (0.05 ms so, 0.1 ms otherwise) that end
in a longer time without the lock; the watch takes the lock for some microseconds per wake.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import threading
import time
from collections.abc import Callable

import numpy as np

MEAN_S = 0.001
"""Mean of the random sleeps."""

MOST_LATE_S = 0.0005
"""Wakes that are usually later than this say nothing about holds, most of which are shorter."""

_QUANTILE = 0.9


def latenesses(work: Callable[[], object], seed: int = 0) -> np.ndarray:
    """float64 [wakes], seconds by which a thread woke late while `work` ran in this one."""
    sleeps = np.random.default_rng(seed).exponential(MEAN_S, 4096).tolist()
    stop, found = threading.Event(), []

    def watch() -> None:
        _hurry()
        due, number = time.perf_counter(), 0
        while not stop.is_set():
            # Not counted from the last wake: what falls due while this thread waits is late too.
            due += sleeps[number % len(sleeps)]
            if (left := due - time.perf_counter()) > 0:
                time.sleep(left)
            found.append(time.perf_counter() - due)
            number += 1

    thread = threading.Thread(target=watch, name="lock watch", daemon=True)
    thread.start()
    try:
        work()
    finally:
        stop.set()
        thread.join()
    return np.array(found)


def free_load(seconds: float) -> None:
    """Keeps a core busy without the lock."""
    data, end = bytes(1 << 24), time.perf_counter() + seconds
    while time.perf_counter() < end:
        hashlib.blake2b(data).digest()


def held_load(seconds: float) -> None:
    """Keeps a core busy with the lock."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _hurry() -> None:
    """Lets this thread run as soon as it wakes, where the system allows that."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


@dataclasses.dataclass(frozen=True)
class LockWatch:
    """How wakes look with a free and with a held lock, on this machine now."""

    late_s: float
    """A wake that is later than this is late."""
    free: float
    """Share of late wakes with a free lock."""
    held: float
    """Share of late wakes with a held lock."""

    @classmethod
    def calibrated(cls, seconds: float = 1.0) -> LockWatch:
        """Watches both known loads for so many seconds each."""
        free = latenesses(lambda: free_load(seconds))
        held = latenesses(lambda: held_load(seconds))
        late = float(np.quantile(free, _QUANTILE))
        return cls(late, float((free > late).mean()), float((held > late).mean()))

    def share(self, work: Callable[[], object]) -> float | None:
        """Share of the time of `work` in which a thread holds the lock, 0 to 1.

        None where wakes are so late anyway that they tell nothing. `work` must take many times
        `MEAN_S`.
        """
        if self.late_s > MOST_LATE_S:
            work()
            return None
        late = float((latenesses(work) > self.late_s).mean())
        return float(np.clip((late - self.free) / max(self.held - self.free, 1e-9), 0.0, 1.0))
