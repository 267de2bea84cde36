"""The attention pooler, its grid and decoder, and searchlight inference."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax import losses
from olmoearth_jax.inference import domain
from olmoearth_jax.inference.prepare import ModelInput
from olmoearth_jax.interop import config_json, torch_keys
from olmoearth_jax.losses import Objective
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.model import latent_mim, searchlight
from olmoearth_jax.model.config import (
    AttentionPoolerConfig,
    EncoderConfig,
    ModelConfig,
    PredictorConfig,
    official_model,
)
from olmoearth_jax.model.pooler import GridSpec
from olmoearth_jax.model.uniform_batch import Layout, UniformBatch, decode_batch, encode_batch
from olmoearth_jax.train import assemble
from olmoearth_jax.train.step import TrainProgram
from tests.train.steady import steady
from tools.goldens.dense_engine import dense_engine
from tools.goldens.unet_head import conv_numbers, initial_head, unet_head

NAMES = ["sentinel2_l2a", "worldcover"]
STAMPS = np.array([[[15, 0, 2021], [15, 5, 2021]]], np.int32)


def config(depth=1, **pooler) -> ModelConfig:
    common = {"supported_modality_names": NAMES, "num_heads": 2, "depth": 1}
    members = {"pooler_dim": 8, "pooler_depth": depth, "student_dims": [4, 6], **pooler}
    return ModelConfig(
        encoder_config=EncoderConfig(
            **common,
            embedding_size=16,
            max_patch_size=2,
            position_encoding="rope_3d_mixed",
            rope_temporal_coordinate_scale=1e-4,
            attention_pooler_config=AttentionPoolerConfig(**members),
        ),
        decoder_config=PredictorConfig(
            **common, position_encoding="rope", use_attention_pooler=True, pooler_dim=8
        ),
        projection_only_target=True,
    )


def encoder_of(model: ModelConfig):
    rng = np.random.Generator(np.random.Philox(1))
    params = latent_mim.unflatten(
        {
            path: x + np.float32(0.1) * rng.standard_normal(x.shape, dtype=np.float32)
            for path, x in latent_mim.flatten(latent_mim.initial_params(model, 2))
        }
    )
    return latent_mim.merge(latent_mim.graph(model)[0], params), params


def inputs(side=6, patch=1):
    rng = np.random.Generator(np.random.Philox(3))
    data = {
        "sentinel2_l2a": rng.standard_normal((1, side, side, 2, 12), dtype=np.float32),
        "worldcover": rng.standard_normal((1, side, side, 1, 1), dtype=np.float32),
    }
    grid = side // patch
    masks = {
        "sentinel2_l2a": np.zeros((1, grid, grid, 2, 3), np.int8),
        "worldcover": np.zeros((1, grid, grid, 1, 1), np.int8),
    }
    return data, masks


@pytest.mark.parametrize("per_read", [False, True])
@pytest.mark.parametrize("attn_dim", [None, 16])
def test_keys_round_trip(per_read, attn_dim):
    model = config(2, per_depth_read_proj=per_read, attn_dim=attn_dim, student_output_norm=True)
    assert config_json.from_json(config_json.to_json(model)) == model
    state = torch_keys.to_state_dict(latent_mim.initial_params(model), model)
    params, _, extras = torch_keys.from_state_dict(state, model)
    again = torch_keys.to_state_dict(params, model, extras=extras)
    assert state.keys() == again.keys()
    read = "input_norms.1.weight" if per_read else "input_norm.weight"
    assert f"encoder.attention_pooler.{read}" in state
    assert ("encoder.attention_pooler.kv_proj.weight" in state) == (not per_read and not attn_dim)


def test_published_size():
    model = official_model("base", "v1_3")
    shapes = torch_keys.state_dict_shapes(model)
    assert len(shapes) == 416 and sum(map(math.prod, shapes.values())) == 186_720_512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "must be a whole multiple of 4"),
        ({"student_dims": []}, "must be positive widths"),
        ({"pooler_depth": 0}, "at least 1"),
        ({"pooler_dim": 16}, "expects location tokens of width 8"),
    ],
)
def test_bad_poolers(change, message):
    with pytest.raises(ValueError, match=message):
        latent_mim.check(config(**{**change}) if "pooler_depth" not in change else config(0))
    model = config()
    model.encoder_config.position_encoding = "absolute"
    with pytest.raises(ValueError, match="needs a rotary position_encoding"):
        latent_mim.check(model)
    other = dataclasses.replace(config(), decoder_config=PredictorConfig(NAMES))
    with pytest.raises(ValueError, match="set use_attention_pooler"):
        latent_mim.check(other)


def test_grid_positions():
    grid = GridSpec(1, 2, 4, 4.0)
    assert grid.shape == (4, 8)
    np.testing.assert_allclose(grid.positions(1.0)[:3, 1], [-1.5, -0.5, 0.5])
    with pytest.raises(ValueError, match="does not divide"):
        GridSpec.of(Layout({"sentinel2_l2a": (1, 1, 1, 1)}, {}, 1), 4, 10.0, 3)


@pytest.mark.slow
def test_predictions_read_the_grid_only():
    model, _ = encoder_of(config())
    data, masks = inputs(2)
    masks["worldcover"] = np.full_like(masks["worldcover"], 2)
    encoded = encode_batch(model.encoder, UniformBatch(data, masks, STAMPS, 1))
    blank = dataclasses.replace(
        encoded, tokens={k: jnp.zeros_like(v) for k, v in encoded.tokens.items()}
    )
    out, same = (decode_batch(model.decoder, e)["worldcover"] for e in (encoded, blank))
    np.testing.assert_array_equal(out, same)


@pytest.mark.slow
def test_student_sends_no_gradient_back():
    model = config()
    graph = latent_mim.graph(model)[0]
    data, masks = inputs(2)

    def loss(params):
        encoder = latent_mim.merge(graph, params).encoder
        grid = encode_batch(encoder, UniformBatch(data, masks, STAMPS, 1)).locations
        return (grid.student**3).sum()

    grads = jax.grad(loss)(encoder_of(model)[1])["encoder"]
    assert float(jnp.abs(grads["attention_pooler"]["student"]["kernel"]).max()) > 0
    assert not any(np.any(x) for x in jax.tree.leaves(grads["blocks"]))


@pytest.mark.slow
def test_training_lowers_the_loss():
    model = config(student_output_norm=True)
    objective = Objective(losses.build({"type": "patch_discrimination"}), losses.InfoNCE(0.1, 0.1))
    mesh = make_mesh(devices=jax.devices()[:1])
    settings = steady(model, weight_decay=0.0)
    engine = dense_engine(settings, objective, mesh, 4)
    leaves = assemble.trainable_leaves(model, True, objective)
    program = TrainProgram(settings, engine, mesh, leaves, 20)
    rng = np.random.Generator(np.random.Philox(9))
    data, masks = inputs(4, 2)
    group = {
        "data": {n: rng.standard_normal((4, *x.shape[1:]), dtype=np.float32)
                 for n, x in data.items()},
        "timestamps": STAMPS.repeat(4, 0), "ok": np.ones(4, bool), "index": np.arange(4),
        "position": np.arange(4), "grid": 2, "patch_size": 2,
    }  # fmt: skip
    for view in "ab":
        chosen = rng.choice([0, 2], (4, *masks["sentinel2_l2a"].shape[1:])).astype(np.int8)
        chosen[:, 0, 0, 0] = 0
        known = np.full((4, *masks["worldcover"].shape[1:]), 2, np.int8)
        group[f"mask_{view}"] = {"sentinel2_l2a": chosen, "worldcover": known}
    state, seen = program.init_state(), []
    start = jax.tree.map(np.array, state["params"])
    for step in range(1, 21):
        state, report = program.step(state, [group], step)
        seen.append(float(report.metrics[f"train/{objective.metric_name}"]))
        assert float(report.metrics["train/dropped_micro_steps"]) == 0
    assert np.isfinite(seen).all() and seen[-1] < 0.9 * seen[0]
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), start, state["params"])["encoder"]
    pooler = moved["attention_pooler"]
    assert all(jax.tree.leaves(pooler["read_blocks"])) and pooler["learned_query"]
    assert not any(jax.tree.leaves((pooler["student"], pooler["student_norm"])))
    assert any(jax.tree.leaves(moved["blocks"]))


def test_box_starts():
    assert searchlight.box_starts(6, 4).tolist() == [0, 0, 0, 1, 2, 2]
    assert searchlight.box_starts(5, 3).tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(("grid", "window"), [((5, 7), 3), ((4, 4), 4), ((6, 5), 2)])
def test_window_attention_is_the_masked_one(grid, window):
    rng = np.random.Generator(np.random.Philox(4))
    height, width = grid
    cells = height * width
    q = rng.standard_normal((1, cells * 2, 2, 4), dtype=np.float32)
    k, v = (rng.standard_normal((1, cells * 3, 2, 4), dtype=np.float32) for _ in range(2))
    got = searchlight.window_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), grid, window)
    rows, cols = (searchlight.box_starts(n, window) for n in grid)
    y, x = np.divmod(np.arange(cells), width)
    seen = (y >= rows[y][:, None]) & (y < rows[y][:, None] + window)
    seen &= (x >= cols[x][:, None]) & (x < cols[x][:, None] + window)
    seen = np.repeat(np.repeat(seen, 2, 0), 3, 1)
    scores = np.where(seen, np.einsum("qhd,khd->hqk", q[0], k[0]) / 2, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("hqk,khd->qhd", weights, v[0])
    np.testing.assert_allclose(got[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_one_window_is_the_ordinary_forward():
    model, _ = encoder_of(config())
    data, masks = inputs(4)
    masks["sentinel2_l2a"][..., 1, :] = 3
    whole = encode_batch(model.encoder, UniformBatch(data, masks, STAMPS, 1))
    lit = searchlight.encode_searchlight(
        model.encoder, UniformBatch(data, masks, STAMPS, 1), window_px=4
    )
    np.testing.assert_allclose(lit.locations.tokens, whole.locations.tokens, atol=1e-5)
    for name, x in whole.tokens.items():
        np.testing.assert_allclose(lit.tokens[name], x, atol=1e-5)


def test_searchlight_refuses():
    model, _ = encoder_of(config())
    data, masks = inputs(6)

    def run(encoder, data, masks, patch_size, window_px, **options):
        batch = UniformBatch(data, masks, STAMPS, patch_size, **options)
        return searchlight.encode_searchlight(encoder, batch, window_px)

    with pytest.raises(ValueError, match="smaller than the window"):
        run(model.encoder, data, masks, 1, window_px=8)
    with pytest.raises(ValueError, match="not a whole number of patches"):
        run(model.encoder, *inputs(6, 2), 2, window_px=3)
    with pytest.raises(ValueError, match="does not divide"):
        run(model.encoder, *inputs(6, 2), 2, window_px=4, location_size=3)
    masks["sentinel2_l2a"][0, 0, 0] = 3
    with pytest.raises(ValueError, match="leave out whole timesteps"):
        run(model.encoder, data, masks, 1, window_px=2)


@pytest.mark.slow
def test_safe_halo_leaves_no_trace():
    model, _ = encoder_of(config())
    data, masks = inputs(20, 2)
    halo = domain.safe_halo(config().encoder_config, 2, 4)
    ready = ModelInput(data, masks, STAMPS)
    whole = domain.embed_domain(model.encoder, ready, domain.DomainPlan(2, 20, 0, 4, 1))
    assert whole.shape == (20, 20, 6)
    plan = domain.DomainPlan(2, 2 * halo + 12, 2 * halo, 4, 1)
    tiled = domain.embed_domain(model.encoder, ready, plan)
    np.testing.assert_allclose(tiled, whole, atol=1e-5)
    with pytest.raises(ValueError, match="whole patches of 2"):
        domain.crops_of(20, 10, 6, 2, 4)
    with pytest.raises(ValueError, match="less than the window"):
        domain.crops_of(20, 6, 0, 2, 4)


def test_unet_head():
    assert conv_numbers(4) == [0, 3, 6, 8] and conv_numbers(2, 2) == [0, 3, 5, 7]
    assert conv_numbers(1) == [0, 2]
    head = initial_head(0, 4, 3, 4)
    assert unet_head(head, jnp.ones((2, 3, 2, 4)), 4).shape == (2, 3, 12, 8)
    with pytest.raises(ValueError, match="power of two"):
        conv_numbers(3)
    with pytest.raises(ValueError, match="needs the tensors"):
        unet_head(head, jnp.ones((2, 3, 2, 4)), 2)
