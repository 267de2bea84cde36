"""Which sample stands at which position of an epoch (spec/data.md section 8.2)."""

from __future__ import annotations

import functools

import numpy as np


@functools.lru_cache(maxsize=2)
def epoch_order(
    size: int, global_batch_size: int, seed: int, epoch: int, repeats: int = 1, shuffle: bool = True
) -> np.ndarray:
    """Data set indices in the order of one epoch, uint32 [batches * global_batch_size].

    Each repeat is a shuffle of all indices, less the tail that does not fill a batch.

    Epochs count from 1 and are added to the seed; `repeats` passes over the data make one epoch;
    without `shuffle` each keeps the natural order.

    Raises:
      ValueError: the data set is smaller than one batch.
    """
    kept = steps_per_pass(size, global_batch_size) * global_batch_size
    rng = np.random.Generator(np.random.PCG64(seed + epoch))
    out = []
    for _ in range(repeats):
        indices = np.arange(size, dtype=np.uint32)
        if shuffle:
            rng.shuffle(indices)
        out.append(indices[:kept])
    order = np.concatenate(out)
    order.setflags(write=False)
    return order


def steps_per_pass(size: int, global_batch_size: int) -> int:
    """Whole batches in one pass over `size` samples.

    Raises:
      ValueError: not even one.
    """
    if global_batch_size < 1:
        raise ValueError(f"global batch size must be positive, got {global_batch_size}")
    if size < global_batch_size:
        raise ValueError(
            f"the dataset has {size} samples, fewer than one global batch of {global_batch_size}; "
            f"lower data_loader.global_batch_size or add data"
        )
    return size // global_batch_size
