"""Stopping a run cleanly: SIGTERM and Ctrl-C, and waiting in a way that notices them.

Python runs signal handlers in the main thread, between two bytecodes: not while that thread sits
in a compilation, a save or a device call. So everything long runs in a `Worker` thread, and the
main thread waits with short timeouts.
"""

from __future__ import annotations

import concurrent.futures
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from olmoearth_jax.train.hosts import Hosts

T = TypeVar("T")

THREADS = "olmoearth-"
"""How the names of our threads begin."""


class Abandoned(Exception):
    """A signal came while a call was running whose result is not worth waiting for."""


class CancelFlag:
    """Whether somebody asked this process to stop, and what that means for the others."""

    def __init__(self, hosts: Hosts | None = None) -> None:
        self.hosts = hosts or Hosts()
        self.reason: str | None = None

    @property
    def requested(self) -> bool:
        """A signal has reached this process."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        self.reason = self.reason or reason

    def told(self) -> bool:
        """Asked while waiting: whether to stop; passes it on to all processes of the run."""
        if self.requested:
            self.hosts.refuse()
        return self.requested

    def told_alone(self) -> bool:
        """As `told`, but only where no other process waits for what this one is doing."""
        return self.told() and self.hosts.count == 1

    def poll(self, waited_s: float) -> None:
        """For waits that nothing interrupts: `told`, and raises HostMissing if they last."""
        self.told()
        self.hosts.check(waited_s)

    def heard(self) -> bool:
        """As `told`, and true also if another process was told."""
        return self.told() or self.hosts.heard()


@contextmanager
def catch_signals(hosts: Hosts | None = None) -> Iterator[CancelFlag]:
    """Turns SIGTERM and the first Ctrl-C into a cancel flag; a second Ctrl-C aborts at once.

    Outside the main thread no handler can be set: the flag stays unset.
    """
    flag = CancelFlag(hosts)
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        name = signal.Signals(number).name
        if flag.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        again = " (Ctrl-C again aborts without saving)" if number == signal.SIGINT else ""
        flag.request(name)
        # os.write: print may not be entered again from a handler that interrupted a print.
        os.write(2, f"{name}: stopping after this step and saving{again}\n".encode())

    # With several hosts this takes SIGTERM back from JAX's runtime, see `hosts`.
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


class Worker:
    """One daemon thread that runs calls in order.

    Not an executor of concurrent.futures: that one is joined at interpreter exit, so a stuck read
    would keep a cancelled run alive.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.busy = False
        threading.Thread(target=self._work, name=THREADS + name, daemon=True).start()

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Queues a call; its result or exception arrives in the future."""
        future: Future[T] = Future()
        self._queue.put((future, function, args))
        return future

    def call(
        self,
        function: Callable[..., T],
        *args: Any,
        stop: Callable[[], bool] | None = None,
        poll: Callable[[float], None] | None = None,
    ) -> T:
        """Runs a call and waits for it, see `wait`. Raises Abandoned when `stop()` became true.

        An abandoned call goes on in the background; the worker can't be used any more.
        """
        future = self.submit(function, *args)
        if not wait(future, stop=stop, poll=poll):
            raise Abandoned
        return future.result()

    def close(self) -> None:
        """Ends the thread after the calls queued so far; does not wait for it."""
        self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, function, args = item
            self.busy = True
            result, error = None, None
            try:
                result = function(*args)
            except BaseException as caught:  # the caller raises it again
                error = caught
            self.busy = False
            future.set_exception(error) if error is not None else future.set_result(result)
            # A kept reference would hold device buffers and batches until the next call.
            del item, future, function, args, result, error


def threads_at_work() -> bool:
    """Is a worker thread still inside a call? Then only os._exit ends the process quickly."""
    return any(thread.name.startswith(THREADS) for thread in threading.enumerate())


def wait(
    future: Future[Any],
    *,
    stop: Callable[[], bool] | None = None,
    poll: Callable[[float], None] | None = None,
    interval_s: float = 0.1,
) -> bool:
    """Waits for a future, waking up often enough for signals to be handled.

    Returns True when it is done, False when `stop()` became true first. `poll(seconds waited)` is
    called at every waking.
    """
    waited = 0.0
    while not concurrent.futures.wait([future], timeout=interval_s).done:
        waited += interval_s
        if stop is not None and stop():
            return False
        if poll is not None:
            poll(waited)
    return True
