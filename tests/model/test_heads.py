"""Heads that only training needs: their place in the model, their values, what trains them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.interop import torch_keys
from olmoearth_jax.losses import MaskedNegativesVec, NoTokenLoss, Objective
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.model import heads, latent_mim
from olmoearth_jax.model.config import (
    AttentionPoolerConfig,
    EncoderConfig,
    LocationTokenDistillationHeadConfig,
    ModelConfig,
    PredictorConfig,
    SupervisedMapConfig,
    SupervisionHeadConfig,
)
from olmoearth_jax.train import assemble
from tools.goldens.dense_engine import dense_engine

NAMES = ["sentinel2_l2a", "srtm", "worldcover"]


def small(**changes) -> ModelConfig:
    shared = {"supported_modality_names": NAMES, "num_heads": 2, "depth": 1, "drop_path": 0.0}
    pooler = AttentionPoolerConfig(
        pooler_dim=16, pooler_depth=1, attn_dim=16, student_dims=[6, 3], student_output_norm=True
    )
    codes = [c / 100 for c in (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100)]
    maps = {
        "worldcover": SupervisedMapConfig("classification", 11, 0.1, codes),
        "srtm": SupervisedMapConfig("regression", 1, regression_loss_type="l1"),
    }
    parts = {
        "supervision_head_config": SupervisionHeadConfig(maps),
        "location_token_distillation_head_config": LocationTokenDistillationHeadConfig(8),
        **changes,
    }
    return ModelConfig(
        encoder_config=EncoderConfig(
            **shared, embedding_size=16, max_patch_size=4, position_encoding="rope_3d_mixed",
            attention_pooler_config=pooler,
        ),
        decoder_config=PredictorConfig(
            **shared, position_encoding="rope", use_attention_pooler=True, pooler_dim=16
        ),
        projection_only_target=True,
        **parts,
    )  # fmt: skip


def batch(seed=0, size=2, patch=2, grid=3):
    rng = np.random.default_rng(seed)
    side, steps = patch * grid, 2
    data = {
        "sentinel2_l2a": rng.normal(size=(size, side, side, steps, 12)),
        "srtm": rng.random((size, side, side, 1, 1)),
        "worldcover": rng.random((size, side, side, 1, 1)),
    }
    tokens = {"sentinel2_l2a": (steps, 3), "srtm": (1, 1), "worldcover": (1, 1)}
    masks = {n: rng.choice([0, 1, 2], (size, grid, grid, *t)) for n, t in tokens.items()}
    masks["srtm"][:], masks["worldcover"][:] = 2, 2
    return {
        "position": np.arange(size), "index": np.arange(size), "ok": np.ones(size, bool),
        "epoch": np.int64(1), "grid": np.int32(grid), "patch_size": np.int32(patch),
        "timestamps": np.tile([[1, 5, 2020], [1, 6, 2020]], (size, 1, 1)).astype(np.int32),
        "data": {n: x.astype(np.float32) for n, x in data.items()},
        "mask_a": {n: m.astype(np.int8) for n, m in masks.items()},
    }  # fmt: skip


def gradients(config, group, token=True):
    """(loss, aux, gradients by path) of one group."""
    loss = MaskedNegativesVec()
    objective = Objective(
        token_loss=loss if token else NoTokenLoss(),
        kind="latent_mim",
        supervision=heads.supervision_of(config),
        distillation=heads.distillation_of(config),
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    settings = ExperimentConfig(model=config, precision="float32")
    engine = dense_engine(settings, objective, mesh, len(group["ok"]))
    params = jax.tree.map(jnp.asarray, latent_mim.initial_params(config, 1))
    target = latent_mim.target_params(params)
    prepared = engine.prepare([group])[0]

    @jax.jit
    @jax.value_and_grad
    def run(params):
        return engine.loss(params, target, prepared.inputs, jax.random.key(0), prepared.key)[0]

    value, grads = run(params)
    return value, dict(latent_mim.flatten(grads)), objective


@pytest.fixture(scope="module")
def whole():
    return gradients(small(), batch())


def test_each_loss_trains_its_parts(whole):
    _, grads, objective = whole
    assert objective.metric_name.endswith("+supervision+projection")
    silent = {
        ("decoder", "input_norm"), ("decoder", "embed"), ("encoder", "project_and_aggregate")
    }  # fmt: skip
    for path, grad in grads.items():
        maps = path[-1] != "rope_freqs" and {"srtm", "worldcover"} & set(path[:-1])
        if path[:2] in silent or (path[0] == "encoder" and maps):
            assert not np.any(grad), path
        elif path[0] == heads.SUPERVISION or "student" in path or path[0] == heads.DISTILLATION:
            assert np.any(grad), path


def test_the_student_leaves_the_encoder_alone():
    bare = small(location_token_distillation_head_config=None)
    with jax.disable_jit():  # two programs would round apart, most of all rope_freqs
        _, grads, _ = gradients(small(), batch())
        _, without, objective = gradients(bare, batch())
    for path, grad in without.items():
        if "student" in "".join(path):
            assert not np.any(grad)
        else:
            np.testing.assert_allclose(grad, grads[path], rtol=1e-5, atol=1e-8)
    trained = dict(latent_mim.flatten(assemble.trainable_leaves(bare, False, objective)))
    assert not any(v for k, v in trained.items() if "student" in "".join(k))


def test_masks_do_not_move_the_supervision():
    config = small(location_token_distillation_head_config=None)
    maps = {"srtm": SupervisedMapConfig("regression", 1, regression_loss_type="l1")}
    config.supervision_head_config = SupervisionHeadConfig(maps)
    group = batch()
    first, *_ = gradients(config, group, token=False)
    group["mask_a"]["srtm"] = np.ones_like(group["mask_a"]["srtm"])
    second, *_ = gradients(config, group, token=False)
    assert first == second


def test_initial_values_follow_the_framework_default():
    params = dict(latent_mim.flatten(latent_mim.initial_params(small(), 0)))
    kernel = params[heads.SUPERVISION, "heads", "worldcover", "kernel"]
    bias = params[heads.SUPERVISION, "heads", "worldcover", "bias"]
    assert 0.9 / 4 < np.abs(kernel).max() <= 1 / 4 and 0.8 / 4 < np.abs(bias).max() <= 1 / 4
    back = (heads.DISTILLATION, "back_projections", "width_3")
    assert np.abs(params[*back, "first", "kernel"]).max() <= 3**-0.5
    assert np.all(params[*back, "norm", "scale"] == 1) and not params[*back, "norm", "bias"].any()


def test_they_have_the_released_names():
    keys = torch_keys.state_dict_shapes(small())
    assert keys["supervision_head.heads.worldcover.weight"] == (176, 16)
    assert keys["supervision_head._class_values_worldcover"] == (11,)
    assert keys["location_token_distillation_head.back_projections.6.0.weight"] == (8, 6)
    linear = small(location_token_distillation_head_config=LocationTokenDistillationHeadConfig())
    keys = torch_keys.state_dict_shapes(linear)
    assert keys["location_token_distillation_head.back_projections.3.weight"] == (16, 3)


def test_right_class_values_come_from_the_record():
    maps = small().supervision_head_config
    assert maps is not None
    mirrored = heads.map_tasks(maps)[0]
    maps.fix_class_values = True
    fixed = heads.map_tasks(maps)[0]
    assert mirrored.class_values[0] == 0.1 and fixed.class_values == mirrored.known_values
    assert fixed.ignore_unknown and not mirrored.ignore_unknown
    maps.modality_configs["worldcover"].num_output_channels = 3
    with pytest.raises(ValueError, match="has 11 classes in its record, not 3"):
        heads.map_tasks(maps)
