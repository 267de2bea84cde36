"""Labelled points and polygons of a file."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.crs import same_crs
from olmoearth_jax.maps import vectors
from olmoearth_jax.maps.lattice import LONLAT, on_earth
from olmoearth_jax.maps.vectors import shapely_library

EXTRAS = ("split", "date", "year", "id")
WEIGHT = "weight"
"""Columns that mean something if they are there."""
_LARGEST = float(np.finfo(np.float32).max)
"""Values and weights are taken as float32."""


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
      weights: how much each counts in training, where the file has a column 'weight'.
    """

    shapes: list[Any]
    crs: Any
    values: list[Any]
    columns: dict[str, list[str]]
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    weights: list[float] | None = None

    @property
    def points_only(self) -> bool:
        """Whether every feature is a point, or several."""
        return all("Point" in shape.geom_type for shape in self.shapes)


def read(path: Path, column: str, numeric: bool = False) -> Features:
    """The labelled features of a file.

    Args:
      path: GeoJSON, GeoParquet, .gpkg, or CSV or plain Parquet with columns lon and lat.
      column: holds the labels.
      numeric: labels are values to regress on, not classes.

    Raises:
      ValueError: the file cannot be read, holds no features or no such column, labels of several
        types, or weights that are none.
    """
    table = vectors.read(path, "label file")
    if not table.rows:
        raise ValueError(f"the label file {path} holds no features")
    known = list(dict.fromkeys(key for row in table.rows for key in row))
    if column not in known:
        shown = ", ".join(map(str, known)) or "none"
        raise ValueError(f"{path} has no column {column!r}; it has: {shown}")
    shapes, rows, dropped = [], [], {}
    degrees = same_crs(table.crs, LONLAT)
    for number, (shape, row) in enumerate(zip(table.shapes, table.rows, strict=True), 1):
        reason = "null label" if _missing(row.get(column)) else ""
        shape = None if reason else _usable(shape)
        if degrees and shape is not None and not isinstance(shape, str):
            _check_degrees(shape, f"feature {number} of {path}")
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
    weights = None
    if WEIGHT in known and column != WEIGHT:
        weights = _weights([row.get(WEIGHT) for row in rows], path)
    return Features(shapes, table.crs, values, columns, dropped, list(table.notes), weights)


def _bounds(shape: Any) -> np.ndarray:
    """West, south, east, north; NaN of nothing, without the warning of an older shapely."""
    with np.errstate(invalid="ignore"):
        return np.array(shape.bounds, float)


def _check_degrees(shape: Any, where: str) -> None:
    """Raises ValueError if a shape reaches beyond all longitudes and latitudes."""
    bounds = _bounds(shape)
    if not on_earth(bounds.reshape(2, 2)).all():
        shown = ", ".join(f"{v:g}" for v in bounds)
        raise ValueError(
            f"{where} reaches over {shown}, which are no longitudes and latitudes: name its CRS in "
            "the file"
        )


def _missing(value: Any) -> bool:
    value = value.item() if isinstance(value, np.generic) else value  # None of a date that is none
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value: Any) -> str:
    return "" if _missing(value) else str(value).strip()


def _weights(given: list[Any], path: Path) -> list[float]:
    """Weights of labels, 1 where nothing is said."""
    out = []
    for value in given:
        try:
            number = 1.0 if _missing(value) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, bool) or not 0 <= number <= _LARGEST:
            raise ValueError(
                f"the column {WEIGHT!r} of {path} holds {value!r}; weights are numbers from 0 on"
            )
        out.append(float(np.float32(number)))
    if not any(out):
        raise ValueError(f"all weights in {path} are 0: there is nothing to learn from")
    return out


def _values(given: list[Any], path: Path, column: str, numeric: bool) -> list[Any]:
    """Labels of one type: texts, integers, or with `numeric` floats."""
    values = [v.item() if isinstance(v, np.generic) else v for v in given]
    if numeric:
        out = []
        for value in values:
            try:
                number = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError, OverflowError):
                number = math.nan
            if not abs(number) <= _LARGEST:
                raise ValueError(f"the column {column!r} of {path} holds {value!r}, no number")
            out.append(number)
        return out
    if all(isinstance(v, float) and v.is_integer() for v in values):
        values = [int(v) for v in values]  # integers of a column that has gaps
    kinds = {type(v).__name__ for v in values}
    if path.suffix.lower() == ".csv" and all(_is_integer(v) for v in values):
        values, kinds = [int(str(v).partition(".")[0]) for v in values], {"int"}
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
    """Whether a text is an integer, or one that was written with others that have gaps: '3.0'."""
    return isinstance(value, str) and bool(re.fullmatch(r"\s*[+-]?[0-9]+(\.0*)?\s*", value))


def _usable(shape: Any) -> Any:
    """The points or polygons of a geometry, or the reason why it has none."""
    shapely = shapely_library()
    if shape is None or shape.is_empty or not np.isfinite(_bounds(shape)).all():
        return "empty geometry"
    if "Line" in shape.geom_type or shape.geom_type == "LinearRing":
        return "line"
    if shape.geom_type != "GeometryCollection":
        return shape
    parts = np.array([shape])
    while any(g.geom_type == "GeometryCollection" for g in parts):
        parts = shapely.get_parts(parts)
    areas = [g for g in parts if "Polygon" in g.geom_type]
    points = [g for g in parts if "Point" in g.geom_type]
    if areas:
        return shapely.union_all(areas)
    return shapely.union_all(points) if points else "line"
