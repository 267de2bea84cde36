"""Typed settings of the objective and the optimizer: `train_module`."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any, Literal

TrainKind = Literal["contrastive_latent_mim", "latent_mim", "mae", "galileo"]

MODEL_KINDS = {
    "contrastive_latent_mim": "latent_mim",
    "latent_mim": "latent_mim",
    "mae": "mae",
    "galileo": "galileo",
}
"""The kind of model that each kind of training needs."""

VIEWS = {"contrastive_latent_mim": 2, "latent_mim": 1, "mae": 1, "galileo": 2}
"""Masked views of a sample that each kind of training needs."""


@dataclasses.dataclass
class LossConfig:
    """A loss: `loss_config` holds its `type` and its parameters."""

    loss_config: dict[str, Any] = field(default_factory=dict)


@dataclasses.dataclass
class OptimConfig:
    """AdamW (spec/train.md section 5.1); weight decay applies to every trained parameter."""

    lr: float = 1e-4
    weight_decay: float = 0.02
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    group_overrides: list[dict[str, Any]] = field(default_factory=list)
    """[{params: [glob, ...], opts: {lr: ...}}]: other settings for some parameters."""
    count_offset: int = 0
    """Updates counted before the first one; 1 gives the first steps of the reference."""


@dataclasses.dataclass
class SchedulerConfig:
    """Learning rate with linear warm-up (spec/train.md section 5.2)."""

    name: Literal["CosWithWarmup", "LinearWithWarmup", "ConstantWithWarmup"] = "CosWithWarmup"
    warmup: int | None = 8000
    """Steps of warm-up; exactly one of warmup and warmup_fraction is set."""
    warmup_fraction: float | None = None
    """Warm-up as a fraction of the horizon."""
    alpha_f: float = 0.1
    """Final learning rate as a fraction of lr (cosine and linear)."""
    t_max: int | None = None
    """Horizon in steps; null means the length of the run."""
    warmup_min_lr: float = 0.0


@dataclasses.dataclass
class TrainModuleConfig:
    """What is optimised and how (spec/train.md sections 3-5)."""

    kind: TrainKind = "contrastive_latent_mim"
    rank_microbatch_size: int = 32
    """Samples of a group: they share patch size and grid, and are each other's negatives."""
    optim_config: OptimConfig = field(default_factory=OptimConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    max_grad_norm: float | None = 1.0
    loss_config: LossConfig | None = None
    """Token loss of the latent objective (of the first view for kind galileo)."""
    loss_config_b: LossConfig | None = None
    """Token loss of the second view, kind galileo only."""
    contrastive_config: LossConfig | None = None
    mae_loss_config: LossConfig | None = None
    regularizer_config: LossConfig | None = None
    ema_decay: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """Decay of the target at the start and the end of the run; [1, 1] never updates it."""
    token_exit_cfg: dict[str, int] = field(default_factory=dict)
    """Per modality, the block after which the target is taken; 0 is the patch projection."""
    token_exit_cfg_b: dict[str, int] | None = None
    """The same for the second view, kind galileo only."""
    reinit_targets: bool = False
    """Initialise the target anew instead of copying the encoder."""
