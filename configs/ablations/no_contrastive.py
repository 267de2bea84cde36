"""Does the contrastive loss between the two views help?

    python -m launch.train --config=configs/ablations/no_contrastive.py \\
        --run_name=no_contrastive --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {"train_module.contrastive_config.loss_config.weight": 0.0}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "no_contrastive", CHANGES)
