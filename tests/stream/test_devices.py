"""A step is the same on 1, 2, 4 and 8 devices, under both engines, and with sharded parameters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import jax, numpy as np
from olmoearth_jax import losses
from olmoearth_jax.model import latent_mim
from olmoearth_jax.train import assemble
from olmoearth_jax.losses import Objective
from olmoearth_jax.mesh import make_mesh, rules_of
from olmoearth_jax.train.step import TrainProgram
from tests.stream.builders import make_group, make_spec, small_model
from tests.train.steady import steady
from tools.goldens.dense_engine import dense_engine

assert jax.device_count() == 8
rng = np.random.default_rng(0)
config = small_model()
config.encoder_config.drop_path = 0.2
a, strategy = make_group(rng, 4, 3, 2, first=0, holes=(1,))
b, _ = make_group(rng, 4, 2, 4, first=4)
token_loss = losses.build({"type": "modality_patch_discrimination"})
objective = Objective(token_loss, losses.InfoNCE(0.1, 0.1))
RULES = rules_of([], 2)

def step(devices, fsdp=1, rules=(), dense=False):
    mesh = make_mesh(-1, fsdp, jax.devices()[:devices])
    settings = steady(config)
    settings.fsdp_rules = [list(rule) for rule in rules]
    if dense:
        engine = dense_engine(settings, objective, mesh, 4)
    else:
        k, samples = assemble.micro_step_shape(8, 4, devices)
        spec = make_spec(config, strategy, samples, devices, k)
        engine = assemble.stream_engine(settings, spec, [spec.top_rung()], objective, mesh)
    trained = assemble.trainable_leaves(config, True)
    program = TrainProgram(settings, engine, mesh, trained, 10)
    state = program.init_state()
    grads, _ = program.gradients(state, [a, b])
    state, report = program.step(state, [a, b], 1)
    return jax.device_get(grads), jax.device_get(report.metrics)

one, metrics = step(1)
CASES = [(2, 1, (), False), (4, 2, RULES, False), (8, 1, (), False), (8, 4, RULES, False)]
CASES += [(1, 1, (), True), (4, 2, RULES, True)]
for devices, fsdp, rules, dense in CASES:
    print(devices, fsdp, dense)
    grads, others = step(devices, fsdp, rules, dense)
    for name in ("train/ModalityPatchDisc", "train/InfoNCE", "optim/total grad norm"):
        np.testing.assert_allclose(others[name], metrics[name], rtol=2e-5, err_msg=name)
    for (path, x), (_, y) in zip(
        latent_mim.flatten(grads), latent_mim.flatten(one), strict=True
    ):
        limit = 1e-6 + 2e-4 * np.abs(y).max()
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=limit, err_msg="/".join(path))
print("equal")
"""


@pytest.mark.slow
def test_step_does_not_depend_on_the_devices():
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip().endswith("equal")
