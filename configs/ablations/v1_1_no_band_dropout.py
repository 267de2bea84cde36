"""Does dropping input bands at random help v1.1?

    python -m launch.train --config=configs/ablations/v1_1_no_band_dropout.py \\
        --run_name=v1_1_no_band_dropout --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {
    "model.encoder_config.band_dropout_rate": 0.0,
    "model.encoder_config.random_band_dropout": False,
    "model.encoder_config.band_dropout_modalities": [],
}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "v1_1_no_band_dropout", CHANGES, version="v1_1")
