"""Kills a training run again and again, and checks that it ends as if nothing had happened.

    python -m tools.kill_test --folder=/tmp/kills --kills=20 --processes=2 -- \\
        --config=configs/nano.py:smoke --config.trainer.max_duration.value=200 [...]

What follows `--` goes to launch.train. One run is left in peace. In the other, SIGKILL hits one
process at a random step, after a random delay; the rest is killed too, as a scheduler would, and
all are started again. Prints one JSON line. Exit code 1 if parameters or metrics differ in a bit.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from absl import flags
from absl import logging as absl_logging

from olmoearth_jax import commands
from olmoearth_jax.checkpoints import checkpoint, integrity
from olmoearth_jax.train.comparison import first_difference
from olmoearth_jax.train.metrics import read_metrics

_TRAIN = f"{(__package__ or 'tools').removesuffix('tools')}launch.train"

_MOST_DELAY_S = 0.5
_MOST_WAIT_S = 1200.0  # for one start to get as far as its kill


def _start(folder: Path, arguments: list[str], processes: int) -> list[subprocess.Popen]:
    """Starts the processes of a run; what they print goes to <folder>.log.

    `arguments` begin with the module to run.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", *arguments, f"--config.common.save_folder={folder}"]
    started = []
    with open(f"{folder}.log", "ab") as log:
        for rank in range(processes):
            place = [f"--num_processes={processes}", f"--process_id={rank}"]
            started.append(
                subprocess.Popen(
                    [*command, f"--coordinator={address}", *place],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def _last_step(folder: Path) -> int:
    """The last step in metrics.jsonl; 0 if there is none."""
    path = folder / "metrics.jsonl"
    return max((r["step"] for r in read_metrics(path)), default=0) if path.exists() else 0


def run_to_end(folder: Path, arguments: list[str], processes: int) -> None:
    """Runs until all processes have ended. Raises RuntimeError if one failed."""
    started = _start(folder, arguments, processes)
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError(f"{arguments[0]} ended with {codes}; see {folder}.log")


def _kill_at(step: int, folder: Path, arguments: list[str], processes: int, draw) -> bool:
    """Starts a run and kills it soon after `step`; False if it was complete before."""
    started = _start(folder, arguments, processes)
    begun = time.monotonic()
    while _last_step(folder) < step:
        codes = [process.poll() for process in started]
        if any(codes) or time.monotonic() - begun > _MOST_WAIT_S:
            for process in started:
                process.kill()
            raise RuntimeError(f"no step {step}, exit codes {codes}; see {folder}.log")
        if None not in codes:
            return False
        time.sleep(0.01)
    time.sleep(draw.random() * _MOST_DELAY_S)
    first = draw.choice(started)
    killed = first.poll() is None
    first.send_signal(signal.SIGKILL)
    for process in started:
        process.kill()
        process.wait()
    return killed


def difference(one: Path, other: Path) -> str | None:
    """Where two runs differ in metrics or in a bit of their last checkpoint; None if nowhere."""
    found = first_difference(read_metrics(one), read_metrics(other))
    if found is not None:
        return f"metrics, {found}"
    folders = [checkpoint.find_checkpoint(folder) for folder in (one, other)]
    for item in checkpoint.read_meta(folders[0])["items"]:
        digests = {integrity.parameter_digest(checkpoint.load_item(f, item)) for f in folders}
        if len(digests) > 1:
            return f"item {item} of the checkpoints"
    return None


def main(argv: list[str]) -> None:
    absl_logging.set_verbosity(absl_logging.ERROR)
    given = flags.FLAGS
    folder, count, draw = (
        Path(given.folder).absolute(),
        given.processes,
        random.Random(given.seed),
    )
    folder.mkdir(parents=True, exist_ok=True)
    peace, storm = folder / "peace", folder / "storm"
    begun, command = time.monotonic(), [given.module, *argv[1:]]
    run_to_end(peace, command, count)
    last = _last_step(peace)
    kills = 0
    for step in sorted(draw.randrange(1, last) for _ in range(given.kills)):
        kills += _kill_at(step, storm, command, count, draw)
    run_to_end(storm, command, count)
    found = difference(peace, storm)
    result = {"steps": last, "kills": kills, "processes": count, "difference": found}
    print(json.dumps(result | {"seconds": round(time.monotonic() - begun, 1)}))
    if found is not None:
        raise SystemExit(1)


def define_flags() -> None:
    """Defined when this is run, so that its functions can be imported beside those of others."""
    flags.DEFINE_string("folder", None, "Where both runs are written.", required=True)
    flags.DEFINE_integer("kills", 20, "Kills, spread over the steps of the run.")
    flags.DEFINE_integer("processes", 2, "Processes of a run, connected over localhost.")
    flags.DEFINE_string("module", _TRAIN, "What to run; must take the same flags.")
    flags.DEFINE_integer("seed", 0, "Of the steps, processes and delays.")


if __name__ == "__main__":
    define_flags()
    commands.run(main)
