"""Points and polygons of a file: GeoJSON, GeoParquet, GeoPackage, or a table with lon and lat.

shapely, pyarrow and pyogrio are imported when they are needed.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.crs import check_name, same_crs, transform_points
from olmoearth_jax.data.crs import library as rasterio_library
from olmoearth_jax.maps.lattice import LONLAT

SUFFIXES = (".geojson", ".json", ".csv", ".parquet", ".geoparquet", ".gpkg")


def shapely_library() -> Any:
    """The shapely package.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import shapely
        import shapely.geometry
    except ImportError:
        raise ValueError(
            "points and polygons need the 'geo' extra: pip install 'olmoearth-jax[geo]'"
        ) from None
    return shapely


@dataclasses.dataclass
class Table:
    """The features of a file as they stand there.

    Attributes:
      shapes: shapely geometries, None where a feature has none.
      rows: their columns.
      crs: of their coordinates, x or longitude first.
      notes: sentences on what a user should know.
    """

    shapes: list[Any]
    rows: Sequence[Mapping[str, Any]]
    crs: Any
    notes: list[str] = dataclasses.field(default_factory=list)


def read(path: Path, what: str = "file") -> Table:
    """The features of a file.

    Args:
      path: GeoJSON, GeoParquet, .gpkg, or CSV or plain Parquet with columns lon and lat.
      what: the user's word for the file.

    Raises:
      ValueError: there is none, or it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"there is no {what} {path}")
    readers = dict.fromkeys(SUFFIXES, _geojson)
    readers |= {".csv": _csv, ".parquet": _parquet, ".geoparquet": _parquet, ".gpkg": _gpkg}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(
            f"the {what} must end in one of {', '.join(SUFFIXES)}, not "
            f"{suffix or 'a name without end'}: {path}"
        )
    return readers[suffix](path)


def project(shape: Any, source: Any, target: Any) -> Any:
    """A shape, or an array of them, in another CRS, vertex by vertex.

    Raises:
      ValueError: a place that the CRS does not have.
    """

    def move(points: np.ndarray) -> np.ndarray:
        if not len(points):
            return points
        return np.stack(transform_points(source, target, *points.T.tolist()), axis=1)

    return shapely_library().transform(shape, move)


def _geojson(path: Path) -> Table:
    try:
        held = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(held, dict):
            raise ValueError("it is no object")
        named = held.get("crs")
        name = named["properties"]["name"] if isinstance(named, dict) else named
        features = _features(held)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        told = f"there is no {e}" if isinstance(e, KeyError) else e
        raise ValueError(f"{path} cannot be read as GeoJSON: {told}") from None
    crs, notes = LONLAT, []
    if name is not None and not _is_lonlat(name, path):
        crs = name
        notes = [f"{path} names the CRS {name}; GeoJSON should be longitude and latitude"]
    shapely, shapes, rows = shapely_library(), [], []
    for number, feature in enumerate(features, 1):
        try:
            geometry = feature["geometry"]
            shapes.append(None if geometry is None else shapely.geometry.shape(geometry))
            row = dict(feature.get("properties") or {})
        except (
            ValueError, KeyError, TypeError, AttributeError, shapely.errors.ShapelyError,
        ) as e:  # fmt: skip
            told = f"there is no {e}" if isinstance(e, KeyError) else e
            raise ValueError(
                f"{path} cannot be read as GeoJSON: feature {number}: {told}"
            ) from None
        if "id" in feature:
            row.setdefault("id", feature["id"])
        rows.append(row)
    return Table(shapes, rows, crs, notes)


def _features(held: dict[str, Any]) -> list[Any]:
    """The features of a collection, of one feature, or of a geometry alone."""
    if "features" in held or held["type"] == "FeatureCollection":
        return list(held["features"])
    return [held if held["type"] == "Feature" else {"geometry": held}]


def _is_lonlat(name: Any, path: Path) -> bool:
    try:
        return same_crs(name, LONLAT)
    except ValueError:
        raise ValueError(f"{path} names the unknown CRS {name!r}") from None


def _csv(path: Path) -> Table:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows, names = list(reader), list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path} cannot be read as CSV: {e}") from None
    _check_names(path, names)
    return _from_lonlat(path, rows)


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raises ValueError for a name that several columns have."""
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(f"{path} has several columns named {name!r}")


