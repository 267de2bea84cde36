"""Labelled windows of images: what is trained on and scored.

Points get a window around the pixel that holds them; everything else a lattice of windows that
blocks of the split are made of.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from olmoearth_jax.data.crs import transform_points
from olmoearth_jax.data.raster_lattice import FALSE_NORTHING
from olmoearth_jax.dates import parse_date
from olmoearth_jax.maps import labels as label_grids
from olmoearth_jax.maps import plan
from olmoearth_jax.maps.label_files import Features
from olmoearth_jax.maps.lattice import LONLAT, crs_of, zone_of
from olmoearth_jax.maps.plan import Period
from olmoearth_jax.maps.scenes import Scene
from olmoearth_jax.maps.vectors import shapely_library

NONE = -1
"""Index of no class."""
_PART = 1 << 22
"""Pixels of a scene that are looked at together."""


@dataclasses.dataclass
class Target:
    """What labels mean.

    Attributes:
      classes: in the order of their index, or None for values.
      unit: of the values, for people.
    """

    classes: list[label_grids.Class] | None
    unit: str = ""

    def index(self, codes: np.ndarray) -> np.ndarray:
        """int64 indices of class numbers, NONE for all others; values as float32, inf if larger."""
        if self.classes is None:
            with np.errstate(over="ignore"):
                return codes.astype(np.float32)
        out = np.full(codes.shape, NONE, np.int64)
        for i, c in enumerate(self.classes):
            out[codes == c.value] = i
        return out

    def labelled(self, found: np.ndarray) -> np.ndarray:
        """Where indices or values are labels."""
        return np.isfinite(found) if self.classes is None else found != NONE


@dataclasses.dataclass
class Window:
    """One sample.

    Attributes:
      scene: number of its scene.
      row, col: its first pixel.
      size: (height, width) in pixels.
      labels: of its tokens, see `Target.index`.
      place: (x, y) in the scene's CRS that decides its block.
      ids: of a point, its name and pixel by (row, column) in `labels`.
      split: text of the column 'split', or ''.
      weights: float32 of its tokens, how much each counts in training; None: alike.
    """

    scene: int
    row: int
    col: int
    size: tuple[int, int]
    labels: np.ndarray
    place: tuple[float, float]
    ids: dict[tuple[int, int], tuple[str, tuple[int, int]]] = dataclasses.field(
        default_factory=dict
    )
    split: str = ""
    weights: np.ndarray | None = None


@dataclasses.dataclass
class Grid:
    """The labelled pixels of one scene, and which of them came from which point feature.

    Attributes:
      cells: flat numbers of the pixels, int64 ascending.
      codes: see `Target.index`, of each.
      points: per labelled pixel of points its (x, y), id and split; None if not all are points.
      split: that all its labels are of, or ''.
      weights: of each, or None: alike.
    """

    cells: np.ndarray
    codes: np.ndarray
    points: dict[int, tuple[tuple[float, float], str, str]] | None = None
    split: str = ""
    weights: np.ndarray | None = None


def burn_scene(
    features: Features, target: Target, scene: Scene, all_touched: bool
) -> tuple[Grid, label_grids.Cells]:
    """Labels of features on the grid of a scene, and what became of the features."""
    classes = target.classes
    numbers = {} if classes is None else {c.name: c.value for c in classes}
    codes = [v if classes is None else numbers[str(v)] for v in features.values]
    stack, slack = scene.stack, label_grids.SAME if classes is None else 0.0
    got = label_grids.burn_cells(
        features, codes, stack.crs, stack.transform, stack.shape, slack, all_touched
    )
    grid = Grid(got.cells, target.index(got.codes), weights=got.weights)
    if features.points_only:
        places, _ = label_grids.project(features, stack.crs)
        grid.points, good = {}, set(got.cells.tolist())
        splits = features.columns.get("split", [""] * len(places))
        t: Any = stack.transform
        for number, cells in enumerate(got.pixels):
            known = dict(_points_by_pixel(places[number], t, stack.shape[1]))
            for cell in good.intersection(cells.tolist()):
                mine = known[cell], features.columns["id"][number], splits[number]
                # Whatever the order of rows.
                grid.points[cell] = min(grid.points.get(cell, mine), mine)
    return grid, got


def _points_by_pixel(shape: Any, t: Any, width: int):
    """(pixel, (x, y)) of the points of a geometry, the smallest of each pixel last."""
    points = sorted(map(tuple, shapely_library().get_coordinates(shape).tolist()), reverse=True)
    for x, y in points:
        yield math.floor((y - t.f) / t.e) * width + math.floor((x - t.c) / t.a), (x, y)


def window_size(shape: Sequence[int], side: int, patch: int) -> tuple[int, int]:
    """(height, width) of the windows in a scene: `side`, or less where it is smaller.

    Raises:
      ValueError: it is smaller than a patch, or the side is not whole patches.
    """
    if side < patch or side % patch:
        low = side // patch * patch
        fits = " or ".join(str(s) for s in (low, low + patch) if s)
        raise ValueError(f"a window of {side} pixels is not whole patches of {patch}; take {fits}")
    height, width = (min(side, n // patch * patch) for n in shape)
    if not (height and width):
        raise ValueError(f"images of {shape[0]} x {shape[1]} pixels are smaller than a patch")
    return height, width


def windows_of(
    grid: Grid, number: int, scene: Scene, target: Target, side: int, patch: int, step: int
) -> list[Window]:
    """The windows of a scene that hold labels.

    Args:
      number: of the scene.
      side, patch: pixels per side of a window and of a patch.
      step: pixels per side of what carries a label: a token, or 1.
    """
    size = window_size(scene.stack.shape, side, patch)
    if grid.points is None:
        found = list(_lattice(grid, number, scene, target, size, step))
        return [dataclasses.replace(w, split=grid.split) for w in found]
    return list(_centred(grid, number, scene, target, size, step))


def parts_of(scene: Scene, side: int, patch: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of parts of a scene, each whole windows of the lattice of one row of them.

    Args:
      side, patch: see `window_size`.
    """
    size = window_size(scene.stack.shape, side, patch)
    many = max(1, _PART // (size[0] * size[1]))
    rows, cols = (
        [slice(max(at, 0), min(at + step, whole)) for at in range(edge, whole, step)
         if at + step > 0]
        for edge, step, whole in zip(
            _edges(scene, size), (size[0], size[1] * many), scene.stack.shape, strict=True
        )
    )  # fmt: skip
    yield from itertools.product(rows, cols)


def _centred(grid: Grid, number: int, scene: Scene, target: Target, size, step: int):
    assert grid.points is not None
    width = scene.stack.shape[1]
    for cell, (place, name, split) in sorted(grid.points.items()):
        at = divmod(cell, width)
        row, col = (
            min(max((p - n // 2) // scene.align * scene.align, 0), whole - n)
            for p, n, whole in zip(at, size, scene.stack.shape, strict=True)
        )
        kind = np.float32 if target.classes is None else np.int64
        found = np.full([n // step for n in size], np.nan if kind is np.float32 else NONE, kind)
        token = (at[0] - row) // step, (at[1] - col) // step
        index = np.searchsorted(grid.cells, cell)
        found[token] = grid.codes[index]
        weights = None
        if grid.weights is not None:
            weights = np.full(found.shape, grid.weights[index], np.float32)
        yield Window(number, row, col, size, found, place, {token: (name, at)}, split, weights)


def _edges(scene: Scene, size) -> list[int]:
    """The first pixel, at most 0, of a window of the lattice along either axis."""
    t: Any = scene.stack.transform
    epsg = scene.stack.crs.to_epsg() or 0
    # Southern zones count from 10,000 km: blocks count from the equator.
    zero = FALSE_NORTHING if 32701 <= epsg <= 32760 else 0
    out = []
    for origin, pixel, n in ((t.f - zero, t.e, size[0]), (t.c, t.a, size[1])):
        edge = abs(pixel) * n
        first = math.floor(origin / edge) * edge if pixel > 0 else math.ceil(origin / edge) * edge
        # A pixel belongs to the window that holds its centre.
        out.append(math.ceil((first - origin) / pixel - 0.5))
    return out


def _lattice(grid: Grid, number: int, scene: Scene, target: Target, size, step: int):
    t: Any = scene.stack.transform
    shape, edges = scene.stack.shape, _edges(scene, size)
    rows, cols = np.divmod(grid.cells, shape[1])
    at = (rows - edges[0]) // size[0], (cols - edges[1]) // size[1]
    order = np.lexsort(at[::-1])
    marks = np.stack(at)[:, order]
    cuts = np.flatnonzero((np.diff(marks) != 0).any(0)) + 1
    for mine in np.split(order, cuts) if len(order) else ():
        top = int(at[0][mine[0]]) * size[0] + edges[0]
        left = int(at[1][mine[0]]) * size[1] + edges[1]
        row, col = (
            min(max(a, 0), whole - n) for a, n, whole in zip((top, left), size, shape, strict=True)
        )
        part = np.full(size, np.nan if target.classes is None else NONE, grid.codes.dtype)
        part[rows[mine] - row, cols[mine] - col] = grid.codes[mine]
        found = tokens_of(part, target, step)
        if target.labelled(found).any():
            y = t.f + t.e * (top + size[0] / 2)
            x = t.c + t.a * (left + size[1] / 2)
            weights = None
            if grid.weights is not None:
                weights = np.full(size, np.nan, np.float32)
                weights[rows[mine] - row, cols[mine] - col] = grid.weights[mine]
                weights = mean_of_tokens(weights, step)
            yield Window(number, row, col, size, found, (x, y), weights=weights)


def tokens_of(part: np.ndarray, target: Target, step: int) -> np.ndarray:
    """Labels of tokens from those of pixels."""
    if step == 1:
        return part
    if target.classes is None:
        return label_grids.to_tokens(part, step, None)
    return label_grids.to_tokens(part, step, NONE)


def mean_of_tokens(x: np.ndarray, side: int) -> np.ndarray:
    """Means of the finite values of tokens of `side` x `side` pixels, 1 where there is none."""
    height, width = (n // side for n in x.shape)
    cut = x[: height * side, : width * side].reshape(height, side, width, side)
    count = np.isfinite(cut).sum((1, 3))
    mean = np.nansum(cut, (1, 3)) / np.maximum(count, 1)
    return np.where(count > 0, mean, 1.0).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where windows lie, in their own zones.

    Attributes:
      zone: int [N].
      easting, northing: metres in EPSG:326zz.
      boxes: (low, high) float [N, 2], centres of the outermost pixels.
      across: (rows int [M], zone [M], low [M, 2], high [M, 2]) of windows that reach into the 6
        degrees of another zone, and their boxes there.
    """

    zone: np.ndarray
    easting: np.ndarray
    northing: np.ndarray
    boxes: tuple[np.ndarray, np.ndarray]
    across: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def locate(windows: Sequence[Window], scenes: Sequence[Scene]) -> Places:
    """The places of windows."""
    count = len(windows)
    zone, found = np.zeros(count, int), np.zeros((count, 5, 2))
    across: list[tuple[int, int, np.ndarray]] = []
    for number, scene in enumerate(scenes):
        rows = np.array([i for i, w in enumerate(windows) if w.scene == number], int)
        if not len(rows):
            continue
        points, crs = _corners([windows[i] for i in rows], scene), scene.stack.crs
        lon = _moved(points, crs, LONLAT)[..., 0]
        seen = zone_of(lon)
        zone[rows] = seen[:, 0]
        for z in np.unique(seen):
            here = _moved(points, crs, crs_of(int(z)))
            mine = seen[:, 0] == z
            found[rows[mine]] = here[mine]
            others = np.flatnonzero((seen == z).any(1) & ~mine)
            across += [(int(rows[k]), int(z), here[k, 1:]) for k in others]
    boxes = found[:, 1:].min(1), found[:, 1:].max(1)
    there = np.array([p for _, _, p in across]).reshape(-1, 4, 2)
    beyond = (
        np.array([i for i, _, _ in across], int), np.array([z for _, z, _ in across], int),
        there.min(1), there.max(1),
    )  # fmt: skip
    return Places(zone, found[:, 0, 0], found[:, 0, 1], boxes, beyond)


def _corners(windows: Sequence[Window], scene: Scene) -> np.ndarray:
    """float [N, 5, 2]: the place of each window, and the centres of its outermost pixels."""
    t: Any = scene.stack.transform
    out = np.zeros((len(windows), 5, 2))
    for k, w in enumerate(windows):
        top, left = w.row + 0.5, w.col + 0.5
        bottom, right = w.row + w.size[0] - 0.5, w.col + w.size[1] - 0.5
        corners = [(left, top), (right, top), (left, bottom), (right, bottom)]
        out[k, 0] = w.place
        out[k, 1:] = [(t.c + t.a * x, t.f + t.e * y) for x, y in corners]
    return out


def _moved(points: np.ndarray, source: Any, target: Any) -> np.ndarray:
    """Points [..., 2] of one CRS in another."""
    flat = points.reshape(-1, 2)
    moved = transform_points(source, target, flat[:, 0].tolist(), flat[:, 1].tolist())
    return np.stack(moved, -1).reshape(points.shape)


def counts_of(windows: Sequence[Window], target: Target) -> list[Mapping[str, int]]:
    """Labels of each class in each window; values are one class, ''."""
    out = []
    for w in windows:
        good = w.labels[target.labelled(w.labels)]
        if target.classes is None:
            out.append({"": len(good)})
        else:
            numbers, sizes = np.unique(good, return_counts=True)
            names = [target.classes[i].name for i in numbers]
            out.append(dict(zip(names, sizes.tolist(), strict=True)))
    return out


def by_period(
    features: Features, periods: Sequence[Period], months: tuple[int, int] | None = None
) -> dict[int, np.ndarray]:
    """Which features see the images of which period.

    Args:
      months: each sees those of a window around its date (`plan.around`), not of the first period
        that holds it.

    Raises:
      ValueError: there are several periods and the labels have neither date nor year, or a date
        that is none.
    """
    days = days_of(features, months is not None)
    if days is None:
        if len(periods) > 1:
            names = ", ".join(p.name for p in periods)
            raise ValueError(
                f"the images are of several periods ({names}), but the labels have no column "
                "'date' or 'year'"
            )
        return {0: np.arange(len(features.shapes))}
    out: dict[int, list[int]] = {}
    for i, day in enumerate(days):
        if day is None:
            continue
        if months is not None:
            own = plan.around(day, months)
            mine = next((k for k, p in enumerate(periods) if p == own), None)
        else:
            mine = next((k for k, p in enumerate(periods) if p.holds(day)), None)
        if mine is not None:
            out.setdefault(mine, []).append(i)
    return {k: np.array(rows) for k, rows in out.items()}


def days_of(features: Features, exact: bool = False) -> list[datetime.date | None] | None:
    """The day of each feature, in the middle of its year if that is all it says.

    Args:
      exact: a year will not do.

    Returns:
      None without such a column; None for features that say nothing.

    Raises:
      ValueError: a date that is none, or no dates where they are needed.
    """
    texts = features.columns.get("date")
    if texts is None and exact:
        raise ValueError("--months needs a column 'date' in the labels")
    by_year = texts is None
    texts = features.columns.get("year") if by_year else texts
    if texts is None:
        return None
    return [parse_date(_middle(t) if by_year else t) if t else None for t in texts]


def _middle(year: str) -> str:
    """The month in the middle of a year, which tables with gaps write as 2023.0."""
    found = re.fullmatch(r"([0-9]{4})(\.0*)?", year)
    if found is None:
        raise ValueError(f"the column 'year' holds {year!r}; years are numbers such as 2023")
    return f"{found[1]}-07"


def subset(features: Features, rows: np.ndarray) -> Features:
    """Some of the features."""
    columns = {k: [v[i] for i in rows] for k, v in features.columns.items()}
    return dataclasses.replace(
        features, shapes=[features.shapes[i] for i in rows],
        values=[features.values[i] for i in rows], columns=columns,
        weights=None if features.weights is None else [features.weights[i] for i in rows],
    )  # fmt: skip
