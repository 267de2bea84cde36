"""What does the loss per modality add to that?

    python -m launch.train --config=configs/ablations/crossmodrand_modpatchdisc_nocon.py \\
        --run_name=crossmodrand_modpatchdisc_nocon --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {
    "train_module.contrastive_config.loss_config.weight": 0.0,
    "common.training_modalities": ["sentinel2_l2a", "sentinel1", "landsat"],
}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "crossmodrand_modpatchdisc_nocon", CHANGES)
