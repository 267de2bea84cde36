"""Pretrains a model; goes on by itself where the run folder holds a checkpoint.

    python -m launch.train --config=configs/nano.py --run_name=my_run \\
        --config.dataset.h5py_dir=/path/to/h5 [--config.<path>=<value> ...]

Several hosts: `launch.submit` writes the job files. By hand, nothing more is needed under Slurm;
elsewhere start it on each with --coordinator=HOST:PORT --num_processes=N --process_id=I (and
--local_device_ids=0,1,... for a part of a host's GPUs), or set the JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID (in a Kubernetes job: JOB_COMPLETION_INDEX) of its environment.
"""

from __future__ import annotations

from . import _early  # isort: split

import dataclasses
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from absl import flags
from absl import logging as absl_logging

from olmoearth_jax import platforms
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.data.pipeline import TooManyBadSamples
from olmoearth_jax.data.pool import WorkerDied
from olmoearth_jax.evals.callback import build_evaluator
from olmoearth_jax.platforms import HostMissing
from olmoearth_jax.train import devices, signals
from olmoearth_jax.train.loop import Summary, train
from olmoearth_jax.train.metrics import Sink, check_wandb
from olmoearth_jax.train.progress import TrainingDiverged
from olmoearth_jax.train.runfolder import RunFolder, RunFolderInUse

from . import _app

if TYPE_CHECKING:
    from olmoearth_jax.train.build import Training

_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the run.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_LOCAL = flags.DEFINE_list("local_device_ids", None, "GPUs of this process on its host, as 0,1.")
_STOPPED = flags.DEFINE_integer(
    "stopped_exit_code",
    0,
    "Exit code of a run that was told to stop and saved; another than 0 lets a scheduler start it "
    "again.",
)
_CACHE = flags.DEFINE_bool("compilation_cache", True, "Keep compiled programs between runs.")


def run(config: ExperimentConfig) -> Summary:
    """Builds the training of a checked config and runs it to its end.

    Raises ValueError with a readable sentence for whatever the user can mend.
    """
    from olmoearth_jax.train.build import build_training

    platforms.check_open_files()
    devices.start_distributed(
        _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _local_devices(_LOCAL.value)
    )
    if config.trainer.callbacks.wandb.enabled and not jax.process_index():
        check_wandb()
    cache = devices.use_compilation_cache(config.compile.cache_dir if _CACHE.value else "")
    print(devices.topology(_local_devices(_LOCAL.value)), flush=True)
    if cache is not None:
        _say(f"compilation cache: {cache}")
    elif _CACHE.value and config.compile.cache_dir != "":
        _say("no compilation cache: its folder cannot be written to (compile.cache_dir)")
    training = build_training(config, say=_say)
    evaluation = build_evaluator(config, training.stream.steps_per_epoch, _say)
    if config.dataset.validation_fraction:
        evaluation = _with_validation(config, training, evaluation)
    extras = dataclasses.replace(
        training.extras, sinks=_sinks(config), evaluation=evaluation, say=_say
    )
    try:
        return train(training.program, training.stream, config, training.info, extras)
    except Exception as error:
        advice = devices.memory_advice(error, training.program.memory())
        if advice is None:
            raise
        raise devices.OutOfMemory(advice) from error


def _with_validation(config: ExperimentConfig, training: Training, evaluation: Any) -> Any:
    """The evaluation of a run after that of its loss on what is kept out of training."""
    from olmoearth_jax.train.validation import Together, Validation

    held = Validation(config, training.program, training.stream.steps_per_epoch)
    _say(
        f"val/loss: {held.samples} of {len(held.stream.index)} samples that are kept out of "
        f"training, every {held.settings.interval} steps"
    )
    return held if evaluation is None else Together((held, evaluation))


def _local_devices(given: list[str] | None) -> list[int] | None:
    if given is None:
        return None
    if not given or not all(n.isdigit() for n in given) or len(set(given)) < len(given):
        raise _app.UserError(
            f"--local_device_ids must be different numbers, as in 0,1; got {','.join(given)}"
        )
    return [int(n) for n in given]


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def _sinks(config: ExperimentConfig) -> tuple[Callable[[], Sink], ...]:
    settings = config.trainer.callbacks.wandb
    if not settings.enabled or jax.process_index():
        return ()
    from olmoearth_jax.train.metrics import WandbSink

    return (
        lambda: WandbSink(
            RunFolder(config.run_folder),
            project=settings.project,
            entity=settings.entity,
            name=config.common.run_name,
            config=config.to_dict(),
        ),
    )


def main(config: ExperimentConfig) -> int:
    """Exit code: 0 completed, already complete, or ended by its evaluation; --stopped_exit_code
    where it stopped and saved, 75 where another process hung, 1 otherwise.

    Raises ValueError for what the user can mend.
    """
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells every step it takes
    try:
        summary = run(config)
    except (TrainingDiverged, TooManyBadSamples, WorkerDied, devices.OutOfMemory) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except HostMissing as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return _early.AGAIN
    except signals.Abandoned:
        _say("Stopped before the first step; nothing is lost. Run it again to go on.")
        return _STOPPED.value
    except KeyboardInterrupt:
        print("Aborted; the newest checkpoint is untouched.", file=sys.stderr, flush=True)
        return _early.ABORTED
    except Exception as error:
        if isinstance(error, RunFolderInUse):
            error = _app.UserError(str(error))
        if jax.process_count() == 1:
            raise error
        # Raised further, it would wait at the end for the other processes, which wait for us.
        told = _app.is_users(error)
        if not told:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return _app.USER_ERROR if told else 1
    if summary.status != "cancelled":  # one that was told to stop has little time left
        _write_page(config)
    if not summary.saved and config.trainer.saves:
        return 1
    return _STOPPED.value if summary.status == "cancelled" else 0


def _write_page(config: ExperimentConfig) -> None:
    """report.html; a run does not fail for the want of it."""
    if jax.process_index():
        return
    from . import _run_page

    try:
        _say(f"report: {_run_page.write(config.run_folder)}")
    except Exception as error:
        _say(f"no report: {error if isinstance(error, ValueError | OSError) else repr(error)}")


def leave(code: int) -> None:
    """Ends the process, at once if one of its threads is stuck in a read or a compilation."""
    for child in multiprocessing.active_children():
        child.kill()  # readers that were stuck; they ignore SIGTERM, so Python would wait for them
    sys.stdout.flush()
    sys.stderr.flush()
    several = jax.process_count() > 1
    if several and code in (0, _STOPPED.value):
        jax.distributed.shutdown()  # waits for the others, so that none loses its coordinator
    if several or signals.threads_at_work():
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _app.run(lambda config: leave(main(config)))
