"""Does masking whole band sets help over masking tokens at random?

Maps are then encoded too, as the strategy knows no decode-only modalities.

    python -m launch.train --config=configs/ablations/random_masking.py \\
        --run_name=random_masking --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {"data_loader.masking_config.strategy_config.type": "random"}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "random_masking", CHANGES)
