"""Do targets from a moving average of the encoder help over frozen ones?

    python -m launch.train --config=configs/ablations/ema.py \\
        --run_name=ema --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {"train_module.ema_decay": [0.996, 1.0]}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "ema", CHANGES)
