"""What the training loop is made of: its partners' interfaces, and its longer phases."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import jax

from olmoearth_jax.checkpoints.checkpoint import State
from olmoearth_jax.checkpoints.kept import Kept
from olmoearth_jax.config import ProfileConfig, TensorBoardConfig
from olmoearth_jax.train.hosts import COMPILING, EVALUATING, StopAgreed
from olmoearth_jax.train.metrics import read_metrics
from olmoearth_jax.train.progress import VAL_LOSS, Recorder, Report
from olmoearth_jax.train.runfolder import RunFolder
from olmoearth_jax.train.signals import CancelFlag, Worker, wait

_EVALUATED = "eval_time/total"  # its presence in metrics.jsonl says that a step was evaluated
_PATIENCE_S = 30.0  # a step that takes longer than this is announced, once per such span
_CLOSE_S = 2.0  # seconds


class Program(Protocol):
    """The compiled training step (see olmoearth_jax.train.step)."""

    @property
    def compile_count(self) -> int: ...

    def init_state(self) -> State: ...

    def abstract_state(self) -> State: ...

    def step(
        self, state: State, groups: list[Any], step: int, gate: Callable[[], None]
    ) -> tuple[State, Report]: ...


class Stream(Protocol):
    """The data: one list of groups per step, from step `start_step` + 1 to `stop_step`."""

    @property
    def steps_per_epoch(self) -> int: ...

    def batches(self, start_step: int, stop_step: int) -> Iterator[list[Any]]: ...


class Evaluation(Protocol):
    """Evaluates during training."""

    def due(self, step: int) -> bool:
        """Is there anything to evaluate after this step?"""
        ...

    def __call__(
        self, state: State, step: int, stop: Callable[[], bool]
    ) -> Mapping[str, float] | None:
        """Values to record, or None if it gave up because `stop()` became true."""
        ...


class Batches:
    """Reads one step ahead in a thread, and measures how long training had to wait."""

    def __init__(self, stream: Stream, start: int, stop: int, cancel: CancelFlag) -> None:
        self._iterator = stream.batches(start, stop)
        self._worker = Worker("data")
        self._cancel = cancel
        self._next = self._worker.submit(self._read)
        self.waited = 0.0

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exc: object) -> None:
        # Closing ends the reader processes. It is queued behind a read that may be stuck, so we
        # don't wait for it for long.
        closed = self._worker.submit(getattr(self._iterator, "close", lambda: None))
        wait(closed, stop=_after(_CLOSE_S))
        self._worker.close()

    def next(self, step: int) -> list[Any] | None:
        """The groups of a step; None if the run was cancelled while waiting for them."""
        begun = time.perf_counter()
        self._cancel.hosts.says(f"reading the data of step {step}")
        if not wait(self._next, stop=self._cancel.told, poll=self._cancel.hosts.listen):
            return None
        groups = self._next.result()
        self.waited = time.perf_counter() - begun
        if groups is None:
            raise RuntimeError(f"The data ended before step {step}.")
        self._next = self._worker.submit(self._read)
        return groups

    def _read(self) -> list[Any] | None:
        return next(self._iterator, None)


class Best:
    """The step of the lowest validation loss so far, whose checkpoint is kept."""

    def __init__(self, kept: Kept, wanted: bool) -> None:
        self._kept = kept
        self._wanted = wanted
        self.step: int | None = None
        self.loss = math.inf
        self._before: tuple[int | None, float] = (None, math.inf)
        self._others: frozenset[int] = frozenset()

    def better(self, step: int, values: Mapping[str, Any]) -> bool:
        """Takes the values of an evaluation; whether they are the best so far."""
        loss = values.get(VAL_LOSS, math.inf)
        if not self._wanted or not loss < self.loss:
            return False
        self._before = (self.step, self.loss)
        self._kept.before = self.step
        self.step, self.loss = step, float(loss)
        self._kept.step = step
        return True

    def hold(self, steps: Collection[int]) -> None:
        """Goes back to the one before if there is no checkpoint of the best: its save failed."""
        if self.step is not None and self.step not in steps:
            self.step, self.loss = self._before
            self._before = (None, math.inf)
            self._kept.step, self._kept.before = self.step, None

    def record(self) -> dict[str, Any]:
        """What a checkpoint's meta record says of it."""
        said: dict[str, Any] = {"other_best": sorted(self._others)} if self._others else {}
        return (
            said if self.step is None else said | {"best": {"step": self.step, VAL_LOSS: self.loss}}
        )

    def restore(self, meta: Mapping[str, Any], changed: Collection[str] = ()) -> str | None:
        """Takes over what a checkpoint says.

        Args:
          changed: what makes a loss of now another than that of then; the best step's checkpoint
            stays then, but its loss is compared with no later one.

        Returns:
          a sentence for the user, if there is something to say.
        """
        self._others = frozenset(meta.get("other_best", ()))
        found, told = meta.get("best"), None
        if isinstance(found, Mapping) and self._wanted:
            step = int(found["step"])
            if changed:
                self._others |= {step}
                told = (
                    f"{VAL_LOSS} is measured otherwise now ({'; '.join(changed)}): the lowest so "
                    f"far, of step {step}, is compared with no later one. Its checkpoint stays."
                )
            else:
                self.better(step, found)
        self._kept.earlier |= self._others
        return told


