"""Which sample stands at which position of an epoch (spec/data.md section 8.2)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np


@functools.lru_cache(maxsize=2)
def epoch_order(
    size: int, global_batch_size: int, seed: int, epoch: int, repeats: int = 1, shuffle: bool = True
) -> np.ndarray:
    """Data set indices in the order of one epoch, uint32 [batches * global_batch_size].

    Each repeat is a shuffle of all indices, less the tail that does not fill a batch.

    Args:
      size: samples in the data set.
      global_batch_size: samples per optimiser step.
      seed: shuffle seed; the epoch is added to it.
      epoch: 1-based.
      repeats: passes over the data per epoch.
      shuffle: False keeps the natural order.

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


def order_file_name(size: int, seed: int, epoch: int, shuffle: bool = True) -> str:
    """Name under which the reference keeps an epoch's order of `size` indices."""
    return (
        f"global_indices_epoch{epoch}_seed{seed}_size{size}.npy"
        if shuffle
        else (f"global_indices_size{size}.npy")
    )


def reference_rank_indices(
    order: np.ndarray,
    global_batch_size: int,
    rank: int,
    world: int,
    worker: int,
    workers: int,
    batches_processed: int = 0,
) -> np.ndarray:
    """The indices one loader worker of one rank gets in the reference, to compare runs with it.

    Here groups are contiguous runs of the epoch instead (spec/data.md section 8.3 describes both
    axes of the reference's striding).
    """
    rows = order.reshape(-1, global_batch_size)[batches_processed:]
    return rows[worker :: max(1, workers), rank::world].reshape(-1)


def reference_shape_draws(
    seed: int, patch_sizes: tuple[int, int], grids: Sequence[int], count: int, tile_px: int = 256
) -> list[tuple[int, int]]:
    """The first (patch size, grid) draws of one reference worker, to compare runs with it.

    Args:
      seed: seed + epoch + rank * max(1, workers) + worker.
      patch_sizes: smallest and largest patch size.
      grids: the grid sides to draw from.
      count: draws wanted.
      tile_px: side that limits the grid; the reference always takes 256.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    out = []
    choices = np.arange(patch_sizes[0], patch_sizes[1] + 1)
    for _ in range(count):
        patch = int(rng.choice(choices))
        fitting = [g for g in grids if 0 < g <= tile_px // patch]
        out.append((patch, int(rng.choice(fitting))))
    return out
