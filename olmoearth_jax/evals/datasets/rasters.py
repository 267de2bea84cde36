"""GeoTIFF reading, with the `geo` extra."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from olmoearth_jax.data.raster_file import opening
from olmoearth_jax.files import check_file

_ROOM, _MOST_PACKED = 1 << 26, 2000
"""Pixels that any file may declare, and how well those of larger ones may be packed per byte."""


def read_raster(path: str | Path) -> np.ndarray:
    """All bands of a raster file, [bands, H, W].

    Raises:
      ValueError: missing or unreadable file, or no rasterio.
    """
    return _read(path)[0]


def read_label(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """As `read_raster`, and bool [bands, H, W]: false where the file declares that it has no data.

    A declared nodata value of a label raster is a value to be ignored; without one all counts.
    """
    values, flags = _read(path)
    return values, flags > 0


def _read(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(values, mask of GDAL: 0 is no data)."""
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning, RasterioIOError
    except ImportError as e:
        raise ValueError("reading GeoTIFFs needs rasterio: pip install olmoearth-jax[geo]") from e
    import warnings

    try:
        check_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path, **opening(path)) as source:
                pixels = source.count * source.height * source.width
                if pixels > max(_ROOM, _MOST_PACKED * Path(path).stat().st_size):
                    raise ValueError(f"{path} declares far more pixels than it can hold")
                return source.read(), source.read_masks()
    except (RasterioIOError, OSError) as e:
        raise ValueError(f"{path} cannot be read as a raster: {e}") from e
