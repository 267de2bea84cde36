"""GeoTIFF reading (with the `geo` extra) and image resizing for dataset converters."""

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


def resize_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W] -> float32 [height, width], bilinear between pixel centres (corners not aligned)."""

    def weights(size: int, out: int) -> np.ndarray:
        place = np.maximum((np.arange(out) + 0.5) * size / out - 0.5, 0)
        low = np.minimum(np.floor(place).astype(int), size - 1)
        part = place - low
        table = np.zeros((out, size), np.float32)
        table[np.arange(out), low] += (1 - part).astype(np.float32)
        table[np.arange(out), np.minimum(low + 1, size - 1)] += part.astype(np.float32)
        return table

    if image.shape == (height, width):
        return image.astype(np.float32)
    rows, columns = weights(image.shape[0], height), weights(image.shape[1], width)
    return rows @ image.astype(np.float32) @ columns.T
