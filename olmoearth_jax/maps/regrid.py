"""Embeddings on a grid of another CRS: of each pixel, those of the token that holds its centre.

An `archive` here is a `maps.archive.Archive`, which stands above and calls this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from olmoearth_jax.data.crs import bounds_in, metres_per_unit, transform_points
from olmoearth_jax.maps.lattice import LONLAT


def read(
    archive: Any, windows: Sequence[Any], bbox: Sequence[float], period: Any, width: int | None,
    crs: Any,
) -> tuple[np.ndarray, np.ndarray, list[float]]:  # fmt: skip
    """(values float32 [H, W, d] with NaN, valid bool [H, W], affine map a..f).

    Pixels are as large as tokens, at the equator where units are degrees, and lie at multiples of
    their side.

    Args:
      archive: to read.
      windows: `archive.windows` of the box.
      bbox: west, south, east, north in degrees.
      period: one of its periods.
      width: the first bands only.
      crs: whatever rasterio takes for a CRS.

    Raises:
      ValueError: an unknown CRS, or one that is not defined there.
    """
    side = archive.zone(archive.zones[0]).transform[0] / metres_per_unit(crs)
    west, south, east, north = bounds_in(LONLAT, _within(windows, bbox), crs)
    left, right = math.floor(west / side), math.ceil(east / side)
    bottom, top = math.floor(south / side), math.ceil(north / side)
    x, y = (np.arange(left, right) + 0.5) * side, (np.arange(top, bottom, -1) - 0.5) * side
    xs, ys = np.meshgrid(x, y)
    lon, lat = transform_points(crs, LONLAT, xs.ravel().tolist(), ys.ravel().tolist())
    lonlat = np.stack([np.mod(lon + 180, 360) - 180, lat], axis=1)
    values, valid = archive.points(lonlat, [period], width)
    shape = len(y), len(x)
    place = [side, 0.0, left * side, 0.0, -side, top * side]
    return values.reshape(*shape, -1), valid.reshape(shape), place


def _within(windows: Sequence[Any], bbox: Sequence[float]) -> tuple[float, float, float, float]:
    """The part of a box in degrees that some windows of an archive reach over."""
    found = []
    for zone, rows, cols in windows:
        a, _, c, _, e, f = zone.place(rows, cols)
        right, bottom = c + a * (cols.stop - cols.start), f + e * (rows.stop - rows.start)
        found.append(bounds_in(zone.crs, (c, bottom, right, f)))
    west, south, east, north = bbox
    lows, highs = np.array(found)[:, :2].min(0), np.array(found)[:, 2:].max(0)
    if highs[0] <= 180:
        west, east = max(west, lows[0]), min(east, highs[0])
    return float(west), float(max(south, lows[1])), float(east), float(min(north, highs[1]))
