"""The training loop: restore or start, then fetch, step, record, evaluate, save, until the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from olmoearth_jax.train import checkpoint, hosts, partial
from olmoearth_jax.train.checkpoint import Checkpointer, RunInfo, State
from olmoearth_jax.train.hosts import StopAgreed
from olmoearth_jax.train.loop_parts import (
    Batches,
    Evaluate,
    Evaluation,
    Program,
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
class LoopConfig:
    """Plain settings of the loop; everything that needs the config tree is decided before."""

    run_dir: Path
    max_steps: int
    hard_stop: int | None = None  # stop here; max_steps stays the horizon
    metrics_collect_interval: int = 10
    cancel_grace_s: float = 10.0  # a signal waits so long for a step before saving without it
    host_timeout_s: float = hosts.TIMEOUT_S  # so long may one process hold up the others
    save_interval: int = 5000
    ephemeral_save_interval: int | None = 250
    checkpoints: bool = True
    tensorboard: bool = True
    load_strategy: str = "if_available"  # if_available, always, never
    load_path: str | None = None
    load_weights_only: bool = False
    load_partial: bool = False
    allow_dataset_change: bool = False
    allow_config_change: bool = False
    seed: int = 0
    dataset_fingerprint: str = ""
    dataset_content: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    normalization: Mapping[str, Any] = field(default_factory=dict)
    image_interval: int | None = None
    pictures: Callable[[Any], Mapping[str, Any]] | None = None  # of the parameters
    texts: Mapping[str, str] = field(default_factory=dict)  # more to say about the run
    profile_steps: tuple[int, int] | None = None  # first step and number of steps to trace
    sinks: tuple[Callable[[], Sink], ...] = ()  # opened once the run folder is locked

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
    checkpoint that doesn't fit, RunFolderInUse, RunFolderLost, TrainingDiverged, HostMissing; and
    `signals.Abandoned` when a signal came before the first step could begin.
    """
    begun = time.monotonic()
    say = _quiet if jax.process_index() else (say or _say)
    folder = RunFolder(config.run_dir).create()
    with ExitStack() as stack:
        cancel, device, guard = _occupy(stack, folder, config)
        saver = stack.enter_context(_checkpointer(folder, stream, config))
        start_up = (_restore_or_init, program, saver, config, say)
        state, start = device.call(*start_up, stop=cancel.told_alone, poll=cancel.poll)
        stop, step = config.stop_step, start
        evaluate = Evaluate(evaluation, folder, cancel, say)
        owed = evaluate.owed(start)
        if start >= stop and not owed:
            say(f"Training is already complete: step {start} of {stop}.")
            return Summary("already complete", start, start, True, time.monotonic() - begun)
        recorder = _open_recorder(stack, folder, program, config, state, start, say, guard)
        if owed:
            owed = not device.call(evaluate, state, start, recorder)
        batches = stack.enter_context(Batches(stream, start, stop, cancel))
        take_step = StepTaker(program, device, cancel, say, config.cancel_grace_s)
        trace = stack.enter_context(Trace(folder, config.profile_steps, start))

        for number in range(start + 1, stop + 1):
            if owed or (groups := batches.next(number)) is None:
                break  # told to stop while evaluating or waiting for data
            trace.before(number)
            try:
                state, report = take_step(state, groups, number, step in (0, saver.on_disk))
            except StopAgreed:
                break
            step = number
            device.call(recorder.add, step, report, batches.waited, poll=cancel.poll)
            trace.after(step, report)
            if config.pictures and config.image_interval and step % config.image_interval == 0:
                device.call(recorder.images, step, config.pictures, state, poll=cancel.poll)
            if evaluate.due(step):
                owed = not device.call(evaluate, state, step, recorder)
            if config.checkpoints and saver.due(step):
                device.call(_save, saver, recorder, step, state, poll=cancel.poll)
            if cancel.told() or getattr(evaluation, "cancel", False):
                break

        saved = _finish(stack, device, saver if config.checkpoints else None, recorder, step, state)
        status = "cancelled" if step < stop or owed else "completed"
        say(_last_words(status, step, stop, saved, cancel, saver))
        return Summary(status, start, step, saved, time.monotonic() - begun)


def _note_loaded(config: LoopConfig, report: Mapping[str, Any] | None) -> None:
    """Keeps in config.json, and in every checkpoint, which parameters came from another run."""
    trainer = config.config.get("trainer")
    if report and isinstance(trainer, dict):
        trainer["loaded"] = dict(report)


