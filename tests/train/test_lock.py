"""The run lock: a living owner on this host, a dead one, and an owner that lost it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from olmoearth_jax.train import runfolder
from olmoearth_jax.train.runfolder import RunFolderInUse, RunFolderLost, RunLock
from tests.train import train_toy as toy

OWNER = (
    "import sys, time, pathlib; from olmoearth_jax.train.runfolder import RunLock; "
    "lock = RunLock(pathlib.Path(sys.argv[1]), heartbeat_s=0.1).__enter__(); "
    "print('locked', flush=True); time.sleep(600)"
)


@pytest.fixture
def owner(tmp_path):
    """Another process that holds tmp_path/run.lock."""
    command = [sys.executable, "-c", OWNER, str(tmp_path / "run.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def older(record: dict) -> dict:
    """A lock as earlier versions wrote it: their namespace is a path with the process in it."""
    return record | {"namespace": f"/proc/{record['pid']}/ns/{record['namespace']}"}


@pytest.mark.parametrize("change", [dict, older])
def test_a_stopped_owner_keeps_its_lock(tmp_path, owner, change):
    path = tmp_path / "run.lock"
    owner.send_signal(signal.SIGSTOP)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    begun = time.monotonic()
    with pytest.raises(RunFolderInUse, match=f"process {owner.pid} "):
        RunLock(path, watch_s=30).__enter__()
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_owner_is_taken_at_once(tmp_path, owner, reaped):
    owner.kill()
    if reaped:
        owner.wait()
    else:
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # dead, but still a zombie
    begun = time.monotonic()
    with RunLock(tmp_path / "run.lock", watch_s=30):
        assert time.monotonic() - begun < 5


def test_a_later_process_with_the_number_of_the_owner_is_not_the_owner(tmp_path):
    path = tmp_path / "run.lock"
    path.write_text(json.dumps(runfolder._identity() | {"started": "1", "token": "x"}))
    begun = time.monotonic()
    with RunLock(path, watch_s=30):
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize("change", [{"pid": "4x"}, {"pid": None}, {"started": None}, {"pid": True}])
def test_an_owner_without_a_usable_number_is_watched(tmp_path, change):
    path = tmp_path / "run.lock"
    path.write_text(json.dumps(runfolder._identity() | change))
    begun = time.monotonic()
    with RunLock(path, watch_s=0.5):
        assert time.monotonic() - begun >= 0.5


def replace(path):
    path.unlink()
    path.write_text(json.dumps({"pid": 4321, "host": "elsewhere", "token": "theirs"}))


@pytest.mark.parametrize(
    "loss, words",
    [
        (replace, "taken over by process 4321 on elsewhere"),
        (os.unlink, "run.lock was deleted"),
        (lambda path: shutil.rmtree(path.parent), "was deleted while this run was writing"),
    ],
)
def test_a_run_that_lost_its_lock_writes_no_more(tmp_path, loss, words):
    folder = tmp_path / "run"

    class Losing(toy.ToyProgram):
        def step(self, state, groups, step, gate=lambda: None):
            if step == 7:
                until = time.monotonic() + 60
                while not (folder / "checkpoints" / "4").exists() and time.monotonic() < until:
                    time.sleep(0.05)
                loss(folder / "run.lock")
            return super().step(state, groups, step, gate)

    with pytest.raises(RunFolderLost, match=words):
        toy.run(folder, 30, program=Losing())
    if loss is replace:
        assert json.loads((folder / "run.lock").read_text())["token"] == "theirs"
    saved = [int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit()]
    assert saved == ([4] if folder.exists() else [])


def test_the_heartbeat_leaves_the_lock_of_another_alone(tmp_path):
    path = tmp_path / "run.lock"
    with RunLock(path, heartbeat_s=0.05) as lock:
        replace(path)
        os.utime(path, (1, 1))
        time.sleep(0.3)
        assert path.stat().st_mtime == 1
        with pytest.raises(RunFolderLost):
            lock.check()
    assert path.exists()


def test_a_lock_that_is_a_folder_or_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(ValueError, match="is a folder, not the lock of a run"):
        RunLock(tmp_path / "run.lock").__enter__()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runfolder.Path, "write_text", full)
    with pytest.raises(ValueError, match="cannot be locked: No space left on device"):
        RunLock(tmp_path / "other.lock").__enter__()
