"""The training loop: restore or start, then fetch, step, record, evaluate, save, until the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import jax

from olmoearth_jax.checkpoints import checkpoint, integrity
from olmoearth_jax.checkpoints.checkpoint import Checkpointer, RunInfo, State
from olmoearth_jax.checkpoints.folders import complete_steps
from olmoearth_jax.config import Duration, ExperimentConfig, TrainerConfig
from olmoearth_jax.train import cards, hosts, partial
from olmoearth_jax.train.hosts import StopAgreed
from olmoearth_jax.train.loop_parts import (
    Batches,
    Best,
    Evaluate,
    Evaluation,
    Program,
    Shown,
    StepTaker,
    Stream,
    Trace,
)
from olmoearth_jax.train.metrics import (
    MetricWriter,
    Sink,
    markdown_table,
    parameter_table,
)
from olmoearth_jax.train.progress import Recorder
from olmoearth_jax.train.runfolder import RunFolder, RunLock
from olmoearth_jax.train.signals import CancelFlag, Worker, catch_signals


@dataclass(frozen=True)
class Extras:
    """What a run shows and measures besides training."""

    evaluation: Evaluation | None = None
    pictures: Callable[[Any], Mapping[str, Any]] | None = None  # of the parameters
    texts: Mapping[str, str] = field(default_factory=dict)  # more to say about the run
    sinks: tuple[Callable[[], Sink], ...] = ()  # opened once the run folder is locked
    say: Callable[[str], None] | None = None  # takes progress lines; None: prints, on process 0
    cancel_grace_s: float = 10.0  # a signal waits so long for a step before saving without it


def max_steps(duration: Duration, steps_per_epoch: int) -> int:
    """A duration in optimiser steps."""
    return duration.value if duration.unit == "steps" else duration.value * steps_per_epoch


def stop_step(trainer: TrainerConfig, steps_per_epoch: int) -> int:
    """The step at which a run ends: hard_stop, if that comes first."""
    durations = (d for d in (trainer.max_duration, trainer.hard_stop) if d is not None)
    return min(max_steps(duration, steps_per_epoch) for duration in durations)


@dataclass(frozen=True)
class _Run:
    """What every part of a run needs to know."""

    config: ExperimentConfig
    info: RunInfo
    extras: Extras
    folder: RunFolder
    stop: int  # the last step: hard_stop, or the end of the run
    say: Callable[[str], None]

    @property
    def trainer(self) -> TrainerConfig:
        return self.config.trainer

    @property
    def saves(self) -> bool:
        """Are checkpoints to be written?"""
        return self.trainer.saves


@dataclass(frozen=True)
class Summary:
    """How a run ended: 'completed', 'ended' by its evaluation, 'cancelled', 'already complete'."""

    status: str
    start_step: int
    step: int
    saved: bool  # the state after `step` is on disk
    seconds: float


def train(
    program: Program,
    stream: Stream,
    config: ExperimentConfig,
    info: RunInfo,
    extras: Extras,
) -> Summary:
    """Trains for `config.trainer.max_duration`, continuing what the run folder holds.

    `info` goes into config.json and into every checkpoint. Raises ValueError for a
    checkpoint that doesn't fit, RunFolderInUse, RunFolderLost, TrainingDiverged, HostMissing; and
    `signals.Abandoned` when a signal came before the first step could begin.
    """
    begun, evaluation = time.monotonic(), extras.evaluation
    run = _begin(config, info, extras, stream.steps_per_epoch)
    with ExitStack() as stack:
        cancel, device, guard = _occupy(stack, run)
        saver = stack.enter_context(_checkpointer(run))
        best = Best(saver.kept, run.saves and run.trainer.callbacks.validation.keep_best)
        start_up = (_restore_or_init, program, saver, run, best)
        state, start = device.call(*start_up, stop=cancel.told_alone, poll=cancel.poll)
        stop, step = run.stop, start
        evaluate = Evaluate(evaluation, run.folder, cancel, run.say, best)
        owed = evaluate.owed(start)
        if start >= stop and not owed:
            run.say(f"Training is already complete: step {start} of {stop}.")
            return Summary("already complete", start, start, True, time.monotonic() - begun)
        writer = _open_writer(stack, run, state, start)
        recorder = _open_recorder(stack, run, writer, program, guard)
        owed = owed and not device.call(evaluate, state, start, recorder)
        stack.callback(getattr(program, "close", _unguarded))
        batches = stack.enter_context(Batches(stream, start, stop, cancel))
        keeping = _Keeping(saver, recorder, best)
        show = Shown(extras.pictures, config.trainer.callbacks.tensorboard, stop)
        show.before(start, state, recorder, device, cancel)
        take_step = StepTaker(program, device, cancel, run.say, extras.cancel_grace_s)
        trace = stack.enter_context(Trace(run.folder, config.trainer.profile, start))
        for number in range(start + 1, stop + 1):
            if owed or _ends(evaluation) or (groups := batches.next(number)) is None:
                break  # told to stop while evaluating or waiting for data
            trace.before(number)
            try:
                state, report = take_step(state, groups, number, step in (0, saver.on_disk))
            except StopAgreed:
                break
            step = number
            device.call(recorder.add, step, report, batches.waited, poll=cancel.poll)
            trace.after(step, report)
            show(step, state, recorder, device, cancel)
            if evaluate.due(step):
                owed = not device.call(evaluate, state, step, recorder)
            if run.saves and (saver.due(step) or best.step == step):
                device.call(keeping.save, step, state, poll=cancel.poll)
            if cancel.told():
                break

        saved = keeping.finish(_idle(stack, device), step, state if run.saves else None)
        how = _status(step < stop, owed, evaluation)
        done = Summary(how, start, step, saved, time.monotonic() - begun)
        return _told(run, done, cancel, saver)


def _status(early: bool, owed: bool, evaluation: Evaluation | None) -> str:
    """How a run ended; `owed`: before an evaluation was done."""
    if early and not owed and _ends(evaluation):
        return "ended"
    return "cancelled" if early or owed else "completed"


def _ends(evaluation: Evaluation | None) -> bool:
    """Whether the evaluation that there was is all that was wanted."""
    return bool(getattr(evaluation, "cancel", False))


def _begin(config: ExperimentConfig, info: RunInfo, extras: Extras, steps_per_epoch: int) -> _Run:
    stop = stop_step(config.trainer, steps_per_epoch)
    say = _quiet if jax.process_index() else (extras.say or _say)
    return _Run(config, info, extras, RunFolder(config.run_folder).create(), stop, say)


def _note_loaded(info: RunInfo, report: Mapping[str, Any] | None) -> None:
    """Keeps in config.json, and in every checkpoint, which parameters came from another run."""
    trainer = info.config.get("trainer")
    if report and isinstance(trainer, dict):
        trainer["loaded"] = dict(report)


@dataclass(frozen=True)
class _Keeping:
    """Saves states, with the metrics before them and the note of the best step."""

    saver: Checkpointer
    recorder: Recorder
    best: Best

    def save(self, step: int, state: State, and_wait: bool = False) -> bool:
        """Saves in the background; whether that, and the save before, went well so far."""
        begun, saver = time.perf_counter(), self.saver
        # All lines up to this step must be in metrics.jsonl before a checkpoint says they are.
        self.recorder.drain()
        self.recorder.flush()
        self.recorder.guard()
        before = saver.wait()
        self.best.hold({step, *complete_steps(saver.folder)})
        saved = saver.save(step, state, **self.best.record()) and before
        self.recorder.add_checkpoint_time(time.perf_counter() - begun)
        return saver.wait() and saved if and_wait else saved

    def finish(self, device: Worker, step: int, state: State | None) -> bool:
        """Writes all metrics, and the state if there is one to save; whether it is saved."""
        device.call(self.recorder.drain)
        self.recorder.flush()
        return state is not None and device.call(self.save, step, state, True)


def _idle(stack: ExitStack, device: Worker) -> Worker:
    """The thread that talks to the device, or another if nobody waits for its compilation."""
    if device.busy:
        device = Worker("saving")
        stack.callback(device.close)
    return device


def _occupy(stack: ExitStack, run: _Run) -> tuple[CancelFlag, Worker, Callable[[], None]]:
    """Locks the run folder, catches signals, and starts the thread that talks to the device.

    The third value raises RunFolderLost if the folder is not ours any more.
    """
    guard = _unguarded
    if jax.process_index() == 0:
        guard = stack.enter_context(RunLock(run.folder.lock_file)).check
    ours = hosts.current()
    ours.timeout_s = run.trainer.host_timeout_s
    cancel = stack.enter_context(catch_signals(ours))
    device = Worker("device")
    stack.callback(device.close)
    return cancel, device, guard


def _unguarded() -> None:
    """The guard of processes that hold no lock."""


def _restore_or_init(
    program: Program, saver: Checkpointer, run: _Run, best: Best
) -> tuple[State, int]:
    """State, and the number of steps it has behind it."""
    abstract, config, say = program.abstract_state(), run.trainer, run.say
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
        _note_loaded(run.info, meta["config"].get("trainer", {}).get("loaded"))
        if told := best.restore(meta, integrity.loss_differences(meta, run.info)):
            say(told)
        if config.load_path:
            say("trainer.load_path is ignored: the run folder holds a checkpoint of its own.")
        say(f"Resuming after step {meta['step']} from {saver.folder}.")
        return state, int(meta["step"])
    if run.saves:
        saver.check_space(abstract, run.stop)
    if config.load_path and config.load_strategy == "never":
        say("trainer.load_path is ignored: trainer.load_strategy is never.")
    elif config.load_path:
        source, _ = checkpoint.open_whole(config.load_path)
        if config.load_partial:
            state, report = partial.restore(source, abstract, program.init_state)
            _note_loaded(run.info, report)
            say(f"Starting at step 0 from {source}: {partial.told(report)}.")
            return state, 0
        kept = "" if config.load_weights_only else " and optimizer state (if any)"
        say(f"Starting at step 0 from the parameters{kept} of {source}.")
        state = checkpoint.restore_as_start(
            source, abstract, program.init_state, weights_only=config.load_weights_only
        )
        return state, 0
    if config.load_strategy == "always":
        raise ValueError(
            f"trainer.load_strategy=always, but neither {saver.folder} nor trainer.load_path "
            "holds a checkpoint."
        )
    return program.init_state(), 0


def _checkpointer(run: _Run) -> Checkpointer:
    intervals = run.trainer.callbacks.checkpointer
    return Checkpointer(
        run.folder.checkpoints,
        run.info,
        save_interval=intervals.save_interval,
        ephemeral_interval=intervals.ephemeral_save_interval,
    )


def _open_writer(stack: ExitStack, run: _Run, state: State, start: int) -> MetricWriter:
    """Opens the writer and describes the run: config.json, config and parameters as text."""
    writer = MetricWriter(
        run.folder,
        start_step=start,
        tensorboard=run.trainer.callbacks.tensorboard.enabled,
        sinks=[open_sink() for open_sink in run.extras.sinks],
    )
    stack.callback(writer.close)
    if jax.process_index() == 0:
        run.folder.write_config(dict(run.info.config))
        lines = run.folder.config.read_text(encoding="utf-8").splitlines()
        writer.text("config", "\n".join("    " + line for line in lines), start)
        rows = parameter_table(state["params"], norms=False)
        writer.text("parameters", markdown_table(rows), start)
        for name, markdown in run.extras.texts.items():
            writer.text(name, markdown, start)
        writer.flush()
        run.say(
            f"Training {sum(row[3] for row in rows):,} parameters from step {start} to "
            f"{run.stop} on {jax.device_count()} {jax.devices()[0].device_kind} "
            f"device(s), {jax.process_count()} process(es); run folder {run.folder.root}"
        )
    return writer


def _open_recorder(
    stack: ExitStack, run: _Run, writer: MetricWriter, program: Program, guard: Callable[[], None]
) -> Recorder:
    recorder = Recorder(
        writer,
        last_step=run.stop,
        interval=run.trainer.metrics_collect_interval,
        compile_count=lambda: program.compile_count,
        say=run.say,
        guard=guard,
        tflops=cards.rate_of(jax.devices()[0].device_kind, jax.device_count()),
    )
    stack.callback(recorder.flush)  # after an error: what is finished is still written
    return recorder


def _told(run: _Run, done: Summary, cancel: CancelFlag, saver: Checkpointer) -> Summary:
    """Says how a run ended."""
    run.say(_last_words(done, run.stop, cancel, saver))
    return done


def _last_words(done: Summary, stop: int, cancel: CancelFlag, saver: Checkpointer) -> str:
    status, step, saved = done.status, done.step, done.saved
    where = f"saved in {saver.folder}" if saved else "NOT saved"
    if status == "completed":
        return f"Training completed: {step} steps, {where}."
    if status == "ended":
        return f"Ended after an evaluation, as was asked, at step {step} of {stop}, {where}."
    reason = cancel.reason or ("another process" if cancel.heard() else "request")
    kept = saved or saver.latest_complete() is not None
    again = "Run it again to go on." if kept else "Run again, it begins anew."
    return f"Stopped by {reason} after step {step} of {stop}, {where}. {again}"


def _say(line: str) -> None:
    print(line, flush=True)


def _quiet(line: str) -> None:
    del line
