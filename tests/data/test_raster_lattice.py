"""Rasters on the lattice of a zone: across files, hemispheres and grids."""

import datetime

import numpy as np
import pytest
import rasterio

from olmoearth_jax.data import raster_lattice
from olmoearth_jax.data.raster_lattice import LatticeStack, look_at
from olmoearth_jax.data.raster_list import Raster

pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")
DAYS = [datetime.date(2023, 5, 15), datetime.date(2023, 6, 15)]
BANDS = {"sentinel1": ["vv", "vh"]}


def _write(path, x, transform, crs="EPSG:32633", nodata=None, names=("vv", "vh")):
    form = {"count": len(x), "height": x.shape[1], "width": x.shape[2], "dtype": x.dtype}
    with rasterio.open(
        path, "w", driver="GTiff", crs=crs, transform=transform, nodata=nodata, **form
    ) as file:
        file.write(x)
        file.descriptions = names
    return str(path)


def _image(seed, height=20, width=30):
    return np.random.default_rng(seed).uniform(-25, -5, (2, height, width)).astype(np.float32)


def _read(stack, box):
    west, south, east, north = (round(v / 10) for v in box)
    return stack.read(slice(-north, -south), slice(west, east)).arrays["sentinel1"]


def test_windows_lie_anywhere_and_join_files(tmp_path):
    one, two = _image(1), _image(2)
    left = rasterio.Affine(10, 0, 400_000, 0, -10, 5_000_200)
    right = rasterio.Affine(10, 0, 400_250, 0, -10, 5_000_150)
    rasters = [Raster(_write(tmp_path / "a.tif", one, left), "2023-05"),
               Raster(_write(tmp_path / "b.tif", two, right), "2023-05")]  # fmt: skip
    with LatticeStack(rasters, 33, BANDS, DAYS) as stack:
        got = _read(stack, (399_950, 4_999_900, 400_600, 5_000_250))
    want = np.full((35, 65, 2, 2), np.nan, np.float32)
    want[10:30, 30:60, 0] = np.moveaxis(two, 0, -1)
    want[5:25, 5:35, 0] = np.moveaxis(one, 0, -1)  # the first file counts
    assert np.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize("turned", [False, True])
def test_the_southern_form_is_the_northern_one_ten_thousand_km_lower(tmp_path, turned):
    x = _image(3)
    t = rasterio.Affine(10, 0, 500_000, 0, -10, 9_999_000)
    if turned:  # bottom-up
        t, shown = rasterio.Affine(10, 0, 500_000, 0, 10, 9_998_800), x[:, ::-1]
    else:
        shown = x
    raster = Raster(_write(tmp_path / "a.tif", shown, t, "EPSG:32735"), "2023-06")
    placed = look_at(raster)
    assert placed.zone == 35 and placed.box == (500_000, -1_200, 500_300, -1_000)
    with LatticeStack([raster], 35, BANDS, DAYS) as stack:
        got = _read(stack, placed.box)
    assert np.array_equal(got[..., 1, :], np.moveaxis(x, 0, -1)) and np.isnan(got[..., 0, :]).all()


def test_a_zone_without_a_number_is_known(tmp_path):
    text = "+proj=utm +zone=33 +datum=WGS84 +units=m +no_defs"
    t = rasterio.Affine(10, 0, 400_000, 0, -10, 5_000_000)
    raster = Raster(_write(tmp_path / "a.tif", _image(1), t, text), "2023-05")
    assert look_at(raster).zone == 33


