"""Programs are compiled per capacity, all in the first step, and none afterwards."""

import jax
import numpy as np
import pytest

from olmoearth_jax import losses
from olmoearth_jax.losses import Objective
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.stream.ladder import build_ladder
from olmoearth_jax.stream.token_counts import count_tokens, needs
from olmoearth_jax.train import assemble
from olmoearth_jax.train.step import TrainProgram
from tests.stream.builders import make_group, make_spec, small_model
from tests.train.steady import steady


@pytest.mark.slow
def test_no_compilation_after_the_first_step():
    rng = np.random.default_rng(0)
    config = small_model()
    groups = []
    for grid in (1, 2, 3):
        group, strategy = make_group(rng, 4, grid, 2)
        groups.append(group)
    spec = make_spec(config, strategy, samples=4)
    seen = [needs([count_tokens(g, spec)], np.zeros(4, int), spec, 1) for g in groups]
    ladder = build_ladder(spec, seen[:2], 3)
    objective = Objective(
        losses.build({"type": "modality_patch_discrimination"}), losses.InfoNCE(0.1, 0.1)
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    settings = steady(config)
    engine = assemble.stream_engine(settings, spec, ladder, objective, mesh)
    trained = assemble.trainable_leaves(config, True)
    program = TrainProgram(settings, engine, mesh, trained, 10)
    state = program.init_state()
    for step, group in enumerate(groups, start=1):
        state, _ = program.step(state, [group], step)
        assert program.compile_count == len(ladder) + 1
    assert len(ladder) >= 2 and engine.rung_counts.sum() == len(groups)
