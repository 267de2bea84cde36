"""Labelled points and polygons of a file: GeoJSON, GeoParquet, GeoPackage, or CSV.

shapely, pyarrow and pyogrio are imported when they are needed.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.raster_file import library as rasterio_library
from olmoearth_jax.data.raster_file import same_crs
from olmoearth_jax.maps import area
from olmoearth_jax.maps.lattice import LONLAT

EXTRAS = ("split", "date", "year", "id")
"""Columns that mean something if they are there."""
SUFFIXES = (".geojson", ".json", ".csv", ".parquet", ".geoparquet", ".gpkg")


@dataclasses.dataclass
class Features:
    """Labelled places.

    Attributes:
      shapes: shapely geometries, points and polygons and multi-forms of them.
      crs: of their coordinates, x or longitude first.
      values: text, int or float of each.
      columns: texts of the columns of `EXTRAS` that the file has; always 'id'.
      dropped: how many features were left out, by reason.
      notes: sentences on what a user should know.
    """

    shapes: list[Any]
    crs: Any
    values: list[Any]
    columns: dict[str, list[str]]
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def points_only(self) -> bool:
        """Whether every feature is a point, or several."""
        return all("Point" in shape.geom_type for shape in self.shapes)


shapely_library = functools.partial(area.shapely_library, "labels of points and polygons")


@dataclasses.dataclass
class _Table:
    """Rows of a file as they stand there."""

    shapes: list[Any]
    rows: Sequence[Mapping[str, Any]]
    crs: Any
    notes: list[str] = dataclasses.field(default_factory=list)


def read(path: Path, column: str, numeric: bool = False) -> Features:
    """The labelled features of a file.

    Args:
      path: GeoJSON, GeoParquet, .gpkg, or CSV or plain Parquet with columns lon and lat.
      column: holds the labels.
      numeric: labels are values to regress on, not classes.

    Raises:
      ValueError: the file cannot be read, holds no features or no such column, or labels of
        several types.
    """
    table = _read_table(path)
    if not table.rows:
        raise ValueError(f"the label file {path} holds no features")
    known = list(dict.fromkeys(key for row in table.rows for key in row))
    if column not in known:
        shown = ", ".join(map(str, known)) or "none"
        raise ValueError(f"{path} has no column {column!r}; it has: {shown}")
    shapes, rows, dropped = [], [], {}
    for shape, row in zip(table.shapes, table.rows, strict=True):
        reason = "null label" if _missing(row.get(column)) else ""
        shape = None if reason else _usable(shape)
        if shape is None or isinstance(shape, str):
            reason = reason or shape or "empty geometry"
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        shapes.append(shape)
        rows.append(row)
    if not rows:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.items())
        raise ValueError(f"no feature of {path} can be used as a label ({reasons})")
    values = _values([row[column] for row in rows], path, column, numeric)
    numbers = {str(row.get("id", "")) for row in rows}
    unique = len(numbers) == len(rows) and "" not in numbers and "id" in known
    columns = {"id": [str(r["id"]) if unique else str(i) for i, r in enumerate(rows)]}
    for name in EXTRAS[:-1]:
        if name in known and name != column:
            columns[name] = [_text(row.get(name)) for row in rows]
    notes = list(table.notes)
    if "weight" in known and column != "weight":
        notes.append("the column 'weight' is not used: all labels count alike within a class")
    return Features(shapes, table.crs, values, columns, dropped, notes)


def _missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _text(value: Any) -> str:
    return "" if _missing(value) else str(value).strip()


def _values(given: list[Any], path: Path, column: str, numeric: bool) -> list[Any]:
    """Labels of one type: texts, integers, or with `numeric` floats."""
    values = [v.item() if isinstance(v, np.generic) else v for v in given]
    if numeric:
        out = []
        for value in values:
            try:
                number = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise ValueError(f"the column {column!r} of {path} holds {value!r}, no number")
            out.append(number)
        return out
    if all(isinstance(v, float) and v.is_integer() for v in values):
        values = [int(v) for v in values]  # integers of a column that has gaps
    kinds = {type(v).__name__ for v in values}
    if path.suffix.lower() == ".csv" and all(_is_integer(v) for v in values):
        values, kinds = [int(v) for v in values], {"int"}
    if kinds == {"str"}:
        return [v.strip() for v in values]
    if kinds == {"int"}:
        return values
    if kinds == {"float"}:
        raise ValueError(
            f"the column {column!r} of {path} holds numbers that are no classes; values to "
            "predict are given with --value_column"
        )
    words = {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}
    shown = ", ".join(sorted(words.get(k, k) for k in kinds))
    raise ValueError(
        f"the column {column!r} of {path} holds {shown}; classes must be all text or all integers"
    )


def _is_integer(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lstrip("-").isdigit()


def _usable(shape: Any) -> Any:
    """The points or polygons of a geometry, or the reason why it has none."""
    shapely = shapely_library()
    if shape is None or shape.is_empty:
        return "empty geometry"
    if "Line" in shape.geom_type or shape.geom_type == "LinearRing":
        return "line"
    if shape.geom_type != "GeometryCollection":
        return shape
    areas = [g for g in shapely.get_parts(shape) if "Polygon" in g.geom_type]
    points = [g for g in shapely.get_parts(shape) if "Point" in g.geom_type]
    if areas:
        return shapely.union_all(areas)
    return shapely.union_all(points) if points else "line"


def _read_table(path: Path) -> _Table:
    if not path.is_file():
        raise ValueError(f"there is no label file {path}")
    suffix = path.suffix.lower()
    if suffix in (".geojson", ".json"):
        return _read_geojson(path)
    if suffix == ".csv":
        return _read_csv(path)
    if suffix in (".parquet", ".geoparquet"):
        return _read_parquet(path)
    if suffix == ".gpkg":
        return _read_gpkg(path)
    raise ValueError(
        f"labels are read from {', '.join(SUFFIXES)} or .tif, not {suffix or 'a file without end'}"
        f": {path}"
    )


def _read_geojson(path: Path) -> _Table:
    shapely = shapely_library()
    try:
        held = json.loads(path.read_text(encoding="utf-8-sig"))
        kind = held.get("type") if isinstance(held, dict) else None
        features = {"FeatureCollection": lambda: held["features"], "Feature": lambda: [held]}
        if kind not in features:
            raise ValueError("it is no FeatureCollection")
        shapes, rows = [], []
        for feature in features[kind]():
            geometry = feature.get("geometry")
            shapes.append(None if geometry is None else shapely.geometry.shape(geometry))
            row = dict(feature.get("properties") or {})
            if "id" in feature:
                row.setdefault("id", feature["id"])
            rows.append(row)
        named = held.get("crs")
        name = named["properties"]["name"] if isinstance(named, dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"the label file {path} cannot be read as GeoJSON: {e}") from None
    crs, notes = LONLAT, []
    if name is not None and not _is_lonlat(name, path):
        crs = name
        notes = [f"{path} names the CRS {name}; GeoJSON should be longitude and latitude"]
    return _Table(shapes, rows, crs, notes)


def _is_lonlat(name: Any, path: Path) -> bool:
    try:
        return same_crs(name, LONLAT)
    except ValueError:
        raise ValueError(f"{path} names the unknown CRS {name!r}") from None


def _read_csv(path: Path) -> _Table:
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.DictReader(text.splitlines(), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"the label file {path} cannot be read as CSV: {e}") from None
    return _from_lonlat(path, rows)


def _from_lonlat(path: Path, rows: Sequence[Mapping[str, Any]]) -> _Table:
    shapely = shapely_library()
    known = list(rows[0]) if rows else []
    for name in ("lon", "lat"):
        if rows and name not in known:
            raise ValueError(f"{path} needs columns lon and lat; it has: {', '.join(known)}")
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
    return _Table(list(shapely.points(places)) if places else [], kept, LONLAT)


def _read_parquet(path: Path) -> _Table:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "reading Parquet needs the 'geo' extra: pip install 'olmoearth-jax[geo]'"
        ) from None
    try:
        table = pyarrow.parquet.read_table(path)
        stored = (table.schema.metadata or {}).get(b"geo")
        about = None if stored is None else json.loads(stored)
    except (OSError, ValueError, pyarrow.ArrowException) as e:
        raise ValueError(f"the label file {path} cannot be read as Parquet: {e}") from None
    if about is None:
        return _from_lonlat(path, table.to_pylist())
    name = about["primary_column"]
    record = about["columns"][name]
    if record.get("encoding") != "WKB":
        raise ValueError(f"{path} stores its geometries as {record.get('encoding')}, not as WKB")
    shapes = shapely_library().from_wkb(table[name].to_pylist())
    rows = table.drop_columns([name]).to_pylist()
    return _Table(list(shapes), rows, _geoparquet_crs(record, path))


def _geoparquet_crs(record: Mapping[str, Any], path: Path) -> Any:
    """The CRS of a geometry column; none said means longitude and latitude."""
    if "crs" not in record:
        return LONLAT
    held = record["crs"]
    if held is None:
        raise ValueError(f"{path} says that its CRS is not known: set it, for example with ogr2ogr")
    known = held.get("id") or {}
    code = f"{known.get('authority')}:{known.get('code')}" if known else json.dumps(held)
    try:
        return rasterio_library().crs.CRS.from_user_input(code).to_wkt()
    except Exception as e:  # rasterio's errors have several bases
        raise ValueError(f"{path} has a CRS that cannot be read: {e}") from None


def _read_gpkg(path: Path) -> _Table:
    try:
        raw = importlib.import_module("pyogrio.raw")
    except ImportError:
        raise ValueError(
            "reading .gpkg needs the 'gpkg' extra: pip install 'olmoearth-jax[gpkg]'"
        ) from None
    try:
        about, _, shapes, columns = raw.read(path)
    except Exception as e:  # pyogrio's own errors have no common public base
        raise ValueError(f"the label file {path} cannot be read as GeoPackage: {e}") from None
    names = list(about["fields"])
    rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    if about["crs"] is None:
        raise ValueError(f"{path} says nothing of its CRS")
    return _Table(list(shapely_library().from_wkb(shapes)), rows, about["crs"])
