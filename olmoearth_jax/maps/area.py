"""Areas of interest: polygons of a file, cut to UTM zones and projected."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.crs import same_crs
from olmoearth_jax.maps import vectors
from olmoearth_jax.maps.lattice import LONLAT, Lattice, crs_of, zone_bounds, zone_of
from olmoearth_jax.maps.vectors import project, shapely_library

DENSE = 0.01
"""Degrees between the points of an edge, which is straight in longitude and latitude."""


def read_area(path: Path) -> Any:
    """The (multi)polygon in longitude and latitude that a file shows.

    Args:
      path: GeoJSON, GeoParquet (.parquet) or GeoPackage (.gpkg).

    Raises:
      ValueError: it cannot be read, holds no polygons, or one of them is unusable; its number in
        the file, from 1, is named.
    """
    table = vectors.read(path, "area file")
    return area_of(table.shapes, table.crs, str(path))


def area_of(shapes: Iterable[Any], crs: Any = LONLAT, source: str = "the area") -> Any:
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
            try:
                shape = project(shape, crs, LONLAT)
            except ValueError as e:
                raise ValueError(f"{where}: {e}") from None
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


def of_box(box: Sequence[float]) -> Any:
    """The (multi)polygon of a box in degrees, whose east may lie beyond 180 (`crs.bounds_in`)."""
    shapely, (west, south, east, north) = shapely_library(), box
    parts = [(west, min(east, 180.0))]
    if east > 180:
        parts.append((-180.0, east - 360))
    return shapely.union_all([shapely.box(left, south, right, north) for left, right in parts])


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


def tokens_in(shape: Any, lattice: Lattice, row: int, col: int) -> np.ndarray:
    """bool [S, S]: the tokens of a shard that a shape in the CRS of its zone touches."""
    square = shapely_library().box(*lattice.box(row, col))
    out = np.zeros((lattice.side, lattice.side), bool)
    if shape.contains(square):
        return ~out
    part = shape.intersection(square.buffer(lattice.token))
    if not part.is_empty:
        from rasterio.features import rasterize
        from rasterio.transform import Affine

        place = Affine(*lattice.place(row, col))
        burnt = rasterize([(part, 1)], out.shape, transform=place, all_touched=True)
        out = np.asarray(burnt) > 0
    return out


def digest_of_file(path: Path) -> str:
    """SHA-256 of the file of an area.

    Raises:
      ValueError: there is none.
    """
    if not path.expanduser().is_file():
        raise ValueError(f"there is no file {path} for --area")
    return hashlib.sha256(path.expanduser().read_bytes()).hexdigest()


class AreaOfScenes:
    """An area on the grids of some scenes."""

    def __init__(self, path: Path, scenes: Sequence[Any]):
        """Reads and projects it.

        Args:
          scenes: of `scenes`.

        Raises:
          ValueError: no polygons, or no scene that they touch; shows where both lie.
        """
        shapely, whole = shapely_library(), read_area(path.expanduser())
        self._grids, self._shapes = [s.stack for s in scenes], []
        for scene in scenes:
            t: Any = scene.stack.transform
            height, width = scene.stack.shape
            box = shapely.box(t.c, t.f + t.e * height, t.c + t.a * width, t.f)
            mine = project(shapely.segmentize(whole, DENSE), LONLAT, scene.stack.crs)
            self._shapes.append(mine if mine.intersection(box).area > 0 else None)
        if not any(s is not None for s in self._shapes):
            stack = scenes[0].stack
            x, y = scenes[0].lonlat([0, stack.shape[0]], [0, stack.shape[1]])
            raise ValueError(
                f"no raster touches the area {path}: it lies within {_box(*whole.bounds)}, the "
                f"rasters within {_box(min(x), min(y), max(x), max(y))} (west, south, east, north)"
            )

    def touches(self, scene: int, rows: slice, cols: slice) -> bool:
        """Whether it touches a part of the map."""
        shape = self._shapes[scene]
        if shape is None:
            return False
        t: Any = self._grids[scene].transform
        box = shapely_library().box(
            t.c + t.a * cols.start, t.f + t.e * rows.stop, t.c + t.a * cols.stop,
            t.f + t.e * rows.start,
        )  # fmt: skip
        return bool(shape.intersects(box))

    def mask(self, scene: int, rows: slice, cols: slice) -> np.ndarray:
        """bool [H, W] of a part of the map: the pixels that it touches."""
        import rasterio.features

        t: Any = self._grids[scene].transform
        corner = type(t)(t.a, 0.0, t.c + t.a * cols.start, 0.0, t.e, t.f + t.e * rows.start)
        size = rows.stop - rows.start, cols.stop - cols.start
        found: Any = rasterio.features.rasterize(
            [(self._shapes[scene], 1)], out_shape=size, transform=corner, fill=0,
            all_touched=True, dtype="uint8",
        )  # fmt: skip
        return found > 0


def _box(*bounds: Any) -> str:
    return ", ".join(f"{float(b):.4f}" for b in bounds)
