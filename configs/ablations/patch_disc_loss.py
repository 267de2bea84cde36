"""Does scoring each modality on its own help over scoring all tokens together?

    python -m launch.train --config=configs/ablations/patch_disc_loss.py \\
        --run_name=patch_disc_loss --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {"train_module.loss_config.loss_config.type": "patch_discrimination_new"}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "patch_disc_loss", CHANGES)
