"""The lattice of embeddings: zones, tokens and shards, and the grids of arrays on it.

A token is a square of g metres of UTM in the northern form (EPSG:326zz) on both hemispheres: in the
south northings are negative. A shard is a square of S x S tokens. Both are counted from E = N = 0,
columns to the east and rows to the south, so all archives of one g and S share them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from olmoearth_jax.data.raster_lattice import crs_of, zone_of

__all__ = ["LONLAT", "Grid", "Lattice", "crs_of", "grid_around", "on_earth", "pixel_of",
           "whole_zone", "zone_bounds", "zone_of"]  # fmt: skip

LONLAT = "EPSG:4326"


def zone_bounds(zone: int) -> tuple[float, float]:
    """(west, east) in degrees of a zone."""
    west = -180.0 + 6.0 * (zone - 1)
    return west, west + 6.0


def on_earth(lonlat: np.ndarray) -> np.ndarray:
    """bool [N]: which of float [N, 2] are longitudes and latitudes in degrees."""
    return np.all(np.abs(lonlat) <= (180.0, 90.0), axis=1)


def pixel_of(transform: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """(row, col) of points; a point on an edge belongs to the pixel to its right or below.

    Args:
      transform: a, b, c, d, e, f of a north-up grid.
      x, y: arrays or numbers in its CRS.
    """
    a, _, c, _, e, f = list(transform)[:6]
    col = np.floor((np.asarray(x, np.float64) - c) / a).astype(int)
    row = np.floor((np.asarray(y, np.float64) - f) / e).astype(int)
    return row, col


@dataclasses.dataclass(frozen=True)
class Lattice:
    """Attributes:
    token: side of a token in metres (g).
    side: tokens per side of a shard (S).
    """

    token: float
    side: int

    def shard_at(self, easting: float, northing: float) -> tuple[int, int]:
        """(R, C) of the shard that holds a point."""
        col, row = math.floor(easting / self.token), math.floor(-northing / self.token)
        return row // self.side, col // self.side

    def box(self, row: int, col: int) -> tuple[float, float, float, float]:
        """(xmin, ymin, xmax, ymax) in metres of a shard."""
        span = self.token * self.side
        return col * span, -(row + 1) * span, (col + 1) * span, -row * span

    def place(self, row: int, col: int) -> list[float]:
        """Affine map a..f of the tokens of a shard."""
        span = self.token * self.side
        return [self.token, 0.0, col * span, 0.0, -self.token, -row * span]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The arrays of a zone: whole shards around what is planned.

    Attributes:
      zone: number.
      lattice: what they lie on.
      top, left: first row and column of shards.
      rows, cols: how many.
    """

    zone: int
    lattice: Lattice
    top: int
    left: int
    rows: int
    cols: int

    @property
    def name(self) -> str:
        return f"utm{self.zone:02d}"

    @property
    def crs(self) -> str:
        return crs_of(self.zone)

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) in tokens."""
        return self.rows * self.lattice.side, self.cols * self.lattice.side

    @property
    def transform(self) -> list[float]:
        """Affine map a..f of the tokens, from the top-left corner."""
        return self.lattice.place(self.top, self.left)

    @property
    def bbox(self) -> list[float]:
        """xmin, ymin, xmax, ymax in metres of the outer edges."""
        west, _, _, north = self.lattice.box(self.top, self.left)
        _, south, east, _ = self.lattice.box(self.top + self.rows - 1, self.left + self.cols - 1)
        return [west, south, east, north]

    def centres(self) -> tuple[np.ndarray, np.ndarray]:
        """(y descending, x) float64, centres of the tokens in metres."""
        a, _, c, _, e, f = self.transform
        height, width = self.shape
        return f + (np.arange(height) + 0.5) * e, c + (np.arange(width) + 0.5) * a


def grid_around(zone: int, lattice: Lattice, shards: Any) -> Grid:
    """The grid that spans some shards (R, C) of a zone."""
    rows, cols = zip(*shards, strict=True)
    top, left = min(rows), min(cols)
    return Grid(zone, lattice, top, left, max(rows) - top + 1, max(cols) - left + 1)


def whole_zone(zone: int, lattice: Lattice) -> Grid:
    """The grid of everything that a zone can hold, 80 S to 84 N."""
    # At the equator a zone is widest: 6 degrees are about 667.9 km around E = 500 km.
    half, north, south = 334_000.0, 9_330_000.0, -8_883_000.0
    corners = [(500_000 - half, north), (500_000 + half, south)]
    return grid_around(zone, lattice, [lattice.shard_at(x, y) for x, y in corners])
