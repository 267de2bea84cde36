"""Do fewer, more varied samples do as well as all of them?

Give the sample numbers to keep with `--config.dataset.filter_idx_file=FILE.npy`; the number of
epochs stays, so there are fewer steps.

    python -m launch.train --config=configs/ablations/high_entropy_dataset.py \\
        --run_name=high_entropy_dataset --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {"dataset.filter_idx_file": "high_entropy_indices.npy"}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "high_entropy_dataset", CHANGES)
