"""The rest of a run: lock, metrics, TensorBoard, bad steps, progress, signals."""

from __future__ import annotations

import functools
import json
import os
import signal
import struct
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax.files import write_atomically
from olmoearth_jax.train import progress, runfolder
from olmoearth_jax.train.hosts import StopAgreed
from olmoearth_jax.train.metrics import (
    MetricWriter,
    WandbSink,
    is_timing,
    markdown_table,
    parameter_table,
    read_metrics,
)
from olmoearth_jax.train.progress import TrainingDiverged
from olmoearth_jax.train.runfolder import RunFolder, RunFolderInUse, RunLock
from olmoearth_jax.train.signals import Worker, catch_signals, wait
from tests.train import train_toy as toy


def test_lock_keeps_a_second_run_out(tmp_path):
    in_use = pytest.raises(RunFolderInUse, match=f"process {os.getpid()}")
    with RunLock(tmp_path / "run.lock"), in_use:
        toy.run(tmp_path, 2)
    assert toy.run(tmp_path, 2).step == 2
    assert not (tmp_path / "run.lock").exists()


def test_lock_of_a_dead_process_is_replaced(tmp_path):
    code = (
        "import os, sys; from olmoearth_jax.train.runfolder import RunLock; "
        "RunLock(__import__('pathlib').Path(sys.argv[1])).__enter__(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.lock")], check=True)
    assert (tmp_path / "run.lock").exists()
    assert toy.run(tmp_path, 2).step == 2


@pytest.mark.parametrize("skew_s", [0, 86400, -86400])
@pytest.mark.parametrize("alive", [True, False])
def test_lock_of_another_host_is_judged_by_its_heartbeat(tmp_path, monkeypatch, alive, skew_s):
    def renew(path):
        now = time.time() + skew_s  # the clock of the other host
        touch(path, (now, now))

    touch = os.utime
    monkeypatch.setattr(os, "utime", renew)
    path = tmp_path / "run.lock"
    here = runfolder._identity()
    monkeypatch.setattr(runfolder, "_identity", lambda: here | {"host": "elsewhere"})
    with RunLock(path, heartbeat_s=0.1 if alive else 100):
        monkeypatch.setattr(runfolder, "_identity", lambda: here)
        second = RunLock(path, watch_s=0.6)
        if alive:
            with pytest.raises(RunFolderInUse, match="elsewhere"):
                second.__enter__()
        else:
            with second:
                assert "elsewhere" not in path.read_text()
    assert not path.exists()


def test_unwritable_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be created"):
        RunFolder(tmp_path / "file" / "run").create()


