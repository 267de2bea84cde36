"""A step that hangs, errors of users, and SIGTERM before there is anything to save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from launch import _early, train
from olmoearth_jax.data.pipeline import TooManyBadSamples
from olmoearth_jax.data.pool import WorkerDied
from olmoearth_jax.platforms import HostMissing
from olmoearth_jax.train import hosts, loop_parts
from olmoearth_jax.train.hosts import Hosts
from olmoearth_jax.train.signals import CancelFlag, Worker
from tests.train import test_program

ROOT = Path(__file__).resolve().parents[2]


class Store:
    """The key-value store of two processes, in memory."""

    def __init__(self):
        self.kept = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        self.kept[key] = value

    def key_value_try_get(self, key):
        return self.kept.get(key)


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setattr(hosts, "_TELL_S", 0.0)
    store = Store()
    both = [Hosts(store, index, 2) for index in (0, 1)]
    for one in both:
        one.timeout_s = 5.0
        one.says("step 7")
    return both


def test_a_hang_is_told_to_all_with_their_stacks(pair, capfd):
    first, second = pair
    first.check(4.0)
    second.listen(4.0)
    with pytest.raises(HostMissing, match=r"process 1: step 7. This process waits in no step"):
        first.check(5.1)
    assert "Stacks of process 0" in (told := capfd.readouterr().err)
    assert "test_a_hang_is_told_to_all" in told  # faulthandler's lines name the functions
    second._looked = 0.0
    with pytest.raises(HostMissing, match="process 0: step 7"):
        second.listen(2.0)
    assert "Stacks of process 1" in capfd.readouterr().err


def test_the_message_names_what_the_device_thread_waits_in():
    busy, go_on = Future(), Future()
    device = Worker("device")
    done = device.submit(stand, busy, go_on)
    busy.result(10)
    assert hosts.waits_in().startswith(("no step", "wait ("))
    go_on.set_result(None)
    assert done.result(10) is None
    device.close()


def stand(busy, go_on):
    busy.set_result(None)
    loop_parts.wait(go_on)


@pytest.mark.parametrize("compiling", [0, 1])
def test_only_a_compilation_is_blamed_on_compilation(monkeypatch, pair, compiling):
    class Slow:
        compile_count = 0

        def step(self, state, groups, step, gate):
            time.sleep(0.6)
            return state, None

    program: Any = Slow()
    lines, device = [], Worker("device")
    program.compiling = compiling
    monkeypatch.setattr(loop_parts, "_PATIENCE_S", 0.2)
    take = loop_parts.StepTaker(program, device, CancelFlag(pair[0]), lines.append, 10.0)
    take({}, [], 3, False)  # pyright: ignore
    device.close()
    assert lines and all(("compiled" in line) == bool(compiling) for line in lines)
    said = pair[0]._look("doing/0")
    assert said == ("compiling for step 3" if compiling else "step 3")


def test_a_program_tells_that_it_compiles(monkeypatch):
    program = test_program.program()
    seen = []
    program.programs.on_compile = lambda name, seconds: seen.append(program.compiling)
    program.step(program.init_state(), test_program.groups(1.0), 1)
    assert program.compiling == 0 and seen in ([0, 0], [1, 0])  # two at a time, or one by one


@pytest.mark.parametrize(
    "error, code", [(TooManyBadSamples("x"), 1), (WorkerDied("x"), 1), (HostMissing("x"), 75)]
)
def test_errors_of_a_run_are_sentences(monkeypatch, capsys, error, code):
    def fail(config):
        raise error

    monkeypatch.setattr(train, "run", fail)
    assert train.main(None) == code  # pyright: ignore
    assert capsys.readouterr().err == "error: x\n"


@pytest.mark.parametrize(
    "number, code, name", [(signal.SIGTERM, 75, b"SIGTERM"), (signal.SIGINT, 130, b"Ctrl-C")]
)
def test_signals_while_the_program_is_imported(tmp_path, number, code, name):
    command = [sys.executable, "-m", "launch.train", "--config=configs/nano.py:smoke"]
    command += [f"--config.common.save_folder={tmp_path / 'run'}"]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    # What runs in the background of a shell has SIGINT ignored, and hands that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE) as process:
        signal.signal(signal.SIGINT, before)
        maps = Path(f"/proc/{process.pid}/maps")
        until = time.monotonic() + 60
        while "numpy" not in maps.read_text() and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(number)
        out = process.communicate(timeout=60)[1]
    assert process.returncode == code, out
    assert name + b": ended at once; nothing is lost. Run it again to go on" in out
    assert b"Traceback" not in out and not (tmp_path / "run").exists()


def test_only_the_program_itself_catches_signals_early():
    assert not _early.is_program("train")
    assert signal.getsignal(signal.SIGTERM) is not _early.leave
