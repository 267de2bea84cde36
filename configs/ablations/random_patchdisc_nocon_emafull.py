"""Does a full-depth moving-average target help plain random masking?

    python -m launch.train --config=configs/ablations/random_patchdisc_nocon_emafull.py \\
        --run_name=random_patchdisc_nocon_emafull --config.dataset.h5py_dir=/path/to/h5data/num
"""

from typing import Any

from ml_collections import ConfigDict

from olmoearth_jax.config import ExperimentConfig

from . import common
from .random_patchdisc_nocon_emazero import CHANGES


def changes(cfg: ExperimentConfig) -> dict[str, Any]:
    """The settings of `random_patchdisc_nocon_emazero`, and targets from the last block."""
    modalities = ("sentinel2_l2a", "sentinel1", "landsat")
    depth = cfg.model.encoder_config.depth
    return {**CHANGES, "train_module.token_exit_cfg": dict.fromkeys(modalities, depth)}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with `changes`; `arg` is the text after the colon."""
    return common.ablation(arg, "random_patchdisc_nocon_emafull", changes)
