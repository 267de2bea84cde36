"""xarray in and out: what labels say is used, and what they leave open is refused."""

import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from rasterio.crs import CRS

from olmoearth_jax import Sample, modalities
from olmoearth_jax.inference.model import PretrainedModel
from tests.inference.test_model import weights_of

S2 = list(modalities.get("sentinel2_l2a").bands)
TIMES = np.array(["2021-01-15T10:31", "2021-04-15T10:41"], "datetime64[ns]")
X, Y = 500_005.0 + 10 * np.arange(8), 5_800_075.0 - 10 * np.arange(8)


@pytest.fixture(scope="module")
def model():
    return PretrainedModel(weights_of(), "mine")


def optical(seed=0, bands=S2, times=TIMES):
    rng = np.random.Generator(np.random.Philox(seed))
    values = rng.integers(100, 4000, (len(times), len(bands), 8, 8)).astype(np.uint16)
    coords = {"time": times, "band": bands, "y": Y, "x": X}
    out = xr.DataArray(values, coords, ("time", "band", "y", "x"), name="sentinel2_l2a")
    return out.assign_coords(spatial_ref=xr.DataArray(0, attrs=utm()))


def utm() -> dict[str, str]:
    crs = CRS.from_epsg(32633)
    return {"crs_wkt": crs.to_wkt()}


def radar(times=TIMES):
    rng = np.random.Generator(np.random.Philox(1))
    coords = {"time": times, "band": ["vv", "vh"], "y": Y, "x": X}
    return xr.DataArray(
        rng.uniform(-25, -5, (len(times), 2, 8, 8)), coords, ("time", "band", "y", "x")
    )


def plain(array=None) -> np.ndarray:
    array = optical() if array is None else array
    return array.transpose("y", "x", "time", "band").values[None].astype(np.float32)


def same(sample: Sample, want: np.ndarray | None = None) -> None:
    np.testing.assert_array_equal(
        sample.data["sentinel2_l2a"], plain() if want is None else want, strict=True
    )
    assert sample.timestamps[0].tolist() == [[15, 0, 2021], [15, 3, 2021]]


def test_labels_say_what_arrays_need_arguments_for():
    array = optical()
    same(Sample.from_xarray(array))
    same(Sample.from_xarray(array.transpose("x", "band", "y", "time")))  # any order
    same(Sample.from_xarray(array.isel(band=slice(None, None, -1))))  # bands by name
    same(Sample.from_xarray(array.isel(time=[1, 0])))  # dates ascending
    same(Sample.from_xarray(array.isel(y=slice(None, None, -1))))  # south-up
    same(Sample.from_xarray(array.isel(x=slice(None, None, -1))))  # mirrored
    for one, other in (("x", "y"), ("y", "x")):  # turned also where the other axis says nothing
        alone = array.drop_vars(one).isel({other: slice(None, None, -1)})
        same(Sample.from_xarray(alone))
        assert Sample.from_xarray(alone).place is None
    same(Sample.from_xarray(array.rename(time="t", band="bands", y="northing", x="easting")))
    same(Sample.from_xarray(array.rename(None)))  # modality by its bands
    same(Sample.from_xarray(array.to_dataset("band")))  # bands as variables
    same(Sample.from_xarray(array.to_dataset("band").drop_vars("spatial_ref")))
    same(Sample.from_xarray(array.to_dataset()))
    same(Sample.from_xarray({"sentinel2_l2a": array.rename(None)}))
    same(Sample.from_xarray(array.expand_dims(scene=1)))
    numbered = array.assign_coords(band=np.arange(1, 13))
    numbered.attrs["long_name"] = tuple(S2)
    same(Sample.from_xarray(numbered))  # as rioxarray opens files


def test_one_date_is_a_scalar_coordinate():
    one = Sample.from_xarray(optical().isel(time=1))
    assert one.timestamps.tolist() == [[[15, 3, 2021]]]
    np.testing.assert_array_equal(one.data["sentinel2_l2a"], plain()[:, :, :, 1:])


