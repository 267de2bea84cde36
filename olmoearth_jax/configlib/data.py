"""Typed settings of what is read and how it is masked: `common`, `dataset` and `data_loader`."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any, Literal

from olmoearth_jax import modalities


@dataclasses.dataclass
class CommonConfig:
    """Settings that several parts share; overriding one reaches all of them."""

    run_name: str = "run"
    """Names the run's folder and its logs."""
    save_folder: str | None = None
    """The run's folder; null means ./local_output/<run_name>."""
    training_modalities: list[str] = field(
        default_factory=lambda: list(modalities.OFFICIAL_MODALITIES)
    )
    """Modalities of model, dataset, loader, masking and losses, in config order."""
    extra_modalities: dict[str, Any] = field(default_factory=dict)
    """Records of your own modalities by name, or the JSON file that holds them
    (docs/new_sensor.md)."""
    tokenization: dict[str, list[list[str]]] = field(default_factory=dict)
    """Per modality, the bands of each token; a modality not named keeps its own band sets."""
    recipe: str = ""
    """Which size and version the config was made from; for the reader only."""


@dataclasses.dataclass
class DatasetConfig:
    """Which H5 samples are read (spec/data.md sections 5-6)."""

    h5py_dir: str | None = None
    """Folder with sample_<i>.h5; its last component is the number of samples."""
    more_h5py_dirs: dict[str, float] = field(default_factory=dict)
    """Further folders to train on, each with the share of its samples to keep, in (0, 1]."""
    training_modalities: list[str] = field(
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

    def shape_block(self, group: int) -> int:
        """Contiguous samples that share a draw: `samples_per_shape`, resolved.

        Args:
          group: samples of a group (train_module.rank_microbatch_size).
        """
        if self.samples_per_shape is not None:
            return self.samples_per_shape
        return max(min(64, self.global_batch_size) // group, 1) * group
