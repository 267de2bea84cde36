"""Compiled programs: each once, several at a time, some of them behind the training."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from olmoearth_jax.train.signals import THREADS

_log = logging.getLogger(__name__)

Job = Callable[[], Any]
"""Asks for a program, which compiles it."""


def compile_threads() -> int:
    """Programs compiled at a time: XLA keeps about two of this process's cores busy with one."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min(8, cores // 2))


def give_back() -> None:
    """Returns freed memory to the system: glibc keeps most of what a compilation has needed."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def shapes_of(tree: Any) -> Any:
    """Shapes, types and shardings of arrays: what can be compiled for once they are given away."""

    def shape(x: Any) -> Any:
        # Random keys stay: they are small, on no device in particular, and never given away.
        if not isinstance(x, jax.Array) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if x.committed else x

    return jax.tree.map(shape, tree)


class Programs:
    """Compiled programs by name.

    Args:
      on_compile: told the name of a program and the seconds it took to compile.
      options: XLA's options by name, beside those of XLA_FLAGS.
    """

    def __init__(
        self,
        on_compile: Callable[[str, float], None] | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        self.on_compile = on_compile
        self.options = dict(options or {}) or None
        self.count = 0
        """Compiled so far."""
        self.awaited = 0
        """Compilations that somebody waits for now; those behind the training are not counted."""
        self._lock = threading.Lock()
        self._found: dict[Any, Future[Any]] = {}
        self._queue: deque[Job] = deque()
        self._behind: set[threading.Thread] = set()

    def __bool__(self) -> bool:
        return bool(self._found)

    def __contains__(self, name: Any) -> bool:
        return name in self._found

    def __getitem__(self, name: Any) -> Any:
        return self._found[name].result()

    def __setitem__(self, name: Any, program: Any) -> None:
        future: Future[Any] = Future()
        future.set_result(program)
        self._found[name] = future

    def items(self) -> Iterator[tuple[Any, Any]]:
        """(name, program) of those that are ready."""
        for name, future in list(self._found.items()):
            if future.done() and future.exception() is None:
                yield name, future.result()

    def find(self, name: Any) -> Any:
        """The program of that name, awaited if somebody just compiles it; None if nobody does."""
        future = self._found.get(name)
        if future is None or future.done():
            return None if future is None else future.result()
        with self._waiting():
            return future.result()

    def get(
        self,
        name: Any,
        function: Callable[..., Any],
        arguments: tuple,
        donate: Sequence[int] = (),
        out_shardings: Any = None,
    ) -> Any:
        """The program of that name; compiled if nobody has, awaited if somebody just does.

        Args:
          name: of the program.
          function: what is compiled.
          arguments: arrays or their shapes.
          donate: numbers of the arguments that are given away.
          out_shardings: of the results.
        """
        with self._lock:
            future = self._found.get(name)
            if mine := future is None:
                future = self._found[name] = Future()
        if not mine:
            return self.find(name)
        with self._waiting():
            try:
                jitted = jax.jit(function, donate_argnums=donate, out_shardings=out_shardings)
                begun = time.perf_counter()
                future.set_result(jitted.lower(*arguments).compile(self.options))
            except BaseException as error:
                with self._lock:
                    del self._found[name]  # the next who asks tries again
                future.set_exception(error)
                raise
        give_back()
        with self._lock:
            self.count += 1
            if self.on_compile is not None:
                self.on_compile(str(name), time.perf_counter() - begun)
        return future.result()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        change = 0 if threading.current_thread() in self._behind else 1
        with self._lock:
            self.awaited += change
        try:
            yield
        finally:
            with self._lock:
                self.awaited -= change

    def all(self, jobs: Sequence[Job], beside: Job = lambda: None) -> None:
        """Does jobs, as many at a time as the cores allow, and one in the caller's thread."""
        with ThreadPoolExecutor(compile_threads(), thread_name_prefix=THREADS) as pool:
            waiting = [pool.submit(job) for job in jobs]
            beside()
            for one in waiting:
                one.result()

    def behind(self, jobs: Sequence[Job]) -> None:
        """Does jobs, first ones first, while the caller goes on.

        What fails is said and tried again by whoever needs it.
        """
        self._queue.extend(jobs)
        for _ in range(min(compile_threads(), len(jobs))):
            # Not daemons: a process that ends while XLA is at work in one of them may crash.
            thread = threading.Thread(target=self._work, name=THREADS + "compile")
            self._behind.add(thread)
            thread.start()

    def _work(self) -> None:
        while threading.main_thread().is_alive():  # else only what is at work delays the end
            try:
                job = self._queue.popleft()
            except IndexError:
                return
            try:
                job()
            except Exception as error:
                _log.warning("a step program was not compiled ahead: %s", error)
            del job  # it holds a batch

    def close(self) -> None:
        """Forgets the jobs behind that have not begun."""
        self._queue.clear()

    def join(self) -> None:
        """Waits until nothing is compiled behind any more."""
        for thread in list(self._behind):
            thread.join()

    def memory(self) -> list[str]:
        """A line per program: what it needs of a device's memory, largest first."""
        found = []
        for name, program in self.items():
            analysis = getattr(program, "memory_analysis", lambda: None)()
            if analysis is None:
                continue
            kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
            kept -= analysis.alias_size_in_bytes
            work = analysis.temp_size_in_bytes
            text = f"{(kept + work) / 2**30:.2f} GiB: {kept / 2**30:.2f} GiB of state and inputs, "
            title = "update" if str(name).startswith("update") else "micro-step"
            found.append((kept + work, f"{text}{work / 2**30:.2f} GiB at work ({title})"))
        return [line for _, line in sorted(found, reverse=True)]
