"""Loading one modality of a tile from its GeoTIFFs (spec/data.md section 3, loading)."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.convert.tree import TileJob, files_of, raster_path
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.modalities import IMAGE_TILE_PX


def load_modality(tree: Path, job: TileJob, name: str) -> np.ndarray:
    """A modality of a tile in its stored dtype: [H, W, T, C], or [T, C] without extent.

    Coarser rasters are repeated and finer ones decimated to the modality's own grid.

    Raises:
      ReadError: a raster is missing, damaged, not square, or of the wrong number of bands.
    """
    modality = registry.get(name)
    steps = len(job.dates[name])
    cell = job.cell.coarser(modality.tile_resolution_factor)
    ratio = modality.tile_resolution_factor // job.cell.factor
    parts, channels = [], []
    for resolution, bands in files_of(modality).items():
        path = raster_path(tree, modality, cell, resolution)
        side = IMAGE_TILE_PX * modality.image_factor // ratio if modality.spatial else None
        place = (job.cell.row - cell.row * ratio, job.cell.col - cell.col * ratio)
        values = _read(path, steps * len(bands), ratio if modality.spatial else 1, place)
        if side is not None:
            values = resample(values, side, path)
        elif values.shape[1:] != (1, 1):
            raise ReadError(path, f"must have a single pixel, got {values.shape[1:]}")
        parts.append(values.reshape(steps, len(bands), *values.shape[1:]))
        channels += bands
    joined = np.concatenate(parts, axis=1)
    if channels != sorted(channels):
        joined = joined[:, np.argsort(channels)]
    if modality.spatial:
        return joined.transpose(2, 3, 0, 1)
    return joined[:, :, 0, 0]


def resample(values: np.ndarray, side: int, path: str | Path = "raster") -> np.ndarray:
    """[C, h, h] to [C, side, side]: every k-th pixel from index 0, or each pixel k times.

    Raises:
      ReadError: the sides are not whole multiples of each other.
    """
    own = values.shape[1]
    if own == side:
        return values
    if own > side and own % side == 0:
        k = own // side
        return values[:, ::k, ::k]
    if own < side and side % own == 0:
        k = side // own
        return values.repeat(k, axis=1).repeat(k, axis=2)
    raise ReadError(path, f"is {own} px wide, which is no whole fraction or multiple of {side} px")


def _read(path: Path, count: int, ratio: int, place: tuple[int, int]) -> np.ndarray:
    """Bands [C, h, w] of the part at `place` when the raster is cut into ratio x ratio parts."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError
    from rasterio.windows import Window

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as raster:
                if raster.width != raster.height:
                    raise ReadError(path, f"is not square: {raster.width} x {raster.height} px")
                if raster.count != count:
                    raise ReadError(
                        path,
                        f"has {raster.count} bands, expected {count} (timesteps in the CSV times "
                        f"bands of the set)",
                    )
                if len(set(raster.dtypes)) != 1:
                    raise ReadError(path, f"mixes data types: {sorted(set(raster.dtypes))}")
                side = raster.width // ratio
                window = Window(place[1] * side, place[0] * side, side, side)  # pyright: ignore
                return raster.read(window=window)
    except RasterioError as e:
        if not path.exists():
            raise ReadError(path, "file does not exist, but the CSV lists the tile") from None
        raise ReadError(path, f"cannot be read, it may be damaged or incomplete ({e})") from e
    except OSError as e:
        raise ReadError(path, f"cannot be read ({e})") from e
