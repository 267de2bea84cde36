"""Windows of labels: where they lie, whatever the grid."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

from olmoearth_jax.maps import samples, split
from olmoearth_jax.maps.labels import Class
from olmoearth_jax.maps.plan import periods_of
from olmoearth_jax.maps.samples import Grid, Target
from olmoearth_jax.maps.scenes import Scene

TARGET = Target([Class(1, "a", "#000000"), Class(2, "b", "#ffffff")])
SHAPE, SIDE = (300, 260), 64


def _scene(epsg, x, y):
    stack: Any = SimpleNamespace(
        crs=rasterio.crs.CRS.from_epsg(epsg), transform=Affine(10, 0, x, 0, -10, y), shape=SHAPE,
        dates=[], names=[],
    )  # fmt: skip
    return Scene(periods_of(["2023"])[0], stack)


def _dense(codes, target):
    """The grid of an array of a code for every pixel."""
    cells = np.flatnonzero(target.labelled(codes))
    return Grid(cells, codes.ravel()[cells])


PLACES = [
    (32633, 500_480, 5_600_640),
    (32633, 500_130, 5_600_070),  # on no window's edge
    (32633, 500_003.5, 5_600_001.5),  # off the lattice of 10 m
    (32733, 300_000, 7_400_010),  # the south counts from 10,000 km
    (32631, 499_000, 1_000),  # across the equator
]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_windows_lie_in_the_block_of_their_centre(place):
    scene = _scene(*place)
    codes = np.random.default_rng(0).integers(0, 2, SHAPE)
    grid = _dense(codes, TARGET)
    windows = samples.windows_of(grid, 0, scene, TARGET, SIDE, 4, 1)
    found = samples.locate(windows, [scene])
    own = split.blocks_of(found.zone, found.easting, found.northing, 640)
    assert len(set(own)) == len(own)  # one window a block
    low, high = found.boxes
    seen = np.full(SHAPE, samples.NONE)
    for i, w in enumerate(windows):
        here = np.s_[w.row : w.row + SIDE, w.col : w.col + SIDE]
        labelled = w.labels != samples.NONE
        assert (seen[here][labelled] == samples.NONE).all()  # no pixel twice
        seen[here][labelled] = w.labels[labelled]
        corner = np.array(own[i][1:]) * 640
        inside = (low[i] >= corner - 1e-3).all() and (high[i] <= corner + 640 + 1e-3).all()
        edge = w.row in (0, SHAPE[0] - SIDE) or w.col in (0, SHAPE[1] - SIDE)
        assert inside or edge
        # Labels always lie in the block, also where the window was moved inward.
        rows, cols = np.nonzero(labelled)
        t = scene.stack.transform
        x = t.c + 10 * (w.col + cols + 0.5)
        y = t.f - 10 * (w.row + rows + 0.5) - (10_000_000 if place[0] > 32700 else 0)
        assert (np.floor(x / 640) == own[i][1]).all() and (np.floor(y / 640) == own[i][2]).all()
    np.testing.assert_array_equal(seen, codes)


def test_a_point_is_in_the_middle_of_its_window_or_near_the_edge():
    scene = _scene(*PLACES[0])
    for row, col in ((150, 130), (0, 0), (299, 259), (31, 200)):
        cell = row * SHAPE[1] + col
        points = {cell: ((500_480.0 + 10 * col + 3, 5_600_640.0 - 10 * row - 7), "p", "")}
        grid = Grid(np.array([cell]), np.array([1]), points)
        (w,) = samples.windows_of(grid, 0, scene, TARGET, SIDE, 4, 4)
        token = (row - w.row) // 4, (col - w.col) // 4
        assert w.labels[token] == 1 and (w.labels != samples.NONE).sum() == 1
        assert w.ids == {token: ("p", (row, col))}
        assert w.row == min(max(row - 32, 0), 300 - 64)
        assert w.col == min(max(col - 32, 0), 260 - 64)


def test_values_have_windows_too():
    scene, target = _scene(*PLACES[1]), dataclasses.replace(TARGET, classes=None)
    codes = np.full(SHAPE, np.nan, np.float32)
    codes[10:30, 20:40] = 7
    windows = samples.windows_of(_dense(codes, target), 0, scene, target, 64, 4, 4)
    total = sum(int(np.isfinite(w.labels).sum()) for w in windows)
    assert total > 0 and all(np.nanmax(w.labels) == 7 for w in windows)
