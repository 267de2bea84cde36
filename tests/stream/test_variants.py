"""Every other way to compute the blocks gives the loss and the gradients of today's."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from olmoearth_jax import losses
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.attention import row_attention
from olmoearth_jax.model.blocks import BlockShape, Reading, Running, run_blocks, stack
from olmoearth_jax.model.variants import ALL, TODAY, Variant
from olmoearth_jax.stream.forward import Objective
from olmoearth_jax.stream.ladder import build_ladder
from olmoearth_jax.stream.token_counts import count_tokens, needs
from olmoearth_jax.train.assemble import stream_engine
from tests.stream.builders import make_group, make_spec, small_model

NAMES = ("sentinel2_l2a", "worldcover")
LOSS = {"type": "modality_patch_discrimination_new", "tau": 0.1}

# As exact as float32 allows: sums in another order.
EXACT = [
    Variant(unroll=2), Variant(unroll=4), Variant(unroll=ALL), Variant(keep_hidden=True),
    Variant(joined=True), Variant(norm_once=True), Variant(turn_again=True),
    Variant(open_again=True),
]  # fmt: skip
TOGETHER = Variant(
    unroll=ALL, keep_hidden=True, joined=True, norm_once=True, turn_again=True, open_again=True
)


def _named(variant: Variant) -> str:
    """Only what differs from today's."""
    changed = dataclasses.asdict(variant).items() - dataclasses.asdict(TODAY).items()
    return ",".join(f"{k}={v}" for k, v in sorted(changed))


def _params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(x + 0.05 * rng.standard_normal(x.shape), jnp.float32),
        latent_mim.initial_params(config, seed),
    )


@pytest.fixture(scope="module")
def case():
    """(engine, its micro-step, parameters, target) of a model with everything a block can have."""
    config = small_model(NAMES, position_encoding="rope_3d_mixed", qk_norm=True)
    assert config.decoder_config is not None
    config.encoder_config.depth, config.decoder_config.depth = 4, 1
    config.encoder_config.drop_path = 0.2
    group, strategy = make_group(np.random.default_rng(0), 2, 2, 2, names=NAMES)
    spec = make_spec(config, strategy, 2)
    need = needs([count_tokens(group, spec)], np.zeros(2, int), spec, 1)
    term = cast(losses.TokenLoss, losses.build(LOSS))
    objective = Objective(term, losses.InfoNCE(0.1, 0.1))
    settings = ExperimentConfig(model=config, precision="float32")
    mesh = make_mesh(devices=jax.devices()[:1])
    engine = stream_engine(settings, spec, build_ladder(spec, [need], 1), objective, mesh)
    (prepared,) = engine.prepare([group])
    target = latent_mim.target_params(_params(config, 1))
    return engine, prepared, _params(config), target


def _evaluate(case, variant: Variant):
    engine, prepared, params, target = case
    forward = dataclasses.replace(engine.forward, variant=variant)
    batch, patches, pixels, drawn = prepared.inputs

    def loss(params):
        key = jax.random.key(5)
        return forward(params, target, batch, patches, key, prepared.key, pixels, drawn)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), {"/".join(p): np.asarray(x) for p, x in latent_mim.flatten(grads)}


@pytest.fixture(scope="module")
def today(case):
    """Loss and gradients of what training does."""
    return _evaluate(case, TODAY)


def _stacks(variant: Variant):
    """(value, gradients) of four blocks that read themselves, then three that read those."""
    config = small_model(NAMES, position_encoding="rope_3d_mixed", qk_norm=True).encoder_config
    shape = dataclasses.replace(BlockShape.of(config, 32), layer_scale=True)
    graph, shapes = latent_mim.split(
        nnx.eval_shape(lambda: nnx.List([stack(shape, 4), stack(shape, 3)]))
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) / 4, x.dtype), shapes)
    x, seen, position = (
        jnp.asarray(rng.standard_normal((2, 12, n)), jnp.float32) for n in (32, 32, 3)
    )

    def drop(layer, branch):
        return 1.0 + 0.1 * (layer + branch) * (jnp.arange(12)[:, None] % 2)

    def loss(params, x, seen):
        own, cross = latent_mim.merge(graph, params)
        running = Running(drop, variant=variant)
        latent = run_blocks(own, seen, Reading(row_attention, position), running)
        reading = Reading(row_attention, position, latent, position)
        return jnp.square(run_blocks(cross, x, reading, running)).mean()

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(params, x, seen)
    return float(value), [np.asarray(g) for g in jax.tree.leaves(grads)]