@pytest.mark.parametrize("crs, t, said", [
    ("EPSG:32633", (10, 0, 400_003, 0, -10, 5_000_000), "miss the lattice"),
    ("EPSG:32633", (10, 0, 400_000.002, 0, -10, 5_000_000), "miss the lattice"),
    ("EPSG:32633", (10.1, 0, 400_000, 0, -10.1, 5_000_000), "miss the lattice"),
    ("EPSG:32633", (20, 0, 400_010, 0, -20, 5_000_000), "miss the lattice"),
    ("EPSG:3857", (10, 0, 400_000, 0, -10, 5_000_000), "EPSG:3857, no UTM zone"),
    ("EPSG:4326", (1e-4, 0, 12, 0, -1e-4, 47), "EPSG:4326, no UTM zone"),
])  # fmt: skip
def test_other_grids_are_refused_with_what_helps(tmp_path, crs, t, said):
    path = _write(tmp_path / "a.tif", _image(1), rasterio.Affine(*t), crs)
    with pytest.raises(ValueError, match=said) as error:
        look_at(Raster(path, "2023-05"))
    assert "a.tif" in str(error.value) and "resample" in str(error.value)
    assert look_at(Raster(path, "2023-05", resample="nearest")).zone is None


def test_a_millimetre_is_forgiven(tmp_path):
    t = rasterio.Affine(10, 0, 400_000.0005, 0, -10, 4_999_999.9995)
    assert look_at(Raster(_write(tmp_path / "a.tif", _image(1), t), "2023-05")).zone == 33


@pytest.mark.parametrize("nodata", [None, -99.0])
def test_nearest_moves_by_half_a_pixel_at_most(tmp_path, nodata):
    x = _image(4)
    if nodata is not None:
        x[:, 5, 6] = nodata
    t = rasterio.Affine(10, 0, 400_003, 0, -10, 5_000_004)
    raster = Raster(_write(tmp_path / "a.tif", x, t, nodata=nodata), "2023-05", resample="nearest")
    with LatticeStack([raster], 33, BANDS, DAYS) as stack:
        got = _read(stack, (399_990, 4_999_790, 400_320, 5_000_020))[..., 0, :]
    inner = np.moveaxis(x.copy(), 0, -1)
    if nodata is not None:
        inner[5, 6] = np.nan
    # Pixel centres of the lattice at 400_005 lie in the file's first column, and so on.
    assert np.array_equal(got[2:22, 1:31], inner, equal_nan=True)
    assert np.isnan(got[0]).all() and np.isnan(got[:, 0]).all()


def test_another_zone_is_resampled_to_the_place_where_it_was(tmp_path):
    side = 60
    ramp = np.stack([np.tile(np.arange(side, dtype=np.float32) - 60, (side, 1))] * 2)
    t = rasterio.Affine(10, 0, 730_000, 0, -10, 5_210_000)
    raster = Raster(_write(tmp_path / "a.tif", ramp, t, "EPSG:32632"), "2023-05",
                    resample="bilinear")  # fmt: skip
    x, y = raster_lattice.transform_points("EPSG:32632", "EPSG:32633", [730_300], [5_209_700])
    with LatticeStack([raster], 33, BANDS, DAYS) as stack:
        row, col = int(np.floor(-y[0] / 10)), int(np.floor(x[0] / 10))
        got = stack.read(slice(row, row + 1), slice(col, col + 1)).arrays["sentinel1"]
    assert abs(got[0, 0, 0, 0] - (29.5 - 60)) < 1.5


def test_windows_have_all_modalities_bands_and_timesteps_of_the_period(tmp_path):
    t = rasterio.Affine(10, 0, 400_000, 0, -10, 5_000_000)
    raster = Raster(_write(tmp_path / "a.tif", _image(1), t), "2023-06")
    bands = {"sentinel2_l2a": ["B02", "B03"], "sentinel1": ["vv", "vh"]}
    with LatticeStack([raster], 33, bands, DAYS) as stack:
        window = stack.read(slice(-500_000, -499_990), slice(40_000, 40_010))
    assert {n: x.shape for n, x in window.arrays.items()} == {
        "sentinel2_l2a": (10, 10, 2, 2), "sentinel1": (10, 10, 2, 2)}  # fmt: skip
    assert np.isnan(window.arrays["sentinel2_l2a"]).all()
    assert np.isfinite(window.arrays["sentinel1"][:, :, 1]).all()


