"""Drawn sizes of a location: what is allowed, how often, and a loss on a finer grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax import check
from olmoearth_jax.config import ExperimentConfig, TrainModuleConfig
from olmoearth_jax.configlib.official import official
from olmoearth_jax.data.sampler import shape_sampler
from olmoearth_jax.losses import NoTokenLoss, Objective
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.model import heads, latent_mim
from olmoearth_jax.train.query_stride import QueryStride, query_stride
from tests.model.test_heads import batch, small
from tools.goldens.dense_engine import dense_engine


def test_sizes_divide_the_patch_and_keep_the_limit():
    stride = QueryStride(512, 1)
    assert stride.sizes(8, 3) == [2, 4, 8] and stride.sizes(8, 32) == [8]
    assert stride.sizes(1, 32) == [1] and stride.sizes(6, 3) == [1, 2, 3, 6]
    drawn = [stride.draw(6, 3, 1, k) for k in range(400)]
    assert drawn == [stride.draw(6, 3, 1, k) for k in range(400)]
    shares = np.unique(drawn, return_counts=True)[1] / 400
    assert len(shares) == 4 and np.all(np.abs(shares - 0.25) < 0.1)


def test_how_often_the_recipe_would_draw_fine_grids():
    sampler, stride = shape_sampler(official("base", "v1_3"), 128), QueryStride(512, 1)
    assert sampler is not None
    fine = single = 0.0
    for (patch, grid, _), p in sampler.probabilities().items():
        sizes = stride.sizes(patch, grid)
        fine += p * (len(sizes) - 1) / len(sizes)
        single += p * (1 in sizes) / len(sizes)
    assert abs(fine - 0.25) < 0.01 and abs(single - 0.23) < 0.01


def test_it_is_off_unless_asked_for():
    config = official("nano", "v1_3")
    assert query_stride(config) is None
    config.train_module.random_query_stride = True
    assert query_stride(config) == QueryStride(512, config.data_loader.seed)
    config.train_module.max_location_queries = 0
    assert any("max_location_queries" in p for p in check.problems(config))
    older = official("nano", "v1_2")
    older.train_module.random_query_stride = True
    assert any("attention pooler" in p for p in check.problems(older))


@pytest.mark.parametrize("most", [1, 10_000])
def test_the_losses_read_a_grid_of_that_size(most):
    config, group = small(), batch() | {"group": np.int64(0)}
    objective = Objective(
        token_loss=NoTokenLoss(), kind="latent_mim", supervision=heads.supervision_of(config),
        distillation=heads.distillation_of(config),
    )  # fmt: skip
    module = TrainModuleConfig(random_query_stride=True, max_location_queries=most)
    settings = ExperimentConfig(model=config, train_module=module, precision="float32")
    engine = dense_engine(settings, objective, make_mesh(devices=jax.devices()[:1]), 2)
    keys = {engine.prepare([group | {"group": np.int64(k)}])[0].key[-1] for k in range(12)}
    assert keys == ({2} if most == 1 else {1, 2})
    number = next(
        k for k in range(12) if engine.prepare([group | {"group": k}])[0].key[-1] == min(keys)
    )
    prepared = engine.prepare([group | {"group": number}])[0]
    params = jax.tree.map(jnp.asarray, latent_mim.initial_params(config, 1))
    target = latent_mim.target_params(params)
    value, aux = jax.jit(
        lambda p: engine.loss(p, target, prepared.inputs, jax.random.key(0), prepared.key)
    )(params)
    assert np.isfinite(value) and aux["supervision/worldcover"] > 0
