"""How far does Sentinel-2 alone go?

    python -m launch.train --config=configs/ablations/s2_only.py \\
        --run_name=s2_only --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {"common.training_modalities": ["sentinel2_l2a"]}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "s2_only", CHANGES)
