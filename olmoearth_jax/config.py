"""The typed experiment config: the tree of settings, its JSON form and what derives from it.

The tree has the paths of the pretraining guide (`train_module.optim_config.lr`, ...), listed in
docs/configuration.md; `olmoearth_jax.overrides` sets them from the command line. The text below a
member is its line there.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from olmoearth_jax import modalities
from olmoearth_jax.configlib import gone, schema
from olmoearth_jax.configlib.schema import ConfigError
from olmoearth_jax.configlib.tasks import EvalMode, EvalTaskConfig
from olmoearth_jax.configlib.values import too_deep
from olmoearth_jax.modalities import BandSets, ModalityName
from olmoearth_jax.model.config import ModelConfig


@dataclasses.dataclass
class CommonConfig:
    """Settings that several parts share; overriding one reaches all of them."""

    run_name: str = "run"
    """Names the run's folder and its logs."""
    save_folder: str | None = None
    """The run's folder; null means ./local_output/<run_name>."""
    training_modalities: list[ModalityName] = field(
        default_factory=lambda: list(modalities.OFFICIAL_MODALITIES)
    )
    """Modalities of model, dataset, loader, masking and losses, in config order."""
    extra_modalities: dict[str, Any] = field(default_factory=dict)
    """Records of your own modalities by name, or the JSON file that holds them
    (docs/new_sensor.md)."""
    tokenization: BandSets = field(default_factory=dict)
    """Per modality, the bands of each token; a modality not named keeps its own band sets."""
    plugins: list[str] = field(default_factory=list)
    """Modules of yours that the run uses, written by --plugins, which alone imports them
    (docs/new_masking.md)."""
    recipe: str = ""
    """Which size and version the config was made from; for the reader only."""


@dataclasses.dataclass
class DatasetConfig:
    """Which H5 samples are read (spec/data.md sections 5-6)."""

    h5py_dir: str | None = None
    """Folder with sample_<i>.h5; its last component is the number of samples."""
    more_h5py_dirs: dict[str, float] = field(default_factory=dict)
    """Further folders to train on, each with the share of its samples to keep, in (0, 1]."""
    training_modalities: list[ModalityName] = field(
        default_factory=lambda: list(modalities.OFFICIAL_MODALITIES)
    )
    dtype: Literal["float32", "float16"] = "float32"
    normalize: bool = True
    cache_dir: str | None = None
    """Local folder to which files are copied before they are read."""
    cache_size_gb: float | None = None
    """Once the cache holds this much, further files are read in place; null is no limit."""
    samples_per_sec: float | None = None
    """Upper bound on reads of the original store, per process."""
    dataset_percentage: float = 1.0
    """Fraction of the samples that is kept, in (0, 1]."""
    seed: int = 0
    apply_cutmix: bool = False
    filter_idx_file: str | None = None
    """.npy file of the sample numbers to keep."""
    validation_fraction: float = 0.0
    """Fraction of the map, in blocks of 0.1 degrees, that is not trained on but gives val/loss."""


@dataclasses.dataclass
class MaskingConfig:
    """A masking strategy: `strategy_config` holds its `type` and its parameters."""

    strategy_config: dict[str, Any] = field(default_factory=dict)


