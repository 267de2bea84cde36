"""Settings of a downstream task; the catalogue of tasks is in `olmoearth_jax.evals.tasks`."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Literal

EvalMode = Literal["knn", "linear_probe", "finetune", "embedding_diagnostics"]


@dataclasses.dataclass
class EvalInterval:
    """How often a task runs during training."""

    value: int = 1
    unit: Literal["steps", "epochs"] = "epochs"


@dataclasses.dataclass
class EvalTaskConfig:
    """One downstream task (spec/evals.md section 2)."""

    dataset: str = ""
    """Key of the dataset, which need not be the name of the task."""
    num_workers: int = 8
    pooling_type: Literal["mean", "max"] = "mean"
    norm_stats_from_pretrained: bool = True
    """Normalise with the pretraining statistics instead of the dataset's own."""
    norm_method: str = "norm_no_clip_2_std"
    input_modalities: list[str] = field(default_factory=list)
    """Modalities given to the model; empty means all that the dataset has."""
    embedding_batch_size: int = 128
    probe_lr: float | None = None
    probe_batch_size: int = 32
    probe_type: str = "linear"
    linear_probe_eval_interval: int = 50
    ft_lr: float | None = None
    ft_batch_size: int = 32
    ft_grad_accum_steps: int = 1
    ft_head_type: Literal["linear", "unet"] = "linear"
    finetune_seed: int = 42
    epochs: int = 50
    patch_size: int = 4
    eval_interval: EvalInterval = field(default_factory=EvalInterval)
    eval_mode: EvalMode | None = None
    """Null means kNN for classification and a linear probe for the rest."""
    use_pooled_tokens: bool = False
    use_center_token: bool = False
    label_fraction: float = 1.0
    select_best_by_primary_metric: bool = False
    max_train_samples: int | None = None
    max_train_samples_seed: int = 42
    quantize_embeddings: bool = False
    quantize_bits: int | None = None
    quantile_config_path: str | None = None
    embedding_dim: int | None = None
    use_dice_loss: bool = False
    primary_metric: str | None = None
    primary_metric_class: int | None = None
    h5py_dir: str | None = None
    """Pretraining dataset of a pretrain_subset task (spec/evals.md section 13.7)."""
    pretrain_max_samples: int = 512
    pretrain_target_modality: str | None = None
    pretrain_label_seed: int = 42
    pretrain_train_samples: int = 512
    pretrain_valid_samples: int = 512
    pretrain_test_samples: int = 512
    pretrain_split_strategy: Literal["random", "geographic"] = "random"
    pretrain_geographic_bin_size_deg: float = 5.0
