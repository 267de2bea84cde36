"""Worker processes: what they send back, and what becomes of the others when one is killed."""

import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from olmoearth_jax.data.pool import WorkerDied, Workers, run_tasks

ROOT = Path(__file__).parents[2]
LARGE = 1 << 20
"""Bytes that no pipe holds at once."""


def _large(number: int) -> bytes:
    return bytes([number]) * LARGE


def _killed_while_sending(number: int) -> bytes:
    """The kernel ends a process, for lack of memory, in the midst of what it sends."""
    if number != 3:
        return _large(number)

    def half(self: Connection, buf: memoryview) -> None:
        os.write(self.fileno(), buf[: len(buf) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Connection._send = half  # type: ignore[attr-defined]
    return _large(number)


class Odd(Exception):
    """An error that cannot be unpickled."""

    def __init__(self, a: int, b: int):
        super().__init__(f"{a} and {b}")


def _raises(number: int) -> int:
    if number == 1:
        raise ValueError("one")
    if number == 2:
        raise Odd(1, 2)
    return number


def test_large_results_come_back():
    assert dict(run_tasks(_large, range(7), 2)) == {n: _large(n) for n in range(7)}


@pytest.mark.parametrize("way", ["run", "in_order"])
def test_a_process_killed_while_it_sends_ends_the_list_and_not_the_pool(way):
    with Workers(2) as workers:
        with pytest.raises(WorkerDied, match="a worker process was killed"):
            for _ in getattr(workers, way)(_killed_while_sending, range(20)):
                pass
        # The next list has processes again.
        assert list(workers.in_order(_large, [1, 2])) == [_large(1), _large(2)]


def test_errors_of_tasks_travel_and_name_their_lines():
    with Workers(1) as workers:
        with pytest.raises(ValueError, match="one") as caught:
            list(workers.in_order(_raises, [0, 1]))
        assert "in _raises" in caught.value.__notes__[0]
        with pytest.raises(RuntimeError, match="Odd: 1 and 2"):
            list(workers.in_order(_raises, [2]))
        assert list(workers.in_order(_raises, [3])) == [3]


def test_a_program_that_forgets_its_processes_ends():
    code = """
from olmoearth_jax.data.pool import Workers
kept = Workers(2)
if __name__ == "__main__":
    print(list(kept.in_order(abs, [-1, -2, -3])))
"""
    path_of_code = [sys.executable, "-c", code]
    done = subprocess.run(path_of_code, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "[1, 2, 3]\n"), done.stderr
