"""The official hyper-parameters by size and version (spec/train.md section 8)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from olmoearth_jax import config as c
from olmoearth_jax import modalities, supervision_maps
from olmoearth_jax.configlib.tasks import official_tasks
from olmoearth_jax.model.config import (
    LocationTokenDistillationHeadConfig,
    ModelConfig,
    SupervisedMapConfig,
    SupervisionHeadConfig,
    official_model,
)
from olmoearth_jax.supervision_maps import task_of

_DECODE_ONLY = list(modalities.OFFICIAL_DECODE_ONLY)

_V1_MASKING = {
    "type": "modality_cross_random",
    "encode_ratio": 0.5,
    "decode_ratio": 0.5,
    "allow_encoding_decoding_same_bandset": True,
    "only_decode_modalities": _DECODE_ONLY,
}
_LATER_MASKING = {
    "type": "random_time_with_decode",
    "encode_ratio": 0.5,
    "decode_ratio": 0.5,
    "random_ratio": 0.5,
    "only_decode_modalities": _DECODE_ONLY,
}
_V1_LOSS = {"type": "modality_patch_discrimination_new", "tau": 0.1}
LATER_LOSS = {
    "type": "modality_patch_discrimination_masked_negatives_vec",
    "tau": 0.1,
    "same_target_threshold": 0.999,
    "mask_negatives_for_modalities": _DECODE_ONLY,
}
_V1_3_POOLER_DEPTH = 4
"""Of the recipe; the published model has a depth of 1."""

_FAST = ("nano", "tiny", "small")
"""Sizes that learn at twice the rate from v1.1 on."""


def official(size: str, version: str = "v1", faster: bool = False) -> c.ExperimentConfig:
    """The complete config of an official run.

    Args:
      size: 'nano', 'tiny', 'small', 'base' or 'large'.
      version: 'v1', 'v1_1', 'v1_2' or 'v1_3'. The recipe of v1.3 is that of its public branch
        (spec/train_v1_3.md); all of its sizes but 'base' are ours.
      faster: targets from a projection instead of a copy of the encoder.

    Raises:
      ValueError: a pair that was never defined; the valid ones are listed.
    """
    model = trained_model(size, version, faster)
    first, names = version == "v1", list(modalities.OFFICIAL_MODALITIES)
    masking, loss = (_V1_MASKING, _V1_LOSS) if first else (_LATER_MASKING, LATER_LOSS)
    contrastive = {"type": "InfoNCE", "weight": 0.1 if first else 0.05, "tau": 0.1}
    optimizer = c.OptimConfig(
        lr=2e-4 if size in _FAST and not first else 1e-4,
        weight_decay=0.002 if size == "tiny" and not first else 0.02,
    )
    cfg = c.ExperimentConfig(
        common=c.CommonConfig(
            run_name=f"{size}_{version}",
            training_modalities=names,
            tokenization={} if first else copy.deepcopy(modalities.SINGLE_BAND_SET_OVERRIDES),
            recipe=f"{size} {version}" + (" faster" if faster else ""),
        ),
        model=model,
        dataset=c.DatasetConfig(training_modalities=list(names)),
        data_loader=c.DataLoaderConfig(
            num_workers=12 if first else 16,
            prefetch_factor=2 if first else 4,
            masking_config=c.MaskingConfig(copy.deepcopy(masking)),
        ),
        train_module=c.TrainModuleConfig(
            rank_microbatch_size=32 if first else 64,
            optim_config=optimizer,
            loss_config=c.LossConfig(copy.deepcopy(loss)),
            contrastive_config=c.LossConfig(contrastive),
            token_exit_cfg=dict.fromkeys(names, 0),
        ),
    )
    cfg.trainer.callbacks.downstream_evaluator.tasks = official_tasks(version)
    if version == "v1_3":
        _bottleneck_recipe(cfg)
    return cfg


def trained_model(size: str, version: str = "v1", faster: bool = False) -> ModelConfig:
    """The model that a recipe trains: the published one, and for v1.3 what the recipe adds.

    Raises:
      ValueError: a pair that was never defined; the valid ones are listed.
    """
    model = official_model(size, version, faster=faster)
    pooler = model.encoder_config.attention_pooler_config
    if version == "v1_3" and pooler is not None:
        pooler.pooler_depth = _V1_3_POOLER_DEPTH
        model.supervision_head_config = _supervision_heads()
        model.location_token_distillation_head_config = LocationTokenDistillationHeadConfig(256)
    return model


def _supervision_heads(names: Sequence[str] = _DECODE_ONLY) -> SupervisionHeadConfig:
    """Heads for the maps `names`, in the order of their records."""
    tasks = [task_of(n) for n in supervision_maps.names() if n in names]
    return SupervisionHeadConfig(
        {
            t.name: SupervisedMapConfig(
                t.task_type,
                t.channels,
                t.weight,
                list(t.class_values) or None,
                t.pos_weight,
                t.regression_loss_type,
            )
            for t in tasks
        }
    )


def _bottleneck_recipe(cfg: c.ExperimentConfig) -> None:
    """What v1.3 changes of v1.2's recipe besides the model (spec/train_v1_3.md section 2)."""
    cfg.train_module.kind, cfg.train_module.contrastive_config = "latent_mim", None
    loader = cfg.data_loader
    loader.num_masked_views = 1
    loader.sampled_hw_p_list = [*range(1, 17), 18, 20, 24, 28, 32]
    loader.token_budget, loader.min_tokens_per_instance = 3072, 228
    loader.sample_timesteps = True
    loader.temporal_bias, loader.time_priority_prob = 2.75, 0.5
    loader.match_model_tokenization = loader.exclude_only_decode_from_budget = True
