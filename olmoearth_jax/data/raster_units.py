"""Whether every raster of a stack holds values in the unit of its modality."""

from __future__ import annotations

import numpy as np

from olmoearth_jax.data import values
from olmoearth_jax.data.rasters import Stack, Window


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