def test_a_cropped_stack_counts_from_the_corner_of_its_box(tmp_path):
    t = rasterio.Affine(10, 0, 400_000, 0, -10, 5_000_000)
    raster = Raster(_write(tmp_path / "a.tif", _image(1), t), "2023-05")
    # Noise at an edge takes no further pixel, a part of a pixel does; the box reaches beyond.
    box = (399_985.0, 4_999_900.0 - 1e-6, 400_050.0 + 1e-6, 5_000_020.0)
    stack = LatticeStack([raster], 33, BANDS, DAYS)
    with stack:
        want = stack.read(slice(-500_002, -499_990), slice(39_998, 40_005))
        stack.crop(box)
        got = stack.read(slice(0, 12), slice(0, 7))
        assert stack.shape == (12, 7)
    assert got.transform == want.transform == rasterio.Affine(10, 0, 399_980, 0, -10, 5_000_020)
    assert np.isfinite(got.arrays["sentinel1"]).any()
    assert np.array_equal(got.arrays["sentinel1"], want.arrays["sentinel1"], equal_nan=True)


@pytest.mark.parametrize("down, across", [(1, 1), (-1, 1), (1, -1)])
def test_what_is_resampled_may_lie_any_way_round(tmp_path, down, across):
    x = _image(5)
    corner = 400_003 + 300 * (across < 0), 5_000_204 - 200 * (down < 0)
    place = rasterio.Affine(10 * across, 0, corner[0], 0, -10 * down, corner[1])
    path = _write(tmp_path / "a.tif", x[:, ::down, ::across], place)
    with LatticeStack([Raster(path, "2023-05", resample="nearest")], 33, BANDS, DAYS) as stack:
        got = _read(stack, (400_000, 5_000_000, 400_300, 5_000_200))
    assert np.array_equal(got[..., 0, :], np.moveaxis(x, 0, -1))


def test_a_mask_beside_a_nodata_value_is_not_resampled(tmp_path):
    x = _image(6)
    path = _write(tmp_path / "a.tif", x, rasterio.Affine(10, 0, 400_003, 0, -10, 5_000_204))
    with rasterio.open(path, "r+") as file:
        file.write_mask(np.repeat([0, 255], 300).astype(np.uint8).reshape(20, 30))
        file.nodata = -99.0
    raster = Raster(path, "2023-05", resample="nearest")
    with pytest.raises(ValueError, match=r"a\.tif has a mask and a nodata value"):
        look_at(raster)
    with pytest.raises(ValueError, match=r"a\.tif has a mask and a nodata value"):
        LatticeStack([raster], 33, BANDS, DAYS)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_place_that_is_no_number_is_refused_by_name(tmp_path, value):
    path = _write(tmp_path / "a.tif", _image(7), rasterio.Affine(10, 0, value, 0, -10, 5e6))
    with pytest.raises(ValueError, match=r"a\.tif places its pixels at numbers that are none"):
        look_at(Raster(path, "2023-05", resample="nearest"))


def test_smaller_versions_of_a_resampled_raster_are_read_from_no_other_file(tmp_path):
    form = {"crs": "EPSG:32633", "nodata": None, "names": ("vv", "vh")}
    place = rasterio.Affine(10, 0, 400_003, 0, -10, 5_000_204)
    small = _write(tmp_path / "small.tif", np.full((2, 10, 15), -1, np.float32), place, **form)
    path = _write(tmp_path / "a.tif", np.full((2, 20, 30), -9, np.float32), place, **form)
    with rasterio.open(path, "r+") as file:
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=small)
    with LatticeStack([Raster(path, "2023-05", resample="nearest")], 33, BANDS, DAYS) as stack:
        stack.crop((400_000, 5_000_000, 400_300, 5_000_200))
        got = stack.read(slice(0, 20), slice(0, 30), 8).arrays["sentinel1"]
    assert (got[..., 0, :] == -9).all()