def _from_lonlat(path: Path, rows: Sequence[Mapping[str, Any]]) -> Table:
    shapely = shapely_library()
    known = list(rows[0]) if rows else []
    for name in ("lon", "lat"):
        if rows and name not in known:
            form = "" if path.suffix.lower() == ".csv" else "is no GeoParquet, so it "
            shown = ", ".join(known)
            raise ValueError(f"{path} {form}needs columns lon and lat; it has: {shown}")
    places = []
    for number, row in enumerate(rows):
        try:
            lon, lat = float(row["lon"]), float(row["lat"])
        except (TypeError, ValueError):
            lon = lat = math.nan
        if not (-180 <= lon <= 180 and -90 <= lat <= 90):
            raise ValueError(
                f"row {number + 1} of {path} has no longitude and latitude in degrees: "
                f"{row['lon']!r}, {row['lat']!r}"
            )
        places.append((lon, lat))
    kept = [{k: v for k, v in row.items() if k not in ("lon", "lat")} for row in rows]
    return Table(list(shapely.points(places)) if places else [], kept, LONLAT)


def _parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "reading Parquet needs the 'geo' extra: pip install 'olmoearth-jax[geo]'"
        ) from None
    shapely = shapely_library()
    try:
        _check_names(path, pyarrow.parquet.read_schema(path).names)
        table = pyarrow.parquet.read_table(path)
        stored = (table.schema.metadata or {}).get(b"geo")
        if stored is None:
            return _from_lonlat(path, table.to_pylist())
        about = json.loads(stored)
        name = about["primary_column"]
        record = about["columns"][name]
        if record["encoding"] == "WKB":
            shapes = shapely.from_wkb(table[name].to_pylist())
    except (OSError, KeyError, TypeError, pyarrow.ArrowException, shapely.errors.ShapelyError,
            json.JSONDecodeError) as e:  # fmt: skip
        raise ValueError(f"{path} cannot be read as Parquet: {e}") from None
    if record["encoding"] != "WKB":
        raise ValueError(f"{path} stores its geometries as {record['encoding']}, not as WKB")
    rows = table.drop_columns([name]).to_pylist()
    return Table(list(shapes), rows, _geoparquet_crs(record, path))


def _geoparquet_crs(record: Mapping[str, Any], path: Path) -> Any:
    """The CRS of a geometry column; none said means longitude and latitude."""
    if "crs" not in record:
        return LONLAT
    held = record["crs"]
    if held is None:
        raise ValueError(f"{path} says that its CRS is not known: set it, for example with ogr2ogr")
    known = held.get("id") if isinstance(held, dict) else None
    code = json.dumps(held)
    if isinstance(known, dict) and known:
        code = f"{known.get('authority')}:{known.get('code')}"
    try:
        check_name(code)
        return rasterio_library().crs.CRS.from_user_input(code).to_wkt()
    except Exception as e:  # rasterio's errors have several bases
        raise ValueError(f"{path} has a CRS that cannot be read: {e}") from None


def _gpkg(path: Path) -> Table:
    try:
        raw = importlib.import_module("pyogrio.raw")
    except ImportError:
        raise ValueError(
            "reading .gpkg needs the 'gpkg' extra: pip install 'olmoearth-jax[gpkg]'"
        ) from None
    try:
        about, _, shapes, columns = raw.read(path)
    except Exception as e:  # pyogrio's own errors have no common public base
        raise ValueError(f"{path} cannot be read as GeoPackage: {e}") from None
    names = list(about["fields"])
    count = 0 if shapes is None else len(shapes)
    rows = [{n: c[i] for n, c in zip(names, columns, strict=True)} for i in range(count)]
    if about["crs"] is None:
        raise ValueError(f"{path} says nothing of its CRS")
    found = [] if shapes is None else list(shapely_library().from_wkb(shapes))
    return Table(found, rows, about["crs"])
