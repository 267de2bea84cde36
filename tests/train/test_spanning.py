"""Arrays that span processes: only the compiled programs of a step may work on them."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from olmoearth_jax.train.metrics import read_metrics
from olmoearth_jax.train.step import SharedCounts
from tests.train import test_processes, test_program, watched
from tools import kill_test

ROOT = Path(__file__).resolve().parents[2]


def on_mesh(value) -> bool:
    return isinstance(value, jax.Array) and isinstance(value.sharding, NamedSharding)


def test_a_step_among_several_processes_has_no_eager_arithmetic(monkeypatch):
    """One process stands for several here: what lies on the mesh is off limits."""
    program = test_program.program()
    state = program.init_state()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with watched.no_eager_operations(on_mesh):
        for step in (1, 2, 3):
            state, report = program.step(state, test_program.groups(1.0, 2.0), step)
    counts = dict(report.host)
    assert counts["encoded_tokens"] == 2.0 and counts["padded_share"] == 0.0
    assert counts["optim/LR (group 0)"] == 0.1 and "stream_tokens" not in counts
    monkeypatch.undo()
    again = test_program.program()
    state = again.init_state()
    for step in (1, 2, 3):
        state, alone = again.step(state, test_program.groups(1.0, 2.0), step)
    assert list(alone.host.items()) == list(counts.items())
    for name, value in alone.metrics.items():
        np.testing.assert_array_equal(report.metrics[name], value, err_msg=name)


def test_eager_arithmetic_is_found():
    x = jax.device_put(np.zeros(8, np.float32), test_program.make_mesh().devices.flat[0])
    with watched.no_eager_operations(lambda v: v is x):
        jax.jit(lambda a: a + 1)(x)
        for operation in (lambda: x + 1, lambda: x / 2, lambda: x.sum(), lambda: x[0], lambda: -x):
            with pytest.raises(AssertionError, match="eager"):
                operation()


def test_counts_are_fetched_when_they_are_looked_at():
    class Unready:
        def __array__(self, *args, **kwargs):
            fetched.append(1)
            return np.array([3.0, 1.0, 8.0, 6.0, 2.0], np.float32)

    fetched: list[int] = []
    names = ("encoded_tokens", "decoded_tokens", "stream_tokens", "masks/a/x", "masks/b/x")
    counts = SharedCounts(names, Unready(), {"train/epoch": 2.0})  # pyright: ignore
    assert not fetched
    expected = {"encoded_tokens": 3, "decoded_tokens": 1, "masks/a/x": 0.75, "masks/b/x": 0.25}
    assert dict(counts) == expected | {"padded_share": 0.5, "train/epoch": 2.0}
    assert fetched == [1] and len(counts) == 6


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_processes_of_several_devices_end_and_equal_one(tmp_path, monkeypatch, devices):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    steps = [*test_processes.TINY, "--config.trainer.max_duration.value=64"]
    steps += [f"--config.compile.cache_dir={tmp_path / 'cache'}"]
    steps += ["--config.trainer.callbacks.tensorboard.image_interval=null"]
    test_processes.train(tmp_path / "one", steps, 1)
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices}")
    kill_test.run_to_end(tmp_path / "many", ["tests.train.watched", *steps], 2)
    one, many = (read_metrics(tmp_path / name) for name in ("one", "many"))
    assert [r["step"] for r in many] == list(range(1, 65))
    for a, b in zip(one, many, strict=True):
        for key in ("data/samples", "data/encoded_tokens", "data/decoded_tokens", "data/holes"):
            assert a[key] == b[key], key
        for key in [k for k in a if k.startswith("masks/")]:
            np.testing.assert_allclose(b[key], a[key], rtol=1e-6, err_msg=key)
    for a, b in zip(one[:8], many[:8], strict=True):  # later, rounding has grown
        for key in [k for k in a if k.startswith("train/") and "micro_steps" not in k]:
            np.testing.assert_allclose(b[key], a[key], rtol=2e-3, atol=1e-5, err_msg=key)
