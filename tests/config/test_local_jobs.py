"""Jobs on one machine: order, GPUs, exit codes, stopping and going on, the report."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from absl.testing import flagsaver

from launch import _local, submit

ROOT = Path(__file__).resolve().parents[2]


def shell(text: str) -> list[str]:
    return ["bash", "-c", text]


def run(commands, folder, shared=((),)) -> tuple[dict[str, int], list[str]]:
    lines: list[str] = []
    codes = _local.Jobs({k: shell(v) for k, v in commands.items()}, folder, lines.append).run(
        shared
    )
    return codes, lines


def test_jobs_run_one_after_another_and_a_failure_stops_no_other(tmp_path):
    log = tmp_path / "order"
    commands = {n: f"echo {n} start >> {log}; sleep 0.2; echo {n} end >> {log}" for n in "ab"}
    codes, lines = run({**commands, "c": "echo oops >&2; exit 3"}, tmp_path / "logs")
    assert codes == {"a": 0, "b": 0, "c": 3}
    assert log.read_text().split("\n")[:-1] == ["a start", "a end", "b start", "b end"]
    assert (tmp_path / "logs" / "c.log").read_text() == "oops\n"
    at = next(i for i, line in enumerate(lines) if "ended c: exit code 3" in line)
    assert lines[at + 1] == "  oops"  # why it failed


def test_jobs_side_by_side_have_gpus_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert _local.shares(2) == [["4", "5"], ["6", "7"]]
    with pytest.raises(ValueError, match="4 GPUs cannot be shared by --at_once=3"):
        _local.shares(3)
    # Each waits for all others, which ends only if they run at once.
    met = " && ".join(f"test -e {tmp_path}/{n}" for n in "abcd")
    wait = f"timeout 60 sh -c 'until {met}; do sleep 0.05; done'"
    commands = {n: f"echo $CUDA_VISIBLE_DEVICES > {tmp_path}/{n}; {wait}" for n in "abcd"}
    codes, _ = run(commands, tmp_path / "logs", _local.shares(4))
    assert set(codes.values()) == {0}
    assert sorted((tmp_path / n).read_text().strip() for n in "abcd") == ["4", "5", "6", "7"]


@pytest.mark.parametrize(("named", "found"), [("-1", []), ("1,-1,2", ["1"]), ("", [])])
def test_gpus_that_cuda_does_not_see_are_none(monkeypatch, named, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert _local.shares(1) == [found]


def test_without_gpus_nothing_is_shared(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _local.shares(3) == [[], [], []]


def test_a_job_that_asks_for_it_is_started_again(tmp_path):
    counter = tmp_path / "count"
    text = f"echo x >> {counter}; [ $(wc -l < {counter}) -ge 3 ] || exit {_local.AGAIN}"
    assert run({"a": text}, tmp_path / "logs")[0] == {"a": 0}
    for_ever = {"a": f"exit {_local.AGAIN}", "b": "true"}
    codes, lines = run(for_ever, tmp_path / "logs")
    assert codes == {"a": _local.AGAIN, "b": 0}
    assert sum(line.startswith("started a;") for line in lines) == _local.TRIES


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_jobs_and_no_more_are_started(tmp_path, number):
    hold = f"trap 'echo saved >> {tmp_path}/saved; exit {_local.AGAIN}' TERM; "
    hold += "for _ in $(seq 200); do sleep 0.05; done"
    lines: list[str] = []
    jobs = _local.Jobs({n: shell(hold) for n in "abc"}, tmp_path / "logs", lines.append)
    threading.Timer(0.7, os.kill, (os.getpid(), number)).start()
    codes = jobs.run(((), ()))
    assert jobs.stopped and codes == {"a": _local.AGAIN, "b": _local.AGAIN}
    assert f"{number.name}: jobs save and end; the same command goes on" in lines
    assert (tmp_path / "saved").read_text() == "saved\nsaved\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_stop_ends_jobs_that_do_not_save(tmp_path):
    """As a second Ctrl-C does with a run by itself."""
    hold = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(30)"
    commands = {"a": [sys.executable, "-c", hold], "b": shell("true")}
    jobs = _local.Jobs(commands, tmp_path / "logs", lambda line: None)
    for seconds in (1.0, 1.5):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    codes = jobs.run(((),))
    assert time.monotonic() - begun < 15 and list(codes) == ["a"] and codes["a"] != 0


def test_a_stop_while_a_job_is_being_started_reaches_it(tmp_path, monkeypatch):
    jobs = _local.Jobs({"a": shell("sleep 30")}, tmp_path / "logs", lambda line: None)
    original = subprocess.Popen

    def popen(*given, **more):
        jobs._stop(signal.SIGTERM, None)
        return original(*given, **more)

    monkeypatch.setattr(_local.subprocess, "Popen", popen)
    begun = time.monotonic()
    assert jobs.run(((),)) == {"a": -signal.SIGTERM}
    assert time.monotonic() - begun < 10


def test_the_table_shows_losses_and_scores_first(tmp_path):
    names = ["train/InfoNCE", "train/epoch", "eval/mados", "val/loss", "train/loss", "train/a",
             "train/b"]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1} | dict.fromkeys(names, 1.0)))
    lines = _local.report({"r": tmp_path}, {"r": 0}, tmp_path / "out")
    assert lines[0] == (
        "| run | status | step | train/loss | val/loss | eval/mados | train/InfoNCE | train/a |"
    )
    assert lines[2] == "| r | done | 1 | 1 | 1 | 1 | 1 | 1 |"
    table = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert table[0] == ",".join(["run,status,step", *sorted(names)])


def test_results_do_not_replace_files_of_others(tmp_path, monkeypatch):
    class Config:
        run_folder = tmp_path / "run"

    class Job:
        name, arguments = "run", ()

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.csv").write_text("mine")
    monkeypatch.setattr(_local, "command", lambda module, arguments: ["true"])
    checked: Any = [(Job, Config, None)]
    flags.FLAGS.mark_as_parsed()
    mine = flagsaver.flagsaver(output=str(tmp_path / "mine"))
    with mine, pytest.raises(ValueError, match="were not written by this program"):
        submit.run_here(checked, "n")
    assert (tmp_path / "mine" / "results.csv").read_text() == "mine"
    with flagsaver.flagsaver(output=str(tmp_path / "new")):
        assert submit.run_here(checked, "n") == 0 == submit.run_here(checked, "n")
    with flagsaver.flagsaver(output=None):
        assert submit.run_here(checked, "n") == 0
    assert (tmp_path / "n_jobs" / "results.csv").is_file()


def test_report_of_runs_that_came_different_ways(tmp_path):
    for name, losses in {"a": [3.0, 2.0], "b": []}.items():
        (tmp_path / name).mkdir()
        if losses:
            lines = [json.dumps({"step": i + 1, "train/x": v}) for i, v in enumerate(losses)]
            (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    runs = {n: tmp_path / n for n in "abc"}
    lines = _local.report(runs, {"a": 0, "b": -9}, tmp_path / "out")
    assert lines[2:5] == [
        "| a | done | 2 | 2.5 |",
        "| b | killed by SIGKILL | 0 |  |",
        "| c | not started | 0 |  |",
    ]
    table = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert table[:2] == ["run,status,step,train/x", "a,done,2,2.5"]
    assert (tmp_path / "out" / "sweep.png").is_file()


def test_runs_without_a_step_have_no_curves(tmp_path):
    lines = _local.report({"a": tmp_path / "a"}, {"a": 2}, tmp_path / "out")
    assert lines[-1] == "no curves: no run has taken a step"
    assert not (tmp_path / "out" / "sweep.png").exists()


@pytest.mark.slow
def test_a_sweep_is_killed_and_goes_on_by_the_same_command(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text(
        "from olmoearth_jax.configs import common\n\n"
        "def get_config(arg=''):\n    return common.config('smoke', 'nano')\n\n"
        "def sweep():\n    yield {'init_seed': 1}\n    yield {'init_seed': 2}\n"
    )
    command = [
        sys.executable, "-m", "launch.submit", f"--config={config}", "--run_name=s", "--sweep",
        "--scheduler=local", f"--output={tmp_path}/out", "--config.trainer.max_duration.value=3",
        "--config.common.training_modalities=[sentinel2_l2a,openstreetmap_raster]",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": environment, "text": True, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **options) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith("ended"):
                first.send_signal(signal.SIGTERM)
                break
        first.stdout.read()
    assert first.returncode == submit._render.STOPPED
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout
    rows = (tmp_path / "out" / "results.csv").read_text().splitlines()[1:]
    assert [row.split(",")[:3] for row in rows] == [
        ["s_init_seed1", "done", "3"], ["s_init_seed2", "done", "3"]
    ]  # fmt: skip
