"""GeoTIFF reading, with the `geo` extra."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def read_raster(path: str | Path) -> np.ndarray:
    """All bands of a raster file, [bands, H, W].

    Raises:
      ValueError: missing or unreadable file, or no rasterio.
    """
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning, RasterioIOError
    except ImportError as e:
        raise ValueError("reading GeoTIFFs needs rasterio: pip install olmoearth-jax[geo]") from e
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as source:
                return source.read()
    except RasterioIOError as e:
        raise ValueError(f"{path} cannot be read as a raster: {e}") from e
