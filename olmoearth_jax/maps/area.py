"""Areas of interest: polygons of a file, cut to UTM zones and projected."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.raster_file import same_crs, transform_points
from olmoearth_jax.maps.lattice import LONLAT, crs_of, zone_bounds, zone_of

DENSE = 0.01
"""Degrees between the points of an edge, which is straight in longitude and latitude."""
_LONLAT_NAMES = ("CRS84", "EPSG::4326", "EPSG:4326")


def shapely_library(what: str = "areas") -> Any:
    """The shapely package.

    Args:
      what: needs it, as an error says.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import shapely
        import shapely.geometry
    except ImportError:
        raise ValueError(f"{what} need the 'geo' extra: pip install 'olmoearth-jax[geo]'") from None
    return shapely


def read_area(path: Path) -> Any:
    """The (multi)polygon in longitude and latitude that a file shows.

    Args:
      path: GeoJSON, GeoParquet (.parquet) or GeoPackage (.gpkg).

    Raises:
      ValueError: it cannot be read, holds no polygons, or one of them is unusable; its number in
        the file, from 1, is named.
    """
    if not path.is_file():
        raise ValueError(f"there is no area file {path}")
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".geoparquet"):
        shapes, crs = _parquet(path)
    elif suffix == ".gpkg":
        shapes, crs = _geopackage(path)
    else:
        shapes, crs = _geojson(path)
    return area_of(shapes, crs, str(path))


def area_of(shapes: Iterable[Any], crs: str = LONLAT, source: str = "the area") -> Any:
    """One (multi)polygon in longitude and latitude of the shapes of an area, checked.

    Raises:
      ValueError: see `read_area`.
    """
    shapely, parts = shapely_library(), []
    for number, shape in enumerate(shapes, 1):
        where = f"{source}: feature {number}"
        if shape is None or shape.is_empty:
            raise ValueError(f"{where} is empty")
        if shape.geom_type not in ("Polygon", "MultiPolygon"):
            raise ValueError(f"{where} is a {shape.geom_type}; an area is made of polygons")
        if not shape.is_valid:
            raise ValueError(f"{where} is no valid polygon: {shapely.is_valid_reason(shape)}")
        if not same_crs(crs, LONLAT):
            shape = project(shape, crs, LONLAT)
        west, south, east, north = shape.bounds
        if not (west >= -180 and east <= 180 and south >= -90 and north <= 90):
            raise ValueError(
                f"{where} reaches from {west:g}, {south:g} to {east:g}, {north:g}, which are no "
                "longitudes and latitudes: name its CRS in the file, and cut it at 180 degrees"
            )
        for part in getattr(shape, "geoms", [shape]):
            if part.bounds[2] - part.bounds[0] > 180:
                raise ValueError(
                    f"{where} is wider than 180 degrees: cut it at the antimeridian (RFC 7946)"
                )
        parts.append(shape)
    if not parts:
        raise ValueError(f"{source} holds no polygons")
    return shapely.union_all(parts)


def project(shape: Any, source: str, target: str) -> Any:
    """A shape in another CRS, vertex by vertex."""

    def move(points: np.ndarray) -> np.ndarray:
        if not len(points):
            return points
        return np.stack(transform_points(source, target, *points.T.tolist()), axis=1)

    return shapely_library().transform(shape, move)


def by_zone(area: Any) -> dict[int, Any]:
    """Zone -> the area's part within its 6 degrees, projected; zones without area are left out."""
    shapely, out = shapely_library(), {}
    for part in getattr(area, "geoms", [area]):
        west, _, east, _ = part.bounds
        for zone in range(zone_of(west), zone_of(min(east, 179.999999)) + 1):
            left, right = zone_bounds(zone)
            cut = _polygons(shapely.intersection(part, shapely.box(left, -90, right, 90)))
            if cut.area > 0:
                out.setdefault(zone, []).append(cut)
    return {
        zone: project(shapely.segmentize(shapely.union_all(out[zone]), DENSE), LONLAT, crs_of(zone))
        for zone in sorted(out)
    }


def _polygons(shape: Any) -> Any:
    """The polygons of a shape; lines and points that a cut leaves have no area."""
    shapely = shapely_library()
    parts = [p for p in getattr(shape, "geoms", [shape]) if p.geom_type in ("Polygon",)]
    return shapely.MultiPolygon(parts)


def _geojson(path: Path) -> tuple[list[Any], str]:
    shapely = shapely_library()
    try:
        held = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} cannot be read as GeoJSON: {e}") from None
    if not isinstance(held, dict) or "type" not in held:
        raise ValueError(f"{path} is no GeoJSON")
    features = held.get("features", []) if held["type"] == "FeatureCollection" else [held]
    shapes = []
    for number, feature in enumerate(features, 1):
        try:
            geometry = feature["geometry"] if feature["type"] == "Feature" else feature
            shapes.append(None if geometry is None else shapely.from_geojson(json.dumps(geometry)))
        except (KeyError, TypeError, ValueError, shapely.errors.ShapelyError) as e:
            raise ValueError(f"{path}: feature {number} is no geometry: {e}") from None
    named = held.get("crs")
    name = named.get("properties", {}).get("name") if isinstance(named, dict) else None
    return shapes, LONLAT if not name or str(name).endswith(_LONLAT_NAMES) else str(name)


def _parquet(path: Path) -> tuple[list[Any], str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "GeoParquet needs the 'geo' extra: pip install 'olmoearth-jax[geo]'"
        ) from None
    try:
        table = pyarrow.parquet.read_table(path)
        geo = json.loads((table.schema.metadata or {})[b"geo"])
        column = geo["primary_column"]
        crs = geo["columns"][column].get("crs", LONLAT)
        shapes = shapely_library().from_wkb(table[column].to_pylist())
    except (OSError, KeyError, ValueError, pyarrow.ArrowException) as e:
        raise ValueError(f"{path} cannot be read as GeoParquet: {e}") from None
    return list(shapes), json.dumps(crs) if isinstance(crs, dict) else str(crs or LONLAT)


def _geopackage(path: Path) -> tuple[list[Any], str]:
    try:
        raw = importlib.import_module("pyogrio.raw")
    except ImportError:
        raise ValueError(
            ".gpkg files need the 'gpkg' extra: pip install 'olmoearth-jax[gpkg]'"
        ) from None
    meta, _, geometry, _ = raw.read(path)
    shapes = [] if geometry is None else list(shapely_library().from_wkb(geometry))
    return shapes, str(meta.get("crs") or LONLAT)
