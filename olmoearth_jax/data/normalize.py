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


def normalize(values: np.ndarray, name: str, strategy: str = "dataset") -> np.ndarray:
    """`values` [..., bands] of any numeric dtype, normalised in float64 and cast to float32.

    Elements equal to MISSING stay exactly MISSING.

    Raises:
      ValueError: the modality has no such statistics.
    """
    limits = bounds(name, strategy)
    if limits is None:
        return values.astype(np.float32)
    lo, hi = limits
    out = values.astype(np.float64)
    out -= lo
    out /= hi - lo
    result = out.astype(np.float32)
    if values.dtype.kind in "fi" and values.dtype.itemsize > 2:
        missing = values == MISSING
        if missing.any():
            result[missing] = MISSING
    return result
