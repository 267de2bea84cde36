"""OlmoEarth Small: an encoder 384 wide, 12 blocks deep, with 4 decoder blocks.

    python -m launch.train --config=configs/small.py --run_name=my_small \\
        --config.dataset.h5py_dir=/path/to/h5data/num_samples

Hardware: 8 x 24 GB GPUs, from the sizes next to it; fewer or smaller devices take a smaller
`--config.train_module.rank_microbatch_size` or `--config.data_loader.global_batch_size`.
Expect 300 epochs of 512-sample steps (667,200 steps on the published 1,138,828 samples).

Argument after the colon: `version=` one of v1_2, v1_3 (default v1_2), `faster`, `smoke`.
No model of this size was published for v1_3: its recipe is that of Base, at this size.
`configs/small.py:smoke` runs 20 steps of a nano model on the packaged sample, on a CPU, with the
rest of this recipe unchanged.
"""

from ml_collections import ConfigDict

from . import common


def get_config(arg: str = "") -> ConfigDict:
    """The complete config; `arg` is the text after the colon (see `configs.common`)."""
    return common.config(arg, "small", version="v1_2")
