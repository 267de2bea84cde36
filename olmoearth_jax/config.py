"""The typed experiment config: defaults, official values, validation and JSON round trip.

The tree has the paths of the pretraining guide (`train_module.optim_config.lr`, ...); see
docs/configuration.md for all of them and `olmoearth_jax.overrides` for the command line.
"""

from olmoearth_jax.configlib.data import (
    CommonConfig,
    DataLoaderConfig,
    DatasetConfig,
    MaskingConfig,
)
from olmoearth_jax.configlib.errors import ConfigError
from olmoearth_jax.configlib.official import official
from olmoearth_jax.configlib.paths import get_path, set_path
from olmoearth_jax.configlib.trainer import (
    CallbacksConfig,
    CheckpointerConfig,
    CompileConfig,
    DownstreamEvaluatorConfig,
    Duration,
    LadderConfig,
    MeshConfig,
    ProfileConfig,
    TensorBoardConfig,
    TrainerConfig,
    WandbConfig,
)
from olmoearth_jax.configlib.training import (
    MODEL_KINDS,
    VIEWS,
    LossConfig,
    OptimConfig,
    SchedulerConfig,
    TrainModuleConfig,
)
from olmoearth_jax.configlib.tree import ExperimentConfig, load_json
from olmoearth_jax.evals.tasks import EvalInterval, EvalTaskConfig

__all__ = [
    "MODEL_KINDS",
    "VIEWS",
    "CallbacksConfig",
    "CheckpointerConfig",
    "CommonConfig",
    "CompileConfig",
    "ConfigError",
    "DataLoaderConfig",
    "DatasetConfig",
    "DownstreamEvaluatorConfig",
    "Duration",
    "EvalInterval",
    "EvalTaskConfig",
    "ExperimentConfig",
    "LadderConfig",
    "LossConfig",
    "MaskingConfig",
    "MeshConfig",
    "OptimConfig",
    "ProfileConfig",
    "SchedulerConfig",
    "TensorBoardConfig",
    "TrainModuleConfig",
    "TrainerConfig",
    "WandbConfig",
    "get_path",
    "load_json",
    "official",
    "set_path",
]
