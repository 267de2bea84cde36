"""Coordinate reference systems, as rasterio knows them: compared, named, and points in them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_HORIZONTAL_ONLY = {"no_defs", "wktext", "type", "vunits", "geoidgrids", "towgs84", "units"}


def library() -> Any:
    """The rasterio package.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import rasterio
        import rasterio.enums
        import rasterio.errors
        import rasterio.warp
        import rasterio.windows
    except ImportError:
        raise ValueError(
            "reading GeoTIFFs needs the 'geo' extra: pip install 'olmoearth-jax[geo]'"
        ) from None
    return rasterio


def same_crs(a: Any, b: Any) -> bool:
    """Whether two coordinate systems place pixels alike, however they are written.

    Args:
      a, b: whatever rasterio takes for a CRS, or None. None equals None only.

    Raises:
      ValueError: a text that is no CRS, or no rasterio.
    """
    a, b = _parsed(a), _parsed(b)
    if a is None or b is None:
        return a is b
    if a == b:
        return True
    codes = _code(a), _code(b)
    if codes[0] is not None and codes[0] == codes[1]:
        return True
    return not _differences(a, b)


def crs_difference(a: Any, b: Any) -> str:
    """What differs between two unequal coordinate systems, for messages: short names or members.

    Raises:
      ValueError: as `same_crs`.
    """
    a, b = _parsed(a), _parsed(b)
    none = "no coordinate reference system"
    if a is None or b is None:
        return f"{none if a is None else _title(a)} against {none if b is None else _title(b)}"
    codes = _code(a), _code(b)
    if None not in codes and codes[0] != codes[1]:
        return f"{codes[0]} against {codes[1]}"
    found = _differences(a, b)
    names = f"{_title(a)} against {_title(b)}"
    parts = ", ".join(f"{key} {one} against {other}" for key, one, other in found[:4])
    if _title(a) == _title(b):
        return parts or names
    return f"{names} ({parts})" if parts else names


def _parsed(crs: Any) -> Any:
    if crs is None or crs == "":
        return None
    rasterio = library()
    check_name(crs)
    try:
        return rasterio.crs.CRS.from_user_input(crs)
    except (rasterio.errors.CRSError, TypeError) as e:
        raise ValueError(f"unknown coordinate reference system {crs!r} ({e})") from None


def check_name(crs: Any) -> None:
    """Refuses texts that GDAL would take for a place to look a CRS up: a URL, or a file.

    Raises:
      ValueError: it is one.
    """
    if not isinstance(crs, str) or re.match(
        r"\s*([{+]|\w+\s*\[|https?://(www\.)?opengis\.net/)", crs
    ):
        return
    if re.match(r"\s*([/\\.~]|dict:)", crs, re.I) or "://" in crs or os.path.exists(crs.strip()):
        raise ValueError(
            f"unknown coordinate reference system {crs!r}: files and URLs are not looked up"
        )


def _code(crs: Any) -> str | None:
    found = crs.to_authority()
    return None if found is None else ":".join(found)


def _title(crs: Any) -> str:
    code = _code(crs)
    if code is not None:
        return code
    name = re.match(r'\w+\["([^"]*)"', crs.to_wkt())
    return repr(name[1]) if name and name[1] else str(crs)


def _datum(crs: Any) -> str | None:
    """Plain name of a datum, or None if it is not known."""
    found = re.search(r'(?:DATUM|ENSEMBLE)\["([^"]*)"', crs.to_wkt())
    name = re.sub(r"[^a-z0-9]", "", found[1].lower()) if found else ""
    name = re.sub(r"^d(?=wgs|north|european|etrs)|ensemble$", "", name)
    if not name or name.startswith(("unknown", "unnamed", "notspecified")):
        return None
    return "wgs84" if name in ("wgs1984", "worldgeodeticsystem1984") else name