@pytest.fixture(scope="module")
def stacks_today():
    """Value and gradients of stacks as they are computed today."""
    return _stacks(TODAY)


@pytest.mark.parametrize("variant", EXACT, ids=_named)
def test_blocks_equal_todays(stacks_today, variant):
    value, grads = _stacks(variant)
    assert value == pytest.approx(stacks_today[0], rel=1e-6)
    for ours, exact in zip(grads, stacks_today[1], strict=True):
        wide = max(1e-3, np.abs(exact).max())
        np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-5 * wide)


def test_a_training_step_equals_todays(case, today):
    value, grads = _evaluate(case, TOGETHER)
    assert value == pytest.approx(today[0], rel=1e-6)
    for name, x in grads.items():
        wide = max(1e-3, np.abs(today[1][name]).max())
        np.testing.assert_allclose(x, today[1][name], rtol=0, atol=2e-5 * wide, err_msg=name)


def test_a_narrow_stream_rounds_and_no_more(case, today):
    value, grads = _evaluate(case, Variant(narrow=True))
    assert value != today[0]
    assert value == pytest.approx(today[0], rel=4e-3)
    assert {x.dtype for x in grads.values()} == {np.dtype(np.float32)}
    flat, exact = (np.concatenate([g[n].ravel() for n in sorted(g)]) for g in (grads, today[1]))
    # bfloat16 has eight bits: a part in 256 at each of six blocks, of either sign.
    assert np.linalg.norm(flat - exact) < 0.02 * np.linalg.norm(exact)


def _kept(variant: Variant) -> list[jax.ShapeDtypeStruct]:
    """What the loop over blocks keeps for the backward pass, in bfloat16 products."""
    config = small_model(position_encoding="rope_3d_mixed")
    config.encoder_config.depth = 4
    graph, shapes = latent_mim.graph(config, jnp.bfloat16)
    tokens, width = 24, config.encoder_config.embedding_size

    def loss(params, x, position):
        blocks = latent_mim.merge(graph, params).encoder.blocks
        reading = Reading(lambda q, k, v: q * k + v, position)
        return run_blocks(blocks, x, reading, Running(variant=variant)).sum()

    x = jnp.zeros((tokens, width))
    made = jax.make_jaxpr(jax.grad(loss))(shapes, x, jnp.zeros((tokens, 3)))
    loop = next(e for e in made.jaxpr.eqns if e.primitive.name == "scan")
    return [v.aval for v in loop.outvars if v.aval.ndim > 2 and v.aval.shape[1] == tokens]


def _bytes(arrays) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)


def test_a_narrow_stream_keeps_nothing_wide():
    kept = _kept(Variant(narrow=True, turn_again=True))
    assert kept and {x.dtype for x in kept} == {jnp.dtype(jnp.bfloat16)}


def test_what_is_computed_again_is_not_kept():
    today = _bytes(_kept(TODAY))
    assert _bytes(_kept(Variant(turn_again=True))) < 0.8 * today
    assert _bytes(_kept(Variant(joined=True))) < today
    assert _bytes(_kept(Variant(keep_hidden=True))) > today


def test_the_loop_is_as_long_as_asked():
    assert len(_loops(TODAY)) == len(_loops(Variant(unroll=2))) == 2
    assert not _loops(Variant(unroll=ALL))


def _loops(variant: Variant) -> list:
    config = small_model()
    config.encoder_config.depth = 4
    graph, shapes = latent_mim.graph(config)

    def loss(params, x):
        blocks = latent_mim.merge(graph, params).encoder.blocks
        return run_blocks(
            blocks, x, Reading(lambda q, k, v: q * k + v), Running(variant=variant)
        ).sum()

    made = jax.make_jaxpr(jax.grad(loss))(shapes, jnp.zeros((8, 32)))
    return [e for e in made.jaxpr.eqns if e.primitive.name == "scan"]
