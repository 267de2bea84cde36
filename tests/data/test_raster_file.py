"""One raster file, in whatever direction and with whatever mask it is stored."""

from typing import Any

import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio")

from rasterio import CRS, Affine  # noqa: E402

from olmoearth_jax.data.raster_file import (  # noqa: E402
    RasterFile,
    crs_difference,
    pixel_size_m,
    same_crs,
)

# rasterio multiplies affine maps in a way that newer versions of that package discourage.
pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")

UTM = CRS.from_epsg(32633)
NORTH_UP = Affine(10, 0, 300_000, 0, -10, 5_800_000)
SHAPE = (5, 7)
VALUES = (np.arange(2 * 5 * 7).reshape(2, 5, 7) + 1).astype(np.uint16)
TURNS = {
    (): (slice(None), NORTH_UP),
    ("upside down",): (np.s_[:, ::-1], Affine(10, 0, 300_000, 0, 10, 5_799_950)),
    ("mirrored",): (np.s_[:, :, ::-1], Affine(-10, 0, 300_070, 0, -10, 5_800_000)),
    ("upside down", "mirrored"): (
        np.s_[:, ::-1, ::-1],
        Affine(-10, 0, 300_070, 0, 10, 5_799_950),
    ),
}


def write(path, x, transform: Any = NORTH_UP, crs=UTM, change=None, **form):
    size = {"count": len(x), "height": x.shape[1], "width": x.shape[2], "dtype": x.dtype}
    place = {} if transform is None else {"transform": transform}
    with rasterio.open(path, "w", driver="GTiff", crs=crs, **size, **place, **form) as file:
        file.write(x)
        if change:
            change(file)
    return path


@pytest.mark.parametrize("turned", TURNS)
def test_turned_rasters_read_like_the_plain_one(tmp_path, turned):
    view, transform = TURNS[turned]
    x = VALUES.copy()
    x[0, 1, 2] = 9999
    path = write(tmp_path / "a.tif", x[view], transform, nodata=9999)
    with RasterFile(path) as file:
        assert file.turned == turned and file.transform == NORTH_UP
        assert (file.height, file.width, file.count) == (5, 7, 2)
        values, valid = file.read(slice(1, 4), slice(2, 7))
        np.testing.assert_array_equal(values, x[:, 1:4, 2:7])
        np.testing.assert_array_equal(valid, x[:, 1:4, 2:7] != 9999)
        assert values.dtype == np.uint16
        assert file.read(slice(0, 5), slice(0, 7), (2, 3))[1].shape == (2, 2, 3)
        with pytest.raises(ValueError, match="are not in"):
            file.read(slice(0, 6), slice(0, 7))


def test_what_says_that_a_pixel_is_missing(tmp_path):
    gone = np.zeros(SHAPE, bool)
    gone[0, :3] = True

    def found(path, **how):
        with RasterFile(path, **how) as file:
            return file.read(slice(0, 5), slice(0, 7))[1]

    def masked(file):
        file.write_mask(~gone)

    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        inside = write(tmp_path / "mask.tif", VALUES, change=masked, nodata=9)
    assert not found(inside)[:, gone].any()
    assert not found(inside)[0, 1, 1]  # 9: the fill value counts beside the mask
    beside = write(tmp_path / "beside.tif", VALUES, change=masked)
    np.testing.assert_array_equal(found(beside), np.stack([~gone] * 2))
    last = np.where(gone, 0, 65535)[None].astype(np.uint16)
    alpha = np.concatenate([VALUES, VALUES[:1], last])
    path = write(tmp_path / "alpha.tif", alpha, photometric="RGB", alpha="YES")
    np.testing.assert_array_equal(found(path), np.stack([~gone] * 3))
    assert found(path, bands=4).all() and len(found(path, bands=4)) == 4
    number = VALUES.astype(np.float32)
    number[:, gone] = np.nan
    np.testing.assert_array_equal(found(write(tmp_path / "nan.tif", number)), np.stack([~gone] * 2))
    low = np.where(gone, np.float32(-3.4028235e38), VALUES)
    path = write(tmp_path / "low.tif", low.astype(np.float32), nodata=-3.4028234663852886e38)
    np.testing.assert_array_equal(found(path), np.stack([~gone] * 2))
    path = write(tmp_path / "own.tif", VALUES, nodata=9)
    assert found(path, nodata=10)[0, 1, 1] and not found(path, nodata=10)[0, 1, 2]


def test_a_fourth_band_of_8_bits_that_has_a_name_is_data(tmp_path):
    def name(file):
        file.descriptions = ("R", "G", "B", "IR")

    x = np.zeros((4, *SHAPE), np.uint8)
    with RasterFile(write(tmp_path / "named.tif", x, change=name)) as file:
        assert file.count == 4 and file.read(slice(0, 5), slice(0, 7))[1].all()
    path = write(tmp_path / "plain.tif", x)
    with RasterFile(path) as three, RasterFile(path, bands=4) as four:
        assert (three.count, four.count) == (3, 4)


