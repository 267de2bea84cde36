"""How much does Landsat contribute, once there are no maps?

    python -m launch.train --config=configs/ablations/no_landsat.py \\
        --run_name=no_landsat --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {"common.training_modalities": ["sentinel2_l2a", "sentinel1"]}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "no_landsat", CHANGES)