@dataclasses.dataclass
class DataLoaderConfig:
    """Batches, crops and masks (spec/data.md sections 7-8)."""

    global_batch_size: int = 512
    """Samples of an optimizer step, over all devices."""
    num_workers: int = 12
    """Reader processes per host; 0 reads in threads of the main process."""
    prefetch_factor: int = 2
    """Batches that each worker prepares ahead."""
    token_budget: int | None = 2250
    """Upper bound on the tokens of a sample, which fixes the number of timesteps."""
    seed: int = 3622
    min_patch_size: int = 1
    max_patch_size: int = 8
    sampled_hw_p_list: list[int] = field(default_factory=lambda: list(range(1, 13)))
    """Grid sides, in patches, that may be drawn."""
    num_masked_views: int = 2
    masking_config: MaskingConfig | None = None
    masking_config_b: MaskingConfig | None = None
    """Masking of the second view; null means the same as the first."""
    transform_config: dict[str, Any] | None = None
    """Augmentation {'type': 'flip_and_rotate'} or {'type': 'mixup', 'alpha': ...}; null is none."""
    repeats: int = 1
    """How often an epoch goes through its samples."""
    shuffle: bool = True
    samples_per_shape: int | None = None
    """Contiguous samples that share patch size and grid; null means min(64, global batch)."""
    max_bad_fraction: float = 0.1
    """The run stops if a larger share of the samples read so far is unusable."""
    match_model_tokenization: bool = False
    """Count the token budget with the model's own tokens; false counts as the reference does."""
    sample_timesteps: bool = False
    """Draw the timesteps too (v1.3); false takes as many as the token budget leaves."""
    min_tokens_per_instance: int = 0
    """Fewest tokens of a sample where timesteps are drawn."""
    temporal_bias: float = 0.0
    """Timesteps T are drawn with weight T ** temporal_bias."""
    time_priority_prob: float = 0.0
    """How often the timesteps are drawn before the grid."""
    patch_size_probs: list[float] | None = None
    """Probability of each patch size where timesteps are drawn; null draws all alike."""
    exclude_only_decode_from_budget: bool = False
    """Leave only-decoded modalities out of the token budget where timesteps are drawn."""
    token_budget_excluded_modalities: list[ModalityName] = field(default_factory=list)
    """Further modalities that the token budget does not count where timesteps are drawn."""


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
    """Learning rate that the warm-up starts from; where a group's own rate is lower, that."""


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
    token_exit_cfg: dict[ModalityName, int] = field(default_factory=dict)
    """Per modality, the block after which the target is taken; 0 is the patch projection."""
    token_exit_cfg_b: dict[ModalityName, int] | None = None
    """The same for the second view, kind galileo only."""
    reinit_targets: bool = False
    """Initialise the target anew instead of copying the encoder."""
    random_query_stride: bool = False
    """Draw how many pixels a location spans instead of one location per patch (v1.3)."""
    max_location_queries: int = 512
    """Most locations of a sample where they are drawn."""


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
    """Names of `tasks`, of tasks_json or of the catalogue; null means all but the catalogue's."""
    tasks_json: str | None = None
    """File with tasks of your own and their data sets (docs/new_task.md)."""
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
    image_interval: int | None = 1000
    """Steps between pictures of inputs, masks and features; null draws none."""


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
class ValidationConfig:
    """Loss on samples that are kept out of training (dataset.validation_fraction)."""

    interval: int = 1000
    """Steps between validations; the last step has one too."""
    samples: int = 2048
    """How many samples at most, always the same ones, with the same crops and masks."""
    keep_best: bool = True
    """Keep the checkpoint of the lowest val/loss for good."""


