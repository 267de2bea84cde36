"""Do finer location grids in training help v1.3 at one location per pixel?

    python -m launch.train --config=configs/ablations/v1_3_random_query_stride.py \\
        --run_name=v1_3_random_query_stride --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {"train_module.random_query_stride": True}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "v1_3_random_query_stride", CHANGES, version="v1_3")
