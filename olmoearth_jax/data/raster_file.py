"""One raster file as it is meant: north up, without what it declares to be missing.

A file says more than its numbers: in which direction it is stored, which pixels count, what the
numbers stand for. Nothing of that is ignored here; what cannot be obeyed is refused.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_ALPHA_NAMES = ("", "alpha", "a", "mask")
_VERTICAL = ("vunits", "vto_meter", "geoidgrids", "geoid_crs")
_WORDS = ("no_defs", "wktext", "type", "over")


def raster_library() -> Any:
    """The rasterio package.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import rasterio
        import rasterio.shutil
        import rasterio.warp
        import rasterio.windows
    except ImportError:
        raise ValueError(
            "GeoTIFFs need the 'geo' extra: pip install 'olmoearth-jax[geo]'"
        ) from None
    return rasterio


class RasterFile:
    """An open raster; a context manager. Bands of transparency are masks, no data.

    Attributes:
      path: where it lies.
      count: number of bands.
      dtypes: their types, as names.
      descriptions: their names in the file, '' where there is none.
      units: their units in the file, '' where there is none.
      height, width: in pixels.
      crs: as rasterio has it, or None.
      transform: affine map of the pixels once they are turned, or None where the file says
        nothing of its place.
      turned: what was turned: 'upside down', 'mirrored'.
      nodata: the declared fill value of each band, or None.
      scales, offsets: of each band; the value meant is raw * scale + offset.
      by_points: it is placed by ground control points or by a camera model, not by a grid.
    """

    def __init__(self, path: str | Path, *, bands: int | None = None, nodata: float | None = None):
        """Opens a file.

        Args:
          path: the file.
          bands: how many bands of data it should have. Writers mark the fourth band of 8 bits as
            transparency without being asked: if the number counts it, it is data.
          nodata: replaces the fill value that the file declares.

        Raises:
          ValueError: it cannot be opened, is rotated, or holds no plain numbers.
        """
        library = raster_library()
        self.path = Path(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", library.errors.NotGeoreferencedWarning)
                self._file: Any = library.open(path)
                transform = self._file.transform
        except (library.errors.RasterioError, OSError) as e:
            raise ValueError(f"{path} cannot be read as a raster: {e}") from None
        try:
            self._describe(bands, nodata)
            self._turn(None if transform == type(transform).identity() else transform)
        except ValueError:
            self._file.close()
            raise

    def __enter__(self) -> RasterFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def _describe(self, bands: int | None, nodata: float | None) -> None:
        file = self._file
        if not file.count:
            parts = ", ".join(file.subdatasets[:5])
            raise ValueError(f"{self.path} holds no bands of its own; name a part of it: {parts}")
        alpha = [
            k
            for k, kind in enumerate(file.colorinterp)
            if kind.name == "alpha" and (file.descriptions[k] or "").strip().lower() in _ALPHA_NAMES
        ]
        if bands == file.count or len(alpha) == file.count:
            alpha = []
        self._alpha = [k + 1 for k in alpha]
        self._bands = [k + 1 for k in range(file.count) if k not in alpha]
        self.count, self.height, self.width = len(self._bands), file.height, file.width
        self.dtypes = self._of(file.dtypes)
        self.descriptions = tuple((d or "").strip() for d in self._of(file.descriptions))
        self.units = tuple((u or "").strip() for u in self._of(file.units))
        self.scales, self.offsets = self._of(file.scales), self._of(file.offsets)
        self._declared = nodata is None
        self.nodata = self._of(file.nodatavals) if nodata is None else (nodata,) * self.count
        self.crs = file.crs or None
        self.by_points = bool(file.gcps[0]) or file.rpcs is not None
        if any("complex" in d for d in self.dtypes):
            raise ValueError(f"{self.path} holds complex numbers; give amplitudes or decibel")
        self.dtype = np.result_type(*self.dtypes)

    def _of(self, every: Sequence[Any]) -> tuple[Any, ...]:
        """Of a list with an entry per band of the file, those of the bands of data."""
        return tuple(every[k - 1] for k in self._bands)

    def _turn(self, transform: Any) -> None:
        self.transform, self._up, self._right, self.turned = transform, True, True, ()
        if transform is None:
            return
        t = transform
        # A hundredth of a pixel over the whole side is the noise of tools that write the map.
        askew = max(abs(t.b) * self.height / (abs(t.a) or 1e-300),
                    abs(t.d) * self.width / (abs(t.e) or 1e-300))  # fmt: skip
        if askew > 0.01:
            raise ValueError(
                f"{self.path} is rotated; warp it to a north-up grid, for example with gdalwarp"
            )
        self._up, self._right = t.e < 0, t.a > 0
        words = (("upside down", self._up), ("mirrored", self._right))
        self.turned = tuple(word for word, right in words if not right)
        x = t.c if self._right else t.c + t.a * self.width
        y = t.f if self._up else t.f + t.e * self.height
        self.transform = type(t)(abs(t.a), 0.0, x, 0.0, -abs(t.e), y)

    @property
    def scaled(self) -> bool:
        """Whether the file says that its numbers are not the values meant."""
        return any(s != 1 for s in self.scales) or any(o != 0 for o in self.offsets)

    def physical(self, values: np.ndarray) -> np.ndarray:
        """The values meant by raw ones [C, h, w], float32; see `scales` and `offsets`."""
        if not self.scaled:
            return values.astype(np.float32)
        scale, offset = (
            np.array(v, np.float64)[:, None, None] for v in (self.scales, self.offsets)
        )
        return (values * scale + offset).astype(np.float32)

    def read(
        self, rows: slice, cols: slice, out_shape: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of a window, north up.

        Args:
          rows, cols: start and stop in pixels, inside the raster.
          out_shape: (h, w) to thin the window out to, by the nearest pixels.

        Returns:
          raw values [C, h, w] in the file's dtype, and bool [C, h, w]: not declared missing by a
          fill value, a mask or transparency, and a number.

        Raises:
          ValueError: the window lies outside, or the file is damaged.
        """
        inside = 0 <= rows.start < rows.stop <= self.height
        if not inside or not 0 <= cols.start < cols.stop <= self.width:
            raise ValueError(
                f"rows {rows.start}..{rows.stop} and columns {cols.start}..{cols.stop} are not in "
                f"{self.path} ({self.height} x {self.width})"
            )
        if not self._up:
            rows = slice(self.height - rows.stop, self.height - rows.start)
        if not self._right:
            cols = slice(self.width - cols.stop, self.width - cols.start)
        library = raster_library()
        how: dict[str, Any] = {
            "window": library.windows.Window(
                cols.start, rows.start, cols.stop - cols.start, rows.stop - rows.start
            )
        }
        if out_shape is not None:
            how["out_shape"] = (self.count, *out_shape)
        try:
            values = self._file.read(self._bands, out_dtype=self.dtype, **how)
            valid = self._valid(values, how)
        except library.errors.RasterioError as e:
            raise ValueError(f"{self.path} cannot be read, it may be damaged: {e}") from None
        turn = (slice(None), slice(None, None, 1 if self._up else -1),
                slice(None, None, 1 if self._right else -1))  # fmt: skip
        return np.ascontiguousarray(values[turn]), np.ascontiguousarray(valid[turn])

    def _valid(self, values: np.ndarray, how: dict[str, Any]) -> np.ndarray:
        """bool [C, h, w] as stored; GDAL itself looks at one of fill value, mask and alpha only."""
        single = {**how, "out_shape": values.shape[1:]}
        valid = np.ones(values.shape, bool)
        if values.dtype.kind == "f":
            valid &= ~np.isnan(values)
        for k, (band, nodata) in enumerate(zip(self._bands, self.nodata, strict=True)):
            if nodata is not None and not math.isnan(nodata):
                same = np.float32(nodata) if values.dtype == np.float32 else nodata
                valid[k] &= values[k] != same
            flags = {flag.name for flag in self._file.mask_flag_enums[band - 1]}
            # The mask of a band may be the transparency, or the fill value that was replaced.
            if "alpha" in flags or "all_valid" in flags or (flags == {"nodata"}):
                continue
            if "nodata" in flags and not self._declared:
                continue
            valid[k] &= self._file.read_masks(band, **single) > 0
        for band in self._alpha:
            valid &= self._file.read(band, **single) > 0
        return valid


def _meaning(crs: Any) -> dict[str, str]:
    """Parameters of a CRS in PROJ's words, without its name and without heights."""
    out = {}
    for part in crs.to_proj4().split():
        key, _, value = part.removeprefix("+").partition("=")
        if key in _WORDS or key in _VERTICAL:
            continue
        if key == "towgs84" and not any(float(v) for v in value.split(",")):
            continue
        out[key] = value
    if out.get("datum") == "WGS84":
        del out["datum"]
        out["ellps"] = "WGS84"
    return out


def same_crs(a: Any, b: Any) -> bool:
    """Whether two coordinate reference systems of rasterio mean the same places.

    Their names do not matter, nor does the system of heights, nor whether they come as a code, as
    WKT or as a PROJ text. None equals None only.
    """
    if a is None or b is None:
        return a is None and b is None
    if a == b:
        return True
    ours, theirs = _meaning(a), _meaning(b)
    return bool(ours) and ours == theirs


def crs_name(crs: Any) -> str:
    """A short name: its code, else the name it bears, else its PROJ text."""
    if crs is None:
        return "none"
    code = crs.to_epsg()
    if code:
        return f"EPSG:{code}"
    wkt = crs.to_wkt()
    name = wkt.split('"')[1] if wkt.count('"') > 1 else ""
    return name if name and name != "unknown" else crs.to_proj4() or wkt[:60]


def crs_difference(a: Any, b: Any) -> str:
    """What differs, as 'EPSG:32633 against EPSG:32634 (zone 33 / 34)'."""
    text = f"{crs_name(a)} against {crs_name(b)}"
    if a is None or b is None:
        return text
    ours, theirs = _meaning(a), _meaning(b)
    parts = [
        f"{key} {ours.get(key, 'none') or 'yes'} / {theirs.get(key, 'none') or 'yes'}"
        for key in dict.fromkeys((*ours, *theirs))
        if ours.get(key) != theirs.get(key)
    ]
    return f"{text} ({', '.join(parts)})" if parts else text


def pixel_size_m(crs: Any, transform: Any, height: int, width: int) -> tuple[float, float]:
    """(width, height) in metres on the ground of the pixel in the middle of a north-up raster.

    A projection's metres are not those of the ground everywhere: Web Mercator at 60 degrees draws
    all things twice as large. Where the system has no known place on earth, its own units count.

    Raises:
      ValueError: there is no CRS.
    """
    if crs is None:
        raise ValueError("without a coordinate reference system, pixels have no size")
    library = raster_library()
    x = transform.c + transform.a * (width / 2)
    y = transform.f + transform.e * (height / 2)
    points = [x, x + transform.a, x], [y, y, y + transform.e]
    try:
        lon, lat = library.warp.transform(crs, "EPSG:4326", *points)
    except Exception:  # PROJ knows no way; rasterio has no public class for that
        lon, lat = [math.inf], [math.inf]
    if not all(map(math.isfinite, (*lon, *lat))):
        metres = crs.linear_units_factor[1] if crs.is_projected else math.nan
        return abs(transform.a) * metres, abs(transform.e) * metres
    # Radii of the WGS84 ellipsoid along the meridian and across it.
    phi, e2 = math.radians(lat[0]), 0.00669437999014
    root = 1 - e2 * math.sin(phi) ** 2
    along, across = 6378137.0 * (1 - e2) / root**1.5, 6378137.0 / math.sqrt(root) * math.cos(phi)

    def ground(k: int) -> float:
        east = math.radians((lon[k] - lon[0] + 180) % 360 - 180) * across
        return math.hypot(east, math.radians(lat[k] - lat[0]) * along)

    return ground(1), ground(2)
