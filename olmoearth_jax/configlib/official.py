"""The official hyper-parameters by size and version (spec/train.md section 8)."""

from __future__ import annotations

import copy

from olmoearth_jax import modalities
from olmoearth_jax.configlib.data import (
    CommonConfig,
    DataLoaderConfig,
    DatasetConfig,
    MaskingConfig,
)
from olmoearth_jax.configlib.trainer import (
    CallbacksConfig,
    CheckpointerConfig,
    Duration,
    TrainerConfig,
)
from olmoearth_jax.configlib.training import (
    LossConfig,
    OptimConfig,
    SchedulerConfig,
    TrainModuleConfig,
)
from olmoearth_jax.configlib.tree import ExperimentConfig
from olmoearth_jax.model.config import official_model

DECODE_ONLY = list(modalities.OFFICIAL_DECODE_ONLY)

V1_MASKING = {
    "type": "modality_cross_random",
    "encode_ratio": 0.5,
    "decode_ratio": 0.5,
    "allow_encoding_decoding_same_bandset": True,
    "only_decode_modalities": DECODE_ONLY,
}
V1_1_MASKING = {
    "type": "random_time_with_decode",
    "encode_ratio": 0.5,
    "decode_ratio": 0.5,
    "random_ratio": 0.5,
    "only_decode_modalities": DECODE_ONLY,
}
V1_LOSS = {"type": "modality_patch_discrimination_new", "tau": 0.1}
V1_1_LOSS = {
    "type": "modality_patch_discrimination_masked_negatives_vec",
    "tau": 0.1,
    "same_target_threshold": 0.999,
    "mask_negatives_for_modalities": DECODE_ONLY,
}

_LR = {("nano", False): 2e-4, ("tiny", False): 2e-4, ("small", False): 2e-4}


def _optimizer(size: str, first: bool) -> OptimConfig:
    """AdamW of a size, of the first version or the later ones."""
    decay = 0.002 if size == "tiny" and not first else 0.02
    return OptimConfig(lr=_LR.get((size, first), 1e-4), weight_decay=decay)


def official(size: str, version: str = "v1", faster: bool = False) -> ExperimentConfig:
    """The complete config of an official run.

    Args:
      size: 'nano', 'tiny', 'small', 'base' or 'large'.
      version: 'v1', 'v1_1' or 'v1_2'.
      faster: targets from a projection instead of a copy of the encoder.

    Raises:
      ValueError: a pair that was never defined; the valid ones are listed.
    """
    from olmoearth_jax.evals.tasks import official_tasks

    model = official_model(size, version, faster=faster)
    first = version == "v1"
    tokenization = {} if first else copy.deepcopy(modalities.SINGLE_BAND_SET_OVERRIDES)
    names = list(modalities.OFFICIAL_MODALITIES)
    loader = DataLoaderConfig(
        num_workers=12 if first else 16,
        prefetch_factor=2 if first else 4,
        masking_config=MaskingConfig(copy.deepcopy(V1_MASKING if first else V1_1_MASKING)),
    )
    contrastive = {"type": "InfoNCE", "weight": 0.1 if first else 0.05, "tau": 0.1}
    module = TrainModuleConfig(
        rank_microbatch_size=32 if first else 64,
        optim_config=_optimizer(size, first),
        scheduler=SchedulerConfig(),
        loss_config=LossConfig(copy.deepcopy(V1_LOSS if first else V1_1_LOSS)),
        contrastive_config=LossConfig(contrastive),
        token_exit_cfg=dict.fromkeys(names, 0),
    )
    callbacks = CallbacksConfig(
        checkpointer=CheckpointerConfig(save_interval=5000, ephemeral_save_interval=250)
    )
    callbacks.downstream_evaluator.tasks = official_tasks(version)
    return ExperimentConfig(
        common=CommonConfig(
            run_name=f"{size}_{version}",
            training_modalities=names,
            tokenization=tokenization,
            recipe=f"{size} {version}" + (" faster" if faster else ""),
        ),
        model=model,
        dataset=DatasetConfig(training_modalities=list(names)),
        data_loader=loader,
        train_module=module,
        trainer=TrainerConfig(max_duration=Duration(300, "epochs"), callbacks=callbacks),
    )
