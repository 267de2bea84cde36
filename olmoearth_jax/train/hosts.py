"""What the processes of a run agree on: the next capacity, and when to stop.

Every process goes through the same sequence of agreements, each on one small integer.
They use the key-value store of JAX's coordination service, so no device is involved. A process
that was told to stop answers its next agreement with STOP: then none gets past it, and all stand
after the same step with a state that can be saved. (JAX's own preemption sync point agrees on a
step to come. A process that waits for data, or compiles, can't promise to reach it.)
"""

from __future__ import annotations

import faulthandler
import functools
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax

from olmoearth_jax.platforms import HostMissing

_TIMEOUT_S = 1800.0
EVALUATING = "evaluating"  # for as long as it takes
COMPILING = "compiling for"
_COMPILING_TAKES = 4  # times as long as any other step, where only some have compiled before
_STOP = "stop"
_SLICE_S = 2.0  # one wait in the store; between two of them we look at what the other one does
_HEAR_S = 1.0
_TELL_S = 3.0  # for the other processes to write their stacks too, before the first one ends


class StopAgreed(Exception):
    """Some process was told to stop; no process takes the step that was about to begin."""


class Hosts:
    """This process among those of the run.

    Attributes:
      timeout_s: seconds after which a process that keeps others waiting counts as hung.
      committed: the step at work has passed its last agreement, so it will be finished.
    """

    def __init__(self, client: Any = None, index: int = 0, count: int = 1):
        self._client, self.index, self.count = client, index, count
        self.timeout_s = _TIMEOUT_S
        self.committed = False
        self._lock = threading.Lock()
        self._calls = 0
        self._refused: int | None = None  # the agreement that we have answered with STOP
        self._heard, self._listened, self._looked = False, 0.0, 0.0
        self._gives_up = False

    def agree(
        self, value: int = 0, last: bool = False, join: Callable[[Sequence[int]], int] = max
    ) -> int:
        """One value of all processes, which must call this equally often.

        Args:
          value: of this process; not negative.
          last: nothing can stop the step at work after this.
          join: makes one of all values; the largest by default.

        Raises:
          StopAgreed: some process refused.
          HostMissing: some process has not come here within `timeout_s`.
        """
        with self._lock:
            self._calls += 1
            call, refused = self._calls, self._refused is not None
            if not refused:
                self._publish(call, str(value))
                self.committed = last
        if refused:
            raise StopAgreed
        answers = [self._answer(call, i) for i in range(self.count) if i != self.index]
        if _STOP in answers:
            self.committed = False
            raise StopAgreed
        if call > 2 and self._client is not None:  # all have read what is two calls old
            self._client.key_value_delete(f"agree/{call - 2}/{self.index}")
        return join([value, *map(int, answers)])

    def refuse(self) -> None:
        """Answers the next agreement with STOP, at once, whenever this process comes to it."""
        with self._lock:
            if self._refused is None:
                self._refused = self._calls + 1
                self._publish(self._refused, _STOP)
                if self._client is not None:
                    self._client.key_value_set("stopping", str(self.index), allow_overwrite=True)

    def heard(self) -> bool:
        """Whether any process refuses to go on."""
        if self._refused is not None or self._client is None or self._heard:
            return self._refused is not None or self._heard
        if time.monotonic() - self._listened >= _HEAR_S:
            self._listened = time.monotonic()
            self._heard = self._look("stopping") is not None
        return self._heard

    def says(self, what: str) -> None:
        """Tells the others what this process is doing, for their error messages."""
        if self._client is not None:
            self._client.key_value_set(f"doing/{self.index}", what, allow_overwrite=True)

    def check(self, waited_s: float) -> None:
        """Raises HostMissing if a step that all take together has lasted for `timeout_s`.

        Also if another process has given up waiting: all write where they are (`listen`).
        """
        self.listen(waited_s)
        if self.count > 1 and waited_s > self.timeout_s and not self._gives_up:
            mine = self._look(f"doing/{self.index}") or ""
            if mine.startswith(COMPILING) and waited_s < _COMPILING_TAKES * self.timeout_s:
                return
            others = [i for i in range(self.count) if self._look(f"doing/{i}") != mine]
            raise HostMissing(self._blame(others or list(range(self.count)), waited_s))

    def listen(self, waited_s: float) -> None:
        """Raises HostMissing if another process has given up waiting; asks about once a second."""
        if self.count < 2 or waited_s < _HEAR_S or time.monotonic() - self._looked < _HEAR_S:
            return
        if self._gives_up:
            return  # another of our threads is about to raise it
        self._looked = time.monotonic()
        told = self._look("hung")
        if told is not None:
            raise HostMissing(self._blame([int(told)], waited_s))

    def _publish(self, call: int, answer: str) -> None:
        if self._client is not None:
            self._client.key_value_set(f"agree/{call}/{self.index}", answer)

    def _answer(self, call: int, other: int) -> str:
        begun = time.monotonic()
        while True:
            try:
                wait_ms = int(1000 * min(_SLICE_S, self.timeout_s))
                return self._client.blocking_key_value_get(f"agree/{call}/{other}", wait_ms)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise HostMissing(
                        f"Lost the connection to process 0 while waiting for process {other}: "
                        f"{str(error).splitlines()[0][:200]}"
                    ) from error
            doing = self._look(f"doing/{other}") or ""
            limit = self.timeout_s * (_COMPILING_TAKES if doing.startswith(COMPILING) else 1)
            if doing == EVALUATING:
                begun = time.monotonic()
            elif time.monotonic() - begun > limit:
                raise HostMissing(self._blame([other], time.monotonic() - begun))

    def _look(self, key: str) -> str | None:
        try:
            return self._client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError:
            return None  # not there

    def _blame(self, culprits: list[int], waited_s: float) -> str:
        found = "; ".join(
            f"process {i}: {self._look(f'doing/{i}') or 'starting'}" for i in culprits
        )
        here, self._gives_up = waits_in(), True
        self._tell_of_hang()
        return (
            f"Waited {waited_s:.0f} s for {found}. This process waits in {here}. A process that "
            "hangs holds up all others, so the run ends; start it again to go on from its newest "
            "checkpoint. Raise --config.trainer.host_timeout_s if it was only slow."
        )

    def _tell_of_hang(self) -> None:
        """Writes the stacks of this process, and has the others write theirs."""
        try:
            sys.stderr.write(f"Stacks of process {self.index}, which waits for others:\n")
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.stderr)
        except (OSError, ValueError, AttributeError):
            pass  # a closed or replaced stderr
        if self._client is None or self._look("hung") is not None:
            return
        try:
            self._client.key_value_set("hung", str(self.index), allow_overwrite=True)
        except jax.errors.JaxRuntimeError:
            return  # process 0 is gone
        time.sleep(_TELL_S)


def waits_in() -> str:
    """Where the thread that talks to the device stands: the innermost of our functions in it."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if not thread.name.endswith("-device") or thread.ident not in frames:
            continue
        for frame in reversed(traceback.extract_stack(frames[thread.ident])):
            path = frame.filename.replace("\\", "/")
            if "olmoearth_jax" in path and not path.endswith("/signals.py"):
                place = path[path.rindex("olmoearth_jax") :]
                return f"{frame.name} ({place}:{frame.lineno}: {frame.line})"
    return "no step"


def current() -> Hosts:
    """The one of this process: among several, always the same; alone, a fresh one."""
    return _connected() if jax.process_count() > 1 else Hosts()


@functools.cache
def _connected() -> Hosts:
    from jax._src import distributed  # the key-value client has no public name

    return Hosts(distributed.global_state.client, jax.process_index(), jax.process_count())
