"""The PyTorch reference's data loading, for `tools.bench.data_loader --compare_reference`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TOKEN_BUDGET = 2250


class ReferenceLoader:
    """Reads, crops, normalises, collates and masks groups as the reference's workers do."""

    def __init__(self, h5py_dir: Path, names: Sequence[str], masking: dict[str, Any]):
        """`masking` is the setting of a strategy with its `type`.

        Raises:
          ImportError: the reference or PyTorch is not installed.
        """
        import torch  # pyright: ignore[reportMissingImports]
        from olmoearth_pretrain.data import collate  # pyright: ignore[reportMissingImports]
        from olmoearth_pretrain.data import dataset as data  # pyright: ignore[reportMissingImports]
        from olmoearth_pretrain.train.masking import (  # pyright: ignore[reportMissingImports]
            MaskingConfig,
        )
        from upath import UPath  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(1)  # as in the worker processes of PyTorch's loader
        np.random.seed(0)
        random.seed(0)
        torch.manual_seed(0)
        self._item = data.GetItemArgs
        self._collate = collate.collate_double_masked_batched
        self._dataset = data.OlmoEarthDataset(UPath(h5py_dir), list(names), np.float32)
        self._dataset.prepare()
        self._masking = MaskingConfig(masking).build()

    def group(self, numbers: Sequence[int], patch_size: int, grid: int) -> Any:
        """The group of samples with these numbers: two masked views of normalised tensors."""
        batch = [self._dataset[self._item(int(n), patch_size, grid, TOKEN_BUDGET)] for n in numbers]
        return self._collate(batch, None, self._masking, None)
