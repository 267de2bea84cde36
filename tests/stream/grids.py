"""Small v1.3 models and groups with maps to draw, for the tests of the location stream."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from olmoearth_jax import losses, masking
from olmoearth_jax.losses import Objective
from olmoearth_jax.modalities import MISSING, SINGLE_BAND_SET_OVERRIDES, Tokenization
from olmoearth_jax.model import heads
from olmoearth_jax.model.config import (
    AttentionPoolerConfig,
    LocationTokenDistillationHeadConfig,
    ModelConfig,
    SupervisedMapConfig,
    SupervisionHeadConfig,
)
from tests.stream.builders import make_group, small_model

NAMES = ("sentinel2_l2a", "landsat", "worldcover", "srtm", "worldcereal")
MAPS = ("worldcover", "srtm", "worldcereal")
SINGLE = {k: v for k, v in SINGLE_BAND_SET_OVERRIDES.items() if k in NAMES}
TOKENS = Tokenization.from_mapping(SINGLE)
LOSS = {
    "type": "modality_patch_discrimination_masked_negatives_vec",
    "mask_negatives_for_modalities": list(MAPS),
}


def grid_model(depth: int = 2, **changes) -> ModelConfig:
    """A model with a pooler of that depth, heads for three maps, and a student of 8 and 4."""
    config = small_model(
        NAMES, tokenization_overrides=SINGLE, position_encoding="rope_3d_mixed", **changes
    )
    encoder, decoder = config.encoder_config, config.decoder_config
    assert decoder is not None
    encoder.attention_pooler_config = AttentionPoolerConfig(
        pooler_dim=24, pooler_depth=depth, attn_dim=16, per_depth_read_proj=depth > 1,
        student_dims=[8, 4], student_output_norm=True,
    )  # fmt: skip
    decoder.position_encoding = "rope"
    decoder.use_attention_pooler, decoder.pooler_dim = True, 24
    codes = [c / 100 for c in (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100)]
    config.supervision_head_config = SupervisionHeadConfig(
        {
            "worldcover": SupervisedMapConfig("classification", 11, 0.1, codes),
            "srtm": SupervisedMapConfig("regression", 1, regression_loss_type="l1"),
            "worldcereal": SupervisedMapConfig("binary_classification", 8, 0.1, pos_weight=True),
        }
    )
    config.location_token_distillation_head_config = LocationTokenDistillationHeadConfig(6)
    config.projection_only_target = True
    return config


def grid_objective(config: ModelConfig, most: int = 2048) -> Objective:
    """The terms of v1.3; at most so many cells are compared with one another."""
    student = heads.distillation_of(config)
    if student is not None:
        student = dataclasses.replace(student, gram_max_tokens=most)
    token_loss: Any = losses.build(LOSS)
    return Objective(
        token_loss, kind="latent_mim", supervision=heads.supervision_of(config),
        distillation=student,
    )  # fmt: skip


def grid_groups(shapes, seed: int = 0, size: int = 4, holes=((1,),), missing: float = 0.3):
    """(groups, strategy): one group per (grid, patch size), with maps between 0 and 1."""
    rng = np.random.default_rng(seed)
    strategy = masking.build(
        {"type": "random_time_with_decode", "only_decode_modalities": list(MAPS)}
    )
    out = []
    for number, (grid, patch) in enumerate(shapes):
        group, _ = make_group(
            rng, size, grid, patch, first=size * number, names=NAMES, tokenization=TOKENS,
            strategy=strategy, missing=missing, holes=holes[number % len(holes)],
        )  # fmt: skip
        for name in MAPS:
            x = group["data"][name]
            drawn = rng.random(x.shape).astype(np.float32)
            lost = rng.random(x.shape[:-1]) < 0.2
            group["data"][name] = np.where(x == MISSING, x, drawn)
            group["data"][name][lost & (x != MISSING).all(-1)] = MISSING
            group["data"][name][x[..., :1].repeat(x.shape[-1], -1) == MISSING] = MISSING
        group["epoch"], group["group"] = np.int64(1), np.int64(number)
        out.append(group)
    return out, strategy
