"""Do the maps drawn from the location grid help v1.3?

    python -m launch.train --config=configs/ablations/v1_3_no_supervision.py \\
        --run_name=v1_3_no_supervision --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {"model.supervision_head_config": None}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "v1_3_no_supervision", CHANGES, version="v1_3")
