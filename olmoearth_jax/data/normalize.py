"""Normalisation (spec/data.md section 2): (x - lo) / (hi - lo) per band, no clipping."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.modalities import MISSING, STD_MULTIPLIER

Strategy = Literal["dataset", "computed", "predefined"]


@functools.lru_cache(maxsize=256)
def bounds(name: str, strategy: Strategy = "dataset") -> tuple[np.ndarray, np.ndarray] | None:
    """(lo, hi) float64 [bands] of a modality, or None where values pass unchanged.

    Args:
      name: modality.
      strategy: 'computed' (mean -/+ 2 std), 'predefined' (fixed range), or 'dataset' (the first
        of these two that the modality has).

    Raises:
      ValueError: the modality has no such statistics.
    """
    modality = registry.get(name)
    if strategy == "dataset" or modality.skip_normalization:
        return modality.norm_range()
    if strategy == "computed" and modality.computed is not None:
        mean, std = (np.asarray(v, np.float64) for v in modality.computed)
        return mean - STD_MULTIPLIER * std, mean + STD_MULTIPLIER * std
    if strategy == "predefined" and modality.predefined is not None:
        lo, hi = (np.asarray(v, np.float64) for v in modality.predefined)
        return lo, hi
    if strategy not in ("computed", "predefined"):
        raise ValueError(
            f"unknown normalisation strategy {strategy!r}; known: dataset, computed, predefined"
        )
    raise ValueError(f"modality {name!r} has no {strategy} normalisation statistics")


def normalize(values: np.ndarray, name: str, strategy: Strategy = "dataset") -> np.ndarray:
    """`values` [..., bands] of any numeric dtype, normalised in float64 and cast to float32.

    Elements equal to MISSING stay exactly MISSING.

    Raises:
      ValueError: the modality has no such statistics.
    """
    limits = bounds(name, strategy)
    if limits is None or _is_unit(*limits):
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


def _is_unit(lo: np.ndarray, hi: np.ndarray) -> bool:
    """True if (x - lo) / (hi - lo) is x itself; spares the float64 arithmetic on maps."""
    return bool((lo == 0).all() and (hi == 1).all())
