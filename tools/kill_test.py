"""Kills a training run again and again, and checks that it ends as if nothing had happened.

    python -m tools.kill_test --folder=/tmp/kills --kills=20 --processes=2 -- \\
        --config=configs/nano.py:smoke --config.trainer.max_duration.value=200 [...]

What follows `--` goes to launch.train. One run is left in peace. In the other, SIGKILL hits one
process at a random step, after a random delay; the rest is killed too, as a scheduler would, and
all are started again. Prints one JSON line. Exit code 1 if parameters or metrics differ in a bit.

    python -m tools.kill_test --folder=/tmp/kills --kills=40 --workers=3 \\
        --module=launch.predict -- --run=runs/crops --inputs=imagery.csv --block=64

With --workers they share a list of work, as those of launch.embed and launch.predict do: each kill
hits one of them, which is started again at once; the files that result must be the same.
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
from olmoearth_jax.files import is_leftover
from olmoearth_jax.train.comparison import first_difference
from olmoearth_jax.train.metrics import read_metrics

_TRAIN = f"{(__package__ or 'tools').removesuffix('tools')}launch.train"

_MOST_DELAY_S = 0.5
_MOST_CALM_S = 8.0  # between two kills of workers
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


def start_worker(folder: Path, arguments: list[str], number: int, of: int) -> subprocess.Popen:
    """Starts one of the workers that write to a folder; what it prints goes to <folder>.log."""
    command = [sys.executable, "-m", *arguments, f"--output={folder}", f"--shard={number}"]
    with open(f"{folder}.log", "ab") as log:
        return subprocess.Popen([*command, f"--of={of}"], stdout=log, stderr=subprocess.STDOUT)


def storm_of_workers(folder: Path, arguments: list[str], of: int, kills: int, draw) -> int:
    """Kills workers one by one at random times and starts them again, then lets them end; how many
    were killed.

    Raises:
      RuntimeError: one failed by itself.
    """
    workers = [start_worker(folder, arguments, k, of) for k in range(of)]
    killed = 0
    while killed < kills:
        time.sleep(draw.uniform(0.2, _MOST_CALM_S))
        number = draw.randrange(of)
        worker = workers[number]
        if worker.poll() is None:
            worker.kill()
            killed += 1
        elif worker.returncode:
            break
        worker.wait()
        if all(w.poll() == 0 for w in workers):
            break  # all is done: there is nothing left to kill
        workers[number] = start_worker(folder, arguments, number, of)
    codes = [w.wait() for w in workers]
    last = start_worker(folder, arguments, 0, 1).wait()
    if last or any(code not in (0, -signal.SIGKILL) for code in codes):
        raise RuntimeError(f"{arguments[0]} ended with {codes} and {last}; see {folder}.log")
    return killed


def file_difference(one: Path, other: Path) -> str | None:
    """The first file of two folders that differs, but for the records of their jobs.

    What a killed writer had not renamed yet is no result: it is never read, and goes with the
    next writer of the same file that finds it old.
    """
    names = [
        sorted(
            p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file() and not is_leftover(p)
        )
        for f in (one, other)
    ]
    kept = [[n for n in held if not n.startswith("job/")] for held in names]
    if kept[0] != kept[1]:
        return f"names: {', '.join(sorted(set(kept[0]) ^ set(kept[1])))}"
    differ = [n for n in kept[0] if (one / n).read_bytes() != (other / n).read_bytes()]
    return ", ".join(differ) or None


def kill_workers(folder: Path, command: list[str], of: int, kills: int, draw) -> dict:
    """Works once in peace, then in as many storms as so many kills need; what came of it."""
    peace = folder / "peace" / "out"
    peace.parent.mkdir(parents=True, exist_ok=True)
    if start_worker(peace, command, 0, 1).wait():
        raise RuntimeError(f"{command[0]} failed; see {peace}.log")
    killed, rounds, found = 0, 0, None
    while killed < kills and found is None:
        storm = folder / f"storm{rounds}" / "out"
        storm.parent.mkdir(parents=True, exist_ok=True)
        killed += storm_of_workers(storm, command, of, kills - killed, draw)
        found = file_difference(peace, storm)
        rounds += 1
    return {"kills": killed, "workers": of, "rounds": rounds, "difference": found}


def main(argv: list[str]) -> None:
    absl_logging.set_verbosity(absl_logging.ERROR)
    given = flags.FLAGS
    if given.workers:
        begun, draw = time.monotonic(), random.Random(given.seed)
        result = kill_workers(Path(given.folder).absolute(), [given.module, *argv[1:]],
                              given.workers, given.kills, draw)  # fmt: skip
        print(json.dumps(result | {"seconds": round(time.monotonic() - begun, 1)}))
        if result["difference"] is not None:
            raise SystemExit(1)
        return
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
    flags.DEFINE_integer("workers", 0, "Workers of a list of work instead.", 0)
    flags.DEFINE_string("module", _TRAIN, "What to run; must take the same flags.")
    flags.DEFINE_integer("seed", 0, "Of the steps, processes and delays.")


if __name__ == "__main__":
    define_flags()
    commands.run(main)
