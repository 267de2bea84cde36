"""Recognises values in other units than the models were trained on."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

OFFSET_SINCE = 20220125  # first day of the processing baseline that adds 1000 to Sentinel-2
_SAMPLED = 200_000
_OFF = "; pass check_units=False if the values are right as they are"


def check_units(
    values: np.ndarray,
    name: str,
    newest: int | None = None,
    normalized: bool = False,
    dtype: Any = None,
) -> None:
    """Looks at raw values of a modality.

    Args:
      values: raw values of any shape, NaN where missing.
      name: modality.
      newest: date of the newest image as yyyymmdd, where known.
      normalized: they are said to be normalised.
      dtype: type in which the values came.

    Raises:
      ValueError: values that cannot be in the expected unit: reflectance in 0..1 or 8-bit values
        for Sentinel-2 and Landsat, linear power for Sentinel-1, or raw values that are said to be
        normalised. A Sentinel-2 image that seems to hold the +1000 offset of newer products gives
        a warning.
    """
    flat = values.reshape(-1)
    flat = flat[:: max(1, flat.size // _SAMPLED)]
    flat = flat[np.isfinite(flat)]
    if not flat.size:
        return
    low, middle, high = (float(v) for v in np.percentile(flat, (1, 50, 99)))
    if normalized:
        if np.abs(flat).max() > 50:
            raise ValueError(
                f"{name} is said to be normalised (about 0..1), but its values reach "
                f"{np.abs(flat).max():.3g}; leave out normalized=True for raw units{_OFF}"
            )
    elif name == "sentinel1":
        if low >= 0:
            raise ValueError(
                f"sentinel1 must be backscatter in decibel (about -30 to 0), but its values are "
                f"all positive (median {middle:.3g}), like linear power: take 10 * log10(x){_OFF}"
            )
    elif name in ("sentinel2_l2a", "landsat"):
        if 0 < high <= 2.0:
            fix = "multiply by 10000" if name == "sentinel2_l2a" else "give the digital numbers"
            raise ValueError(
                f"{name} must be digital numbers (up to about 10000), but its values reach only "
                f"{high:.3g}, like reflectance in 0..1: {fix}{_OFF}"
            )
        if dtype == np.uint8 or (high <= 255 and float(flat.max()) == 255):
            raise ValueError(
                f"{name} must be digital numbers (up to about 10000), but its values are those of "
                f"an 8-bit picture (0..255): use the original product, not a rendering{_OFF}"
            )
        if name == "sentinel2_l2a" and low >= 1000 and (newest or 0) >= OFFSET_SINCE:
            warnings.warn(
                f"sentinel2_l2a: nearly all values are above 1000 (1st percentile {low:.0f}); "
                "products since January 2022 hold an offset of 1000 that must be subtracted "
                "(values below 0 set to 0). If that was done and the scene is bright, ignore this",
                stacklevel=3,
            )
