"""How well does plain random masking with one loss over all tokens do, on sensors only?

    python -m launch.train --config=configs/ablations/random_patchdisc_nocon.py \\
        --run_name=random_patchdisc_nocon --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {
    "data_loader.masking_config.strategy_config.type": "random",
    "train_module.contrastive_config.loss_config.weight": 0.0,
    "train_module.loss_config.loss_config.type": "patch_discrimination_new",
    "common.training_modalities": ["sentinel2_l2a", "sentinel1", "landsat"],
}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "random_patchdisc_nocon", CHANGES)
