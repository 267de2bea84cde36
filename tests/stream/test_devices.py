"""A step is the same on 1, 2, 4 and 8 devices, under both engines, and with sharded parameters."""

import pytest

from tests.stream.several_devices import run

SCRIPT = """
import jax
import numpy as np
from olmoearth_jax import losses
from olmoearth_jax.train import assemble
from olmoearth_jax.losses import Objective
from olmoearth_jax.mesh import make_mesh, rules_of
from olmoearth_jax.train.step import TrainProgram
from tests.stream.builders import make_group, make_spec, small_model
from tests.stream.several_devices import compare, step_of
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
    return step_of(program, state, [a, b])

one = step(1)
METRICS = ("train/ModalityPatchDisc", "train/InfoNCE", "optim/total grad norm")
CASES = [(2, 1, (), False), (4, 2, RULES, False), (8, 1, (), False), (8, 4, RULES, False)]
CASES += [(1, 1, (), True), (4, 2, RULES, True)]
for devices, fsdp, rules, dense in CASES:
    print(devices, fsdp, dense)
    compare(step(devices, fsdp, rules, dense), one, METRICS)
print("equal")
"""


@pytest.mark.slow
def test_step_does_not_depend_on_the_devices():
    run(SCRIPT, 8)
