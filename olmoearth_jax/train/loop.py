"""The training loop: restore or start, then fetch, step, record, evaluate, save, until the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax

from olmoearth_jax.train import checkpoint
from olmoearth_jax.train.checkpoint import Checkpointer, RunInfo, State
from olmoearth_jax.train.metrics import (
    MetricWriter,
    Sink,
    markdown_table,
    parameter_table,
    read_metrics,
)
from olmoearth_jax.train.progress import Recorder, Report
from olmoearth_jax.train.runfolder import RunFolder, RunLock
from olmoearth_jax.train.signals import CancelFlag, Worker, catch_signals, wait

EVALUATED = "eval_time/total"  # its presence in metrics.jsonl says that a step was evaluated
_PATIENCE_S = 30.0  # a step that takes longer than this is announced, once per such span
_CLOSE_S = 2.0  # seconds


class Program(Protocol):
    """The compiled training step (see olmoearth_jax.train.step)."""

    @property
    def compile_count(self) -> int: ...

    def init_state(self) -> State: ...

    def abstract_state(self) -> State: ...

    def step(self, state: State, groups: list[Any], step: int) -> tuple[State, Report]: ...


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


@dataclass(frozen=True)
class LoopConfig:
    """Plain settings of the loop; everything that needs the config tree is decided before."""

    run_dir: Path
    max_steps: int
    hard_stop: int | None = None  # stop here; max_steps stays the horizon
    metrics_collect_interval: int = 10
    cancel_check_interval: int = 25  # accepted for the guide's sake; we look after every step
    save_interval: int = 5000
    ephemeral_save_interval: int | None = 250
    checkpoints: bool = True
    tensorboard: bool = True
    load_strategy: str = "if_available"  # if_available, always, never
    load_path: str | None = None
    allow_dataset_change: bool = False
    allow_config_change: bool = False
    seed: int = 0
    dataset_fingerprint: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    normalization: Mapping[str, Any] = field(default_factory=dict)
    profile_steps: tuple[int, int] | None = None  # first step and number of steps to trace
    sinks: tuple[Sink, ...] = ()

    @property
    def stop_step(self) -> int:
        return min(self.max_steps, self.hard_stop or self.max_steps)


@dataclass(frozen=True)
class Summary:
    """How a run ended: 'completed', 'cancelled' or 'already complete'."""

    status: str
    start_step: int
    step: int
    saved: bool  # the state after `step` is on disk
    seconds: float


def train(
    program: Program,
    stream: Stream,
    config: LoopConfig,
    *,
    evaluation: Evaluation | None = None,
    say: Callable[[str], None] | None = None,
) -> Summary:
    """Trains to `config.stop_step`, continuing what the run folder holds.

    `say` takes the progress lines (default: print, on process 0). Raises ValueError for a
    checkpoint that doesn't fit, RunFolderInUse, TrainingDiverged.
    """
    begun = time.monotonic()
    say = _quiet if jax.process_index() else (say or _say)
    folder = RunFolder(config.run_dir).create()
    with ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(RunLock(folder.lock_file))
        cancel = stack.enter_context(catch_signals())
        device = Worker("device")
        stack.callback(device.close)
        saver = _checkpointer(folder, stream, config)
        stack.callback(saver.close)

        state, start = device.call(_restore_or_init, program, saver, config, say)
        stop, step = config.stop_step, start
        evaluate = _Evaluate(evaluation, folder, cancel, say)
        owed = evaluate.owed(start)
        if start >= stop and not owed:
            say(f"Training is already complete: step {start} of {stop}.")
            return Summary("already complete", start, start, True, time.monotonic() - begun)
        recorder = _open_recorder(stack, folder, program, config, state, start, say)
        if owed:
            owed = not device.call(evaluate, state, start, recorder)
        batches = stack.enter_context(_Batches(stream, start, stop, cancel))
        trace = stack.enter_context(_Trace(folder, config.profile_steps, start))

        for number in range(start + 1, stop + 1):
            if owed or (groups := batches.next(number)) is None:
                break  # cancelled while evaluating or waiting for data
            trace.before(number)
            state, report = device.call(program.step, state, groups, number, poll=_patience(say))
            step = number
            device.call(recorder.add, step, report, batches.waited)
            trace.after(step, report)
            if step % config.metrics_collect_interval == 0:
                recorder.flush()
            if evaluate.due(step):
                owed = not device.call(evaluate, state, step, recorder)
            if config.checkpoints and saver.due(step):
                device.call(_save, saver, recorder, step, state)
            if cancel.agreed(step):
                break

        device.call(recorder.drain)
        recorder.flush()
        saved = config.checkpoints and device.call(_save, saver, recorder, step, state, True)
        status = "cancelled" if step < stop or owed else "completed"
        say(_last_words(status, step, stop, saved, cancel, saver))
        return Summary(status, start, step, saved, time.monotonic() - begun)


def _restore_or_init(
    program: Program, saver: Checkpointer, config: LoopConfig, say: Callable[[str], None]
) -> tuple[State, int]:
    """State, and the number of steps it has behind it."""
    abstract = program.abstract_state()
    found = None
    if config.load_strategy != "never":
        found = saver.restore_latest(
            abstract,
            allow_dataset_change=config.allow_dataset_change,
            allow_config_change=config.allow_config_change,
        )
    elif saver.latest_complete() is not None:
        raise ValueError(
            f"{saver.folder} already holds checkpoints, and trainer.load_strategy=never would "
            "mix a second run into them. Choose another --run_name."
        )
    if found is not None:
        state, meta = found
        if config.load_path:
            say("trainer.load_path is ignored: the run folder holds a checkpoint of its own.")
        say(f"Resuming after step {meta['step']} from {saver.folder}.")
        return state, int(meta["step"])
    if config.checkpoints:
        saver.check_space(abstract, config.stop_step)
    if config.load_path:
        source = checkpoint.find_checkpoint(config.load_path)
        say(f"Starting at step 0 from the parameters and optimizer state of {source}.")
        return checkpoint.restore_as_start(source, abstract), 0
    if config.load_strategy == "always":
        raise ValueError(
            f"trainer.load_strategy=always, but neither {saver.folder} nor trainer.load_path "
            "holds a checkpoint."
        )
    return program.init_state(), 0


def _save(
    saver: Checkpointer, recorder: Recorder, step: int, state: State, and_wait: bool = False
) -> bool:
    # All lines up to this step must be in metrics.jsonl before a checkpoint says that they are.
    begun = time.perf_counter()
    recorder.drain()
    recorder.flush()
    saved = saver.save(step, state)
    recorder.add_checkpoint_time(time.perf_counter() - begun)
    return saver.wait() and saved if and_wait else saved


class _Batches:
    """Reads one step ahead in a thread, and measures how long training had to wait."""

    def __init__(self, stream: Stream, start: int, stop: int, cancel: CancelFlag) -> None:
        self._iterator = stream.batches(start, stop)
        self._worker = Worker("data")
        self._cancel = cancel
        self._next = self._worker.submit(self._read)
        self.waited = 0.0

    def __enter__(self) -> _Batches:
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
        if not wait(self._next, stop=self._cancel.stop_now):
            return None
        groups = self._next.result()
        self.waited = time.perf_counter() - begun
        if groups is None:
            raise RuntimeError(f"The data ended before step {step}.")
        self._next = self._worker.submit(self._read)
        return groups

    def _read(self) -> list[Any] | None:
        return next(self._iterator, None)


class _Evaluate:
    """Runs the evaluation and records its values; False if a signal stopped it."""

    def __init__(
        self,
        evaluation: Evaluation | None,
        folder: RunFolder,
        cancel: CancelFlag,
        say: Callable[[str], None],
    ) -> None:
        self._evaluation = evaluation
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
        return not any(r["step"] == start and EVALUATED in r for r in records)

    def __call__(self, state: State, step: int, recorder: Recorder) -> bool:
        if self._evaluation is None:
            return True
        recorder.drain()
        recorder.flush()
        begun = time.perf_counter()
        values = self._evaluation(state, step, self._cancel.stop_now)
        if values is None:
            return False
        recorder.write(step, {**values, EVALUATED: time.perf_counter() - begun})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._say(f"step {step} evaluation: {shown}")
        return True


class _Trace:
    """Profiler trace of a few steps, under <run folder>/profile."""

    def __init__(self, folder: RunFolder, steps: tuple[int, int] | None, start: int) -> None:
        first, count = steps or (0, 0)
        self._range = range(max(first, start + 1), first + count) if steps else range(0)
        self._folder = folder.root / "profile"
        self._on = False

    def __enter__(self) -> _Trace:
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


def _checkpointer(folder: RunFolder, stream: Stream, config: LoopConfig) -> Checkpointer:
    info = RunInfo(
        config=config.config,
        normalization=config.normalization,
        dataset_fingerprint=config.dataset_fingerprint,
        seed=config.seed,
        steps_per_epoch=max(stream.steps_per_epoch, 1),
    )
    return Checkpointer(
        folder.checkpoints,
        info,
        save_interval=config.save_interval,
        ephemeral_interval=config.ephemeral_save_interval,
    )


def _open_recorder(
    stack: ExitStack,
    folder: RunFolder,
    program: Program,
    config: LoopConfig,
    state: State,
    start: int,
    say: Callable[[str], None],
) -> Recorder:
    """Opens the writer and describes the run: config.json, config and parameters as text."""
    writer = MetricWriter(
        folder, start_step=start, tensorboard=config.tensorboard, sinks=config.sinks
    )
    stack.callback(writer.close)
    if jax.process_index() == 0:
        folder.write_config(dict(config.config))
        lines = folder.config.read_text(encoding="utf-8").splitlines()
        writer.text("config", "\n".join("    " + line for line in lines), start)
        rows = parameter_table(state["params"], norms=False)
        writer.text("parameters", markdown_table(rows), start)
        writer.flush()
        say(
            f"Training {sum(row[3] for row in rows):,} parameters from step {start} to "
            f"{config.stop_step} on {jax.device_count()} {jax.devices()[0].device_kind} "
            f"device(s), {jax.process_count()} process(es); run folder {folder.root}"
        )
    recorder = Recorder(
        writer, last_step=config.stop_step, compile_count=lambda: program.compile_count, say=say
    )
    stack.callback(recorder.flush)  # after an error: what is finished is still written
    return recorder


def _patience(say: Callable[[str], None]) -> Callable[[float], None]:
    """Tells, now and then, that a long step is still at work."""
    told = 0.0

    def poll(waited: float) -> None:
        nonlocal told
        if waited - told >= _PATIENCE_S:
            told = waited
            say(f"... this step has taken {waited:.0f} s so far (new shapes are compiled once)")

    return poll


def _last_words(
    status: str, step: int, stop: int, saved: bool, cancel: CancelFlag, saver: Checkpointer
) -> str:
    where = f"saved in {saver.folder}" if saved else "NOT saved"
    if status == "completed":
        return f"Training completed: {step} steps, {where}."
    reason = cancel.reason or "request"
    return f"Stopped by {reason} after step {step} of {stop}, {where}. Run it again to go on."


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def _say(line: str) -> None:
    print(line, flush=True)


def _quiet(line: str) -> None:
    del line
