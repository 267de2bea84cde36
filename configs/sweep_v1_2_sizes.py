"""The v1.2 sizes side by side, as jobs of 8 GPUs.

    python -m launch.submit --config=configs/sweep_v1_2_sizes.py --sweep --run_name=v1_2 \\
        --config.dataset.h5py_dir=/path/to/h5data/num_samples [--submit]
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from . import common


def get_config(arg: str = "") -> ConfigDict:
    """The base config, which is not part of the sweep."""
    return common.config(arg, "base", version="v1_2")


def sweep(arg: str = "") -> Iterator[dict[str, Any]]:
    """One job per size; `arg` is the text after the colon, for all of them."""
    for size in ("nano", "tiny", "small", "large"):
        config = f"configs/{size}.py:version=v1_2" + (f",{arg}" if arg else "")
        yield {"launch.name": size, "launch.config": config, "launch.gpus_per_host": 8}
