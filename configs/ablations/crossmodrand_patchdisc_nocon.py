"""What does masking whole band sets add to random masking, on sensors only?

    python -m launch.train --config=configs/ablations/crossmodrand_patchdisc_nocon.py \\
        --run_name=crossmodrand_patchdisc_nocon --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {
    "train_module.contrastive_config.loss_config.weight": 0.0,
    "train_module.loss_config.loss_config.type": "patch_discrimination_new",
    "common.training_modalities": ["sentinel2_l2a", "sentinel1", "landsat"],
}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "crossmodrand_patchdisc_nocon", CHANGES)
