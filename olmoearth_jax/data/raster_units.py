"""Whether rasters hold values in the unit of their modality, and none that stand for nothing."""

from __future__ import annotations

import numpy as np

from olmoearth_jax.data import values
from olmoearth_jax.data.rasters import Stack, Window

_FILLED = ("sentinel2_l2a", "landsat")
"""Modalities whose products store 0 in all bands where there is nothing."""
_MANY = 0.01
"""Share of pixels from which this is told."""


def fills(window: Window) -> list[str]:
    """Notes on pixels that an offset has moved from the 0 that stands for nothing.

    Zeros themselves are told by `values`.

    Args:
      window: of a stack, thinned out or not.
    """
    out = []
    for name in _FILLED:
        x = window.arrays.get(name)
        there = np.isfinite(x).all(-1) if x is not None else np.zeros(1, bool)
        if x is None or not there.any():
            continue
        # Of measurements no two bands agree everywhere; an offset moves all fills alike.
        empty = there & (x == x[..., :1]).all(-1) & (x[..., 0] < 0)
        if x.shape[-1] == 1:
            empty &= x[..., 0] == x[there].min()
        if empty.sum() > _MANY * there.sum():
            out.append(
                f"warning: {empty.sum() / there.sum():.0%} of the pixels of {name} are 0 in all "
                "bands before the offset, which its products store where there is nothing, but no "
                "nodata value is declared: give nodata 0 in the manifest"
            )
    return out


def check_files(stack: Stack, window: Window) -> None:
    """Holds each raster to the unit, for one of many has no weight among all values.

    Args:
      stack: the rasters.
      window: what it gives, thinned out or not.

    Raises:
      ValueError: a raster in another unit; it is named.
    """
    for name in stack.names:
        bands, dates = stack.bands_of(name), stack.dates
        for path, planes, dtype in stack.files_of(name):
            for day in dict.fromkeys(day for _, day in planes):
                step = dates.index(day) if day else 0
                channels = [bands.index(band) for band, of in planes if of == day]
                held = window.arrays[name][..., step, :][..., channels]
                flat = held[np.isfinite(held)]
                if not flat.size:
                    continue
                if wrong := values.wrong_unit(name, flat, dtype) or values.odd_band(name, held):
                    raise ValueError(f"{path}: {name} {wrong[1]}; {values.FLAG_TO_SETTLE}")
