"""Does the hidden layer before the patch projection help v1.1?

    python -m launch.train --config=configs/ablations/v1_1_no_nonlinear.py \\
        --run_name=v1_1_no_nonlinear --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {"model.encoder_config.patch_embed_hidden_sizes": None}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "v1_1_no_nonlinear", CHANGES, version="v1_1")
