"""Search for places like some others: the cosine of embeddings, in one pass over an archive.

An `archive` here is a `maps.archive.Archive`, which stands above and calls these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from olmoearth_jax.data.crs import transform_points
from olmoearth_jax.inference.quantize import unit
from olmoearth_jax.maps.lattice import LONLAT


def query_of_points(archive: Any, lonlat: Any, period: Any, width: int | None = None) -> np.ndarray:
    """float32 [d] of length 1: the mean direction of the embeddings at points.

    Raises:
      ValueError: one of them has no embedding.
    """
    lonlat = np.asarray(lonlat, np.float64).reshape(-1, 2)
    values, valid = archive.points(lonlat, [period], width)
    if not valid.all():
        without = lonlat[~valid[:, 0]]
        where = ", ".join(f"{x:g} {y:g}" for x, y in without[:3])
        more = f" and {len(without) - 3} other points" if len(without) > 3 else ""
        advice = "; leave them out of the query" if valid.any() else ""
        raise ValueError(f"there is no embedding of {period} at {where}{more}{advice}")
    return _mean(values[:, 0])


def query_of_shape(archive: Any, shape: Any, period: Any, width: int | None = None) -> np.ndarray:
    """float32 [d] of length 1: the mean direction of the embeddings whose centre is in a polygon.

    Raises:
      ValueError: none is.
    """
    from rasterio.features import rasterize
    from rasterio.transform import Affine

    from olmoearth_jax.maps import area

    found, step = [], archive.step_of(period)
    for number, part in area.by_zone(shape).items():
        if number not in archive.zones:
            continue
        zone = archive.zone(number)
        near = _near(zone, part.bounds)
        for rows, cols in (one for shard in near for one in zone.stripes(*shard)):
            size = rows.stop - rows.start, cols.stop - cols.start
            burnt = rasterize([(part, 1)], size, transform=Affine(*zone.place(rows, cols)))
            x, valid = archive.window(zone, step, rows, cols, width)
            found.append(x[(np.asarray(burnt) > 0) & valid])
    if not sum(map(len, found)):
        raise ValueError(f"there is no embedding of {period} inside of the polygon")
    return _mean(np.concatenate(found))


def _near(zone: Any, bounds: Any) -> Iterator[tuple[slice, slice]]:
    """Shards of a zone that overlap bounds of its CRS."""
    for rows, cols in zone.shards():
        a, _, c, _, e, f = zone.place(rows, cols)
        right, bottom = c + a * (cols.stop - cols.start), f + e * (rows.stop - rows.start)
        if c < bounds[2] and bounds[0] < right and bottom < bounds[3] and bounds[1] < f:
            yield rows, cols


def _mean(x: np.ndarray) -> np.ndarray:
    mean = unit(x).astype(np.float64).mean(0)
    if not np.linalg.norm(mean) > 0:
        raise ValueError("the embeddings of the query point nowhere: their mean is 0")
    return unit(mean[None].astype(np.float32))[0]


def cosine(x: np.ndarray, valid: np.ndarray, query: np.ndarray) -> np.ndarray:
    """float32 [h, w], NaN where there is no embedding."""
    score = (unit(np.where(valid[..., None], x, 0)) @ query).astype(np.float32)
    return np.where(valid, np.clip(score, -1, 1), np.float32(np.nan))


def search(
    archive: Any,
    query: np.ndarray,
    period: Any,
    top: int = 100,
    min_distance: float = 200.0,
    put: Callable[[Any, slice, slice, np.ndarray], None] | None = None,
) -> list[dict[str, Any]]:
    """The places that are most like a query, best first.

    In each shard the best places are picked greedily at the distance from each other, then the best
    of all picks in the same way.

    Args:
      archive: to look through.
      query: float32 [d]; the first d bands are compared.
      period: one of its periods.
      top: how many places.
      min_distance: metres between any two of them in a zone.
      put: gets the scores [h, w] of each shard with data.

    Returns:
      lon, lat, score, zone, row, col of each.
    """
    step, found = archive.step_of(period), []
    for number in archive.zones:
        zone = archive.zone(number)
        apart = min_distance / zone.transform[0]
        picks: list[tuple[float, int, int]] = []
        for rows, cols in zone.shards():
            score = _scores(archive, zone, step, (rows, cols), query)
            if np.isnan(score).all():
                continue
            if put is not None:
                put(zone, rows, cols, score)
            picks += [(s, r + rows.start, c + cols.start) for s, r, c in _picks(score, top, apart)]
        found += [(s, number, r, c) for s, r, c in _apart(picks, top, apart)]
    best = sorted(found, key=lambda p: (-p[0], *p[1:]))[:top]
    return [_place(archive, *pick) for pick in best]


def _scores(
    archive: Any, zone: Any, step: int, shard: tuple[slice, slice], query: np.ndarray
) -> np.ndarray:
    """float32 [h, w]: the cosine of each embedding of a shard; NaN where there is none."""
    found = []
    for part in zone.stripes(*shard):
        x, valid = archive.window(zone, step, *part, len(query))
        score = np.full(valid.shape, np.nan, np.float32)
        found.append(cosine(x, valid, query) if valid.any() else score)
    return np.concatenate(found)


def _picks(score: np.ndarray, top: int, apart: float) -> list[tuple[float, int, int]]:
    """The best places of a shard, greedily and apart from each other."""
    left, out, reach = score.copy(), [], int(np.ceil(apart))
    while len(out) < top:
        at = np.nanargmax(left) if not np.isnan(left).all() else None
        if at is None:
            break
        row, col = (int(v) for v in np.unravel_index(at, left.shape))
        out.append((float(left[row, col]), row, col))
        r0, c0 = max(row - reach, 0), max(col - reach, 0)
        near = left[r0 : row + reach + 1, c0 : col + reach + 1]
        y, x = np.ogrid[: near.shape[0], : near.shape[1]]
        near[(y + r0 - row) ** 2 + (x + c0 - col) ** 2 < max(apart, 0.5) ** 2] = np.nan
    return out


def _apart(
    picks: list[tuple[float, int, int]], top: int, apart: float
) -> list[tuple[float, int, int]]:
    out: list[tuple[float, int, int]] = []
    for score, row, col in sorted(picks, key=lambda p: (-p[0], p[1], p[2])):
        if all((row - r) ** 2 + (col - c) ** 2 >= apart**2 for _, r, c in out):
            out.append((score, row, col))
            if len(out) == top:
                break
    return out


def _place(archive: Any, score: float, number: int, row: int, col: int) -> dict[str, Any]:
    zone = archive.zone(number)
    a, _, c, _, e, f = zone.transform
    lon, lat = transform_points(zone.crs, LONLAT, [c + (col + 0.5) * a], [f + (row + 0.5) * e])
    return {"lon": float(lon[0]), "lat": float(lat[0]), "score": score, "zone": number,
            "row": row, "col": col}  # fmt: skip
