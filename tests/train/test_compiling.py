"""Programs are compiled once, in order of need, and never more than is needed."""

import dataclasses
import logging
import re
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax.train import compiling
from olmoearth_jax.train.compiling import Programs
from tests.train.test_program import ScaledSum, groups, program


def double(x):
    return 2 * x


def test_a_program_is_compiled_once_and_awaited_by_all_who_ask():
    told: list[str] = []
    programs, gate = Programs(lambda name, _: told.append(name)), threading.Event()

    def slow(x):
        gate.wait(60)
        return 2 * x

    def ask():
        got.append(programs.get("slow", slow, (jnp.ones(2),)))

    got: list = []
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while programs.awaited < 3:
        time.sleep(0.01)
    assert programs and "slow" in programs and list(programs.items()) == []
    gate.set()
    for thread in threads:
        thread.join()
    assert told == ["slow"] and programs.count == 1 and programs.awaited == 0
    assert len(got) == 3 and all(g is programs.find("slow") for g in got)
    np.testing.assert_array_equal(got[0](jnp.ones(2)), [2, 2])


def test_what_fails_is_tried_again(caplog):
    programs = Programs()

    def broken(x):
        raise RuntimeError("no such operation")

    with pytest.raises(RuntimeError, match="no such operation"):
        programs.get("one", broken, (jnp.ones(2),))
    assert "one" not in programs and programs.find("one") is None and programs.count == 0
    with caplog.at_level(logging.WARNING):
        programs.behind([lambda: programs.get("one", broken, (jnp.ones(2),))])
        programs.join()
    assert "not compiled ahead: no such operation" in caplog.text
    assert programs.get("one", double, (jnp.ones(2),)) is programs["one"]


def test_nobody_waits_for_what_is_compiled_behind(monkeypatch):
    monkeypatch.setattr(compiling, "compile_threads", lambda: 1)
    programs, gate, waited = Programs(), threading.Event(), []

    def slow(x):
        waited.append(programs.awaited)
        gate.wait(60)
        return 2 * x

    def job(name):
        return lambda: programs.get(name, slow, (jnp.ones(2),))

    programs.behind([job("first"), job("second"), job("third")])
    while "first" not in programs:
        time.sleep(0.01)
    programs.close()
    gate.set()
    programs.join()
    assert waited == [0] and [name for name, _ in programs.items()] == ["first"]


class Rungs(ScaledSum):
    """An engine of three capacities, the last of which nothing likely needs."""

    keys = ("small", "large", "bound")
    used = "large"

    def prepare(self, groups):
        return [dataclasses.replace(p, key=self.used) for p in super().prepare(groups)]

    def every_program(self, groups, spare):
        (one,) = self.prepare(groups[:1])
        return [dataclasses.replace(one, key=key) for key in self.keys[: 3 if spare else 2]]


def test_a_first_step_waits_for_its_own_programs_only(monkeypatch):
    monkeypatch.setattr(compiling, "compile_threads", lambda: 1)
    gate, told = threading.Event(), []

    class Held(Rungs):
        def loss(self, params, target, inputs, key, program_key):
            if program_key == "small":
                gate.wait(60)
            return super().loss(params, target, inputs, key, program_key)

    engine = Held()
    runner = program(engine, lambda name, _: told.append(name))
    state, _ = runner.step(runner.init_state(), groups(1.0), 1)
    assert sorted(told) == ["large", "update"]
    state, _ = runner.step(state, groups(1.0), 2)  # the state is given away meanwhile
    gate.set()
    runner.programs.join()
    assert told[2:] == ["small"] and runner.compiling == 0
    for used in ("small", "bound"):
        engine.used = used
        state, report = runner.step(state, groups(1.0), 3)
        assert np.isfinite(float(report.metrics["train/base"]))
    assert told[2:] == ["small", "bound"] and runner.compile_count == 4
    assert int(state["step"]) == 4


def test_everything_is_compiled_where_it_is_asked_for():
    runner = program(Rungs())
    runner.compile_all(runner.init_state(), groups(1.0))
    assert runner.compile_count == 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_given_back():
    def resident():
        text = Path("/proc/self/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) << 10

    # Pieces that are taken from the heap, the last of which keeps it from shrinking.
    held = [np.ones(100_000, np.uint8) for _ in range(3000)]
    last = held.pop()
    full = resident()
    del held
    compiling.give_back()
    assert full - resident() > 200e6 and last.all()
