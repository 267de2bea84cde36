"""Official hyper-parameters against spec/train.md section 8 and the published model configs."""

import dataclasses
import json
from pathlib import Path

import pytest

from olmoearth_jax import check
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.configlib.official import official
from olmoearth_jax.data.sampler import shape_sampler
from olmoearth_jax.model.config import PUBLISHED_VERSIONS

SHARED = Path(__file__).resolve().parents[3] / "shared"
GOLDEN = SHARED / "goldens" / "model" / "official_configs.json"

PAIRS = [(size, version) for version, sizes in PUBLISHED_VERSIONS.items() for size in sizes]
NOT_OURS = {"use_flash_attn", "log_token_norm_stats", "tokenization_config", "_CLASS_"}

LR = {
    "v1": dict.fromkeys(("nano", "tiny", "base", "large"), 1e-4),
    "v1_1": {"nano": 2e-4, "tiny": 2e-4, "base": 1e-4},
    "v1_2": {"nano": 2e-4, "tiny": 2e-4, "small": 2e-4, "base": 1e-4, "large": 1e-4},
    "v1_3": {"nano": 2e-4, "tiny": 2e-4, "small": 2e-4, "base": 1e-4},
}


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the folder with goldens is not here")
@pytest.mark.parametrize(
    "name", list(json.loads(GOLDEN.read_text())) if GOLDEN.is_file() else ["none"]
)
def test_model_is_the_published_one(name):
    version, _, size = name.partition("-")
    faster = size.endswith("_faster")
    published = json.loads(GOLDEN.read_text())[name]
    ours = dataclasses.asdict(official(size.removesuffix("_faster"), version, faster).model)
    assert ours["projection_only_target"] == published["projection_only_target"]
    for part in ("encoder_config", "decoder_config"):
        theirs = published[part]
        overrides = (theirs.get("tokenization_config") or {}).get("overrides", {})
        groups = {m: o["band_groups"] for m, o in overrides.items()}
        assert ours[part].pop("tokenization_overrides") == groups
        assert not ours[part].pop("use_attention_pooler", False)  # later files only
        assert {k: v for k, v in theirs.items() if k not in NOT_OURS} == {
            k: v for k, v in ours[part].items() if v is not None
        }


@pytest.mark.parametrize(("size", "version"), PAIRS)
def test_recipe(size, version):
    config, later = official(size, version), version != "v1"
    loader, module, trainer = config.data_loader, config.train_module, config.trainer
    newest = version == "v1_3"
    budget = 3072 if newest else 2250
    assert (loader.global_batch_size, loader.token_budget, loader.seed) == (512, budget, 3622)
    assert (loader.num_workers, loader.prefetch_factor) == ((16, 4) if later else (12, 2))
    assert module.rank_microbatch_size == (64 if later else 32)
    optim = module.optim_config
    decay = 0.002 if later and size == "tiny" else 0.02
    assert (optim.lr, optim.weight_decay) == (LR[version][size], decay)
    assert (module.contrastive_config is None) == newest
    if module.contrastive_config is not None:
        assert module.contrastive_config.loss_config["weight"] == (0.05 if later else 0.1)
    assert (module.scheduler.warmup, module.scheduler.alpha_f) == (8000, 0.1)
    assert (trainer.max_duration.value, trainer.max_duration.unit) == (300, "epochs")
    assert config.init_seed == 12536
    assert loader.masking_config is not None
    expected = "random_time_with_decode" if later else "modality_cross_random"
    assert loader.masking_config.strategy_config["type"] == expected
    tasks = trainer.callbacks.downstream_evaluator.tasks
    assert len(tasks) == (18 if newest else 7 if later else 4)
    assert newest or tasks["mados"].eval_interval.value == 4000


@pytest.mark.parametrize("size", PUBLISHED_VERSIONS["v1_3"])
def test_the_newest_recipe(size):
    config = official(size, "v1_3")
    loader, module, model = config.data_loader, config.train_module, config.model
    assert (module.kind, loader.num_masked_views) == ("latent_mim", 1)
    assert model.projection_only_target and not any(module.token_exit_cfg.values())
    pooler, heads = model.encoder_config.attention_pooler_config, model.supervision_head_config
    assert pooler is not None and heads is not None
    assert (pooler.pooler_depth, pooler.student_dims) == (4, [128, 64])
    assert pooler.pooler_dim == pooler.attn_dim == model.encoder_config.embedding_size
    weights = {n: c.weight for n, c in heads.modality_configs.items()}
    assert list(weights) == [
        "worldcover", "srtm", "openstreetmap_raster", "wri_canopy_height_map", "cdl", "worldcereal"
    ]  # fmt: skip
    assert list(weights.values()) == [0.1, 1.0, 0.1, 1.0, 0.1, 0.1]
    back = model.location_token_distillation_head_config
    assert back is not None and back.back_projection_hidden == 256
    sampler = shape_sampler(config, 256)
    assert sampler is not None and sampler.rates == (3, 0, 0, 0) and sampler.tile_px == 128
    assert sampler.grids[-1] == 32 and sampler.min_tokens == 228


BAD_V1_3 = {
    "data_loader.temporal_bias needs data_loader.sample_timesteps=true": (
        "v1_2", {"data_loader.temporal_bias": 2.75}
    ),
    "data_loader.min_tokens_per_instance needs": (
        "v1_2", {"data_loader.min_tokens_per_instance": 5}
    ),
    "spatial_unfold must be at least 8": (
        "v1_3", {"model.supervision_head_config.spatial_unfold": 4}
    ),
    "leaves no grid": ("v1_3", {"data_loader.min_tokens_per_instance": 4000}),
    "patch_size_probs has 1 numbers for 8": ("v1_3", {"data_loader.patch_size_probs": [1.0]}),
    "num_masked_views must be 1": ("v1_3", {"data_loader.num_masked_views": 2}),
    "has 'cdl', which is not trained": (
        "v1_3", {"dataset.training_modalities": ["sentinel2_l2a", "worldcover"]}
    ),
    "needs student_dims": (
        "v1_3", {"model.encoder_config.attention_pooler_config.student_dims": None}
    ),
    "gram_max_tokens must be positive": (
        "v1_3", {"model.location_token_distillation_head_config.gram_max_tokens": 0}
    ),
    "spatial_unfold must be at least 1": (
        "v1_3", {"model.supervision_head_config.spatial_unfold": 0}
    ),
    "has no maps": ("v1_3", {"model.supervision_head_config": {"modality_configs": {}}}),
    "with an attention pooler; set it to null": (
        "v1_2", {"model.location_token_distillation_head_config": {"gram_max_tokens": 5}}
    ),
    "their runs cannot go on; start from configs/base.py:version=v1_3": (
        "v1_3", {"train_module.kind": "contrastive_latent_mim", "data_loader.num_masked_views": 2}
    ),
    "temporal_bias must be at most 100": ("v1_3", {"data_loader.temporal_bias": 1000.0}),
}  # fmt: skip


@pytest.mark.parametrize("text", BAD_V1_3)
def test_settings_of_the_newest_recipe_that_can_not_be(text):
    version, changes = BAD_V1_3[text]
    values = official("nano", version).to_dict()
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        node = values
        for part in parents:
            node = node[part]
        node[leaf] = value
    config = ExperimentConfig.from_dict(values)
    assert any(text in problem for problem in check.problems(config))
