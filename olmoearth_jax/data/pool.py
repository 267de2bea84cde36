"""Runs independent tasks in worker processes, with bounded memory.

Each process has a pipe of its own. The pools of the standard library give all of them one, and wait
for ever when a process is killed (by the kernel, for memory) while it sends a large result: the
others hold that pipe open, so its end is never seen.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
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
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        self._processes: list[_Process] = []
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            for process in self._processes:
                process.end()
            self._threads, self._processes, self._idle = None, [], queue.SimpleQueue()

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
        if self._threads is None:
            with _no_program() if self._apart else contextlib.nullcontext():
                for _ in range(self._count):
                    self._processes.append(_Process())
            for process in self._processes:
                self._idle.put(process)
            self._threads = concurrent.futures.ThreadPoolExecutor(self._count)
        return self._threads.submit(self._call, function, task)

    def _call(self, function: Callable[[Any], Any], task: Any) -> Any:
        process = self._idle.get()
        try:
            return process.call(function, task)
        finally:
            self._idle.put(process)

    @contextlib.contextmanager
    def _ending(self, running: Iterable[concurrent.futures.Future]) -> Iterator[None]:
        """Sees to the end of what runs, and of all processes once one has died."""
        try:
            yield
        except WorkerDied:
            for process in self._processes:
                process.kill()
            raise
        finally:
            # What has begun ends before the caller goes on, as it may remove what that writes.
            concurrent.futures.wait([f for f in running if not f.cancel()])
            if any(process.died for process in self._processes):
                self.__exit__()


class _Process:
    """A process that works off one task at a time."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        # A daemon: Python would wait at its end for a process that waits for a task.
        self._process = context.Process(
            target=_serve, args=(far, registry.user_records()), daemon=True
        )
        self._process.start()
        far.close()  # else the end of the process would not end the pipe
        self.died = False

    def call(self, function: Callable[[Any], Any], task: Any) -> Any:
        """The task's result; raises what the task raises, or WorkerDied."""
        given = pickle.dumps((function, task))
        try:
            self._pipe.send_bytes(given)
            answer = self._pipe.recv_bytes()
        except (EOFError, OSError) as e:
            self.died = True
            raise WorkerDied(
                "a worker process was killed, perhaps for lack of memory; use fewer workers and "
                "run the same command again, it goes on where it stopped"
            ) from e
        result, error = pickle.loads(answer)
        if error is not None:
            raise error
        return result

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Works off the tasks that come through the pipe until it ends."""
    start_worker(records)
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send_bytes(_answer(pipe.recv_bytes()))


def _answer(given: bytes) -> bytes:
    """The pickled pair of a task's result and its error, one of them None."""
    try:
        function, task = pickle.loads(given)
        return pickle.dumps((function(task), None), protocol=pickle.HIGHEST_PROTOCOL)
    except BaseException as e:
        e.add_note("in a worker process:\n" + traceback.format_exc())
        try:
            answer = pickle.dumps((None, e))
            pickle.loads(answer)
            return answer
        except Exception:  # an error of a library that cannot travel
            return pickle.dumps((None, RuntimeError(f"{type(e).__name__}: {e}")))


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