class Evaluate:
    """Runs the evaluation and records its values; False if a signal stopped it."""

    def __init__(
        self,
        evaluation: Evaluation | None,
        folder: RunFolder,
        cancel: CancelFlag,
        say: Callable[[str], None],
        best: Best,
    ) -> None:
        self._evaluation = evaluation
        self._best = best
        self._folder = folder
        self._cancel = cancel
        self._say = say

    def due(self, step: int) -> bool:
        return self._evaluation is not None and self._evaluation.due(step)

    def owed(self, start: int) -> bool:
        """Is the evaluation of the step we start from still missing? (A signal may stop it.)"""
        if not self.due(start):
            return False
        records = read_metrics(self._folder.metrics) if self._folder.metrics.exists() else []
        return not any(r["step"] == start and _EVALUATED in r for r in records)

    def __call__(self, state: State, step: int, recorder: Recorder) -> bool:
        if self._evaluation is None:
            return True
        recorder.drain()
        recorder.flush()
        self._cancel.hosts.says(EVALUATING)
        begun = time.perf_counter()
        try:
            values = self._evaluation(state, step, self._cancel.heard)
        except StopAgreed:
            values = None
        if values is None:
            return False
        recorder.write(step, {**values, _EVALUATED: time.perf_counter() - begun})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._say(f"step {step} evaluation: {shown}")
        if self._best.better(step, values):
            self._say(f"step {step} has the lowest {VAL_LOSS} so far; its checkpoint is kept.")
        return True


class Shown:
    """Pictures of the parameters: before the first step, at intervals, and after the last."""

    def __init__(self, draw: Any, board: TensorBoardConfig, stop: int) -> None:
        self._draw = draw if board.image_interval else None
        self._interval, self._stop = board.image_interval or 1, stop

    def __call__(
        self, step: int, state: State, recorder: Recorder, device: Worker, cancel: CancelFlag
    ) -> None:
        """Draws after a step, if it is time."""
        if self._draw is not None and (step % self._interval == 0 or step == self._stop):
            device.call(recorder.images, step, self._draw, state, poll=cancel.poll)

    def before(
        self, start: int, state: State, recorder: Recorder, device: Worker, cancel: CancelFlag
    ) -> None:
        """Draws before the first step of a run."""
        if start == 0:
            self(0, state, recorder, device, cancel)


class Trace:
    """Profiler trace of a few steps, under <run folder>/profile."""

    def __init__(self, folder: RunFolder, settings: ProfileConfig, start: int) -> None:
        first = settings.start_step
        steps = range(max(first, start + 1), first + settings.num_steps)
        self._range = steps if settings.enabled else range(0)
        self._folder = folder.root / "profile"
        self._on = False

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        if len(self._range) and step == self._range[0]:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, report: Report) -> None:
        if self._on and step == self._range[-1]:
            jax.block_until_ready(report.metrics)
            self.__exit__()


class StepTaker:
    """Takes a step in the device's thread, and knows what a signal may interrupt.

    A step that compiles can take longer than the grace that schedulers grant after SIGTERM. Until
    its gate has let it pass, the state before it is whole, and can be saved.
    """

    def __init__(
        self,
        program: Program,
        device: Worker,
        cancel: CancelFlag,
        say: Callable[[str], None],
        grace_s: float,
    ) -> None:
        self._program = program
        self._device = device
        self._cancel = cancel
        self._hosts = cancel.hosts
        self._say = say
        self._grace_s = grace_s
        self._compiled = False

    def __call__(
        self, state: State, groups: list[Any], number: int, nothing_to_lose: bool
    ) -> tuple[State, Report]:
        """State and report after step `number`.

        `nothing_to_lose`: no work is saved by waiting for a step that is being compiled. Raises
        StopAgreed if it was not taken, because some process was told to stop.
        """
        doing = f"step {number}"
        self._hosts.says(doing if self._compiled else f"{COMPILING} {doing}")
        self._hosts.committed = False
        future = self._device.submit(self._program.step, state, groups, number, self._gate)
        give_up = self._over_grace(0.0 if nothing_to_lose else self._grace_s)
        if not wait(future, stop=give_up, poll=self._patience(doing)):
            raise StopAgreed
        self._compiled = True
        return future.result()

    def _gate(self) -> None:
        self._hosts.agree(last=True)

    def _patience(self, doing: str) -> Callable[[float], None]:
        """Tells, now and then, that a long step is still at work, and ends one that hangs."""
        told, said = 0.0, not self._compiled

        def poll(waited: float) -> None:
            nonlocal told, said
            # A program that does not tell may compile in its first step.
            compiles = bool(getattr(self._program, "compiling", not self._compiled))
            if compiles != said:
                said = compiles
                self._hosts.says(f"{COMPILING} {doing}" if compiles else doing)
            self._hosts.check(waited)
            if waited - told >= _PATIENCE_S:
                told = waited
                why = " (new shapes are compiled once)" if compiles else ""
                self._say(f"... this step has taken {waited:.0f} s so far{why}")

        return poll

    def _over_grace(self, grace_s: float) -> Callable[[], bool]:
        since: list[float] = []

        def over() -> bool:
            if self._cancel.told() and not since:
                since.append(time.monotonic())
            # A refused step never commits, so what we see here stays true.
            late = bool(since) and time.monotonic() - since[0] >= grace_s
            return late and not self._hosts.committed

        return over


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end
