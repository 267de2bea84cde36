"""Runs independent tasks in worker processes, with bounded memory."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from olmoearth_jax import modalities as registry

_AHEAD = 3
"""Tasks per worker that may wait or be at work at a time."""


class WorkerDied(RuntimeError):
    """A worker process ended without an answer."""


class Workers:
    """Worker processes for several lists of tasks; a context that ends them.

    Args:
      count: processes, started when there is work for them; 0 runs in this process, in order.
      apart: they do not import the program that started them, which may bring much; its own
        functions are no tasks then.
    """

    def __init__(self, count: int, apart: bool = False):
        self._count, self._apart = count, apart
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def run(
        self, function: Callable[[Any], Any], tasks: Iterable[Any]
    ) -> Iterator[tuple[Any, Any]]:
        """As `run_tasks`."""
        if self._count <= 0:
            for task in tasks:
                yield task, function(task)
            return
        running: dict[concurrent.futures.Future, Any] = {}
        source = iter(tasks)
        with self._ending(running):
            while True:
                for task in itertools.islice(source, self._count * _AHEAD - len(running)):
                    running[self._submit(function, task)] = task
                if not running:
                    return
                first = concurrent.futures.FIRST_COMPLETED
                for future in concurrent.futures.wait(running, return_when=first).done:
                    task = running.pop(future)
                    yield task, future.result()

    def in_order(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        """Yields the results in the order of the tasks; at most one per process lies ready.

        Args and raises as `run_tasks`.
        """
        if self._count <= 0:
            yield from map(function, tasks)
            return
        running: collections.deque[concurrent.futures.Future] = collections.deque()
        source = iter(tasks)

        def fill() -> None:
            for task in itertools.islice(source, self._count - len(running)):
                running.append(self._submit(function, task))

        with self._ending(running):
            fill()
            while running:
                got = running.popleft().result()
                fill()
                yield got

    def _submit(self, function: Callable[[Any], Any], task: Any) -> concurrent.futures.Future:
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._count,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=start_worker,
                initargs=(registry.user_records(),),
            )
        with _no_program() if self._apart else contextlib.nullcontext():
            return self._pool.submit(function, task)

    @contextlib.contextmanager
    def _ending(self, running: Iterable[concurrent.futures.Future]) -> Iterator[None]:
        """Sees to the end of what runs, and of a pool that has lost a process."""
        try:
            yield
        except BrokenProcessPool as e:
            self.__exit__()
            raise WorkerDied(
                "a worker process was killed, perhaps for lack of memory; use fewer workers and "
                "run the same command again, it goes on where it stopped"
            ) from e
        finally:
            # What has begun ends before the caller goes on, as it may remove what that writes.
            concurrent.futures.wait([f for f in running if not f.cancel()])


@contextlib.contextmanager
def _no_program() -> Iterator[None]:
    """Processes that are started meanwhile find no program to import."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def run_tasks(
    function: Callable[[Any], Any], tasks: Iterable[Any], workers: int
) -> Iterator[tuple[Any, Any]]:
    """Yields (task, function(task)) as the results come, in any order.

    Args:
      function: a function of a module; it and the tasks must be picklable.
      tasks: read only as fast as they are worked off.
      workers: processes; 0 runs in this process, in order.

    Raises:
      WorkerDied: a worker was killed.
      Exception: whatever a task raised; tasks that have not begun are dropped.
    """
    with Workers(workers) as pool:
        yield from pool.run(function, tasks)


def start_worker(records: Mapping[str, Mapping[str, Any]]) -> None:
    """Prepares a worker: the user's modalities, no Ctrl-C, and an end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    registry.register_all(records)
    watch_parent()


def watch_parent() -> None:
    """Ends this process soon after its parent has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def default_workers(reserved: int = 1) -> int:
    """Worker processes for this machine: its cores less the reserved ones, at least 1."""
    return max(1, (os.cpu_count() or 1) - reserved)
