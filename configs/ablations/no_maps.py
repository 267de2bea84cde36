"""How much do the maps contribute?

    python -m launch.train --config=configs/ablations/no_maps.py \\
        --run_name=no_maps --config.dataset.h5py_dir=/path/to/h5data/num
"""

from ml_collections import ConfigDict

from olmoearth_jax.modalities import OFFICIAL_MODALITIES

from . import common

DROPPED = ("worldcover", "openstreetmap_raster", "wri_canopy_height_map", "cdl", "worldcereal")

CHANGES = {"common.training_modalities": [m for m in OFFICIAL_MODALITIES if m not in DROPPED]}


def get_config(arg: str = "") -> ConfigDict:
    """The base config with CHANGES; `arg` is the text after the colon."""
    return common.ablation(arg, "no_maps", CHANGES)
