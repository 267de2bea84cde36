"""Training streams over small data sets."""

from collections.abc import Sequence
from typing import Any

from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.data.index import DatasetIndex
from olmoearth_jax.data.pipeline import TrainStream


def make_config(
    group_size: int = 4, patch_sizes: Sequence[int] = (1, 2, 3), **options: Any
) -> ExperimentConfig:
    """Groups of a few samples; `options` are settings of the loader or the dataset."""
    config = ExperimentConfig()
    config.train_module.rank_microbatch_size = group_size
    given = {
        "global_batch_size": 8,
        "samples_per_shape": 4,
        "num_workers": 0,
        "min_patch_size": min(patch_sizes),
        "max_patch_size": max(patch_sizes),
        "sampled_hw_p_list": [2, 4, 8],
    }
    for name, value in (given | options).items():
        (part,) = (p for p in (config.data_loader, config.dataset) if name in vars(p))
        setattr(part, name, value)
    return config


def make_stream(
    index: DatasetIndex, masks: Sequence[Any], hosts: tuple[int, int] = (0, 1), **options: Any
) -> TrainStream:
    """A stream of such a config; `hosts` are this host and how many there are."""
    return TrainStream(index, make_config(**options), masks, *hosts)