def test_modalities_of_other_dates_are_missing_there():
    times = np.array(["2021-02-01", "2021-04-15T05:00"], "datetime64[ns]")
    both = {"sentinel2_l2a": optical(), "sentinel1": radar(times)}
    made = Sample.from_xarray(both)
    assert made.timestamps[0].tolist() == [[15, 0, 2021], [1, 1, 2021], [15, 3, 2021]]
    s1, s2 = made.data["sentinel1"], made.data["sentinel2_l2a"]
    assert np.isnan(s1[:, :, :, 0]).all() and np.isnan(s2[:, :, :, 1]).all()
    np.testing.assert_array_equal(s2[:, :, :, [0, 2]], plain())
    shared = xr.Dataset({"sentinel2_l2a": optical(), "sentinel1": radar()}, {})
    joined = Sample.from_xarray(shared)  # xarray made one dimension of both lists of bands
    same(joined)
    assert not joined.missing_bands and np.isfinite(joined.data["sentinel1"]).all()
    own = {"sentinel2_l2a": optical(), "sentinel1": radar().rename(band="band_s1")}
    same(Sample.from_xarray(xr.Dataset(own)))


def test_maps_without_time():
    cover = xr.DataArray(np.full((8, 8), 10, np.uint8), {"y": Y, "x": X}, ("y", "x"))
    made = Sample.from_xarray({"sentinel2_l2a": optical(), "worldcover": cover})
    assert made.data["worldcover"].shape == (1, 8, 8, 1, 1)
    assert Sample.from_xarray(cover, "worldcover").image_size == (8, 8)


def test_fill_values_are_missing():
    array = optical()
    array[0] = 0
    array.attrs["_FillValue"] = 0
    assert np.isnan(Sample.from_xarray(array).data["sentinel2_l2a"][:, :, :, 0]).all()
    for told in (1e20, np.float64(1e20), np.float32(1e20)):  # as files and readers spell it
        array = optical().astype(np.float32)
        array[0, :, 2] = 1e20
        array.attrs["_FillValue"] = told
        found = Sample.from_xarray(array, nan_pixels="mask").data["sentinel2_l2a"]
        assert np.isnan(found[0, 2, :, 0]).all() and np.isfinite(found[0, 3]).all()


@pytest.mark.parametrize(
    "attrs", [{"valid_range": [1, 10_000]}, {"valid_min": 1}, {"valid_max": 10_000, "valid_min": 1}]
)
@pytest.mark.parametrize("packing", [{}, {"scale_factor": 0.5, "add_offset": -1}])
def test_values_outside_of_the_valid_range_are_missing(attrs, packing):
    array = optical().astype(np.float32)
    array[0, :, 2], array[0, 0, 3] = 0, 10_000
    # What a reader has unpacked keeps the range in the units of the file.
    array = array * packing.get("scale_factor", 1) + packing.get("add_offset", 0)
    array.attrs, array.encoding = attrs, packing
    found = Sample.from_xarray(array, nan_pixels="mask").data["sentinel2_l2a"]
    assert np.isnan(found[0, 2, :, 0]).all() and np.isfinite(found[0, 3]).all()
    array.attrs = {"valid_range": [1, 2, 3]}
    with pytest.raises(ValueError, match="valid_range"):
        Sample.from_xarray(array)