def _differences(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """(parameter, of a, of b) of all in which two systems differ as PROJ writes them."""
    one, other = _members(a), _members(b)
    if not one or not other:
        return [("definition", _title(a), _title(b))]
    out = []
    for key in sorted(set(one) | set(other)):
        x, y = one.get(key), other.get(key)
        numbers = isinstance(x, float) and isinstance(y, float)
        close = numbers and abs(x - y) <= 1e-9 * max(1.0, abs(x), abs(y))  # pyright: ignore
        if x != y and not close:
            out.append((key, x, y))
    datums = _datum(a), _datum(b)
    if None not in datums and datums[0] != datums[1]:
        out.append(("datum", *datums))
    return out


def _members(crs: Any) -> dict[str, Any]:
    """PROJ's parameters of a system, with one name for what has several."""
    raw = crs.to_dict()
    if "proj" not in raw:
        return {}
    out = {k: v for k, v in raw.items() if k not in _HORIZONTAL_ONLY}
    named = {"WGS84": "WGS84", "NAD83": "GRS80", "NAD27": "clrk66"}
    if out.get("datum") in named:
        out["ellps"] = named[out.pop("datum")]
    if "k_0" in out:
        out["k"] = out.pop("k_0")
    if out["proj"] == "utm":
        south = out.pop("south", False)
        out |= {"proj": "tmerc", "lon_0": 6 * int(out.pop("zone")) - 183, "k": 0.9996}
        out |= {"x_0": 500_000, "y_0": 10_000_000 if south else 0}
    if out["proj"] == "longlat":
        out["pm"] = out.get("pm", 0)
    else:
        out["unit of length"] = crs.linear_units_factor[1] if crs.is_projected else 1.0
        for key in ("x_0", "y_0", "lon_0", "lat_0"):
            out.setdefault(key, 0)
        out.setdefault("k", 1)
    numbers = (int, float)
    return {
        k: float(v) if isinstance(v, numbers) and not isinstance(v, bool) else v
        for k, v in out.items()
    }


def ground_pixel_size(crs: Any, transform: Any, height: int, width: int) -> tuple[float, float]:
    """(width, height) in metres on the ground of the pixel in the middle of a raster.

    Map units lie: those of Web Mercator at 60 degrees are half a metre, and degrees are none.

    Args:
      crs: whatever rasterio takes for a CRS.
      transform: affine map from (column, row) to the CRS.
      height, width: of the raster in pixels.

    Raises:
      ValueError: no CRS, or a place where it is not defined.
    """
    crs = _parsed(crs)
    if crs is None:
        raise ValueError("a raster without a coordinate reference system has no size in metres")
    col, row = width / 2, height / 2
    corners = [(col - 0.5, row), (col + 0.5, row), (col, row - 0.5), (col, row + 0.5)]
    t = transform
    xs = [t.a * x + t.b * y + t.c for x, y in corners]
    ys = [t.d * x + t.e * y + t.f for x, y in corners]
    lon, lat = transform_points(crs, "EPSG:4326", xs, ys)
    points = _earth_centred(np.radians(lon), np.radians(lat))
    across, down = points[1] - points[0], points[3] - points[2]
    return float(np.linalg.norm(across)), float(np.linalg.norm(down))


def metres_per_unit(crs: Any) -> float:
    """Metres of a unit of a CRS; of a degree those at the equator.

    Raises:
      ValueError: an unknown CRS, or none.
    """
    crs = _parsed(crs)
    if crs is None:
        raise ValueError("no coordinate reference system is given")
    if crs.is_geographic:
        return float(np.pi * 6378137.0 / 180)
    return float(crs.linear_units_factor[1])


def transform_points(
    source: Any, target: Any, xs: Sequence[float], ys: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Points of one CRS in another, x (or longitude) first.

    Raises:
      ValueError: an unknown CRS, a local one, or places where one of them is not defined.
    """
    for crs in filter(None, (_parsed(source), _parsed(target))):
        if re.match("LOCAL_CS|ENG", crs.to_wkt()):
            what = "is a local one and says nothing of the place on the earth"
            raise ValueError(f"the coordinate system {_title(crs)} {what}")
    nowhere = f"the place {xs[0]}, {ys[0]} has no coordinates in the CRS"
    try:
        found = np.array(library().warp.transform(source, target, list(xs), list(ys)))
    except Exception as e:  # GDAL's own errors have no public class
        raise ValueError(f"{nowhere} ({e})") from None
    if not np.isfinite(found).all():
        raise ValueError(nowhere)
    return found[0], found[1]


def bounds_in(
    source: Any, box: Sequence[float], target: Any = "EPSG:4326"
) -> tuple[float, float, float, float]:
    """Bounds of a box in another CRS, edges followed.

    Args:
      source, target: whatever rasterio takes for a CRS.
      box: xmin, ymin, xmax, ymax in the CRS of the source.

    Returns:
      xmin, ymin, xmax, ymax. Degrees start in -180..180; what lies across 180 degrees goes on
      beyond, as 179.9 to 180.1. Around a pole they are those of the whole circle.

    Raises:
      ValueError: as `transform_points`.
    """
    west, south, east, north = box
    there = np.arange(8) / 8
    x, y = west + (east - west) * there, south + (north - south) * there
    # Around the box, so that neighbours are near each other on the earth, too.
    xs = [*x, *[east] * 8, *(east + west - x), *[west] * 8, west]
    ys = [*[south] * 8, *y, *[north] * 8, *(north + south - y), south]
    px, py = transform_points(source, target, xs, ys)
    low, high = float(py.min()), float(py.max())
    if not _parsed(target).is_geographic:
        return float(px.min()), low, float(px.max()), high
    px = np.unwrap(px, period=360.0)
    if abs(px[-1] - px[0]) > 180:
        return (-180.0, low, 180.0, 90.0) if low + high > 0 else (-180.0, -90.0, 180.0, high)
    left, right = float(px.min()), float(px.max())
    turns = 0.0 if left >= -180 and right <= 180 else 360 * np.floor((left + 180) / 360)
    return float(left - turns), low, float(right - turns), high


def _earth_centred(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """Metres [n, 3] from the centre of the earth (WGS 84) of points at height 0."""
    a, f = 6378137.0, 1 / 298.257223563
    e2 = f * (2 - f)
    n = a / np.sqrt(1 - e2 * np.sin(lat) ** 2)
    flat = n * np.cos(lat)
    return np.stack([flat * np.cos(lon), flat * np.sin(lon), n * (1 - e2) * np.sin(lat)], axis=-1)
