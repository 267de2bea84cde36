"""Jobs on this machine: one after another, or side by side, each on its share of the GPUs.

A job is a process of `launch.train`, which goes on where it stopped; so a stopped sweep is started
again by the same command, and jobs that are complete end at once.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from olmoearth_jax.files import write_atomically
from olmoearth_jax.train import comparison
from olmoearth_jax.train.metrics import read_metrics

from ._early import AGAIN

TRIES = 5
"""Starts of a job that ends with AGAIN by itself."""

_AVERAGED = 10
_SHOWN = 5
"""Metrics in the printed table; the file has all."""

_Say = Callable[[str], None]


def _gpus() -> list[str]:
    """The GPUs that a job may use, as CUDA numbers them; none where there is no NVIDIA driver."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        names = (n.strip() for n in named.split(","))
        # CUDA looks no further than the first that is none, as -1, which hides all.
        return list(itertools.takewhile(lambda n: n and not n.startswith("-"), names))
    try:
        command = ("nvidia-smi", "-L")
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return []
    return [str(i) for i, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


def shares(at_once: int) -> list[list[str]]:
    """The GPUs of each of `at_once` jobs that run side by side.

    Raises:
      ValueError: they cannot be shared evenly.
    """
    found = _gpus()
    if found and len(found) % at_once:
        raise ValueError(f"{len(found)} GPUs cannot be shared by --at_once={at_once} jobs")
    each = len(found) // at_once
    return [found[i * each : (i + 1) * each] for i in range(at_once)]


class Jobs:
    """Runs commands until all have ended or the user stops them."""

    def __init__(self, commands: Mapping[str, Sequence[str]], logs: Path, say: _Say) -> None:
        """
        Args:
          commands: name -> command.
          logs: folder of what the jobs print, NAME.log.
        """
        self._waiting = dict(commands)
        self._running: dict[int, tuple[str, subprocess.Popen]] = {}
        self._starts = dict.fromkeys(commands, 0)
        self._commands, self._logs, self._say = commands, logs, say
        self.stopped = False
        self._told: list[str] = []
        self.codes: dict[str, int] = {}

    def run(self, shared: Sequence[Sequence[str]]) -> dict[str, int]:
        """Name -> exit code of every job that ended; `shared` has the GPUs of each place."""
        before = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self._running or (self._waiting and not self.stopped):
                for place, devices in enumerate(shared):
                    if place not in self._running and self._waiting and not self.stopped:
                        self._start(place, devices)
                self._collect()
                while self._told:
                    self._say(self._told.pop(0))
                time.sleep(0.1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.codes

    def _start(self, place: int, devices: Sequence[str]) -> None:
        name = next(iter(self._waiting))
        command = self._waiting.pop(name)
        self._starts[name] += 1
        environment = dict(os.environ)
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        self._logs.mkdir(parents=True, exist_ok=True)
        with (self._logs / f"{name}.log").open("ab") as log:
            # A session of its own: Ctrl-C reaches it through us only, once.
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=environment, start_new_session=True,
            )  # fmt: skip
        self._running[place] = (name, process)
        if self.stopped:  # between the check and now, when it was not yet known
            process.send_signal(signal.SIGTERM)
        where = f" on GPU {','.join(devices)}" if devices else ""
        self._say(f"started {name}{where}; it prints to {self._logs / name}.log")

    def _collect(self) -> None:
        for place, (name, process) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[place]
            if code == AGAIN and not self.stopped and self._starts[name] < TRIES:
                self._say(f"{name} asks to be started again")
                self._waiting = {name: self._commands[name], **self._waiting}
                continue
            self.codes[name] = code
            self._say(f"ended {name}: {_told(code)}; {len(self._waiting)} waiting")
            if code not in (0, AGAIN) and (last := _last_line(self._logs / f"{name}.log")):
                self._say(f"  {last}")

    def _stop(self, number: int, frame: object) -> None:
        del frame
        again = self.stopped  # Ctrl-C once more ends a job without saving
        self.stopped = True
        if not again:  # said later: a print must not interrupt a print
            name = signal.Signals(number).name
            self._told.append(f"{name}: jobs save and end; the same command goes on")
        for _, process in list(self._running.values()):
            process.send_signal(number if again else signal.SIGTERM)


def _last_line(log: Path) -> str:
    """The end of what a job printed, which says why it failed."""
    with log.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else ""


def _told(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return "done" if code == 0 else f"exit code {code}"


def report(runs: Mapping[str, Path], codes: Mapping[str, int], folder: Path) -> list[str]:
    """Writes results.csv, and sweep.png where matplotlib is; returns the lines to print."""
    found: comparison.Runs = {}
    for name, path in runs.items():
        try:
            found[name] = read_metrics(path)
        except ValueError:  # it has not got that far
            found[name] = []
    names = comparison.metric_names(found)
    rows = []
    for name, records in found.items():
        values = [comparison.final(records, n, _AVERAGED) for n in names]
        step = max((r["step"] for r in records), default=0)
        ended = _told(codes[name]) if name in codes else "not started"
        rows.append([name, ended, step, *("" if v is None else f"{v:.6g}" for v in values)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["run", "status", "step", *names], *rows])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.csv", text.getvalue())
    shown = [0, 1, 2, *(3 + names.index(n) for n in sorted(names, key=_worth)[:_SHOWN])]
    head = ["run", "status", "step", *names]
    lines = [f"| {' | '.join(str(row[i]) for i in shown)} |" for row in [head, *rows]]
    lines.insert(1, "|---|---|" + "--:|" * (len(shown) - 2))
    lines.append(f"all metrics, means of the last {_AVERAGED} values: {folder / 'results.csv'}")
    if not any(found.values()):
        return [*lines, "no curves: no run has taken a step"]
    try:
        comparison.plot({k: v for k, v in found.items() if v}, names, folder / "sweep.png")
        lines.append(f"curves: {folder / 'sweep.png'}")
    except ValueError as e:
        lines.append(f"no curves: {e}")
    return lines


_FIRST = ("train/loss", "val/loss")
_LAST = ("train/epoch", "train/dropped_micro_steps", "train/good_micro_steps", "train/ema_decay")


def _worth(name: str) -> tuple[int, str]:
    """Order of metrics in the printed table: losses, scores, the rest, what only counts."""
    if name in _FIRST:
        return _FIRST.index(name) - len(_FIRST), name
    return 2 if name in _LAST else 0 if name.startswith("eval/") else 1, name


def command(module: str, arguments: Sequence[str]) -> list[str]:
    """The command of a job with this interpreter; a job that is told to stop says so."""
    return [sys.executable, "-m", module, *arguments, f"--stopped_exit_code={AGAIN}"]
