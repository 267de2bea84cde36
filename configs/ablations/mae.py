"""How does predicting pixels compare with predicting latent targets?

One view, an encoder and a reconstructor; no target and no contrastive loss.

    python -m launch.train --config=configs/ablations/mae.py \\
        --run_name=mae --config.dataset.h5py_dir=/path/to/h5data/num
"""

from typing import Any

from ml_collections import ConfigDict

from olmoearth_jax.config import ExperimentConfig

from . import common


def changes(cfg: ExperimentConfig) -> dict[str, Any]:
    """What becomes another model and another objective."""
    return {
        "train_module": {
            "kind": "mae",
            "loss_config": None,
            "contrastive_config": None,
            "mae_loss_config": {
                "loss_config": {"type": "mae", "loss_function": "SmoothL1Loss", "beta": 0.1}
            },
        },
        "data_loader.num_masked_views": 1,
        "model": common.mae_model(cfg.model),
    }


def get_config(arg: str = "") -> ConfigDict:
    """The base config with `changes`; `arg` is the text after the colon."""
    return common.ablation(arg, "mae", changes)
