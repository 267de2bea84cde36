"""Does choosing the encoded band sets at random help over a fixed split?

Sensor tokens are masked at random; maps are always decoded.

    python -m launch.train --config=configs/ablations/random_fixed_modality_masking.py \\
        --run_name=random_fixed_modality_masking --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from olmoearth_jax.modalities import OFFICIAL_DECODE_ONLY

from . import common

CHANGES = {
    "data_loader.masking_config.strategy_config.type": "random_fixed_modality",
    "data_loader.masking_config.strategy_config.decoded_modalities": list(OFFICIAL_DECODE_ONLY),
}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "random_fixed_modality_masking", CHANGES)
