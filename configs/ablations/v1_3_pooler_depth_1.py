"""Is one read of the tokens, as in the published v1.3, as good as four?

    python -m launch.train --config=configs/ablations/v1_3_pooler_depth_1.py \\
        --run_name=v1_3_pooler_depth_1 --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {"model.encoder_config.attention_pooler_config.pooler_depth": 1}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "v1_3_pooler_depth_1", CHANGES, version="v1_3")
