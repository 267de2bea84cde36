"""Steps of one computation on several devices, compared in a process that has so many."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from olmoearth_jax.model import latent_mim

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, devices: int) -> None:
    """Runs a script that ends by printing 'equal', with so many devices of the CPU."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip().endswith("equal")


def step_of(program, state, groups):
    """(gradients, metrics) of a step."""
    grads, _ = program.gradients(state, groups)
    _, report = program.step(state, groups, 1)
    return jax.device_get(grads), jax.device_get(report.metrics)


def compare(got, expected, names) -> None:
    """Raises AssertionError where gradients, or metrics of some names, differ by more than sums
    in another order do."""
    for name in names:
        np.testing.assert_allclose(
            got[1][name], expected[1][name], rtol=2e-5, atol=1e-7, err_msg=name
        )
    pairs = zip(latent_mim.flatten(got[0]), latent_mim.flatten(expected[0]), strict=True)
    for (path, x), (_, y) in pairs:
        limit = 1e-6 + 2e-4 * np.abs(y).max()
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=limit, err_msg="/".join(path))
