"""A v1.3 step is the same on one device and on four, with sharded parameters, and dense."""

import pytest

from tests.stream.several_devices import run

SCRIPT = """
import jax
from olmoearth_jax.mesh import make_mesh, rules_of
from olmoearth_jax.stream.stream_shape import MicroStepSize
from olmoearth_jax.train import assemble, targets
from olmoearth_jax.train.step import TrainProgram
from tests.engines.compare import random_params
from tests.stream.builders import GRID_TIMESTEPS
from tests.stream.grids import grid_groups, grid_model, grid_objective
from tests.stream.several_devices import compare, step_of
from tests.train.steady import steady
from tools.goldens.dense_engine import dense_engine

assert jax.device_count() == 4
config = grid_model()
config.encoder_config.drop_path = config.decoder_config.drop_path = 0.2
groups, strategy = grid_groups([(3, 2), (2, 4)], 5)
objective = grid_objective(config, most=11)

def step(devices, fsdp=1, dense=False):
    mesh = make_mesh(-1, fsdp, jax.devices()[:devices])
    settings = steady(config)
    settings.fsdp_rules = [list(rule) for rule in rules_of([], fsdp)]
    if dense:
        engine = dense_engine(settings, objective, mesh, 4)
    else:
        k, samples = assemble.micro_step_shape(8, 4, devices)
        size, needs = MicroStepSize(samples, devices, k), assemble.StreamNeeds.of(objective)
        spec = assemble.stream_spec(config, [strategy], GRID_TIMESTEPS, size, needs)
        engine = assemble.stream_engine(settings, spec, [spec.top_rung()], objective, mesh)
    trained = assemble.trainable_leaves(config, objective.pools, objective)
    program = TrainProgram(settings, engine, mesh, trained, 10)
    # Not the initial values: where drop path leaves a block out, predictions would be 0.
    start = jax.device_get((random_params(config, 0), random_params(config, 1)))
    state = program.state_from(start[0], targets.start_of(start[1], objective))
    return step_of(program, state, groups)

one = step(1)
names = [n for n in one[1] if "micro_steps" not in n and not n.startswith("modality/")]
for devices, fsdp, dense in [(1, 1, True), (4, 1, False), (4, 2, False)]:
    print(devices, fsdp, dense)
    compare(step(devices, fsdp, dense), one, names)
print("equal")
"""


@pytest.mark.slow
def test_step_does_not_depend_on_the_devices():
    run(SCRIPT, 4)