@pytest.mark.parametrize(
    ("name", "told"),
    [("missing_value", 0), ("nodatavals", (0.0,) * 12), ("nodata", "0"), ("_FillValue", [0])],
)
def test_fill_values_under_any_name_of_readers_are_missing(name, told):
    array = optical()
    array[0] = 0
    array.attrs[name] = told
    assert np.isnan(Sample.from_xarray(array).data["sentinel2_l2a"][:, :, :, 0]).all()
    plain = array.transpose("y", "x", "time", "band")
    bands = {"sentinel2_l2a": array.band.values}
    made = Sample.from_arrays({"sentinel2_l2a": plain}, array.time.values, bands=bands)
    assert np.isnan(made.data["sentinel2_l2a"][:, :, :, 0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.values, "not ndarray; arrays without labels go into Sample.from_arrays"),
        (lambda a: a.rename(y="lat", x="lon"), "are degrees.*warp it to UTM"),
        (lambda a: a.rename(y="rows"), "an image has 'y' and 'x'"),
        (lambda a: a.assign_coords(x=X * 2), "20 apart along 'x'.*trained on 10 m"),
        (lambda a: a.assign_coords(x=np.r_[X[:-1], X[-1] + 5]), "'x' is not evenly spaced"),
        (lambda a: a.drop_vars("time"), "has no coordinate: the models need the dates"),
        (lambda a: a.isel(time=0).drop_vars("time"), "has no dates: give it a time axis"),
        (lambda a: a.assign_coords(time=[1, 2]), "plain numbers"),
        (lambda a: a.assign_coords(time=["2021-01-15"] * 2), "several images of 2021-01-15"),
        (lambda a: xr.concat([a, a], "scene"), r"choose one entry of it with .isel\(scene=0\)"),
        (lambda a: a.rename(None).drop_vars("band"), "its bands have no names"),
        (lambda a: a.drop_vars("band"), "name the bands: give the dimension"),
        (lambda a: a.assign_attrs(scale_factor=0.0001), "scale_factor is 0.0001 and has not been"),
        (lambda a: a.assign_attrs(scales=(1e-4,) * 12), "scales is 0.0001 and has not been"),
        (lambda a: a.assign_attrs(offsets=(-0.1,) * 12), "offsets is -0.1 and has not been"),
        (lambda a: a.assign_attrs(nodatavals=(0, 1)), "nodatavals holds several values"),
        (lambda a: a / 10000, "multiply by 10000"),
        (lambda a: a.rename("sentinel2").isel(band=slice(0, 0)), "its bands have no names"),
        (lambda a: xr.Dataset(), "has no variables"),
        (lambda a: {"optical": a.isel(band=0), "radar": a}, "does not say of which modality"),
        (lambda a: {"sentinel2_l2a": a, "sentinel1": radar().assign_coords(x=X + 10)},
         "sentinel1 and sentinel2_l2a lie on different grids"),
        (lambda a: a.rename(None).assign_coords(band=[*S2[:-1], "B13"]), r"B13 fit none\): give"),
    ],
)  # fmt: skip
def test_refused(change, message):
    given = change(optical())
    with pytest.raises(ValueError, match=message):
        Sample.from_xarray(given)


def test_pixels_are_measured_on_the_ground():
    crs = CRS.from_epsg(3857)
    array = optical().assign_coords(y=Y + 1e6, spatial_ref=xr.DataArray(0))
    array.spatial_ref.attrs["crs_wkt"] = crs.to_wkt()
    with pytest.raises(ValueError, match="6.* m on the ground"):
        Sample.from_xarray(array)
    same(Sample.from_xarray(array, any_pixel_size=True))


def test_embeddings_come_back_with_coordinates(model):
    array = optical()
    got = model.embed_xarray(array)
    assert got.dims == ("y", "x", "feature") and got.dtype == np.float32
    np.testing.assert_array_equal(got.x, [500_020, 500_060])
    np.testing.assert_array_equal(got.y, [5_800_060, 5_800_020])
    assert got.spatial_ref.attrs == array.spatial_ref.attrs
    assert got.attrs["model_digest"] == model.digest and got.attrs["patch_size"] == 4
    sample = Sample.from_xarray(array)
    np.testing.assert_array_equal(got.values, model.embed(sample, 4, "spatial")[0])
    turned = model.embed_xarray(array.isel(y=slice(None, None, -1)))
    xr.testing.assert_identical(turned, got)
    fine = model.embed_xarray(sample, patch_size=2)
    assert fine.shape == (4, 4, 16) and fine.x[0] == 500_010
    one = model.embed_xarray(sample, pooling="instance")
    assert one.dims == ("feature",) and "spatial_ref" in one.coords
    bare = model.embed_xarray(array.drop_vars(["x", "y", "spatial_ref"]))
    assert set(bare.coords) == {"feature"}
    np.testing.assert_array_equal(bare.values, got.values)
    with pytest.raises(ValueError, match="take embed for batches"):
        model.embed_xarray(sample, pooling="spatial_concat")


def test_samples_of_several_places_have_no_coordinates():
    sample = Sample.from_xarray(optical())
    assert sample.place is not None
    assert Sample.concatenate([sample, sample]).place is None


def test_xarray_is_imported_only_where_an_array_is_made():
    code = (
        "import sys, olmoearth_jax.inference.model, olmoearth_jax.inference.sample;"
        "sys.exit('xarray' in sys.modules or 'rasterio' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_embed_says_how_to_hand_over_labelled_arrays(model):
    for images in (optical(), optical().to_dataset("band")):
        with pytest.raises(ValueError, match=r"not a Data\w+: make one with Sample\.from_xarray"):
            model.embed(images)
