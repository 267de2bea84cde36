"""Does masking by time help v1.1?

    python -m launch.train --config=configs/ablations/v1_1_v1_masking.py \\
        --run_name=v1_1_v1_masking --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {
    "data_loader.masking_config.strategy_config.type": "modality_cross_random",
    "data_loader.masking_config.strategy_config.allow_encoding_decoding_same_bandset": True,
}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "v1_1_v1_masking", CHANGES, version="v1_1")
