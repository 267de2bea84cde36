"""Resuming a run equals never having stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from olmoearth_jax.checkpoints import checkpoint
from olmoearth_jax.train.metrics import read_metrics
from tests.train import train_toy as toy

ROOT = Path(__file__).resolve().parents[2]


def start(settings: dict, **env: str) -> subprocess.Popen:
    """Starts the toy in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | env
    return subprocess.Popen(
        [sys.executable, toy.__file__, json.dumps(settings)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=120)
    return out


def wait_until_said(process: subprocess.Popen, text: str) -> None:
    """Reads the output of a process up to the line that holds `text`."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    pytest.fail("".join(lines))


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


def assert_same_run(one: Path, other: Path) -> None:
    assert toy.lines_of(one) == toy.lines_of(other)
    last_one, last_other = (checkpoint.find_checkpoint(path) for path in (one, other))
    assert last_one.name == last_other.name
    for item in ("params", "target", "opt_state"):
        trees = [checkpoint.load_item(folder, item) for folder in (last_one, last_other)]
        jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "undisturbed"
    summary = toy.run(folder, 20, evaluation=toy.ToyEvaluation(6))
    assert (summary.status, summary.step, summary.saved) == ("completed", 20, True)
    return folder


def test_every_step_has_a_line(undisturbed):
    records = read_metrics(undisturbed)
    steps = [record["step"] for record in records if "train/loss" in record]
    assert steps == list(range(1, 21))
    assert [r["step"] for r in records if "eval/norm" in r] == [0, 6, 12, 18]
    assert all(record["data/padded_share"] == 0.25 for record in records if "train/loss" in record)
    timed = [record for record in records if "throughput/step_time_p50_s" in record]
    assert timed and all(0 <= record["throughput/data_wait_share"] <= 1 for record in timed)


@pytest.mark.parametrize("stop", [4, 7, 13])
def test_resume_is_bitwise(tmp_path, undisturbed, stop):
    first = toy.run(tmp_path, 20, hard_stop=stop, evaluation=toy.ToyEvaluation(6))
    assert (first.status, first.step) == ("completed", stop)
    second = toy.run(tmp_path, 20, evaluation=toy.ToyEvaluation(6))
    assert (second.start_step, second.step) == (stop, 20)
    assert_same_run(tmp_path, undisturbed)


def test_lines_beyond_the_checkpoint_are_cut(tmp_path, undisturbed):
    toy.run(tmp_path, 20, hard_stop=8, evaluation=toy.ToyEvaluation(6))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "train/loss": 5.0}\n{"step": 10, "tra')
    toy.run(tmp_path, 20, evaluation=toy.ToyEvaluation(6))
    assert_same_run(tmp_path, undisturbed)


def test_complete_run_is_left_alone(tmp_path):
    toy.run(tmp_path, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    said: list[str] = []
    assert toy.run(tmp_path, 5, lines=said).status == "already complete"
    assert "already complete" in said[-1]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_sigkill_and_resume(tmp_path, undisturbed):
    settings = {
        "run_dir": str(tmp_path),
        "max_steps": 20,
        "program": {"step_seconds": 0.05},
        "evaluate": [6],
    }
    process = start(settings)
    wait_for(lambda: (tmp_path / "checkpoints" / "8").exists() or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert process.returncode == -signal.SIGKILL
    summary = toy.run(tmp_path, 20, evaluation=toy.ToyEvaluation(6))
    assert 4 <= summary.start_step < 20
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"program": {"step_seconds": 0.1}}, "step 3/"),
        ({"stream": {"hang_at": 3}}, "in stream"),
        ({"evaluate": [2, 1000.0]}, "in evaluation"),
    ],
    ids=["step", "data wait", "evaluation"],
)
def test_sigterm_saves_and_exits_cleanly(tmp_path, settings, said):
    process = start({"run_dir": str(tmp_path), "max_steps": 1000} | settings)
    wait_until_said(process, said)
    process.send_signal(signal.SIGTERM)
    out = finish(process)
    assert process.returncode == 0, out
    summary = json.loads(out.splitlines()[-1])
    assert summary["status"] == "cancelled" and summary["saved"]
    assert checkpoint.find_checkpoint(tmp_path).name == str(summary["step"])
    assert "Stopped by SIGTERM" in out
    assert not (tmp_path / "run.lock").exists()


def test_sigterm_in_the_first_compilation_waits_for_nothing(tmp_path):
    toy.run(tmp_path, 20, hard_stop=2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    process = start({"run_dir": str(tmp_path), "max_steps": 20, "program": {"slow_step": 3}})
    wait_until_said(process, "in program")
    process.send_signal(signal.SIGTERM)
    out = finish(process)
    assert process.returncode == 0 and "Stopped by SIGTERM after step 2" in out, out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "run.lock").exists()
    assert toy.run(tmp_path, 20, hard_stop=4).start_step == 2


def test_sigterm_in_a_later_compilation_saves_without_that_step(tmp_path, undisturbed):
    settings = {"program": {"slow_step": 7}, "cancel_grace_s": 0.5, "evaluate": [6]}
    process = start({"run_dir": str(tmp_path), "max_steps": 20} | settings)
    wait_until_said(process, "in program")
    process.send_signal(signal.SIGTERM)
    out = finish(process)
    assert process.returncode == 0 and "Stopped by SIGTERM after step 6" in out, out
    assert toy.run(tmp_path, 20, evaluation=toy.ToyEvaluation(6)).start_step == 6
    assert_same_run(tmp_path, undisturbed)


def test_interrupted_evaluation_is_made_up_for(tmp_path):
    class Interrupted(toy.ToyEvaluation):
        def __call__(self, state, step, stop):
            return None if step else super().__call__(state, step, stop)

    summary = toy.run(tmp_path, 20, evaluation=Interrupted(6))
    assert (summary.status, summary.step) == ("cancelled", 6)
    evaluation = toy.ToyEvaluation(6)
    toy.run(tmp_path, 20, evaluation=evaluation)
    assert evaluation.steps == [6, 12, 18]


@pytest.mark.parametrize(("first", "steps"), [(0, 0), (6, 6)])
def test_a_run_that_is_to_end_after_its_first_evaluation_does(tmp_path, first, steps):
    class Once(toy.ToyEvaluation):
        cancel = property(lambda self: bool(self.steps))

        def due(self, step):
            return step == first

    said: list[str] = []
    summary = toy.run(tmp_path, 20, evaluation=Once(6), lines=said)
    assert (summary.status, summary.step, summary.saved) == ("ended", steps, True)
    assert said[-1].startswith(f"Ended after an evaluation, as was asked, at step {steps} of 20")
    assert len([r for r in read_metrics(tmp_path) if "train/loss" in r]) == steps


def test_second_interrupt_aborts(tmp_path):
    process = start({"run_dir": str(tmp_path), "max_steps": 9, "program": {"slow_step": 3}})
    wait_until_said(process, "in program")
    process.send_signal(signal.SIGINT)
    wait_until_said(process, "Ctrl-C again aborts")
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in finish(process)
    assert process.returncode != 0
    assert toy.run(tmp_path, 9).step == 9


def test_restore_on_another_device_count(tmp_path):
    eight = start(
        {"run_dir": str(tmp_path), "max_steps": 4},
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    out = finish(eight)
    assert eight.returncode == 0, out
    folder = checkpoint.find_checkpoint(tmp_path)
    assert checkpoint.read_meta(folder)["saved_on"]["devices"] == 8
    state = checkpoint.restore_state(folder, toy.ToyProgram().abstract_state())
    assert len(state["params"]["dense"]["kernel"].sharding.device_set) == jax.device_count()
    assert int(state["step"]) == 4
    params = checkpoint.load_item(folder)
    assert isinstance(params["dense"]["kernel"], np.ndarray)
    np.testing.assert_array_equal(params["dense"]["kernel"], state["params"]["dense"]["kernel"])
    assert toy.run(tmp_path, 8).step == 8


def start_two(settings: dict, *differing: dict) -> list[subprocess.Popen]:
    """Starts the toy in two connected processes; `differing` are settings of one each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    hosts = []
    for rank, own in enumerate(differing or ({}, {})):
        place = {"coordinator_address": address, "num_processes": 2, "process_id": rank}
        hosts.append(start(settings | own | {"distributed": place}))
    return hosts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("both", "second", "said"),
    [
        ({"program": {"step_seconds": 0.05}}, {}, "step 9/"),
        ({}, {"stream": {"hang_at": 6}}, "in stream"),
        ({}, {"program": {"slow_step": 6}, "cancel_grace_s": 0.5}, "in program"),
        ({"evaluate": [5, 1000.0]}, {}, "in evaluation"),
    ],
    ids=["step", "data wait", "compilation", "evaluation"],
)
def test_two_hosts_stop_at_the_same_step(tmp_path, both, second, said):
    hosts = start_two({"run_dir": str(tmp_path), "max_steps": 400} | both, {}, second)
    wait_until_said(hosts[1 if second else 0], said)
    hosts[1].send_signal(signal.SIGTERM)
    outs = [finish(host) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(outs)
    summaries = [json.loads(out.splitlines()[-1]) for out in outs]
    done = summaries[0]["step"]
    assert done == summaries[1]["step"] < 400 and (not second or done == 5)
    assert all(s["status"] == "cancelled" and s["saved"] for s in summaries)
    again = toy.run(tmp_path, done + 3)  # one process goes on with what two began
    assert (again.start_step, again.step) == (done, done + 3)
    steps = [record["step"] for record in read_metrics(tmp_path) if "train/loss" in record]
    assert steps == list(range(1, done + 4))


@pytest.mark.slow
def test_a_host_that_hangs_is_named(tmp_path):
    settings = {"run_dir": str(tmp_path), "max_steps": 400, "host_timeout_s": 6.0}
    hosts = start_two(settings, {}, {"stream": {"hang_at": 6}})
    try:
        out = finish(hosts[0])
        assert hosts[0].returncode == 3, out
        assert "process 1: reading the data of step 6" in out, out
        assert "Stacks of process 0" in out, out
    finally:
        time.sleep(1)
        hosts[1].kill()
        other = finish(hosts[1])
    assert "Stacks of process 1" in other  # told by the first, which waits for that
    assert toy.run(tmp_path, 8).start_step == 4  # what was saved before is whole
