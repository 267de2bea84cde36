"""The stream engine equals the dense one: losses and gradients, any shapes and gaps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax import losses
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.model import latent_mim
from olmoearth_jax.stream.forward import Objective
from olmoearth_jax.stream.ladder import build_ladder
from olmoearth_jax.stream.token_counts import count_tokens, needs
from olmoearth_jax.train.assemble import stream_engine
from tests.stream.builders import make_group, make_spec, small_model
from tools.goldens.dense_engine import dense_engine

V1_LOSS = {"type": "modality_patch_discrimination_new", "tau": 0.1}

pytestmark = pytest.mark.usefixtures("quick_compile")


def _params(config, seed=0):
    """Parameters with nothing left at zero, so that every path shows in the gradient."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(x + 0.05 * rng.standard_normal(x.shape), jnp.float32),
        latent_mim.initial_params(config, seed),
    )


def _both(config, groups, strategy, loss=V1_LOSS, devices=1):
    mesh = make_mesh(devices=jax.devices()[:devices])
    size = len(groups[0]["position"])
    spec = make_spec(config, strategy, size * len(groups) // devices, devices, len(groups))
    owner = np.zeros(size * len(groups), int)
    need = needs([count_tokens(g, spec) for g in groups], owner, spec, 1)
    ladder = build_ladder(spec, [need], 2) if devices == 1 else (spec.top_rung(),)
    objective = Objective(losses.build(loss), losses.InfoNCE(0.1, 0.1))
    settings = ExperimentConfig(model=config, precision="float32")
    stream = stream_engine(settings, spec, ladder, objective, mesh)
    dense = dense_engine(settings, objective, make_mesh(devices=jax.devices()[:1]), size)
    params = _params(config)
    target = latent_mim.target_params(_params(config, 1))
    key = jax.random.key(5)

    def evaluate(engine):
        total, grads = 0.0, None
        for prepared in engine.prepare(groups):
            inputs = prepared.inputs  # packed here, outside of any trace

            def loss(params, prepared=prepared, inputs=inputs):
                value, _ = engine.loss(params, target, inputs, key, prepared.key)
                return value

            value, g = jax.jit(jax.value_and_grad(loss))(params)
            count = len(engine.prepare(groups))
            total += float(value) / count
            g = jax.tree.map(lambda x, n=count: np.asarray(x) / n, g)
            grads = g if grads is None else jax.tree.map(np.add, grads, g)
        return total, grads

    return evaluate(stream), evaluate(dense)


def _assert_equal(ours, oracle):
    assert ours[0] == pytest.approx(oracle[0], rel=1e-5)
    for (path, a), (_, b) in zip(
        latent_mim.flatten(ours[1]), latent_mim.flatten(oracle[1]), strict=True
    ):
        np.testing.assert_allclose(
            a, b, rtol=2e-4, atol=2e-5 * max(1.0, np.abs(b).max()), err_msg="/".join(path)
        )


def test_mixed_shapes_gaps_and_holes():
    rng = np.random.default_rng(0)
    config = small_model()
    a, strategy = make_group(rng, 4, 3, 2, first=0, holes=(2,))
    b, _ = make_group(rng, 4, 2, 4, first=4)
    _assert_equal(*_both(config, [a, b], strategy))


def test_drop_path_draws_agree():
    rng = np.random.default_rng(1)
    config = small_model()
    config.encoder_config.drop_path = 0.4
    config.decoder_config.drop_path = 0.3
    group, strategy = make_group(rng, 4, 2, 3)
    _assert_equal(*_both(config, [group], strategy))


@pytest.mark.parametrize("grid", [1, 4])
def test_no_visible_partner_for_a_modality(grid):
    rng = np.random.default_rng(grid)
    group, strategy = make_group(rng, 4, grid, 1, missing=0.8)
    _assert_equal(*_both(small_model(), [group], strategy))


def test_every_sample_a_hole_gives_zero():
    rng = np.random.default_rng(2)
    group, strategy = make_group(rng, 4, 2, 2, holes=(0, 1, 2, 3))
    (value, grads), _ = _both(small_model(), [group], strategy)
    assert value == 0.0
    assert all(not x.any() for _, x in latent_mim.flatten(grads))
