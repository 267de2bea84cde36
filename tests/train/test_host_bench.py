"""The benchmark of what a host does for a step, on a tiny setting."""

import json
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest

from olmoearth_jax import overrides
from olmoearth_jax.config_files import load_file
from tools.bench import host, host_work, lock_share

TINY = {
    "train_module.rank_microbatch_size": 2,
    "data_loader.global_batch_size": 4,
    "data_loader.sampled_hw_p_list": [1, 2],
}


@pytest.fixture(scope="module")
def work():
    config = overrides.apply_values(load_file("configs/nano.py:version=v1_2"), TINY)
    with host_work.files_in_memory(16):
        yield host_work.HostWork.build(config, 3, 16)


def test_what_is_packed_is_told_by_the_digest(work):
    first = work.digest()
    assert work.samples == 6 and work.digest() == first
    assert work.digest(with_patches=False) != first
    with host_work.patches_on_device():
        assert work.digest(with_patches=False) == work.digest(with_patches=False)
        (_, buffers, _, _), rung = work.one(0)
    assert [b.shape[-1] for b in buffers] == [s.width for s in work.engine.spec.slots]
    assert rung in work.engine.ladder


def test_phases_add_up(work):
    began = time.process_time()
    phases = host_work.phases_of(work)
    spent = 1e3 * (time.process_time() - began) / work.samples
    assert set(phases) == {phase for phase, _, _ in host_work.PHASES} | {"other"}
    assert 0 < sum(phases.values()) <= spent * 1.01
    assert all(phases[name] > 0 for name in ("crop", "masks", "rows", "patches"))


def test_a_phase_within_another_is_left_out_of_it():
    clock = host_work.Clock()

    def spin(seconds):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    inner = clock.timed("inner", lambda: spin(0.02))
    clock.timed("outer", lambda: (spin(0.01), inner(), inner()))()
    assert 0.04 <= clock.spent["inner"] < 0.06 and 0.01 <= clock.spent["outer"] < 0.03


def test_figures_of_an_arm(work):
    watch = lock_share.LockWatch(1e-4, 0.1, 1.0)
    found = host_work.measure(work, 2, watch)
    told = host.joined([{**found, "digest": "a", "device": "1 x cpu"}] * 2)
    assert told["processes"] == 2 and told["digest"] == "a"
    assert told["samples_per_core_s"] == pytest.approx(work.samples / found["cpu_s"])
    assert told["cpu_ms_per_sample"] == pytest.approx(1e3 / told["samples_per_core_s"])
    assert told["slowest_and_fastest_pass"] == sorted(told["slowest_and_fastest_pass"])
    assert told["lock_ms"] >= 0 and 0 <= told["lock_share"] <= 1
    unknown = host.joined([found | {"lock_share": None, "digest": "a", "device": "1 x cpu"}])
    assert unknown["lock_ms"] is None and unknown["lock_share"] is None


def test_the_share_that_holds_the_lock(monkeypatch):
    late = {"free": 10, "held": 90, "work": 30}  # of 100 wakes

    def latenesses(work):
        wakes = np.where(np.arange(100) < late[work()], 0.002, 0.0001)
        return wakes + np.arange(100) * 1e-9  # no two are equal, so that a quantile tells them

    monkeypatch.setattr(lock_share, "latenesses", latenesses)
    monkeypatch.setattr(lock_share, "free_load", lambda seconds: "free")
    monkeypatch.setattr(lock_share, "held_load", lambda seconds: "held")
    watch = lock_share.LockWatch.calibrated()
    assert (watch.free, watch.held) == (0.1, 0.9)
    assert watch.share(lambda: "work") == pytest.approx((0.3 - 0.1) / (0.9 - 0.1))
    late["work"] = 95
    assert watch.share(lambda: "work") == 1.0
    assert lock_share.LockWatch(1.0, 0.1, 1.0).share(lambda: "work") is None


def test_a_held_lock_makes_wakes_late():
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.05)  # a busy machine only makes wakes later than so
    try:
        found = lock_share.latenesses(lambda: lock_share.held_load(0.6))
    finally:
        sys.setswitchinterval(before)
    assert len(found) > 5 and np.median(found) > 0.01


def test_one_arm_as_a_program():
    command = [sys.executable, "-m", "tools.bench.host", "--config=configs/nano.py:smoke"]
    command += ["--host_arms=one", "--host_groups=1", "--host_repeats=1", "--host_tile_px=32"]
    done = subprocess.run(
        [*command, "--host_calibration_s=0.1"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, done.stdout.splitlines())
    assert line["arm"] == "one" and line["samples_per_core_s"] > 0 and line["digest"]


def test_mistakes_are_told(monkeypatch):
    monkeypatch.setattr(host, "_ARMS", mock.Mock(value=["one", "tow"]))
    with pytest.raises(ValueError, match=r"unknown arm 'tow'; did you mean 'two'"):
        host.main()
    child = host._Child({"nothing": 0}, 1)
    try:
        with pytest.raises(ValueError, match=r"(?s)a process of the benchmark failed.*'config'"):
            child.answer()
    finally:
        child.close()
