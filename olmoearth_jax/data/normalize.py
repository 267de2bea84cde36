"""Normalisation (spec/data.md section 2): (x - lo) / (hi - lo) per band, no clipping."""

from __future__ import annotations

import functools

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.modalities import MISSING


@functools.lru_cache(maxsize=256)
def bounds(name: str, strategy: str = "dataset") -> tuple[np.ndarray, np.ndarray] | None:
    """(lo, hi) of a modality as of `Modality.norm_range`, but None also where x stays x."""
    limits = registry.get(name).norm_range(strategy)
    if limits is None or ((limits[0] == 0).all() and (limits[1] == 1).all()):
        return None  # spares the float64 arithmetic on maps
    return limits


_LONG = 64
"""Bands are repeated until a row has so many: NumPy is slow in loops over few elements."""


@functools.lru_cache(maxsize=256)
def _rows(name: str, strategy: str, repeats: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(lo, hi - lo) of a modality's bands, so many times over, as of `bounds`."""
    limits = bounds(name, strategy)
    if limits is None:
        return None
    lo, hi = limits
    return np.tile(lo, repeats), np.tile(hi - lo, repeats)


def _repeats(shape: tuple[int, ...]) -> int:
    """Neighbours along the last axes but one that are treated as one row."""
    count = 1
    for size in reversed(shape[:-1]):
        if count * shape[-1] >= _LONG:
            break
        count *= size
    return count


def normalize(
    values: np.ndarray, name: str, strategy: str = "dataset", out: np.ndarray | None = None
) -> np.ndarray:
    """`values` [..., bands] of any numeric dtype, normalised in float64 and cast to float32.

    Elements equal to MISSING stay exactly MISSING.

    Args:
      values: what is normalised; it isn't changed.
      name: the modality.
      strategy: see `Modality.norm_range`.
      out: float32 of the same shape to write into; made if None.

    Raises:
      ValueError: the modality has no such statistics.
    """
    result = np.empty(values.shape, np.float32) if out is None else out
    if bounds(name, strategy) is None:
        result[...] = values
        return result
    exact = values.astype(np.float64)
    flat = exact.flags.c_contiguous and exact.size > 0
    count = _repeats(exact.shape) if flat else 1
    limits = _rows(name, strategy, count)
    assert limits is not None
    rows = exact.reshape(-1, count * exact.shape[-1]) if flat else exact
    rows -= limits[0]
    rows /= limits[1]
    result[...] = exact
    if values.dtype.kind in "fi" and values.dtype.itemsize > 2:
        missing = values == MISSING
        if missing.any():
            result[missing] = MISSING
    return result
