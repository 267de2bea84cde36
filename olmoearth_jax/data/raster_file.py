"""One raster file, read as it says it is to be read: direction, place, missing pixels.

A file's rows may run from south to north and its columns from east to west; windows are always
those of the north-up picture. rasterio is imported when a file is opened.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.crs import library
from olmoearth_jax.data.remote import without_secrets
from olmoearth_jax.files import check_file

_TILT = 0.01
"""Pixels by which a row or column may slant over the whole raster and still be called straight."""

_HUGE = 1e30
"""No measurement has such a size: fill values near the end of float32 or float64 do."""


class RasterError(ValueError):
    """A raster, of a `path`, cannot be used; `reason` says why, without the path."""

    def __init__(self, path: str | Path, reason: str):
        self.path, self.reason = without_secrets(str(path)), without_secrets(reason)
        super().__init__(self.path, self.reason)

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


_ELSEWHERE = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://|/vsi(curl|s3|gs|az|adls|oss|swift|hdfs)")
"""How the names of files on other machines begin."""


def opening(path: str | Path) -> dict[str, Any]:
    """What rasterio is told beside the path, so that a GeoTIFF is nothing else: GDAL goes by the
    content, and a list of other files (a VRT) may be called .tif. Files of other machines, whose
    names say little, and names that are the content themselves must be of one file, too."""
    name = str(path).lower()
    if "://" in name:  # what follows is a signature
        name = name.partition("?")[0]
    if name.endswith((".tif", ".tiff")):
        return {"driver": "GTiff"}
    if not (_ELSEWHERE.match(name) or "<" in name):
        return {}
    return {"driver": "JP2OpenJPEG" if name.endswith(".jp2") else "GTiff"}


def _check_mask_beside(path: str | Path) -> None:
    """Refuses a mask file beside a raster that is no TIFF: GDAL opens whatever it may name.

    Raises:
      RasterError: there is one.
    """
    for beside in (Path(f"{path}.msk"), Path(f"{path}.MSK")):
        if beside.is_file():
            check_file(beside)
            with beside.open("rb") as file:
                if file.read(4)[:2] not in (b"II", b"MM"):
                    raise RasterError(path, f"has a mask beside it, {beside.name}, that is no TIFF")


class RasterFile:
    """An open raster; a context manager.

    Attributes:
      path: as given.
      count: number of data bands; an alpha band is none.
      dtypes, descriptions, nodata, scales, offsets: per data band, as rasterio has them.
      height, width: in pixels.
      crs: as rasterio has it, or None.
      transform: of the north-up picture; the identity if the file has no place.
      placed: whether it has a place on the ground.
      own_masks: numbers of the data bands with a mask; nodata values and alpha are none.
      complete: whether nothing in the file says that pixels are missing.
      turned: in words how the file differs from north-up, such as 'upside down'; '' if it does not.
    """

    def __init__(self, path: str | Path, expected: int | None = None):
        """Opens a raster.

        Args:
          path: file, or whatever else rasterio opens.
          expected: number of data bands where it is known. GDAL calls the fourth band of any
            8-bit file alpha; with this number it is data where only so the count is right.

        Raises:
          ValueError: it cannot be opened, or its pixels do not lie along the axes of its CRS.
        """
        self._rasterio, self.path = library(), path
        try:
            check_file(path)
            _check_mask_beside(path)
            with _no_place_is_fine(self._rasterio):
                self._file = self._base = self._rasterio.open(path, **opening(path))
        except (self._rasterio.errors.RasterioError, OSError) as e:
            raise RasterError(path, f"cannot be read as a raster: {e}") from e
        try:
            self._describe(expected)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> RasterFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def files(self) -> list[str]:
        """The files it is read from: those that a virtual raster names too."""
        return list(self._file.files)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _describe(self, expected: int | None) -> None:
        file = self._file
        self.height, self.width, self.crs = file.height, file.width, file.crs
        self._alpha, self._bands = _alpha_band(self._rasterio, file, expected)
        chosen = [b - 1 for b in self._bands]
        self.count = len(chosen)
        self.dtypes = tuple(file.dtypes[k] for k in chosen)
        if any(d.startswith("complex") for d in self.dtypes):
            raise RasterError(self.path, "holds complex numbers: calibrate it, or take their power")
        self.descriptions = tuple(file.descriptions[k] for k in chosen)
        self.nodata = tuple(file.nodatavals[k] for k in chosen)
        self.scales = tuple(file.scales[k] for k in chosen)
        self.offsets = tuple(file.offsets[k] for k in chosen)
        self.own_masks = self._masked()
        self.complete = self._alpha is None and not self.own_masks
        self.complete &= all(v is None for v in self.nodata)
        t = file.transform
        if not np.isfinite(t).all():
            raise RasterError(self.path, "places its pixels at numbers that are none")
        if t.is_identity and file.gcps[0]:
            raise RasterError(
                self.path, "is placed by ground control points: warp it to a north-up grid"
            )
        # Without a CRS, pixels counted from a corner are no place.
        counted = self.crs is None and abs(t.a) == abs(t.e) == 1 and t.c == 0
        counted = counted and t.f in (0, self.height)
        self.placed = not (t.is_identity or counted)
        self._rows_up = self._cols_left = False
        if self.placed:
            if not _straight(t, self.height, self.width):
                raise RasterError(self.path, "is rotated: warp it to a north-up grid")
            self._rows_up, self._cols_left = t.e > 0, t.a < 0
        x = t.c + t.a * self.width if self._cols_left else t.c
        y = t.f + t.e * self.height if self._rows_up else t.f
        if self._rows_up or self._cols_left:
            t = type(t)(abs(t.a), 0.0, x, 0.0, -abs(t.e), y)
        self.transform = t
        words = [("upside down", self._rows_up), ("mirrored", self._cols_left)]
        self.turned = " and ".join(word for word, so in words if so)

    def values(
        self,
        rows: slice | None = None,
        cols: slice | None = None,
        out_shape: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """The values of `read` alone: enough for a file that is `complete`."""
        return self._read(rows, cols, out_shape, False)[0]

    def read(
        self,
        rows: slice | None = None,
        cols: slice | None = None,
        out_shape: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The data bands of a window of the north-up picture, and which pixels are valid.

        Args:
          rows, cols: of the window, with bounds inside of the raster; None for all.
          out_shape: (h, w) to thin the window out or to repeat its pixels (nearest ones).

        Returns:
          (values [C, h, w] in the file's own type, valid bool [C, h, w]). Not valid is what nodata
          values, masks and alpha bands say is none; NaN is not judged.

        Raises:
          ValueError: the window leaves the raster, or the file is damaged.
        """
        values, valid = self._read(rows, cols, out_shape, True)
        assert valid is not None
        return values, valid

    def _read(
        self,
        rows: slice | None,
        cols: slice | None,
        out_shape: tuple[int, int] | None,
        masked: bool,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        top, bottom = _bounds(rows, self.height, self.path)
        left, right = _bounds(cols, self.width, self.path)
        if self._rows_up:
            top, bottom = self.height - bottom, self.height - top
        if self._cols_left:
            left, right = self.width - right, self.width - left
        window = self._rasterio.windows.Window(left, top, right - left, bottom - top)
        how = {"window": window}
        if out_shape is not None:
            how["out_shape"] = (self.count, *out_shape)
        try:
            with _no_place_is_fine(self._rasterio):
                values = self._data(how)
                valid = self._valid(values, how) if masked else None
        except (self._rasterio.errors.RasterioError, OSError) as e:
            raise RasterError(
                self.path, f"cannot be read, it may be damaged or incomplete ({e})"
            ) from e
        turn = np.s_[:, :: -1 if self._rows_up else 1, :: -1 if self._cols_left else 1]
        return values[turn], None if valid is None else valid[turn]

    def _data(self, how: dict[str, Any]) -> np.ndarray:
        if len(set(self.dtypes)) == 1:
            return self._thinned(self._file.read, self._bands, how)
        # rasterio reads bands of several types one by one only.
        return np.stack([self._one(self._file.read, band, how) for band in self._bands])

    def _one(self, read: Callable[..., np.ndarray], band: int, how: dict[str, Any]) -> np.ndarray:
        shape = {"out_shape": how["out_shape"][1:]} if "out_shape" in how else {}
        return self._thinned(read, band, {"window": how["window"], **shape})

    def _thinned(
        self, read: Callable[..., np.ndarray], bands: int | list[int], how: dict[str, Any]
    ) -> np.ndarray:
        """Reads with GDAL; where smaller versions of the pixels may come from another file, only
        the pixels themselves."""
        if "out_shape" not in how or not self._has_versions_elsewhere():
            return read(bands, **how)
        whole = read(bands, window=how["window"])
        rows, cols = (
            ((np.arange(n) + 0.5) * size / n).astype(int)
            for n, size in zip(how["out_shape"][-2:], whole.shape[-2:], strict=True)
        )
        return whole[..., rows[:, None], cols]

    def _has_versions_elsewhere(self) -> bool:
        """Whether the file, or what lies beside it, may name other files as its overviews."""
        beside = [Path(f"{self.path}{end}") for end in (".ovr", ".OVR", ".aux", ".AUX")]
        beside.append(Path(self.path).with_suffix(".aux"))
        known = bool(opening(self.path)) and Path(self.path).is_file()
        named = bool(self._base.tags(ns="OVERVIEWS")) or any(p.exists() for p in beside)
        return known and named

    def _masked(self) -> set[int]:
        flag = self._rasterio.enums.MaskFlags
        others = {flag.all_valid, flag.alpha, flag.nodata}
        kinds = self._file.mask_flag_enums
        return {b for b in self._bands if not others & set(kinds[b - 1])}

    def _valid(self, values: np.ndarray, how: dict[str, Any]) -> np.ndarray:
        """What every declaration of the file leaves valid; GDAL's own mask is only one of them."""
        valid = np.ones(values.shape, bool)
        for k, band in enumerate(self._bands):
            if band in self.own_masks:
                mask = self._one(self._file.read_masks, band, how)
                valid[k] &= mask > 0
        alike = len({str(v) for v in self.nodata}) == 1  # then all bands at once
        for k in [slice(None)] if alike else range(self.count):
            missing = self.nodata[0 if isinstance(k, slice) else k]
            if missing is not None:
                valid[k] &= ~_equal(values[k], missing)
        if self._alpha is not None:
            valid &= self._one(self._file.read, self._alpha, how) > 0
        return valid


def _equal(values: np.ndarray, missing: float) -> np.ndarray:
    """Which values are the nodata value; the largest floats are often declared in a few digits."""
    if np.isnan(missing):
        return np.isnan(values)
    with np.errstate(over="ignore"):
        same = values == missing
    if values.dtype.kind == "f" and _HUGE < abs(missing) < np.inf:
        same |= np.isfinite(values) & (values * np.sign(missing) > _HUGE)
    return same


def _no_place_is_fine(rasterio: Any) -> warnings.catch_warnings:
    """Rasters without georeferencing are read without rasterio's warning."""
    return warnings.catch_warnings(
        action="ignore", category=rasterio.errors.NotGeoreferencedWarning
    )


def _alpha_band(rasterio: Any, file: Any, expected: int | None) -> tuple[int | None, list[int]]:
    """(number of the alpha band or None, numbers of the data bands), counted from 1."""
    every = list(range(1, file.count + 1))
    kinds = file.colorinterp
    found = [
        b
        for b in every
        if kinds[b - 1] == rasterio.enums.ColorInterp.alpha
        and (file.descriptions[b - 1] or "alpha").strip().lower() in ("alpha", "a", "mask")
    ]
    data = [b for b in every if b not in found]
    if len(found) != 1 or not data or expected == len(every):
        return None, every
    return found[0], data


def _straight(t: Any, height: int, width: int) -> bool:
    if not (t.a and t.e):
        return False
    return abs(t.b) * height <= _TILT * abs(t.a) and abs(t.d) * width <= _TILT * abs(t.e)


def _bounds(part: slice | None, size: int, path: str | Path) -> tuple[int, int]:
    if part is None:
        return 0, size
    start, stop = part.start or 0, size if part.stop is None else part.stop
    if not 0 <= start < stop <= size or part.step not in (None, 1):
        raise RasterError(path, f"has {size} pixels on this side, no window {start}..{stop}")
    return start, stop
