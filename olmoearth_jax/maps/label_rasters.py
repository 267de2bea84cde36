"""A raster of labels on the grid of the images, read in parts: memory is that of a part.

rasterio is imported when a file is opened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.crs import crs_difference, same_crs
from olmoearth_jax.data.crs import library as rasterio_library
from olmoearth_jax.data.raster_file import RasterError, RasterFile, opening


class LabelRaster:
    """An open raster of labels; a context manager.

    Attributes:
      path: of the file.
      is_float: whether its numbers are floats.
    """

    def __init__(
        self,
        path: Path,
        crs: Any,
        transform: Any,
        shape: tuple[int, int],
        ignore: Sequence[float] = (),
        resample: str | None = None,
    ):
        """Opens it.

        Args:
          crs, transform, shape: of the grid.
          ignore: values that mean no label, besides the file's nodata.
          resample: 'nearest' to take a raster of another grid.

        Raises:
          ValueError: it cannot be read, has several bands or no CRS, or lies on another grid.
        """
        self.path, self._ignore, self._shape = path, ignore, shape
        self._warped: Any = None
        with contextlib.ExitStack() as files:
            file = self._file = files.enter_context(RasterFile(path))
            if file.count != 1:
                raise ValueError(f"the labels {path} have {file.count} bands; one is needed")
            if file.crs is None:
                raise ValueError(
                    f"the labels {path} have no coordinate reference system: set it, for example "
                    "with gdal_edit.py -a_srs"
                )
            self.is_float = np.dtype(file.dtypes[0]).kind == "f"
            # The file's first pixel, (column, row) of the grid.
            at = ((file.transform.c - transform.c) / transform.a,
                  (file.transform.f - transform.f) / transform.e)  # fmt: skip
            other = self._another_grid(crs, transform, at)
            if other and resample != "nearest":
                raise ValueError(
                    f"the labels {path} lie on another grid than the images ({other}): pass "
                    "--resample_labels=nearest, or warp them"
                )
            if other:
                self._warped = files.enter_context(_warped(file, crs, transform, shape))
            else:
                self._corner = round(at[1]), round(at[0])
            self._files = files.pop_all()

    def __enter__(self) -> LabelRaster:
        return self

    def __exit__(self, *_: Any) -> None:
        self._files.close()

    def _another_grid(self, crs: Any, transform: Any, at: tuple[float, float]) -> str:
        """How the file's grid differs from that of the images, in words; '' if it does not."""
        own = self._file.transform
        if not same_crs(self._file.crs, crs):
            return crs_difference(self._file.crs, crs)
        if np.allclose((own.a, own.e), (transform.a, transform.e), 1e-9) and np.allclose(
            at, np.round(at), rtol=0, atol=1e-4
        ):
            return ""
        return f"pixels of {own.a:g} from {own.c:.10g}, {own.f:.10g}"

    def read(self, rows: slice, cols: slice) -> tuple[np.ndarray, np.ndarray]:
        """A part of the grid.

        Returns:
          (values [h, w] in the file's type, bool [h, w] where they are labels: not nodata, not
          ignored, not NaN and not beside the file).

        Raises:
          ValueError: the file is damaged.
        """
        values, there = (self._shifted if self._warped is None else self._resampled)(rows, cols)
        for value in self._ignore:
            there &= values != value
        return values, there & ~np.isnan(values) if self.is_float else there

    def _resampled(self, rows: slice, cols: slice) -> tuple[np.ndarray, np.ndarray]:
        rasterio = rasterio_library()
        window = rasterio.windows.Window(
            cols.start, rows.start, cols.stop - cols.start, rows.stop - rows.start
        )
        try:
            there = self._warped.dataset_mask(window=window) > 0
            return self._warped.read(1, window=window), there
        except (rasterio.errors.RasterioError, OSError) as e:
            raise RasterError(
                self.path, f"cannot be read, it may be damaged or incomplete ({e})"
            ) from e

    def _shifted(self, rows: slice, cols: slice) -> tuple[np.ndarray, np.ndarray]:
        size = rows.stop - rows.start, cols.stop - cols.start
        out, there = np.zeros(size, self._file.dtypes[0]), np.zeros(size, bool)
        spans = []
        for part, at, own in zip(
            (rows, cols), self._corner, (self._file.height, self._file.width), strict=True
        ):
            low, high = max(at, part.start), min(at + own, part.stop)
            if low >= high:
                return out, there
            here = slice(low - part.start, high - part.start)
            spans.append((here, slice(low - at, high - at)))
        here = spans[0][0], spans[1][0]
        values, valid = self._file.read(spans[0][1], spans[1][1])
        out[here], there[here] = values[0], valid[0]
        return out, there


@contextlib.contextmanager
def _warped(file: RasterFile, crs: Any, transform: Any, shape: tuple[int, int]):
    """The nearest pixels of a file on another grid."""
    rasterio = rasterio_library()
    from rasterio.vrt import WarpedVRT

    # Without a nodata value an alpha band tells zeros from what lies beside the raster.
    with rasterio.open(file.path, **opening(file.path)) as source, WarpedVRT(
        source, crs=crs, transform=transform, width=shape[1], height=shape[0],
        resampling=rasterio.enums.Resampling.nearest, add_alpha=file.nodata[0] is None,
    ) as warped:  # fmt: skip
        yield warped
