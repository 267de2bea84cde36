"""Do the larger grids and drawn timesteps help v1.3?

    python -m launch.train --config=configs/ablations/v1_3_v1_2_sampler.py \\
        --run_name=v1_3_v1_2_sampler --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from . import common

CHANGES = {
    "data_loader.sample_timesteps": False,
    "data_loader.min_tokens_per_instance": 0,
    "data_loader.temporal_bias": 0.0,
    "data_loader.time_priority_prob": 0.0,
    "data_loader.exclude_only_decode_from_budget": False,
    "data_loader.match_model_tokenization": False,
    "data_loader.token_budget": 2250,
    "data_loader.sampled_hw_p_list": list(range(1, 13)),
}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "v1_3_v1_2_sampler", CHANGES, version="v1_3")