@pytest.mark.parametrize("text", ['{"name": "my-app"}', '{"model": {}}', "[1]", "{", "[" * 99999])
def test_a_config_of_something_else_is_not_replaced(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is none of a training run"):
        toy.run(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == text


def test_metrics_of_something_else_are_not_cut(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "loss": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is none of a training run"):
        toy.run(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 9, "loss": 1}\n'
    (tmp_path / "metrics.jsonl").write_text("")  # as a run leaves it that was killed as it began
    assert toy.run(tmp_path, 2).step == 2


def test_atomic_write_leaves_no_traces(tmp_path):
    write_atomically(tmp_path / "x.json", "one")
    write_atomically(tmp_path / "x.json", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "two"


def events(folder):
    """(step, tag, value or None) of all TensorBoard event files, read by their format."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                yield event.step, "session", None
            for value in event.summary.value:
                yield event.step, value.tag, value.simple_value


def test_tensorboard_can_be_read(tmp_path):
    toy.run(tmp_path, 6, hard_stop=4, tensorboard=True)
    found = list(events(tmp_path / "tensorboard"))
    losses = [(step, value) for step, tag, value in found if tag == "train/loss"]
    written = [(r["step"], np.float32(r["train/loss"])) for r in read_metrics(tmp_path)]
    assert losses == written and len(losses) == 4
    tags = {tag for _, tag, _ in found}
    assert {"config/text_summary", "parameters/text_summary"} <= tags
    toy.run(tmp_path, 6, tensorboard=True)
    found = list(events(tmp_path / "tensorboard"))
    assert (5, "session", None) in found  # later steps of the first run would be hidden
    assert [step for step, tag, _ in found if tag == "train/loss"] == [1, 2, 3, 4, 5, 6]


def test_metrics_are_exact_and_valid_json(tmp_path):
    folder = RunFolder(tmp_path).create()
    writer = MetricWriter(folder, tensorboard=False)
    value = np.float32(0.1)
    writer.write(1, {"a": value, "b": float("nan"), "c": -np.inf, "d": ["x", 1], "e": np.int32(3)})
    writer.close()
    line = folder.metrics.read_text()
    assert json.loads(line, parse_constant=pytest.fail)["b"] == "nan"
    (record,) = read_metrics(tmp_path)
    assert np.float32(record["a"]) == value and np.isnan(record["b"]) and record["c"] == -np.inf
    assert record["d"] == ["x", "1"] and record["e"] == 3
    assert is_timing("throughput/eta_s") and is_timing("eval_time/x") and not is_timing("eval/x")


def test_a_run_that_is_not_there_is_told_with_the_one_that_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local_output" / "my_run").mkdir(parents=True)
    for given, said in (
        ("my_run", r"no folder my_run; did you mean local_output/my_run\?"),
        ("local_output/my_ran", r"no folder .*my_ran; did you mean local_output/my_run\?"),
        ("other", "no folder other$"),
        ("local_output/my_run", "no metrics file local_output/my_run/metrics.jsonl: has the run"),
        ("x.jsonl", "no metrics file x.jsonl"),
    ):
        with pytest.raises(ValueError, match=said):
            read_metrics(given)


def test_parameter_table():
    rows = parameter_table({"b": np.full((2, 2), 3.0, np.float32), "a": jnp.zeros(())})
    assert rows[1] == ("b", "2x2", "float32", 4, "6") and rows[0][1] == "scalar"
    assert "| total | | | 5 | |" in markdown_table(rows)


def test_three_bad_steps_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(TrainingDiverged, match="sample_11, sample_12, sample_13") as error:
        toy.run(tmp_path, 20, stream=toy.ToyStream(nan_steps=(3, 4, 11, 12, 13)))
    assert "Steps 11 to 13" in str(error.value)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records][:13] == list(range(1, 14))
    assert records[2]["data/bad_ids"] == ["sample_3"] and np.isnan(records[2]["train/loss"])
    assert np.isfinite(records[4]["train/loss"])


def test_data_that_ends_early_is_an_error(tmp_path):
    class Short(toy.ToyStream):
        def batches(self, start_step, stop_step):
            return super().batches(start_step, 3)

    with pytest.raises(RuntimeError, match="ended before step 4"):
        toy.run(tmp_path, 9, stream=Short())
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]  # 2 and 3 were in flight


def test_errors_of_the_reader_and_the_program_reach_the_caller(tmp_path):
    class Broken(toy.ToyStream):
        def batches(self, start_step, stop_step):
            yield from super().batches(start_step, 2)
            raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        toy.run(tmp_path, 9, stream=Broken())
    assert not (tmp_path / "run.lock").exists()


def test_progress_line():
    record = {"train/loss": 1.25, "train/good_micro_steps": 4, "data/padded_share": 0.07}
    rates = {
        "throughput/samples_per_s": 35.2,
        "throughput/encoded_tokens_per_s": 12345.0,
        "throughput/step_time_p50_s": 0.5,
        "throughput/step_time_p99_s": 0.75,
        "throughput/data_wait_share": 0.02,
        "throughput/eta_s": 90061,
    }
    line = progress.progress_line(12, 100, record, rates)
    assert line == (
        "step 12/100  loss 1.25  35.2 samples/s  12.3k encoded tokens/s  padded 7%  "
        "0.5 s/step (p99 0.75)  data wait 2%  ETA 1d 1:01:01"
    )
    assert progress.duration(59.6) == "0:01:00" and progress.short(2.5e6) == "2.5M"


def test_the_device_is_not_waited_for_at_every_step(tmp_path):
    writer = MetricWriter(RunFolder(tmp_path).create(), tensorboard=False)
    recorder = progress.Recorder(writer, last_step=9, say=[].append)

    class Unready:
        metrics = property(lambda self: pytest.fail("fetched too early"))
        host: dict[str, float] = {}
        bad_ids: list[str] = []

    for step in range(1, progress.MAX_IN_FLIGHT + 1):
        recorder.add(step, Unready(), 0.0)
    recorder.flush()
    writer.close()


def test_signals_set_the_flag_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with catch_signals() as flag:
        assert not flag.told()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert flag.requested and flag.told() and flag.reason == "SIGTERM"
        with pytest.raises(StopAgreed):
            flag.hosts.agree()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_worker_and_wait():
    worker = Worker("test")
    assert worker.call(lambda a, b: a + b, 1, 2) == 3
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 / 0)
    polled: list[float] = []
    future = worker.submit(time.sleep, 0.3)
    assert not wait(future, stop=lambda: len(polled) > 0, poll=polled.append, interval_s=0.05)
    assert wait(future)
    worker.close()


def test_wandb_without_key_or_package_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = RunFolder(tmp_path).create()
    with pytest.raises(ValueError, match="WANDB_API_KEY"):
        WandbSink(folder, project="p", name="n")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install"):
        WandbSink(folder, project="p", name="n")


def test_wandb_gets_the_numbers_and_resumes_its_run(tmp_path, monkeypatch):
    """With a stand-in for the package: what it is asked for, and what it is given."""
    started, logged = [], []

    class Run:
        id = "abc"

        def log(self, values, step):
            logged.append((step, dict(values)))

        def finish(self):
            logged.append("finished")

    module = types.ModuleType("wandb")
    module.init = lambda **options: started.append(options) or Run()  # type: ignore[attr-defined]
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(sys.modules, "wandb", module)
    for stop in (2, 4):
        options = {"project": "p", "name": "n", "config": {"a": 1}}
        sink = functools.partial(WandbSink, RunFolder(tmp_path), **options)
        toy.run(tmp_path, 4, hard_stop=stop, sinks=(sink,))
    assert [options["id"] for options in started] == [None, "abc"]
    assert [entry[0] for entry in logged if entry != "finished"] == [1, 2, 3, 4]
    assert logged[0][1]["train/loss"] == read_metrics(tmp_path)[0]["train/loss"]
    assert logged.count("finished") == 2


def test_profile_of_some_steps(tmp_path):
    toy.run(tmp_path, 4, profile_steps=(2, 2))
    assert [p for p in (tmp_path / "profile").rglob("*") if p.is_file()]
