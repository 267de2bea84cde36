"""launch.embed by actors of Ray, which live in the environment of `make env-maps`."""

import contextlib
import json
import os
import signal
import subprocess
import time

import pytest

from tests.maps import region
from tests.maps.other_python import ROOT, python_with
from tests.maps.test_embed import objects


def start(python, out, *given):
    """launch.embed by another interpreter; what it prints goes to <out>.log."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    with open(f"{out}.log", "ab") as log:
        return subprocess.Popen(
            [python, "-m", "launch.embed", *map(str, given), f"--output={out}"],
            stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip


def claimant(out, process, known=()):
    """The process that holds a claim and is none of those known, as soon as there is one."""
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        for path in (out / "job" / "claims").rglob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                pid = json.loads(path.read_text())["pid"]
                if pid not in known:
                    return pid
        time.sleep(0.005)
    raise AssertionError((out.parent / f"{out.name}.log").read_text()[-3000:])


def markers(out):
    return list((out / "job" / "done").rglob("*.json"))


@pytest.mark.slow
def test_dead_actors_and_a_dead_driver_leave_no_trace(tmp_path):
    python = python_with("ray")
    given, quiet, out = region.build(tmp_path), tmp_path / "quiet", tmp_path / "out"
    assert start(python, quiet, *given).wait(600) == 0
    actors = [*given, "--engine=ray", "--actors=2"]
    driver = start(python, out, *actors)
    os.kill(claimant(out, driver), signal.SIGKILL)
    end = time.monotonic() + 300
    while len(markers(out)) < 3 and time.monotonic() < end:
        time.sleep(0.005)
    assert driver.poll() is None
    driver.kill()
    driver.wait()
    log = (tmp_path / "out.log").read_text()
    assert "its actor died; a new one starts" in log
    before = len(markers(out))
    assert 3 <= before < 9
    assert start(python, out, *actors).wait(600) == 0
    assert "complete: " in (tmp_path / "out.log").read_text()
    assert objects(out) == objects(quiet)


@pytest.mark.slow
def test_more_than_ray_has_is_refused(tmp_path):
    python = python_with("ray")
    given, out = region.build(tmp_path), tmp_path / "out"
    flags = ["--engine=ray", "--gpus_per_actor=5000"]
    assert start(python, out, *given, *flags).wait(600) == 2
    assert "1 actors need 5000 GPUs" in (tmp_path / "out.log").read_text()
    again = start(python, out, *given, "--engine=ray", "--shard=0", "--of=2")
    assert again.wait(600) == 2
    assert "--engine=ray has --actors" in (tmp_path / "out.log").read_text()


def test_without_ray_the_extra_is_named(tmp_path, capsys, monkeypatch):
    from tests.maps.test_embed import run

    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert run(*region.build(tmp_path), "--engine=ray", f"--output={tmp_path / 'out'}") == 2
    assert "olmoearth-jax[ray]" in capsys.readouterr().err
