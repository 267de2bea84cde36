"""Does leaving near-identical targets out of the negatives help v1.1?

    python -m launch.train --config=configs/ablations/v1_1_v1_loss.py \\
        --run_name=v1_1_v1_loss --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {"train_module.loss_config.loss_config.type": "modality_patch_discrimination_vec"}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "v1_1_v1_loss", CHANGES, version="v1_1")
