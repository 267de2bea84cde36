"""All ablations of the pretraining guide, one job each.

    python -m launch.submit --config=configs/sweep_ablations.py --sweep --run_name=base \\
        --config.dataset.h5py_dir=/path/to/h5data/num_samples [--submit]
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from . import common

OBJECTIVE = ("no_contrastive", "random_masking", "mae", "random_target", "patch_disc_loss", "ema")
MODALITIES = ("no_ag_maps", "no_maps", "no_decode_modalities", "no_landsat", "s2_only")


def get_config(arg: str = "") -> ConfigDict:
    """The base config, with which the ablations are compared."""
    return common.config(arg, "base")


def sweep(arg: str = "") -> Iterator[dict[str, Any]]:
    """One job per ablation; `arg` is the text after the colon, for all of them."""
    for name in (*OBJECTIVE, *MODALITIES):
        config = f"configs/ablations/{name}.py" + (f":{arg}" if arg else "")
        yield {"launch.name": name, "launch.config": config, "launch.gpus_per_host": 8}
