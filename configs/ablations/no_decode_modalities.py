"""How much do the decode-only modalities (maps and SRTM) contribute?

    python -m launch.train --config=configs/ablations/no_decode_modalities.py \\
        --run_name=no_decode_modalities --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {"common.training_modalities": ["sentinel2_l2a", "sentinel1", "landsat"]}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "no_decode_modalities", CHANGES)
