"""What the checks let pass can be built: configs are drawn, checked, and built if they are good."""

import json

import jax
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from olmoearth_jax import check, overrides
from olmoearth_jax.checkpoints import optimizer_state
from olmoearth_jax.config import ConfigError, ExperimentConfig
from olmoearth_jax.configlib.official import official
from olmoearth_jax.data import transforms
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.model import latent_mim
from olmoearth_jax.train import assemble, build, estimate
from olmoearth_jax.train.build import build_objective
from olmoearth_jax.train.step import TrainProgram

NAMES = ["sentinel2_l2a", "latlon", "worldcover"]
ENCODER, DECODER = "model.encoder_config", "model.decoder_config"
MASKING = "data_loader.masking_config.strategy_config"
MODULE = "train_module"
LOSS = f"{MODULE}.loss_config.loss_config"
ENCODINGS = ["absolute", "rope", "rope_mixed", "rope_3d", "rope_3d_mixed", "none"]

CHOICES = {
    "common.training_modalities": [NAMES, NAMES[:2], NAMES[1:], ["sentinel1"], []],
    f"{ENCODER}.num_heads": [1, 2, 3, 4, 8],
    f"{ENCODER}.depth": [0, 1, 2],
    f"{ENCODER}.embedding_size": [12, 16, 24, 40, 48, 72, 80],
    f"{ENCODER}.output_embedding_size": [None, 16, 24],
    f"{ENCODER}.num_register_tokens": [-1, 0, 2],
    f"{ENCODER}.band_dropout_rate": [0.0, 0.3, 1.0],
    f"{ENCODER}.patch_embed_hidden_sizes": [None, [8]],
    f"{ENCODER}.use_linear_patch_embed": [True, False],
    f"{ENCODER}.max_patch_size": [1, 4, 8],
    f"{ENCODER}.qk_norm": [True, False],
    f"{DECODER}.decoder_embedding_size": [16, 24, 48],
    f"{DECODER}.depth": [0, 1],
    "model.projection_only_target": [True, False],
    f"{MODULE}.kind": ["contrastive_latent_mim", "latent_mim", "mae", "galileo"],
    f"{MODULE}.contrastive_config": [None],
    f"{MODULE}.ema_decay": [[1.0, 1.0], [0.9, 1.0], [0.9]],
    f"{MODULE}.token_exit_cfg": [dict.fromkeys(NAMES, 0), {NAMES[0]: 1}, {"latlon": 9}],
    f"{MODULE}.rank_microbatch_size": [1, 2, 3, 8],
    f"{MODULE}.max_grad_norm": [None, 1.0, 0.0],
    f"{MODULE}.optim_config.lr": [0.0, 1e-3, -1.0],
    f"{MODULE}.optim_config.betas": [[0.9, 0.999], [0.0, 0.0], [0.9, 1.0]],
    f"{MODULE}.optim_config.group_overrides": [
        [{"params": ["*/bias"], "opts": {"lr": 0.1}}], [{"params": []}], [{"opts": {}}],
    ],
    f"{MODULE}.scheduler.warmup_fraction": [None, 0.1, 2.0],
    f"{MODULE}.scheduler.name": ["LinearWithWarmup", "ConstantWithWarmup"],
    f"{LOSS}.type": ["l2", "patch_discrimination_new", "all_discrimination", "mae", "InfoNCE"],
    f"{MASKING}.type": ["random", "space", "time", "random_time_with_decode"],
    f"{MASKING}.encode_ratio": [0.0, 0.2, 0.8],
    f"{MASKING}.only_decode_modalities": [[], ["worldcover"], NAMES],
    "data_loader.global_batch_size": [2, 6, 8, 9],
    "data_loader.num_masked_views": [1, 2, 3],
    "data_loader.token_budget": [None, 10, 200],
    "data_loader.sampled_hw_p_list": [[1, 2], [4], []],
    "data_loader.max_patch_size": [1, 4, 8, 16],
    "data_loader.transform_config": [None, {"type": "mixup", "alpha": 0.5}, {"type": "flip"}],
    "fsdp_rules": [[], [["kernel$", ["fsdp"]]], [["(", [None]]]],
    "ladder.max_rungs": [1, 4, 0],
}  # fmt: skip
"""Values of settings, good and bad; how they go together is left to the checks."""


def base() -> dict:
    return {
        "common.training_modalities": NAMES,
        f"{ENCODER}.embedding_size": 16,
        f"{ENCODER}.num_heads": 2,
        f"{ENCODER}.depth": 1,
        f"{DECODER}.decoder_embedding_size": 16,
        f"{DECODER}.num_heads": 2,
        f"{DECODER}.depth": 1,
        "data_loader.global_batch_size": 4,
        f"{MODULE}.rank_microbatch_size": 2,
        "data_loader.sampled_hw_p_list": [1, 2],
        "trainer.no_evals": True,
    }


@st.composite
def changes(draw) -> dict:
    paths = draw(st.lists(st.sampled_from(list(CHOICES)), max_size=3, unique=True))
    out = {path: draw(st.sampled_from(CHOICES[path])) for path in paths}
    encoding = draw(st.sampled_from(ENCODINGS))
    both = {f"{part}.position_encoding": encoding for part in (ENCODER, DECODER)}
    return json.loads(json.dumps(base() | both | out))


def build_all(cfg: ExperimentConfig) -> None:
    """Everything of a run that needs no data, as shapes only."""
    objective, mesh = build_objective(cfg), make_mesh(devices=jax.devices()[:1])
    transforms.build(cfg.data_loader.transform_config)
    latent_mim.check(cfg.model)
    spec = build.stream_of(cfg, estimate.grid_timesteps(cfg), 1, objective)
    engine = assemble.stream_engine(cfg, spec, [spec.top_rung()], objective, mesh)
    trained = assemble.trainable_leaves(cfg.model, objective.pools, objective)
    state = TrainProgram(cfg, engine, mesh, trained, 10).abstract_state()
    assert optimizer_state.stored(state["opt_state"])["m"]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes())
def test_what_passes_the_checks_can_be_built(drawn):
    try:
        cfg = overrides.apply_values(official("nano"), drawn)
    except ConfigError as e:
        assert e.problems
        event("refused")
        return
    found = check.problems(cfg)
    assert found == list(dict.fromkeys(found)), "a problem is told twice"
    event("problems" if found else "built")
    if not found:
        build_all(cfg)
