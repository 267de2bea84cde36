"""Does it matter that the targets come from the encoder's own initial weights?

The patch projection of the target is drawn anew (in the reference it stays as it is, so there
the targets do not change).

    python -m launch.train --config=configs/ablations/random_target.py \\
        --run_name=random_target --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {"train_module.reinit_targets": True}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "random_target", CHANGES)
