"""Evaluates both engines on the same groups, parameters and draws, and compares them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax.config import ExperimentConfig, TrainModuleConfig
from olmoearth_jax.losses import Objective
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.modalities import SINGLE_BAND_SET_OVERRIDES
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import ModelConfig, ReconstructorConfig
from olmoearth_jax.stream.ladder import build_ladder
from olmoearth_jax.stream.stream_shape import MicroStepSize
from olmoearth_jax.stream.token_counts import count_tokens, needs
from olmoearth_jax.train import assemble, targets
from olmoearth_jax.train.query_stride import query_stride
from tests.stream.builders import GRID_TIMESTEPS, small_model
from tools.goldens.dense_engine import dense_engine

NAMES = ("sentinel2_l2a", "worldcover", "landsat")
SINGLE = dict(SINGLE_BAND_SET_OVERRIDES)


def model_of(kind: str = "latent_mim", pixels: bool = False, **changes) -> ModelConfig:
    """A small model of a kind, with a reconstructor if `pixels`."""
    config = small_model(NAMES, **changes)
    encoder = config.encoder_config
    if pixels:
        assert config.decoder_config is not None
        config.reconstructor_config = ReconstructorConfig(
            dataclasses.replace(config.decoder_config),
            list(NAMES),
            encoder.max_patch_size,
            encoder.tokenization_overrides,
        )
    config.kind = kind
    return config


def random_params(config: ModelConfig, seed: int):
    """Parameters with nothing left at zero, so that every path shows in the gradient."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(x + 0.05 * rng.standard_normal(x.shape), jnp.float32),
        latent_mim.initial_params(config, seed),
    )


def evaluate(engine, groups, params, target):
    """(loss, terms, gradients), mean over micro-steps."""
    key, parts = jax.random.key(5), []
    for prepared in engine.prepare(groups):

        def loss(params, target, inputs, program=prepared.key):
            value, aux = engine.loss(params, target, inputs, key, program)
            return value, {k: v.mean() for k, v in aux.items() if not k.startswith("modality/")}

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        parts.append(jax.device_get(step(params, target, prepared.inputs)))
    return jax.tree.map(lambda *xs: np.mean(np.stack(xs), axis=0), *parts)


def check(
    config, groups, strategies, objective: Objective, module: TrainModuleConfig | None = None
) -> None:
    """Asserts that stream and dense agree in loss, terms and gradients."""
    settings = ExperimentConfig(
        model=config, train_module=module or TrainModuleConfig(), precision="float32"
    )
    stride = query_stride(settings)
    mesh = make_mesh(devices=jax.devices()[:1])
    size = len(groups[0]["position"])
    step = MicroStepSize(size * len(groups), 1, len(groups))
    needed = assemble.StreamNeeds.of(objective)
    most = 0 if stride is None else stride.most
    spec = assemble.stream_spec(config, strategies, GRID_TIMESTEPS, step, needed, most)
    spec = dataclasses.replace(spec, chunk=2)
    owner = np.zeros(size * len(groups), int)
    fine = [1 if stride is None else stride.per_patch(g) for g in groups]
    counts = [count_tokens(g, spec, n) for g, n in zip(groups, fine, strict=True)]
    need = needs(counts, owner, spec, 1)
    ladder = build_ladder(spec, [need], 2)
    params = random_params(config, 0)
    target = targets.start_of(random_params(config, 1), objective)
    stream = assemble.stream_engine(settings, spec, ladder, objective, mesh)
    dense = dense_engine(settings, objective, mesh, size)
    (ours, our_terms), our_grads = evaluate(stream, groups, params, target)
    (oracle, terms), grads = evaluate(dense, groups, params, target)
    assert ours == pytest.approx(oracle, rel=2e-5)
    for name, value in terms.items():
        assert our_terms[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    pairs = zip(latent_mim.flatten(our_grads), latent_mim.flatten(grads), strict=True)
    for (path, a), (_, b) in pairs:
        np.testing.assert_allclose(
            a, b, rtol=2e-4, atol=2e-5 * max(1.0, np.abs(b).max()), err_msg="/".join(path)
        )
