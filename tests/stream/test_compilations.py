"""Programs are compiled per capacity, in the first step or behind the training, none afterwards."""

import jax
import numpy as np
import pytest

from olmoearth_jax import losses
from olmoearth_jax.losses import Objective
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.stream.ladder import build_ladder
from olmoearth_jax.stream.token_counts import count_tokens, needs
from olmoearth_jax.train import assemble
from olmoearth_jax.train.compiling import shapes_of
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
        program.programs.join()
        assert program.compile_count == len(ladder) + 1
    assert len(ladder) >= 2 and engine.rung_counts.sum() == len(groups)


def test_what_is_compiled_without_arrays_is_the_same_program():
    """Else `launch.prep` and the first step would fill the cache for nobody."""
    rng = np.random.default_rng(0)
    config = small_model()
    group, strategy = make_group(rng, 2, 1, 1)
    spec = make_spec(config, strategy, samples=2)
    objective = Objective(losses.build({"type": "modality_patch_discrimination"}))
    mesh, settings = make_mesh(devices=jax.devices()[:1]), steady(config)
    engine = assemble.stream_engine(settings, spec, [spec.top_rung()], objective, mesh)
    program = TrainProgram(settings, engine, mesh, assemble.trainable_leaves(config, False), 10)
    state, (one,) = program.init_state(), engine.prepare([group])
    total = program._zeros(state, one)
    text = []
    for shapes in (lambda tree: tree, shapes_of):
        first = program.abstract_state() if shapes is shapes_of else state
        arguments = (first["params"], first["target"], shapes(total), shapes(one.inputs))
        step = jax.jit(
            program.micro_step(one.key), donate_argnums=2, out_shardings=program._total_shardings
        )
        text.append(step.lower(*arguments, program._rng).as_text())
    assert text[0] == text[1]
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(shapes_of(one.inputs)))
