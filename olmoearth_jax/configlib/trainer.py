"""Typed settings of the run itself: `trainer`, and how it is compiled and spread on devices."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any, Literal

from olmoearth_jax.evals.tasks import EvalMode, EvalTaskConfig


@dataclasses.dataclass
class Duration:
    """A length of training."""

    value: int = 300
    unit: Literal["steps", "epochs"] = "epochs"


@dataclasses.dataclass
class DownstreamEvaluatorConfig:
    """Evaluation on downstream tasks during training (spec/evals.md section 3)."""

    enabled: bool = True
    tasks: dict[str, EvalTaskConfig] = field(default_factory=dict)
    tasks_to_run: list[str] | None = None
    """Names of `tasks` or of the catalogue; null means all of `tasks`."""
    eval_on_startup: bool = False
    cancel_after_first_eval: bool = False
    run_on_test: bool = False
    filter_for_eval_mode: EvalMode | None = None
    n_bootstrap: int = 0
    bootstrap_seed: int = 42


@dataclasses.dataclass
class TensorBoardConfig:
    """Scalars under <run folder>/tensorboard."""

    enabled: bool = True


@dataclasses.dataclass
class WandbConfig:
    """Weights & Biases logging; needs the `wandb` extra and WANDB_API_KEY."""

    enabled: bool = False
    project: str = "olmoearth-jax"
    entity: str | None = None


@dataclasses.dataclass
class CheckpointerConfig:
    """When checkpoints are written (spec/train.md section 6)."""

    enabled: bool = True
    save_interval: int = 5000
    """Steps between checkpoints that are kept."""
    ephemeral_save_interval: int | None = 250
    """Steps between checkpoints of which only the newest is kept; null writes none."""


@dataclasses.dataclass
class CallbacksConfig:
    """What happens besides training."""

    downstream_evaluator: DownstreamEvaluatorConfig = field(
        default_factory=DownstreamEvaluatorConfig
    )
    tensorboard: TensorBoardConfig = field(default_factory=TensorBoardConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    checkpointer: CheckpointerConfig = field(default_factory=CheckpointerConfig)


@dataclasses.dataclass
class ProfileConfig:
    """A profiler trace of a few steps, written under <run folder>/profile."""

    enabled: bool = False
    start_step: int = 10
    num_steps: int = 3


@dataclasses.dataclass
class TrainerConfig:
    """Length of the run, logging, checkpoints and evaluation (spec/train.md sections 6-9b)."""

    max_duration: Duration = field(default_factory=Duration)
    hard_stop: Duration | None = None
    """Stop here without changing the learning-rate horizon."""
    metrics_collect_interval: int = 10
    cancel_check_interval: int = 25
    load_strategy: Literal["if_available", "always", "never"] = "if_available"
    load_path: str | None = None
    """Checkpoint to start from when the run's own folder holds none."""
    allow_dataset_change: bool = False
    """Resume although the dataset is another one than the checkpoint's."""
    allow_config_change: bool = False
    """Resume although settings that shape the result differ from the checkpoint's."""
    no_checkpoints: bool = False
    no_evals: bool = False
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)


@dataclasses.dataclass
class MeshConfig:
    """Devices along each mesh axis; -1 takes what the other axis leaves."""

    data: int = -1
    fsdp: int = 1


@dataclasses.dataclass
class LadderConfig:
    """Capacities of the compiled step programs."""

    max_rungs: int = 12
    """Most capacities, hence most step programs, of a run."""
    row_fractions: list[float] = field(default_factory=lambda: [0.15, 0.3, 0.45, 0.6, 0.8, 1.0])
    """Lengths of attention rows, as fractions of the longest; the last is 1."""


@dataclasses.dataclass
class CompileConfig:
    """Compilation of the step programs."""

    ahead: bool = True
    """Compile every program before the first step; false compiles each at first use."""
    cache_dir: str | None = None
    """Persistent compilation cache; null means ~/.cache/olmoearth_jax/xla."""


FsdpRule = list[Any]
"""[regex on the parameter path, [axis or null per dimension]]; the first match decides."""
