"""Rasters of labels, read in parts."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
from rasterio.crs import CRS as RasterCRS
from rasterio.transform import Affine

from olmoearth_jax.maps import labelled, samples
from olmoearth_jax.maps.label_rasters import LabelRaster
from olmoearth_jax.maps.labelled import LabelOptions
from olmoearth_jax.maps.plan import periods_of
from olmoearth_jax.maps.samples import Grid
from olmoearth_jax.maps.scenes import Scene
from tests.maps import world

CRS, SHAPE = "EPSG:32633", (20, 30)
GRID = Affine(10, 0, 500_000, 0, -10, 5_600_000)


def _moved(cols, rows, t=GRID):
    return Affine(10, 0, t.c + 10 * cols, 0, -10, t.f - 10 * rows)


def whole(path, crs, transform, shape, **more):
    """All labels of the grid, -1 where there is none."""
    with LabelRaster(path, crs, transform, shape, **more) as file:
        values, there = file.read(slice(0, shape[0]), slice(0, shape[1]))
    return np.where(there, values.astype(np.float64), -1)


def _write(path, data, transform=GRID, crs: str | None = CRS, **more):
    form = {"driver": "GTiff", "count": 1, "dtype": data.dtype, "crs": crs}
    height, width = data.shape
    with rasterio.open(path, "w", height=height, width=width, transform=transform, **form,
                       **more) as file:  # fmt: skip
        file.write(data, 1)
    return path


def test_rasters_of_labels(tmp_path):
    data = np.arange(12, dtype=np.uint8).reshape(3, 4)
    shifted = _moved(28, -1)
    path = _write(tmp_path / "a.tif", data, shifted, nodata=4)
    got = whole(path, CRS, GRID, SHAPE, ignore=[8])
    assert (got >= 0).sum() == 2
    assert got[0, 28:].tolist() == [-1, 5] and got[1, 28:].tolist() == [-1, 9]
    values = _write(tmp_path / "v.tif", data.astype("f4"), GRID, nodata=np.nan)
    got = whole(values, CRS, GRID, SHAPE)
    assert (got >= 0).sum() == 12
    far = _write(tmp_path / "f.tif", data, _moved(100, 0))
    assert (whole(far, CRS, GRID, SHAPE) == -1).all()


def test_rasters_of_another_grid_are_taken_only_if_asked(tmp_path):
    data = np.full((40, 60), 3, np.uint8)
    half = _write(tmp_path / "h.tif", data, Affine(5, 0, 500_000, 0, -5, 5_600_000))
    off = _write(tmp_path / "o.tif", data, _moved(0.5, 0))
    other = _write(tmp_path / "c.tif", data, Affine(10, 0, 900_000, 0, -10, 5_600_000),
                   "EPSG:32632")  # fmt: skip
    for path in (half, off, other):
        with pytest.raises(ValueError, match="another grid.*--resample_labels=nearest"):
            whole(path, CRS, GRID, SHAPE)
    got = whole(half, CRS, GRID, SHAPE, resample="nearest")
    assert (got == 3).all()
    # Without a nodata value 0 is a class, beside the raster is nothing.
    small = _write(tmp_path / "z.tif", np.zeros((4, 4), np.uint8), _moved(0.25, 0.25))
    got = whole(small, CRS, GRID, SHAPE, resample="nearest")
    assert (got == 0).sum() == 16 and (got == -1).sum() == got.size - 16
    filled = _write(tmp_path / "y.tif", np.zeros((4, 4), np.uint8), _moved(0.25, 0.25), nodata=0)
    assert (whole(filled, CRS, GRID, SHAPE, resample="nearest") == -1).all()
    two = tmp_path / "two.tif"
    with rasterio.open(two, "w", driver="GTiff", count=2, dtype="uint8", height=2, width=2,
                       crs=CRS, transform=GRID) as file:  # fmt: skip
        file.write(np.ones((2, 2, 2), np.uint8))
    with pytest.raises(ValueError, match="2 bands"):
        whole(two, CRS, GRID, SHAPE)


def _scene(shape, corner=(500_480, 5_600_640)):
    stack: Any = SimpleNamespace(
        crs=RasterCRS.from_string(CRS), shape=shape, dates=[], names=[],
        transform=Affine(10, 0, corner[0], 0, -10, corner[1]),
    )  # fmt: skip
    return Scene(periods_of(["2023"])[0], stack)


def _read(path, scene, **more):
    return labelled.read(LabelOptions(str(path), block="320", **more), [scene], 32, 4, 4, 0)


@pytest.mark.parametrize("kind", ["uint8", "int16", "float32"])
@pytest.mark.parametrize("corner", [(500_480, 5_600_640), (500_130, 5_600_070), (500_003.5, 7)])
def test_parts_give_what_the_whole_gives(tmp_path, monkeypatch, kind, corner):
    """Windows, split and counts of a raster read in parts are those of one array, bit for bit."""
    scene, rng = _scene((300, 260), corner), np.random.default_rng(0)
    data = rng.integers(0, 4, (290, 270)).repeat(1, 0).astype(kind)
    data[100:180, 40:200] = 3
    place = _moved(-7, 5, scene.stack.transform)
    path = _write(tmp_path / "a.tif", data, place, nodata=3)
    monkeypatch.setattr(samples, "_PART", 64 * 32)
    got = _read(path, scene)
    monkeypatch.setattr(samples, "_PART", 1 << 30)
    ((number, grid),) = [(0, _all_at_once(data, got.target))]
    windows = samples.windows_of(grid, number, scene, got.target, 32, 4, 4)
    assert len(windows) == len(got.windows) > 50
    for one, other in zip(windows, got.windows, strict=True):
        assert (one.row, one.col, one.size, one.place) == (
            other.row, other.col, other.size, other.place)  # fmt: skip
        assert one.labels.dtype == other.labels.dtype
        np.testing.assert_array_equal(one.labels, other.labels)
    assert got.counts["labelled_pixels"] == len(grid.cells)
    again = _read(path, scene)
    assert again.split.names == got.split.names and again.split.blocks == got.split.blocks
    assert again.counts == got.counts


def _all_at_once(data, target):
    """The grid of 300 x 260 pixels whose pixel (5, -7) is the first one of the data."""
    every = np.full((300, 260), 3, data.dtype)
    every[5:295] = data[:, 7:267]
    cells = np.flatnonzero(every != 3)
    return Grid(cells, target.index(every.ravel()[cells]))


def test_a_part_is_all_that_is_read(tmp_path, monkeypatch):
    """Memory is that of a part, however large the raster."""
    asked, scene = [], _scene((2000, 3000))
    data = np.full((2000, 3000), 255, np.uint8)
    data[500:900, 100:2900] = np.arange(2800) // 40 % 2
    path = _write(tmp_path / "a.tif", data, scene.stack.transform, nodata=255)
    read = LabelRaster.read
    monkeypatch.setattr(LabelRaster, "read", lambda self, rows, cols: (
        asked.append((rows.stop - rows.start) * (cols.stop - cols.start)), read(self, rows, cols)
    )[1])  # fmt: skip
    monkeypatch.setattr(samples, "_PART", 1 << 14)
    assert _read(path, scene).counts["labelled_pixels"] == 400 * 2800
    assert max(asked) <= 1 << 14 and sum(asked) == 2 * data.size  # classes first, then labels


def test_another_grid_in_parts_is_the_one_at_once(tmp_path, monkeypatch):
    data = np.random.default_rng(1).integers(0, 9, (400, 400)).astype(np.uint8)
    path = _write(tmp_path / "a.tif", data, Affine(1.3e-4, 0, 15.0, 0, -0.9e-4, 50.56), "EPSG:4326")
    scene = _scene((200, 300))
    s = scene.stack
    every = whole(path, s.crs, s.transform, s.shape, resample="nearest")
    monkeypatch.setattr(samples, "_PART", 64 * 32)
    out = np.full(s.shape, -1.0)
    with LabelRaster(path, s.crs, s.transform, s.shape, resample="nearest") as file:
        for rows, cols in samples.parts_of(scene, 32, 4):
            values, there = file.read(rows, cols)
            out[rows, cols] = np.where(there, values, -1.0)
    assert (every >= 0).mean() > 0.5
    np.testing.assert_array_equal(out, every)


def test_what_is_no_class_is_told_or_counted(tmp_path):
    scene = _scene((128, 128))
    data = np.random.default_rng(0).integers(-1, 3, (128, 128)).astype(np.int16)
    path = _write(tmp_path / "a.tif", data, scene.stack.transform)
    with pytest.raises(ValueError, match="holds -1, and classes are .* --ignore_values=-1 leaves"):
        _read(path, scene)
    got = _read(path, scene, ignore_values=[-1.0])
    assert got.counts["labelled_pixels"] == (data >= 0).sum()
    values = data.astype(np.float64)
    values[0, :5], values[1, :3], values[2, :2] = np.inf, np.nan, 1e300
    path = _write(tmp_path / "v.tif", values, scene.stack.transform)
    got = _read(path, scene)
    assert got.counts["not_finite"] == 7
    assert got.counts["labelled_pixels"] == 128 * 128 - 10
    data = _write(tmp_path / "n.tif", data, scene.stack.transform, None)
    for resample in (None, "nearest"):
        with pytest.raises(ValueError, match="have no coordinate reference system: set it"):
            _read(data, scene, resample=resample)


@pytest.mark.parametrize("resample", [None, "nearest"])
def test_a_damaged_raster_is_told(tmp_path, resample):
    scene = _scene((128, 128))
    data = np.random.default_rng(0).integers(0, 3, (128, 128)).astype(np.uint8)
    place = _moved(0.5 if resample else 0, 0, scene.stack.transform)
    path = _write(tmp_path / "a.tif", data, place, compress="deflate")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read, it may be damaged"):
        _read(path, scene, resample=resample)


def test_names_of_a_rasters_classes(tmp_path):
    scene = _scene((128, 128))
    data = np.random.default_rng(0).integers(0, 2, (128, 128)).astype(np.uint8)
    path = _write(tmp_path / "a.tif", data, scene.stack.transform)
    got = _read(path, scene, classes=["water", "land"]).target.classes
    assert [(c.value, c.name) for c in got or ()] == [(0, "water"), (1, "land")]
    with pytest.raises(ValueError, match="names a class twice: land, land"):
        _read(path, scene, classes=["land", "land"])
    (tmp_path / "c.json").write_text('{"water": "blue"}')
    with pytest.raises(ValueError, match="the colour of 'water' must be like #1f77b4, got 'blue'"):
        _read(path, scene, classes=["water", "land"], colors=str(tmp_path / "c.json"))


def test_features_on_several_grids_are_counted_once(tmp_path):
    """Grids that overlap: what lies on both, on one and on none."""
    scenes = [_scene((64, 64)), _scene((64, 64), (500_800, 5_600_640))]
    both, one, none = (
        [world.box(left, 4 * i, left + 4, 4 * i + 4) for i in range(6)] for left in (40, 4, 300)
    )
    x, y = 500_480 + 10 * 50 + 6, 5_600_640 - 10 * 40 - 6
    tiny = shapely.box(x, y, x + 1, y + 1)
    bow = shapely.Polygon([(x, y), (x + 60, y + 60), (x + 60, y), (x, y + 60)])
    shapes = [*both, *one, *none, tiny, bow]
    path = world.write_labels(tmp_path / "a.geojson", shapes, ["a", "b"] * 10)
    counts: dict[str, int] = {}
    options = LabelOptions(str(path), "kind")
    _, _, notes = labelled._from_features(options, scenes, counts)
    assert counts == {"features": 20, "without_period": 0, "empty": 1, "repaired": 1,
                      "conflict_pixels": 0, "outside": 6}  # fmt: skip
    assert "1 polygons cover no pixel's centre: 18" in notes
    assert any(n.startswith("6 of 20 labels cannot be used") for n in notes)
