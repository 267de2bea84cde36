"""OlmoEarth Nano: an encoder 128 wide, 4 blocks deep, with 4 decoder blocks.

    python -m launch.train --config=configs/nano.py --run_name=my_nano \\
        --config.dataset.h5py_dir=/path/to/h5data/num_samples

Hardware: 4 x 16 GB GPUs in the reference's guide; fewer or smaller devices take a smaller
`--config.train_module.rank_microbatch_size` or `--config.data_loader.global_batch_size`.
Expect 300 epochs of 512-sample steps (667,200 steps on the published 1,138,828 samples).

Argument after the colon: `version=` one of v1, v1_1, v1_2, v1_3 (default v1), `faster`, `smoke`.
No model of this size was published for v1_3: its recipe is that of Base, at this size.
`configs/nano.py:smoke` runs 20 steps of a nano model on the packaged sample, on a CPU, with the
rest of this recipe unchanged.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from . import common


def get_config(arg: str = "") -> ConfigDict:
    """The complete config; `arg` is the text after the colon (see `configs.common`)."""
    return common.config(arg, "nano", version="v1")


def sweep() -> Iterator[dict[str, Any]]:
    """Learning rates and weight decays of the v1 recipe (`launch.submit --sweep`)."""
    return common.grid((1e-3, 1e-4, 5e-4), gpus_per_host=4)
