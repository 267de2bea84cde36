"""Labels on the grid of the images: one class or value per pixel of 10 m, or per token.

A pixel that two features give different labels has none, so that the order of features does not
matter. shapely and rasterio are imported when they are needed.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.maps import vectors
from olmoearth_jax.maps.label_files import Features
from olmoearth_jax.maps.vectors import shapely_library

SAME = 1e-6
"""Values that differ by more contradict each other."""
MOST = 65534
"""The largest number of a class: 65535 stands for none."""

COLORS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#ee7733",
    "#0077bb", "#33bbee", "#ee3377", "#cc3311", "#009988", "#332288", "#ddcc77", "#117733",
    "#88ccee", "#882255", "#44aa99", "#999933",
)  # fmt: skip
"""Colour of a class by its position, in turn."""


@dataclasses.dataclass(frozen=True)
class Class:
    """One class: its number in rasters, its name, and its colour as '#rrggbb'."""

    value: int
    name: str
    color: str


def nodata_of(classes: Sequence[Class]) -> int:
    """What stands for no class in rasters: 255, or 65535 if a class needs 16 bits."""
    return 255 if max(c.value for c in classes) < 255 else 65535


def classes_of(
    values: Sequence[Any],
    wanted: Sequence[str] | None = None,
    colors: Mapping[str, str] | None = None,
    naming: bool = False,
) -> list[Class]:
    """The classes of labels.

    Texts are sorted and numbered from 1, or in the order of `wanted`; integers keep their values.

    Args:
      values: texts or integers.
      wanted: names and their order.
      colors: '#rrggbb' by name; positions decide the others.
      naming: `wanted` may also be names for the integers, in ascending order.

    Raises:
      ValueError: `wanted` and the labels differ, numbers that no raster holds, or a colour that
        is none.
    """
    found = sorted(set(values))
    names = [str(v) for v in found]
    if wanted is not None:
        if len(set(wanted)) < len(wanted):
            raise ValueError(f"--classes names a class twice: {', '.join(wanted)}")
        if sorted(wanted) == sorted(names):
            found = [found[names.index(name)] for name in wanted]
        elif not naming or len(wanted) != len(names):
            raise ValueError(
                f"--classes names {', '.join(wanted)}, but the labels hold {', '.join(names)}"
            )
        names = list(wanted)
    if colors and not set(colors) & set(names):
        raise ValueError(
            f"--class_colors has {', '.join(sorted(colors))}, but the classes are "
            f"{', '.join(names)}"
        )
    numbers = [v if isinstance(v, int) else i + 1 for i, v in enumerate(found)]
    if min(numbers) < 0 or max(numbers) > MOST:
        raise ValueError(
            f"classes are numbers from 0 to {MOST}, got {min(numbers)} to {max(numbers)}"
        )
    out = []
    for at, (number, name) in enumerate(zip(numbers, names, strict=True)):
        color = (colors or {}).get(name, COLORS[at % len(COLORS)])
        if not is_color(color):
            raise ValueError(f"the colour of {name!r} must be like #1f77b4, got {color!r}")
        out.append(Class(number, name, color))
    return out


def is_color(text: str) -> bool:
    """Whether a text is a colour of the form '#rrggbb'."""
    return re.fullmatch("#[0-9a-fA-F]{6}", text) is not None


def read_colors(path: Path) -> dict[str, str]:
    """Colours by class name, of a .json object or a .csv of class and colour.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        with path.expanduser().open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".json":
                held = json.load(file)
                if not isinstance(held, dict):
                    raise ValueError('it is no object such as {"forest": "#228833"}')
                return {str(k): str(v) for k, v in held.items()}
            rows = [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error, RecursionError) as e:
        raise ValueError(f"the colours in {path} cannot be read: {e}") from None
    odd = [row for row in rows if len(row) < 2]
    if odd:
        raise ValueError(f"the line {odd[0][0]!r} of {path} is not of the form forest,#228833")
    # The first line may be a heading, which is the name of no class.
    return {row[0].strip(): row[1].strip() for row in rows}


def project(features: Features, crs: Any) -> tuple[list[Any], int]:
    """Geometries in another CRS, vertex by vertex, and how many polygons had to be repaired.

    Raises:
      ValueError: a place that the CRS does not have.
    """
    shapely = shapely_library()
    shapes = shapely.force_2d(np.array(features.shapes, object))
    out, repaired = list(vectors.project(shapes, features.crs, crs)), 0
    for at, shape in enumerate(out):
        if not shape.is_valid:
            parts = shapely.get_parts(shapely.make_valid(shape))
            out[at] = shapely.union_all([p for p in parts if "Polygon" in p.geom_type])
            repaired += 1
    return out, repaired


@dataclasses.dataclass
class Cells:
    """Labels of the pixels of a grid that have one.

    Attributes:
      cells: their flat numbers, int64 ascending.
      codes: number of the class, or value, of each, float64.
      weights: of each, the largest of the features that cover it; None if nothing is weighted.
      pixels: per feature the flat numbers of the pixels that it covers, ascending.
      outside: bool per feature, whether it lies beside the grid.
      report: features outside, empty (burn nothing) and repaired; pixels in conflict and labelled.
      empty_ids: of the features that burn nothing.
    """

    cells: np.ndarray
    codes: np.ndarray
    weights: np.ndarray | None
    pixels: list[np.ndarray]
    outside: np.ndarray
    report: dict[str, int]
    empty_ids: list[str]


