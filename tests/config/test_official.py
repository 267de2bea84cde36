"""Official hyper-parameters against spec/train.md section 8 and the published model configs."""

import dataclasses
import json
from pathlib import Path

import pytest

from olmoearth_jax.configlib.official import official
from olmoearth_jax.model.config import PUBLISHED_VERSIONS

SHARED = Path(__file__).resolve().parents[3] / "shared"
GOLDEN = SHARED / "goldens" / "model" / "official_configs.json"

PAIRS = [(size, version) for version, sizes in PUBLISHED_VERSIONS.items() for size in sizes]
NOT_OURS = {"use_flash_attn", "log_token_norm_stats", "tokenization_config", "_CLASS_"}

LR = {
    "v1": dict.fromkeys(("nano", "tiny", "base", "large"), 1e-4),
    "v1_1": {"nano": 2e-4, "tiny": 2e-4, "base": 1e-4},
    "v1_2": {"nano": 2e-4, "tiny": 2e-4, "small": 2e-4, "base": 1e-4, "large": 1e-4},
    "v1_3": {"base": 1e-4},
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
    assert (loader.global_batch_size, loader.token_budget, loader.seed) == (512, 2250, 3622)
    assert (loader.num_workers, loader.prefetch_factor) == ((16, 4) if later else (12, 2))
    assert module.rank_microbatch_size == (64 if later else 32)
    optim = module.optim_config
    decay = 0.002 if later and size == "tiny" else 0.02
    assert (optim.lr, optim.weight_decay) == (LR[version][size], decay)
    assert module.contrastive_config is not None
    assert module.contrastive_config.loss_config["weight"] == (0.05 if later else 0.1)
    assert (module.scheduler.warmup, module.scheduler.alpha_f) == (8000, 0.1)
    assert (trainer.max_duration.value, trainer.max_duration.unit) == (300, "epochs")
    assert config.init_seed == 12536
    assert loader.masking_config is not None
    expected = "random_time_with_decode" if later else "modality_cross_random"
    assert loader.masking_config.strategy_config["type"] == expected
    tasks = trainer.callbacks.downstream_evaluator.tasks
    assert len(tasks) == (7 if later else 4)
    assert tasks["mados"].eval_interval.value == 4000
