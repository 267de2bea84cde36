"""Bands of evaluation data: their order on disk and in the model, and their normalisation.

Orders: spec/evals.md section 13.1; normalisation and imputed statistics: section 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.configlib.tasks import DEFAULT_METHOD, METHODS, Stats
from olmoearth_jax.modalities import closest
from olmoearth_jax.proposals import known

S2_13 = (
    "01 - Coastal aerosol",
    "02 - Blue",
    "03 - Green",
    "04 - Red",
    "05 - Vegetation Red Edge",
    "06 - Vegetation Red Edge",
    "07 - Vegetation Red Edge",
    "08 - NIR",
    "08A - Vegetation Red Edge",
    "09 - Water vapour",
    "10 - SWIR - Cirrus",
    "11 - SWIR",
    "12 - SWIR",
)
"""Band names of Level-1C-like sets, in their order on disk."""

S2_12 = tuple(b for b in S2_13 if not b.startswith("10 "))
"""Level-2A: without the cirrus band."""

LANDSAT_NAMES = (
    "01 - Coastal aerosol",
    "02 - Blue",
    "03 - Green",
    "04 - Red",
    "05 - NIR",
    "06 - SWIR1",
    "07 - SWIR2",
    "03 - Green",
    "09 - Cirrus",
    "10 - Tirs1",
    "10 - Tirs1",
)
"""Which named band fills each of the positions B1 ... B11 (no panchromatic, one thermal band)."""

S1 = ("vv", "vh")

FROM_S2_13 = (1, 2, 3, 7, 4, 5, 6, 8, 11, 12, 0, 9)
FROM_S2_12 = (1, 2, 3, 7, 4, 5, 6, 8, 10, 11, 0, 9)
FROM_LANDSAT = (7, 0, 1, 2, 3, 4, 5, 6, 8, 9, 10)
FROM_S1 = (0, 1)


class Statistics(NamedTuple):
    """Statistics per band, [C] each, in the order of the image's bands."""

    mean: np.ndarray
    std: np.ndarray
    lo: np.ndarray | None = None
    """Minimum and maximum, where known."""
    hi: np.ndarray | None = None


def normalize(image: np.ndarray, stats: Statistics, method: str = DEFAULT_METHOD) -> np.ndarray:
    """Normalises [..., C] by per-band statistics in their dtype (float64 by default).

    Raises:
      ValueError: unknown method, or a min-max method without min and max.
    """
    known("norm_method", method, METHODS)
    if method == "no_norm":
        return image
    mean, std, lo, hi = stats
    if method == "standardize":
        return (image - mean) / std
    if "min_max" in method:
        if lo is None or hi is None:
            raise ValueError(f"norm_method {method!r} needs the dataset's minimum and maximum")
    else:
        k = 3 if "_3_std" in method else 2 if "_2_std" in method else 1
        lo, hi = mean - k * std, mean + k * std
    out = (image - lo) / (hi - lo)
    if method.endswith("_int"):
        # The cast back to the input type is what makes this an 8-bit image in the reference.
        return np.trunc(np.clip(out * 255, 0, 255)).astype(image.dtype) / 255
    return np.clip(out, 0, 1) if "yes_clip" in method else out


def normalize_with(image: np.ndarray, stats: Stats, bands: Sequence[str], method: str):
    """`normalize` with the statistics of `bands`, in that order; image [..., len(bands)].

    Raises:
      ValueError: a band has no statistics.
    """
    for band in bands:
        if band not in stats:
            raise ValueError(f"band {band!r} has no statistics; {closest(band, stats)}")

    def table(key: str) -> np.ndarray | None:
        values = [stats[b].get(key) for b in bands]
        return None if None in values else np.asarray(values, np.float64)

    mean, std = table("mean"), table("std")
    if mean is None or std is None:
        raise ValueError("statistics need the mean and the std of every band")
    if not (np.isfinite(mean).all() and (std > 0).all()):
        raise ValueError("statistics need finite means, and a std above 0, of every band")
    return normalize(image, Statistics(mean, std, table("min"), table("max")), method)


def normalize_pretrained(image: np.ndarray, modality: str) -> np.ndarray:
    """Normalises [..., C], bands in model order, as the pretraining data was (float64)."""
    bounds = modalities.get(modality).norm_range()
    if bounds is None:
        return image
    lo, hi = bounds
    return (image - lo) / (hi - lo)


def impute_stats(
    available: Stats, pairs: Sequence[tuple[str, str]], names: Sequence[str]
) -> dict[str, Mapping[str, float]]:
    """Statistics for every name: its own, else those of the first pair (source, target) with it.

    Without pairs the input comes back unchanged.

    Raises:
      ValueError: a target has statistics already, or a name has neither.
    """
    if not pairs:
        return dict(available)
    for source, target in pairs:
        if target in available:
            raise ValueError(f"band {target!r} has statistics already, so it cannot be imputed")
        if source not in available:
            raise ValueError(f"band {source!r}, to be copied to {target!r}, has no statistics")
    sources: dict[str, str] = {}
    for source, target in pairs:
        sources.setdefault(target, source)
    out = {}
    for name in names:
        if name not in available and name not in sources:
            raise ValueError(f"band {name!r} has no statistics and no source to copy them from")
        out[name] = available[name] if name in available else available[sources[name]]
    return out