def burn_cells(
    features: Features,
    codes: Sequence[float],
    crs: Any,
    transform: Any,
    shape: tuple[int, int],
    slack: float = 0.0,
    all_touched: bool = False,
) -> Cells:
    """Puts features on a grid of any size; memory is that of what they cover.

    Args:
      codes: number of the class, or value, of each feature.
      crs, transform, shape: of the grid; its pixels are axis-aligned and north-up.
      slack: codes that differ by more contradict each other.
      all_touched: take all pixels that a polygon touches, not those whose centre is inside.
    """
    places, repaired = project(features, crs)
    report = {"outside": 0, "empty": 0, "repaired": repaired}
    pixels, empty, beside = [], [], np.zeros(len(places), bool)
    for number, place in enumerate(places):
        cells, outside = _cells(place, transform, shape, all_touched)
        if not len(cells):
            beside[number] = outside
            report["outside" if outside else "empty"] += 1
            if not outside:
                empty.append(features.columns["id"][number])
        pixels.append(cells)
    every = np.concatenate(pixels) if pixels else np.zeros(0, np.int64)
    sizes = [len(c) for c in pixels]
    given = np.repeat(np.asarray(codes, np.float64), sizes)
    order = np.argsort(every, kind="stable")
    cells, first = np.unique(every[order], return_index=True)
    low = high = given[order]
    if len(cells):
        low, high = (f.reduceat(given[order], first) for f in (np.minimum, np.maximum))
    weights = None
    if features.weights is not None:
        weights = np.repeat(np.asarray(features.weights, np.float64), sizes)[order]
        weights = np.maximum.reduceat(weights, first) if len(cells) else weights
    good = high - low <= slack
    weights = None if weights is None else weights[good]
    report["conflict_pixels"] = int((~good).sum())
    report["labelled_pixels"] = int(good.sum())
    return Cells(cells[good], low[good], weights, pixels, beside, report, empty)


def _cells(
    place: Any, transform: Any, shape: tuple[int, int], all_touched: bool
) -> tuple[np.ndarray, bool]:
    """(flat numbers of the pixels of a geometry, whether it lies outside of the grid)."""
    t, (height, width) = transform, shape
    if "Point" in place.geom_type:
        points = shapely_library().get_coordinates(place)
        col = np.floor((points[:, 0] - t.c) / t.a)
        row = np.floor((points[:, 1] - t.f) / t.e)
        inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
        row, col = (x[inside].astype(np.int64) for x in (row, col))
        return np.unique(row * width + col), True
    if place.is_empty:
        return np.zeros(0, np.int64), False
    west, south, east, north = place.bounds
    # One pixel more on each side: what is touched is decided by the rasteriser.
    left, right = int((west - t.c) // t.a) - 1, int((east - t.c) // t.a) + 2
    top, bottom = int((north - t.f) // t.e) - 1, int((south - t.f) // t.e) + 2
    left, top = max(left, 0), max(top, 0)
    right, bottom = min(right, width), min(bottom, height)
    outside = east <= t.c or west >= t.c + t.a * width or north <= t.f + t.e * height
    if outside or south >= t.f or left >= right or top >= bottom:
        return np.zeros(0, np.int64), True
    import rasterio.features

    corner = type(t)(t.a, 0.0, t.c + left * t.a, 0.0, t.e, t.f + top * t.e)
    found = rasterio.features.rasterize(
        [(place, 1)], out_shape=(bottom - top, right - left), transform=corner, fill=0,
        all_touched=all_touched, dtype="uint8",
    )  # fmt: skip
    rows, cols = np.nonzero(found)
    return (rows + top) * width + cols + left, False


def to_tokens(labels: np.ndarray, side: int, nodata: int | None = 255) -> np.ndarray:
    """Labels of tokens of `side` x `side` pixels; pixels that make no whole token are left out.

    A token takes the class that at least half of its pixels carry, unless another has as many;
    of values the mean, if at least half of its pixels have one.

    Args:
      labels: [H, W] of classes and `nodata`, or of values and NaN.
      nodata: of classes, None for values.
    """
    height, width = (n // side for n in labels.shape)
    cut = labels[: height * side, : width * side].reshape(height, side, width, side)
    pixels = cut.transpose(0, 2, 1, 3).reshape(height, width, side * side)
    half = side * side / 2
    if nodata is None:
        count = np.isfinite(pixels).sum(-1)
        mean = np.nansum(pixels.astype(np.float64), -1) / np.maximum(count, 1)
        return np.where(count >= half, mean, np.nan).astype(np.float32)
    out = np.full((height, width), nodata, labels.dtype)
    best, tied = np.zeros((height, width), int), np.zeros((height, width), bool)
    for code in np.unique(pixels[pixels != nodata]):
        count = (pixels == code).sum(-1)
        tied = np.where(count > best, False, tied | ((count == best) & (count > 0)))
        out = np.where(count > best, code, out)
        best = np.maximum(best, count)
    return np.where((best >= half) & ~tied, out, np.array(nodata, labels.dtype))