def _finish(
    stack: ExitStack,
    device: Worker,
    saver: Checkpointer | None,
    recorder: Recorder,
    step: int,
    state: State,
) -> bool:
    """Writes all metrics, and the state if there is a saver; whether it is saved."""
    if device.busy:  # in a compilation that nobody waits for any more
        device = Worker("saving")
        stack.callback(device.close)
    device.call(recorder.drain)
    recorder.flush()
    return saver is not None and device.call(_save, saver, recorder, step, state, True)


def _occupy(
    stack: ExitStack, folder: RunFolder, config: LoopConfig
) -> tuple[CancelFlag, Worker, Callable[[], None]]:
    """Locks the run folder, catches signals, and starts the thread that talks to the device.

    The third value raises RunFolderLost if the folder is not ours any more.
    """
    guard = _unguarded
    if jax.process_index() == 0:
        guard = stack.enter_context(RunLock(folder.lock_file)).check
    ours = hosts.current()
    ours.timeout_s = config.host_timeout_s
    cancel = stack.enter_context(catch_signals(ours))
    device = Worker("device")
    stack.callback(device.close)
    return cancel, device, guard


def _unguarded() -> None:
    """The guard of processes that hold no lock."""


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
        _note_loaded(config, meta["config"].get("trainer", {}).get("loaded"))
        if config.load_path:
            say("trainer.load_path is ignored: the run folder holds a checkpoint of its own.")
        say(f"Resuming after step {meta['step']} from {saver.folder}.")
        return state, int(meta["step"])
    if config.checkpoints:
        saver.check_space(abstract, config.stop_step)
    if config.load_path and config.load_strategy == "never":
        say("trainer.load_path is ignored: trainer.load_strategy is never.")
    elif config.load_path:
        source, _ = checkpoint.open_whole(config.load_path)
        if config.load_partial:
            state, report = partial.restore(source, abstract, program.init_state)
            _note_loaded(config, report)
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


def _save(
    saver: Checkpointer, recorder: Recorder, step: int, state: State, and_wait: bool = False
) -> bool:
    # All lines up to this step must be in metrics.jsonl before a checkpoint says that they are.
    begun = time.perf_counter()
    recorder.drain()
    recorder.flush()
    recorder.guard()
    saved = saver.save(step, state)
    recorder.add_checkpoint_time(time.perf_counter() - begun)
    return saver.wait() and saved if and_wait else saved


def _checkpointer(folder: RunFolder, stream: Stream, config: LoopConfig) -> Checkpointer:
    info = RunInfo(
        config=config.config,
        normalization=config.normalization,
        dataset_fingerprint=config.dataset_fingerprint,
        dataset_content=config.dataset_content,
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
    guard: Callable[[], None],
) -> Recorder:
    """Opens the writer and describes the run: config.json, config and parameters as text."""
    writer = MetricWriter(
        folder,
        start_step=start,
        tensorboard=config.tensorboard,
        sinks=[open_sink() for open_sink in config.sinks],
    )
    stack.callback(writer.close)
    if jax.process_index() == 0:
        folder.write_config(dict(config.config))
        lines = folder.config.read_text(encoding="utf-8").splitlines()
        writer.text("config", "\n".join("    " + line for line in lines), start)
        rows = parameter_table(state["params"], norms=False)
        writer.text("parameters", markdown_table(rows), start)
        for name, markdown in config.texts.items():
            writer.text(name, markdown, start)
        writer.flush()
        say(
            f"Training {sum(row[3] for row in rows):,} parameters from step {start} to "
            f"{config.stop_step} on {jax.device_count()} {jax.devices()[0].device_kind} "
            f"device(s), {jax.process_count()} process(es); run folder {folder.root}"
        )
    recorder = Recorder(
        writer,
        last_step=config.stop_step,
        interval=config.metrics_collect_interval,
        compile_count=lambda: program.compile_count,
        say=say,
        guard=guard,
    )
    stack.callback(recorder.flush)  # after an error: what is finished is still written
    return recorder


def _last_words(
    status: str, step: int, stop: int, saved: bool, cancel: CancelFlag, saver: Checkpointer
) -> str:
    where = f"saved in {saver.folder}" if saved else "NOT saved"
    if status == "completed":
        return f"Training completed: {step} steps, {where}."
    reason = cancel.reason or ("another process" if cancel.heard() else "request")
    return f"Stopped by {reason} after step {step} of {stop}, {where}. Run it again to go on."


def _say(line: str) -> None:
    print(line, flush=True)


def _quiet(line: str) -> None:
    del line
