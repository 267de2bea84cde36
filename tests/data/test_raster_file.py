"""One raster: direction, place, missing pixels, and coordinate systems in several words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import ColorInterp

from olmoearth_jax.data.crs import crs_difference, ground_pixel_size, same_crs, transform_points
from olmoearth_jax.data.raster_file import RasterError, RasterFile, opening
from olmoearth_jax.evals.datasets import base as evals_rasters

NORTH = Affine(10, 0, 300000, 0, -10, 5800000)


def _write(
    path: Path, data: np.ndarray, transform=NORTH, crs: str | None = "EPSG:32633", mask=None, **more
):
    count, height, width = data.shape
    names, kinds = more.pop("names", None), more.pop("kinds", None)
    form = {"count": count, "height": height, "width": width, "dtype": data.dtype, "crs": crs}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", driver="GTiff", transform=transform, **form, **more) as file,
    ):
        if kinds:
            file.colorinterp = kinds
        file.write(data)
        if names:
            file.descriptions = names
        if mask is not None:
            file.write_mask(mask)
    return path


def _image(dtype="int16", bands=2) -> np.ndarray:
    return np.arange(bands * 6 * 8).reshape(bands, 6, 8).astype(dtype)


TURNS = {
    "": (np.s_[:], NORTH),
    "upside down": (np.s_[:, ::-1], Affine(10, 0, 300000, 0, 10, 5800000 - 60)),
    "mirrored": (np.s_[:, :, ::-1], Affine(-10, 0, 300080, 0, -10, 5800000)),
    "upside down and mirrored": (
        np.s_[:, ::-1, ::-1],
        Affine(-10, 0, 300080, 0, 10, 5800000 - 60),
    ),
}


@pytest.mark.parametrize("turned", TURNS)
def test_every_direction_reads_as_the_north_up_picture(tmp_path, turned):
    data, (turn, transform) = _image(), TURNS[turned]
    data[:, 1, 5] = -7
    with RasterFile(_write(tmp_path / "a.tif", data[turn], transform, nodata=-7)) as file:
        assert file.turned == turned and file.placed
        assert file.transform.almost_equals(NORTH) and (file.height, file.width) == (6, 8)
        values, valid = file.read()
        np.testing.assert_array_equal(values, data)
        np.testing.assert_array_equal(valid, data != -7)
        values, valid = file.read(slice(1, 3), slice(4, 8))
        np.testing.assert_array_equal(values, data[:, 1:3, 4:8])
        assert values.dtype == np.int16 and not valid[:, 0, 1].any() and valid.sum() == 14
        twice, valid = file.read(slice(0, 2), slice(0, 2), (4, 4))
        np.testing.assert_array_equal(twice, data[:, :2, :2].repeat(2, 1).repeat(2, 2))
        assert valid.shape == twice.shape
        for bad in (slice(0, 7), slice(-1, 3), slice(3, 3)):
            with pytest.raises(ValueError, match="has 6 pixels on this side"):
                file.read(bad)


def test_rotated_rasters_and_what_is_no_raster_are_refused(tmp_path):
    for k, tilted in enumerate((Affine(10, 1, 3e5, 1, -10, 58e5), Affine(0, 10, 3e5, 10, 0, 58e5))):
        path = _write(tmp_path / f"{k}.tif", _image(), tilted)
        with pytest.raises(RasterError, match="is rotated: warp it"):
            RasterFile(path)
    (tmp_path / "c.tif").write_text("no raster")
    for path in (tmp_path / "c.tif", tmp_path / "none.tif"):
        with pytest.raises(ValueError, match="cannot be read as a raster"):
            RasterFile(path)
    whole = _write(tmp_path / "d.tif", np.random.default_rng(0).random((2, 90, 90)))
    whole.write_bytes(whole.read_bytes()[:9000])
    with RasterFile(whole) as file, pytest.raises(ValueError, match="may be damaged"):
        file.read()


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize(
    "transform", [None, Affine(1, 0, 0, 0, -1, 0), Affine(1, 0, 0, 0, -1, 6), Affine.identity()]
)
def test_pixels_counted_from_a_corner_are_no_place(tmp_path, transform):
    with RasterFile(_write(tmp_path / "a.tif", _image(), transform, None)) as file:
        assert not file.placed and not file.turned and file.crs is None
        np.testing.assert_array_equal(file.read()[0], _image())


def test_nodata_masks_and_alpha_all_count(tmp_path):
    data = _image("uint16", 3)
    mask = np.full((6, 8), 255, np.uint8)
    mask[0, 0] = 0
    with RasterFile(_write(tmp_path / "m.tif", data, mask=mask, nodata=20)) as file:
        valid = file.read()[1]
        assert not valid[:, 0, 0].any() and not valid[0, 2, 4] and valid.sum() == 3 * 48 - 4
    floats = _image("float32")
    floats[1, 2, 3] = np.nan
    with RasterFile(_write(tmp_path / "f.tif", floats, nodata=np.nan)) as file:
        assert np.argwhere(~file.read()[1]).tolist() == [[1, 2, 3]]
    floats[1, 2, 3] = np.float32(-3.4028235e38)
    with RasterFile(_write(tmp_path / "g.tif", floats, nodata=-3.4028234663852886e38)) as file:
        assert np.argwhere(~file.read()[1]).tolist() == [[1, 2, 3]]
    alpha = data.copy()
    alpha[2] = 65535
    alpha[2, 5, 1:3] = (0, 1)  # any alpha but none is a pixel
    kinds = (ColorInterp.gray, ColorInterp.undefined, ColorInterp.alpha)
    with RasterFile(_write(tmp_path / "a.tif", alpha, kinds=kinds, nodata=3)) as file:
        values, valid = file.read()
        assert file.count == 2 and values.shape[0] == 2 and len(file.dtypes) == 2
        assert np.argwhere(~valid).tolist() == [[0, 0, 3], [0, 5, 1], [1, 5, 1]]


def test_a_fourth_band_of_8_bits_is_not_always_alpha(tmp_path):
    data = _image("uint8", 4)
    path = _write(tmp_path / "four.tif", data)
    with RasterFile(path) as file:
        assert file.count == 3  # GDAL's default for four bands of 8 bits
    with RasterFile(path, expected=4) as file:
        assert file.count == 4 and file.read()[1].all()
    with RasterFile(_write(tmp_path / "named.tif", data, names=("R", "G", "B", "IR"))) as file:
        assert file.count == 4 and file.descriptions[3] == "IR"


UTM = CRS.from_epsg(32633)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("+proj=utm +zone=33 +datum=WGS84 +units=m", UTM),
        ("+proj=utm +zone=33 +ellps=WGS84", UTM),
        ("+proj=tmerc +lon_0=15 +k=0.9996 +x_0=500000 +datum=WGS84", UTM),
        (UTM.to_wkt(version="WKT1_ESRI"), UTM),
        (UTM.to_wkt(version="WKT2_2019"), UTM),
        (UTM.to_wkt().replace("WGS 84 / UTM zone 33N", "my grid"), UTM),
        ("EPSG:32633+5773", UTM),
        ("EPSG:3857", "ESRI:102100"),
        ("EPSG:25833", "EPSG:3045"),
        ("EPSG:32733", "+proj=utm +zone=33 +south +datum=WGS84"),
        ("EPSG:4326", "OGC:CRS84"),
        (None, None),
    ],
)
def test_equal_systems_in_other_words_are_equal(one, other):
    assert same_crs(one, other) and same_crs(other, one)


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ("EPSG:32634", UTM, "EPSG:32634 against EPSG:32633"),
        ("EPSG:25833", UTM, "EPSG:25833 against EPSG:32633"),
        ("EPSG:6339", "EPSG:26910", "EPSG:6339 against EPSG:26910"),
        (None, UTM, "no coordinate reference system against EPSG:32633"),
        (
            "+proj=tmerc +lon_0=15 +k=0.9996 +x_0=500000 +y_0=7 +datum=WGS84",
            UTM,
            "'unknown' against EPSG:32633 (y_0 7.0 against 0.0)",
        ),
        ("+proj=utm +zone=33 +datum=WGS84 +units=us-ft", UTM, "unit of length 0.3048"),
        ("+proj=laea +lat_0=50 +lon_0=9", "+proj=laea +lat_0=52 +lon_0=9", "lat_0 50.0 against 52"),
    ],
)
def test_unequal_systems_are_told_apart_in_words(one, other, said):
    assert not same_crs(one, other) and not same_crs(other, one)
    assert said in crs_difference(one, other)


def test_text_that_is_no_system_is_refused():
    with pytest.raises(ValueError, match="unknown coordinate reference system 'EPSG:9'"):
        same_crs("EPSG:9", UTM)


def test_the_size_on_the_ground_is_not_the_size_on_the_map():
    mercator = Affine(10, 0, 1e6, 0, -10, 8399737)  # 60 degrees north
    assert ground_pixel_size("EPSG:3857", mercator, 10, 10) == pytest.approx((5.0, 5.0), rel=0.01)
    degrees = Affine(1e-4, 0, 10, 0, -1e-4, 60)
    assert ground_pixel_size("EPSG:4326", degrees, 9, 9) == pytest.approx((5.58, 11.14), rel=0.01)
    assert ground_pixel_size(UTM, NORTH, 10, 10) == pytest.approx((10, 10), rel=0.001)
    around = Affine(1e-4, 0, 180 - 5e-4, 0, -1e-4, 0)
    assert ground_pixel_size("EPSG:4326", around, 10, 10)[0] == pytest.approx(11.13, rel=0.01)
    with pytest.raises(ValueError, match="has no size in metres"):
        ground_pixel_size(None, NORTH, 10, 10)


@pytest.mark.parametrize(
    ("dtype", "declared"),
    [("float32", -3.40282e38), ("float64", -1.79769e308), ("float32", -np.inf)],
)
def test_fills_that_are_declared_in_a_few_digits(tmp_path, dtype, declared):
    x = np.arange(30, dtype=dtype).reshape(1, 5, 6)
    x[0, 2, 3] = declared if np.isinf(declared) else np.finfo(dtype).min
    with RasterFile(_write(tmp_path / "x.tif", x, nodata=declared)) as file:
        np.testing.assert_array_equal(file.read()[1], x >= 0)


def test_complex_numbers_are_refused(tmp_path):
    _write(tmp_path / "slc.tif", np.ones((2, 4, 4), np.complex64))
    with pytest.raises(RasterError, match="holds complex numbers"):
        RasterFile(tmp_path / "slc.tif")


@pytest.mark.parametrize(
    "local",
    [
        'LOCAL_CS["site",UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]',
        'ENGCRS["site",EDATUM["peg"],CS[Cartesian,2],AXIS["x",east],AXIS["y",north],'
        'LENGTHUNIT["metre",1]]',
    ],
)
def test_local_systems_have_no_place_on_the_earth(local):
    with pytest.raises(ValueError, match="'site' is a local one and says nothing of the place"):
        ground_pixel_size(local, NORTH, 10, 10)
    for pair in ((local, "EPSG:4326"), ("EPSG:4326", local)):
        with pytest.raises(ValueError, match="is a local one"):
            transform_points(*pair, [1.0], [2.0])
    assert same_crs(local, local) and not same_crs(local, UTM)
    assert crs_difference(local, UTM).startswith("'site' against EPSG:32633")


@pytest.fixture
def raw_sources(monkeypatch):
    """GDAL 3.12 and later read raw bytes of other files only where this says so."""
    monkeypatch.setenv("GDAL_VRT_RAWRASTERBAND_ALLOWED_SOURCE", "ALL")


def _pointing(folder: Path, side: int) -> str:
    """A VRT whose pixels are the bytes of a file that is no raster."""
    secret = folder / "secret"
    secret.write_bytes(b"S" * side * side)
    return (
        f'<VRTDataset rasterXSize="{side}" rasterYSize="{side}">'
        "<GeoTransform>300000, 10, 0, 5800000, 0, -10</GeoTransform>"
        '<VRTRasterBand dataType="Byte" band="1" subClass="VRTRawRasterBand">'
        f'<SourceFilename relativetoVRT="0">{secret}</SourceFilename>'
        f"<PixelOffset>1</PixelOffset><LineOffset>{side}</LineOffset>"
        "</VRTRasterBand></VRTDataset>"
    )


@pytest.mark.usefixtures("raw_sources")
@pytest.mark.parametrize("name", ["tile.tif", "tile.TIFF"])
def test_a_list_of_other_files_is_no_geotiff(tmp_path, name):
    path = tmp_path / name
    path.write_text(_pointing(tmp_path, 8))
    with rasterio.open(path) as file:  # GDAL goes by the content
        assert file.read().tobytes() == b"S" * 64
    with pytest.raises(RasterError, match="cannot be read as a raster"):
        RasterFile(path)
    for read in (evals_rasters.read_raster, evals_rasters.read_masked):
        with pytest.raises(ValueError, match="cannot be read as a raster"):
            read(path)


@pytest.mark.usefixtures("raw_sources")
@pytest.mark.parametrize("where", ["tag", "aux", "ovr"])
def test_smaller_versions_are_read_from_no_other_file(tmp_path, where):
    path = _write(tmp_path / "tile.tif", np.full((1, 8, 8), 77, np.uint8))
    small = tmp_path / ("tile.tif.ovr" if where == "ovr" else "small.vrt")
    small.write_text(_pointing(tmp_path, 4))
    if where == "tag":
        with rasterio.open(path, "r+") as file:
            file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(small))
    elif where == "aux":
        named = f'<MDI key="OVERVIEW_FILE">{small}</MDI>'
        text = f'<PAMDataset><Metadata domain="OVERVIEWS">{named}</Metadata></PAMDataset>'
        (tmp_path / "tile.tif.aux.xml").write_text(text)
    with rasterio.open(path) as file:
        assert file.read(1, out_shape=(4, 4)).tobytes() == b"S" * 16
    with RasterFile(path) as file:
        assert (file.values(out_shape=(4, 4)) == 77).all()
        assert (file.read(out_shape=(4, 4))[0] == 77).all()


@pytest.mark.usefixtures("raw_sources")
def test_a_mask_beside_is_a_tiff_or_refused(tmp_path):
    path = _write(tmp_path / "tile.tif", np.full((1, 8, 8), 77, np.uint8))
    beside = tmp_path / "tile.tif.msk"
    beside.write_text(_pointing(tmp_path, 8))
    with pytest.raises(RasterError, match=r"a mask beside it, tile\.tif\.msk, that is no TIFF"):
        RasterFile(path)
    beside.unlink()
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as file:
        file.write_mask(np.arange(64).reshape(8, 8) < 32)
    assert beside.exists()
    with RasterFile(path) as file:
        assert file.read()[1][0, :4].all() and not file.read()[1][0, 4:].any()


def test_pixels_are_thinned_out_alike_with_and_without_versions_elsewhere(tmp_path):
    data = np.arange(2 * 30 * 40, dtype=np.uint16).reshape(2, 30, 40)
    path = _write(tmp_path / "tile.tif", data)
    for rows, cols, shape in [(30, 40, (7, 9)), (30, 40, (15, 20)), (11, 40, (3, 40)),
                              (4, 4, (8, 12))]:  # fmt: skip
        window = slice(30 - rows, 30), slice(0, cols)
        with RasterFile(path) as file:
            plain = file.read(*window, shape)
        (tmp_path / "tile.tif.ovr").write_bytes(b"")
        with RasterFile(path) as file:
            own = file.read(*window, shape)
        (tmp_path / "tile.tif.ovr").unlink()
        np.testing.assert_array_equal(plain[0], own[0])
        np.testing.assert_array_equal(plain[1], own[1])


def test_a_raster_for_evaluation_holds_what_it_declares(tmp_path):
    form = {"width": 60_000, "height": 60_000, "count": 3, "dtype": "uint8", "tiled": True}
    more = {"crs": "EPSG:32633", "transform": NORTH, "sparse_ok": True}
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", **form, **more):
        pass
    with pytest.raises(ValueError, match="far more pixels than it can hold"):
        evals_rasters.read_raster(tmp_path / "a.tif")


@pytest.mark.parametrize("path, fixed", [
    ("a.tif", True), ("a.TIFF", True), ("https://host/a.tif?sig=1.x", True), ("a.vrt", False),
    ("https://host/a?x=a.tif", True), ("s3://bucket/a", True), ("/vsicurl/https://host/a", True),
    ("a.tif?x", False), ("file:///a.vrt", False),
])  # fmt: skip
def test_a_geotiff_is_nothing_else(path, fixed):
    """Nor is what lies on other machines: a list of files of this one is not followed."""
    assert opening(path) == ({"driver": "GTiff"} if fixed else {})
