"""Maps written block by block as Cloud Optimized GeoTIFF, which appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.raster_file import library

_BLOCK_BYTES = 8 << 20


_PLAIN = {
    "driver": "GTiff", "tiled": True, "blockxsize": 128, "blockysize": 128,
    "interleave": "pixel", "bigtiff": "IF_SAFER", "sparse_ok": True,
}  # fmt: skip


@contextlib.contextmanager
def writing(
    path: Path,
    *,
    crs: str,
    transform: Sequence[float],
    shape: tuple[int, int],
    dtype: str,
    names: Sequence[str],
    nodata: float | None = None,
    tags: Mapping[str, str] | None = None,
    rule: tuple[float, float] | None = None,
    colors: Mapping[int, tuple[int, int, int]] | None = None,
    overviews: str = "nearest",
    alpha: bool = False,
) -> Iterator[Any]:
    """A writer with `put(row, col, x [C, h, w])`; the file appears when the block ends well.

    Args:
      path: of the file.
      crs, transform, shape: of the grid; transform is a..f.
      dtype: of the values.
      names: one per band.
      nodata: where nothing is put, too.
      tags: of the file.
      rule: (scale, offset) of all bands.
      colors: colour by value, of one band of bytes.
      overviews: how they are made; 'nearest' or 'average' or 'mode'.
      alpha: the last band says what is opaque.

    Raises:
      ValueError: rasterio is missing.
    """
    rasterio = library()
    from rasterio.enums import ColorInterp
    from rasterio.shutil import copy
    from rasterio.transform import Affine

    path.parent.mkdir(parents=True, exist_ok=True)
    place = {"crs": crs, "transform": Affine(*list(transform)[:6]), "nodata": nodata}
    size = {"count": len(names), "height": shape[0], "width": shape[1], "dtype": dtype}
    side = _block_side(len(names) * np.dtype(dtype).itemsize)
    with tempfile.TemporaryDirectory(prefix=".map-", dir=path.parent) as scratch:
        raw, done = Path(scratch) / "raw.tif", Path(scratch) / "done.tif"
        with rasterio.open(raw, "w", **_PLAIN, **place, **size) as file:
            if colors is not None:
                file.write_colormap(1, {k: (*v, 255) for k, v in colors.items()})
            elif alpha:
                file.colorinterp = [ColorInterp[k] for k in ("red", "green", "blue", "alpha")]
            yield _Blocks(file)
        with rasterio.open(raw, "r+") as file:
            file.descriptions = tuple(names)
            _describe(file, tags or {}, rule)
        copy(
            raw, done, driver="COG", compress="deflate", blocksize=side, bigtiff="IF_SAFER",
            overview_resampling=overviews, predictor="NO" if colors else "YES",
        )  # fmt: skip
        os.replace(done, path)


def _block_side(bytes_per_pixel: int) -> int:
    side = 512
    while side > 128 and side * side * bytes_per_pixel > _BLOCK_BYTES:
        side //= 2
    return side


def _describe(file: Any, tags: Mapping[str, str], rule: tuple[float, float] | None) -> None:
    file.update_tags(**tags)
    if rule is not None:
        file.scales = (rule[0],) * file.count
        file.offsets = (rule[1],) * file.count


class _Blocks:
    def __init__(self, file: Any):
        self._file = file

    def put(self, row: int, col: int, x: np.ndarray) -> None:
        """Writes values [C, h, w] at a place."""
        window = library().windows.Window(col, row, x.shape[2], x.shape[1])
        self._file.write(x, window=window)

    def read(self, row: int, col: int, height: int, width: int) -> np.ndarray:
        """Values [C, h, w] that were put."""
        return self._file.read(window=library().windows.Window(col, row, width, height))


def named(path: Path, zones: Sequence[int]) -> dict[int, Path]:
    """Zone -> file; its number is added where there are several."""
    if len(zones) == 1:
        return {zones[0]: path}
    return {z: path.with_name(f"{path.stem}_utm{z:02d}{path.suffix}") for z in zones}