@dataclasses.dataclass
class CallbacksConfig:
    """What happens besides training."""

    downstream_evaluator: DownstreamEvaluatorConfig = field(
        default_factory=DownstreamEvaluatorConfig
    )
    tensorboard: TensorBoardConfig = field(default_factory=TensorBoardConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    checkpointer: CheckpointerConfig = field(default_factory=CheckpointerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


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
    """Of the reference, and without effect: a request to stop is seen at every step."""
    host_timeout_s: float = 1800.0
    """Seconds for which one process may hold up the others before the run ends and names it."""
    load_strategy: Literal["if_available", "always", "never"] = "if_available"
    load_path: str | None = None
    """Checkpoint to start from when the run's own folder holds none."""
    load_weights_only: bool = False
    """Take only the weights of load_path; the optimiser starts anew."""
    load_partial: bool = False
    """Take what fits of the weights of load_path (other modalities, a new sensor), nothing else."""
    loaded: dict[str, list[str]] = field(default_factory=dict)
    """Written by the run: parameters taken, fresh and left over with load_partial."""
    allow_dataset_change: bool = False
    """Resume although the dataset is another one than the checkpoint's."""
    allow_config_change: bool = False
    """Resume although settings that shape the result differ from the checkpoint's."""
    no_checkpoints: bool = False
    no_evals: bool = False
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)

    @property
    def saves(self) -> bool:
        """Whether the run writes checkpoints."""
        return self.callbacks.checkpointer.enabled and not self.no_checkpoints


@dataclasses.dataclass
class MeshConfig:
    """Devices along each mesh axis; -1 takes what the other axis leaves."""

    data: int = -1
    fsdp: int = 1


@dataclasses.dataclass
class LadderConfig:
    """Capacities of the compiled step programs."""

    max_rungs: int = 12
    """Most step programs of a run, the update among them; 2: one for all that is likely."""
    row_classes: int = 4
    """Lengths of attention rows, as fractions of the longest; the last is 1."""


@dataclasses.dataclass
class CompileConfig:
    """Compilation of the step programs."""

    ahead: bool = True
    """Compile what is likely needed: for the first step before it, the rest behind the training;
    false compiles each at first use."""
    cache_dir: str | None = None
    """Persistent compilation cache; null means ~/.cache/olmoearth_jax/xla."""


@dataclasses.dataclass
class ExperimentConfig:
    """Everything that defines a run."""

    common: CommonConfig = field(default_factory=CommonConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    data_loader: DataLoaderConfig = field(default_factory=DataLoaderConfig)
    train_module: TrainModuleConfig = field(default_factory=TrainModuleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    init_seed: int = 12536
    """Seed of initialisation, drop path and band dropout."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; auto is bfloat16 on GPU and float32 on CPU."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """Attention kernel; auto is cudnn where it applies and xla elsewhere."""
    remat: Literal["none", "dots", "block"] = "none"
    """Recomputed in the backward pass: nothing, all but matrix products, or whole blocks."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    fsdp_rules: list[list[Any]] = field(default_factory=list)
    """Pairs [regex on the parameter path, axis or null per dimension]; no match replicates. Without
    any, mesh.fsdp splits the matrix products of the blocks."""
    ladder: LadderConfig = field(default_factory=LadderConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)

    @property
    def run_folder(self) -> Path:
        """Folder of checkpoints, logs and evaluations."""
        given = self.common.save_folder
        # Not Path.expanduser, which raises for a `~name` of nobody.
        return Path(os.path.expanduser(given) if given else f"local_output/{self.common.run_name}")

    @property
    def groups_per_step(self) -> int:
        """Groups of `rank_microbatch_size` samples in an optimizer step."""
        return self.data_loader.global_batch_size // self.train_module.rank_microbatch_size

    @property
    def samples_per_shape(self) -> int:
        """Contiguous samples that share patch size and grid."""
        loader, group = self.data_loader, self.train_module.rank_microbatch_size
        if loader.samples_per_shape is not None:
            return loader.samples_per_shape
        return max(min(64, loader.global_batch_size) // group, 1) * group

    def copy(self) -> ExperimentConfig:
        return copy.deepcopy(self)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dict of every setting."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Complete JSON text, which `from_json` reads back to an equal config."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExperimentConfig:
        """The config of a nested dict; members left out keep their defaults.

        Raises:
          ConfigError: unknown members or values of the wrong type, all listed.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"a config is a mapping of its parts (JSON: {{...}}), not {type(values).__name__}"
            )
        if too_deep(values):
            raise ConfigError("the config has lists or mappings too deep in each other")
        common = values.get("common")
        own = common.get("extra_modalities") if isinstance(common, Mapping) else None
        schema.register_modalities(own or {})  # before any list that names them is read
        return schema.convert(cls, gone.left_out(values))

    @classmethod
    def from_json(cls, text: str) -> ExperimentConfig:
        """The config of a JSON text.

        Raises:
          ConfigError: not JSON, unknown members, or values of the wrong type.
        """
        try:
            values = json.loads(text)
        except RecursionError:
            raise ConfigError("the config has lists or mappings too deep in each other") from None
        except ValueError as e:  # also a whole number of thousands of digits
            raise ConfigError(f"the config is not valid JSON: {e}") from e
        return cls.from_dict(values)


def load_json(path: str | Path) -> ExperimentConfig:
    """The config saved in a file, such as a run folder's config.json.

    Raises:
      ConfigError: no such file, or its content is not a config.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ConfigError(f"config file {str(path)!r} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {e}") from e
    return ExperimentConfig.from_json(text)
