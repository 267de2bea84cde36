"""Feeds damaged and made-up files to everything that reads files of others.

    python -m tools.fuzz --seconds=300                       # every parser, one after another
    python -m tools.fuzz --parsers=weights,index --seed=7

Right is a result, or an error that this package raises on purpose. Wrong, and printed with the seed
and number that make the case again: another exception, a crash, a hang, memory out of all
proportion. Each parser runs in a process of its own. Exit code 1 if anything is wrong; --case=N
runs a single case and prints its traceback.
"""

from __future__ import annotations

import linecache
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from absl import flags
from absl import logging as absl_logging

from olmoearth_jax import commands

from . import _fuzz_parsers

_HANG_S = 30.0
_MEMORY_BYTES = 2 << 30
"""Room of a parser's process beside what it takes to start; the files have some kilobytes."""

_PACKAGE = f"{os.sep}olmoearth_jax{os.sep}"


def _unclear(error: BaseException) -> str | None:
    """Why an error is none that a user should see, or None if it was raised on purpose.

    On purpose is a ValueError whose last frame is a `raise` statement of the package.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    own = _PACKAGE in frame.filename and line.startswith("raise")
    if isinstance(error, ValueError) and own:
        return None
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__}: {str(error)[:200]} ({place})"


def try_case(name: str, seed: int, number: int, folder: Path) -> str | None:
    """Runs one case; what is wrong, or None."""
    parser = _fuzz_parsers.PARSERS[name]
    path = parser.make(_fuzz_parsers.rng(name, seed, number), folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser.read(path)
    except Exception as error:
        return _unclear(error)
    return None


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not everywhere
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_BYTES, resource.RLIM_INFINITY))


def _work(name: str, seed: int, first: int, seconds: float) -> None:
    """Runs cases until time is up; a line per case on stdout before it and after a wrong one."""
    with tempfile.TemporaryDirectory() as folder:
        _fuzz_parsers.PARSERS[name].read(
            _fuzz_parsers.PARSERS[name].plain(Path(folder))
        )  # loads what loads late
        if Path("/proc/self/statm").exists():
            _limit_memory()
        end, number = time.monotonic() + seconds, first
        while time.monotonic() < end:
            print(f"case {number}", flush=True)
            if wrong := try_case(name, seed, number, Path(folder)):
                print(f"wrong {number} {wrong!r}", flush=True)
            number += 1
    print("end", flush=True)


def _watch(name: str, seed: int, seconds: float) -> tuple[int, list[str]]:
    """Runs the cases of a parser in processes; (cases tried, what was wrong)."""
    end, first, found = time.monotonic() + seconds, 0, []
    while (left := end - time.monotonic()) > 0:
        given = [f"--worker={name}", f"--seed={seed}", f"--first={first}", f"--seconds={left}"]
        command = [sys.executable, "-m", f"{__package__}.fuzz", *given]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            at, finished = _follow(process, first, found)
            if finished:
                return at + 1, found
            process.kill()
            code = process.wait()
            errors = (process.stderr.read() if process.stderr else b"").decode()[-300:]
        if at < first:
            return 0, [*found, f"the parser of plain files does not start: {errors}"]
        what = "hangs" if code == -9 else f"ends the process with {code}: {errors}"
        found.append(f"{at} {what}")
        first = at + 1
    return first, found


def _follow(process: subprocess.Popen, first: int, found: list[str]) -> tuple[int, bool]:
    """Reads a worker's lines; (the last case begun, whether it came to its end)."""
    at, rest, out = first - 1, b"", process.stdout
    assert out is not None
    while True:
        ready, _, _ = select.select([out], [], [], _HANG_S)
        chunk = os.read(out.fileno(), 1 << 16) if ready else b""
        if not chunk:
            return at, False
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            word, _, text = line.decode().partition(" ")
            if word == "end":
                return at, True
            if word == "case":
                at = int(text)
            elif word == "wrong":
                found.append(text)


def define_flags() -> None:
    names = ", ".join(_fuzz_parsers.PARSERS)
    flags.DEFINE_list("parsers", list(_fuzz_parsers.PARSERS), f"Which of {names}.")
    flags.DEFINE_float("seconds", 30.0, "Time for each parser.", lower_bound=0.1)
    flags.DEFINE_integer("seed", 0, "Seed of all cases.", lower_bound=0)
    flags.DEFINE_integer("case", None, "Run only this case, of the first of --parsers.")
    flags.DEFINE_string("worker", None, "Used by this program itself.")
    flags.DEFINE_integer("first", 0, "Number of the first case.", lower_bound=0)


def main() -> None:
    """Runs what the flags say."""
    absl_logging.set_verbosity(absl_logging.FATAL)
    values = flags.FLAGS
    if values.worker:
        _work(values.worker, values.seed, values.first, values.seconds)
        return
    for name in values.parsers:
        if name not in _fuzz_parsers.PARSERS:
            raise SystemExit(f"error: no parser {name!r}; {', '.join(_fuzz_parsers.PARSERS)}")
    if values.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            parser = _fuzz_parsers.PARSERS[values.parsers[0]]
            random = _fuzz_parsers.rng(values.parsers[0], values.seed, values.case)
            print(f"read: {str(parser.read(parser.make(random, Path(folder))))[:500]}")
        return
    bad = 0
    for name in values.parsers:
        tried, found = _watch(name, values.seed, values.seconds)
        print(f"{name}: {tried} cases with seed {values.seed}, {len(found)} wrong", flush=True)
        for line in found[:20]:
            print(f"  case {line}")
        bad += len(found)
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    define_flags()
    commands.run_alone(main, refusals=())
