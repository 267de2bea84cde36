"""Does a moving-average target help plain random masking?

    python -m launch.train --config=configs/ablations/random_patchdisc_nocon_emazero.py \\
        --run_name=random_patchdisc_nocon_emazero --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common, random_patchdisc_nocon

CHANGES = {**random_patchdisc_nocon.CHANGES, "train_module.ema_decay": [0.996, 1.0]}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "random_patchdisc_nocon_emazero", CHANGES)