def test_tags_give_the_values_meant(tmp_path):
    def tag(file):
        file.scales, file.offsets = (1e-4, 2.0), (0.0, -3.0)

    with RasterFile(write(tmp_path / "a.tif", VALUES, change=tag)) as file:
        values, _ = file.read(slice(0, 1), slice(0, 2))
        assert file.scaled
        expected = [[[1e-4, 2e-4]], [[69, 71]]]
        np.testing.assert_allclose(file.physical(values), expected, rtol=1e-6)
    with RasterFile(write(tmp_path / "b.tif", VALUES)) as file:
        assert not file.scaled and file.physical(VALUES).dtype == np.float32


def test_refused_or_without_a_place(tmp_path):
    path = write(tmp_path / "r.tif", VALUES, NORTH_UP * Affine.rotation(2))
    with pytest.raises(ValueError, match="is rotated"):
        RasterFile(path)
    with pytest.raises(ValueError, match="complex"):
        RasterFile(write(tmp_path / "c.tif", VALUES.astype(np.complex64)))
    (tmp_path / "bad.tif").write_bytes(b"II*\0 no raster")
    for path in ("bad.tif", "absent.tif"):
        with pytest.raises(ValueError, match="cannot be read as a raster"):
            RasterFile(tmp_path / path)
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        path = write(tmp_path / "p.tif", VALUES, None, None)
    with RasterFile(path) as file:  # nothing is turned where nothing is said
        assert file.transform is None and file.crs is None and not file.turned
        np.testing.assert_array_equal(file.read(slice(0, 5), slice(0, 7))[0], VALUES)
    whole = write(tmp_path / "cut.tif", np.tile(VALUES, (1, 40, 40)), compress="deflate")
    whole.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot be read"), RasterFile(whole) as file:
        file.read(slice(0, file.height), slice(0, file.width))


@pytest.mark.parametrize(
    "words",
    [
        UTM.to_wkt(),
        UTM.to_wkt(version="WKT1_ESRI"),
        UTM.to_wkt(version="WKT2_2019"),
        UTM.to_wkt().replace("WGS 84 / UTM zone 33N", "my grid").replace("32633", "0"),
        "+proj=utm +zone=33 +ellps=WGS84 +units=m",
        "+proj=utm +zone=33 +ellps=WGS84 +towgs84=0,0,0",
        "+proj=tmerc +lat_0=0 +lon_0=15 +k=0.9996 +x_0=500000 +y_0=0 +datum=WGS84",
        "EPSG:32633+5773",
    ],
)
def test_one_crs_in_many_words(words):
    assert same_crs(UTM, CRS.from_user_input(words))
    assert same_crs(CRS.from_user_input(words), UTM)


def test_other_crs_and_what_differs():
    said = {"EPSG:32634": "zone 33 / 34", "EPSG:32733": "south", "EPSG:25833": "ellps",
            "+proj=utm +zone=33 +datum=WGS84 +units=us-ft": "units m / us-ft"}  # fmt: skip
    for words, part in said.items():
        other = CRS.from_user_input(words)
        assert not same_crs(UTM, other) and part in crs_difference(UTM, other)
    assert not same_crs(UTM, None) and same_crs(None, None)
    assert crs_difference(UTM, None) == "EPSG:32633 against none"


def test_pixels_on_the_ground():
    def size(crs, transform):
        return pixel_size_m(CRS.from_user_input(crs), transform, 10, 10)

    assert size("EPSG:32633", NORTH_UP) == pytest.approx((10, 10), rel=2e-3)
    flat = Affine(10, 0, 300_000, 0, -20, 5_800_000)
    assert size("EPSG:32633", flat) == pytest.approx((10, 20), rel=2e-3)
    north = Affine(10, 0, 2e7, 0, -10, 8_399_738)  # 60 degrees, near the 180th meridian
    assert size("EPSG:3857", north) == pytest.approx((5, 5), rel=0.01)
    degrees = Affine(1e-4, 0, 179.9998, 0, -1e-4, 60.0005)
    assert size("EPSG:4326", degrees) == pytest.approx((5.58, 11.14), rel=0.01)
    feet = "+proj=utm +zone=33 +datum=WGS84 +units=us-ft"
    transform = Affine(32.8083, 0, 984_000, 0, -32.8083, 19_028_000)
    assert size(feet, transform) == pytest.approx((10, 10), rel=2e-3)
    here = 'LOCAL_CS["field",UNIT["metre",1]]'
    assert np.isnan(size(here, NORTH_UP)).all() or size(here, NORTH_UP) == (10, 10)
