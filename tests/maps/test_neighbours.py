"""Rasters that lie where another zone begins, or across 180 degrees."""

import json

import numpy as np
import pytest
from rasterio.transform import Affine

from olmoearth_jax.data.crs import bounds_in, transform_points
from olmoearth_jax.data.raster_lattice import PIXEL, LatticeStack
from olmoearth_jax.data.raster_list import Raster
from olmoearth_jax.maps import plan
from olmoearth_jax.maps.imagery import Imagery
from olmoearth_jax.maps.lattice import crs_of
from tests.maps import region
from tests.maps.test_embed import run

pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")
YEAR = plan.periods_of(["2023"])


def write(path, crs, lon, lat, side=10.0):
    """A raster whose corner is near a place, on multiples of its pixel side."""
    (x,), (y,) = transform_points("EPSG:4326", crs, [lon], [lat])
    place = Affine(side, 0, round(x / side) * side, 0, -side, round(y / side) * side)
    pixels = region.image(1, 96, 128)
    region.write_raster(path, pixels, place, crs)
    return pixels, place


def look(path, resample="nearest"):
    return Imagery([Raster(str(path), "2023-05-10", "sentinel2_l2a", resample=resample)], YEAR)


def pixel(images, zone, lon, lat):
    """The first band at a place, as the blocks of a zone are read."""
    (x,), (y,) = transform_points("EPSG:4326", crs_of(zone), [lon], [lat])
    col, row = int(x // PIXEL), int(-y // PIXEL)
    box = (col * PIXEL, -(row + 1) * PIXEL, (col + 1) * PIXEL, -row * PIXEL)
    with LatticeStack(*images.part(zone, "2023", box)) as stack:
        return stack.read(slice(row, row + 1), slice(col, col + 1)).arrays["sentinel2_l2a"][0, 0, 0]


def test_a_raster_on_the_lattice_of_a_neighbour_is_resampled_if_it_asks(tmp_path):
    """As tiles of western Norway, which lie in zone 31 and are made for zone 32."""
    x, t = write(tmp_path / "a.tif", "EPSG:32632", 5.3, 60.3)
    images = look(tmp_path / "a.tif")
    assert list(images.area()) == [31] and not images.notes
    for row, col in ((10, 10), (50, 100)):
        at = [t.c + (col + 0.5) * t.a], [t.f + (row + 0.5) * t.e]
        (lon,), (lat,) = transform_points("EPSG:32632", "EPSG:4326", *at)
        near = x[:, row - 1 : row + 2, col - 1 : col + 2].reshape(12, 9).T
        assert (near == pixel(images, 31, lon, lat)).all(1).any()
    assert not look(tmp_path / "a.tif", "refuse").touching(31, "2023", (0, 0, 1e6, 1e7))


def test_one_that_does_not_ask_is_told(tmp_path, capsys):
    given = [a for a in region.build(tmp_path) if not a.startswith(("--inputs", "--years"))]
    write(tmp_path / "a.tif", "EPSG:32632", 5.3, 60.3)
    row = {"path": "a.tif", "date": "2023-05-10", "modality": "sentinel2_l2a"}
    (tmp_path / "m.json").write_text(json.dumps([row]))
    flags = [f"--inputs={tmp_path / 'm.json'}", "--years=2023", f"--output={tmp_path / 'out'}"]
    assert run(*given, *flags) == 2
    told = capsys.readouterr().err
    assert "lattice of zone 32, but their longitudes are of zone 31: give resample" in told
    assert not (tmp_path / "out").exists()


def test_both_sides_of_a_boundary_are_used(tmp_path):
    write(tmp_path / "a.tif", "EPSG:32632", 11.995, 50.0)
    assert sorted(look(tmp_path / "a.tif").area()) == [32, 33]
    alone = look(tmp_path / "a.tif", "refuse")
    assert sorted(alone.area()) == [32] and "lies in its neighbours" in alone.notes[0]


@pytest.mark.parametrize("crs, side", [("EPSG:3832", 10.0), ("EPSG:4326", 1e-4)])
def test_a_raster_across_180_degrees_lies_in_two_zones(tmp_path, crs, side):
    write(tmp_path / "a.tif", crs, 179.995, -17.0, side)
    images = look(tmp_path / "a.tif")
    assert sorted(images.area()) == [1, 60] and sorted(images.boxes("2023")) == [1, 60]
    for zone, lon in ((60, 179.998), (1, -179.999)):
        assert np.isfinite(pixel(images, zone, lon, -17.003)).all()


def test_bounds_in_degrees():
    north = "EPSG:32660"
    (x,), (y,) = transform_points("EPSG:4326", north, [179.99], [-17.0])
    west, _, east, _ = bounds_in(north, (x, y, x + 5000, y + 1000))
    assert 179.98 < west < 179.99 and 180.02 < east < 180.05
    assert bounds_in("EPSG:4326", (-180, -10, 180, 10)) == (-180, -10, 180, 10)
    west, south, east, north = bounds_in("EPSG:3413", (-1e5, -1e5, 1e5, 1e5))
    assert (west, east, north) == (-180, 180, 90) and 88 < south < 90
