"""Configs of runs whose learning rate stays as it is."""

from typing import Any

from olmoearth_jax.config import ExperimentConfig, OptimConfig, SchedulerConfig, TrainModuleConfig
from olmoearth_jax.model.config import ModelConfig


def steady(
    model: ModelConfig, lr: float = 1e-3, weight_decay: float = 0.01, **changes: Any
) -> ExperimentConfig:
    """A run of `model` at the rate `lr`; `changes` go into its training module."""
    module = TrainModuleConfig(
        optim_config=OptimConfig(lr=lr, weight_decay=weight_decay),
        scheduler=SchedulerConfig("ConstantWithWarmup", warmup=0),
        **changes,
    )
    return ExperimentConfig(model=model, train_module=module, precision="float32")
