"""Rasters of one area, however people store them, give the values of the plain ones."""

from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio import CRS, Affine

from olmoearth_jax import modalities
from olmoearth_jax.data import raster_list
from olmoearth_jax.data.rasters import (
    Raster,
    Stack,
    read_folder,
    read_manifest,
    spread_bands,
)

# rasterio multiplies affine maps in a way that newer versions of that package discourage.
pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")

S2 = modalities.get("sentinel2_l2a").bands
UTM = CRS.from_epsg(32633)
NORTH_UP = Affine(10, 0, 300_000, 0, -10, 5_800_000)
SHAPE = (11, 8)


def grid(cols: float, rows: float, wide: float = 1, high: float = 1) -> Affine:
    """The plain grid moved by so many pixels, with pixels so many times as large."""
    x, y = 300_000 + 10 * cols, 5_800_000 - 10 * rows
    return Affine(10 * wide, 0, x, 0, -10 * high, y)


DATES = ["2023-06-15", "2023-08-02"]
WORDS = [
    "EPSG:32633",
    UTM.to_wkt(version="WKT1_ESRI"),
    UTM.to_wkt()
    .replace("WGS 84 / UTM zone 33N", "local")
    .replace(',AUTHORITY["EPSG","32633"]', ""),
    "+proj=utm +zone=33 +ellps=WGS84 +units=m",
]
ALIASES = {"B01": "coastal", "B02": "blue", "B8A": "nir08", "B11": "swir-16", "B05": "B5"}


def write(path, x, names=(), transform: Any = NORTH_UP, crs: Any = UTM, tags=None, **form):
    """Writes x [C, h, w]; `mask` bool [h, w] becomes a mask band."""
    mask = form.pop("mask", None)
    size = {"count": len(x), "height": x.shape[1], "width": x.shape[2], "dtype": x.dtype}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", driver="GTiff", crs=crs, transform=transform, **size, **form) as f,
    ):
        f.write(x)
        f.descriptions = tuple(names) or (None,) * len(x)
        if tags:
            f.scales, f.offsets = (tags[0],) * len(x), (tags[1],) * len(x)
        if mask is not None:
            f.write_mask(mask)
    return str(path)


def turn(x, transform, up, right):
    """The same image stored in another direction."""
    t = transform
    a, c = (t.a, t.c) if right else (-t.a, t.c + t.a * x.shape[2])
    e, f = (t.e, t.f) if up else (-t.e, t.f + t.e * x.shape[1])
    y = x[:, :: 1 if up else -1, :: 1 if right else -1]
    return np.ascontiguousarray(y), Affine(a, 0, c, 0, e, f)


def values(stack, name="sentinel2_l2a", bands=S2):
    """[H, W, T, C] of the whole area, bands in a fixed order."""
    window = stack.read(slice(0, stack.shape[0]), slice(0, stack.shape[1]))
    return window.arrays[name][..., [window.bands[name].index(b) for b in bands]]


def image(rng, steps=2):
    x = rng.integers(1, 9000, (steps, 12, *SHAPE)).astype(np.float32)
    x[rng.random((steps, 1, *SHAPE)).repeat(12, 1) < 0.1] = np.nan
    return x


def one_file(path, rng, x, place, names):
    """Writes [C, h, w] with NaN in a way drawn at random."""
    x, place = turn(x, place, *(rng.random(2) < 0.5))
    gone, form, tags = np.isnan(x), {}, None
    kind = rng.choice(["uint16", "int16", "int32", "float32", "float64"])
    filled = np.nan_to_num(x)
    if kind.startswith("u") and rng.random() < 0.5:
        tags = (1e-4, -0.1)
        filled = filled + 1000
    ways = ["nodata"]
    ways += ["nan"] if kind.startswith("f") else []
    ways += ["mask"] if (gone == gone[0]).all() else []
    way = rng.choice(ways)
    if way == "nodata":
        form["nodata"] = 65535 if kind == "uint16" else -9999
        filled[gone] = form["nodata"]
    elif way == "nan":
        filled[gone] = np.nan
    else:
        form["mask"] = ~gone[0]
    return write(path, filled.astype(kind), names, place, rng.choice(WORDS), tags, **form)


@pytest.mark.parametrize("seed", range(30))
def test_any_storage_gives_the_values_of_the_plain_files(tmp_path, seed):
    rng = np.random.default_rng(seed)
    x = image(rng)
    rasters = []
    order = rng.permutation(12)
    groups = np.array_split(order, rng.integers(1, 4))
    cut = int(rng.integers(0, SHAPE[0]))
    spans = [slice(0, SHAPE[0])] if cut < 2 else [slice(0, cut), slice(cut - 1, SHAPE[0])]
    for g, group in enumerate(groups):
        names = [ALIASES.get(S2[b]) or S2[b].lower() for b in group]
        for p, span in enumerate(spans):
            place = Affine(10, 0, 300_000, 0, -10, 5_800_000 - 10 * span.start)
            path = tmp_path / f"{g}{p}.tif"
            if rng.random() < 0.3:  # both timesteps in one file
                both = x[:, group, span]
                one_file(path, rng, both.reshape(-1, *both.shape[2:]), place, [])
                rasters.append(Raster(str(path), DATES, "sentinel2_l2a", names))
                continue
            for step, date in enumerate(DATES):
                path = tmp_path / f"{g}{p}{step}.tif"
                one_file(path, rng, x[step, group, span], place, names)
                rasters.append(Raster(str(path), date, "sentinel2_l2a"))
    with Stack([rasters[k] for k in rng.permutation(len(rasters))]) as stack:
        assert stack.dates == DATES and stack.shape == SHAPE
        assert stack.transform.almost_equals(NORTH_UP)
        np.testing.assert_allclose(values(stack), x.transpose(2, 3, 0, 1), atol=1e-3)
        part = stack.read(slice(2, 9), slice(3, 8))
        got = part.arrays["sentinel2_l2a"][..., [part.bands["sentinel2_l2a"].index(b) for b in S2]]
        np.testing.assert_allclose(got, x[:, :, 2:9, 3:8].transpose(2, 3, 0, 1), atol=1e-3)
        assert part.transform.almost_equals(Affine(10, 0, 300_030, 0, -10, 5_799_980))
        thin = stack.read(slice(0, 11), slice(0, 8), 4).arrays["sentinel2_l2a"]
        assert thin.shape == (4, 4, 2, 12) and np.isfinite(thin).any()


def test_bands_at_half_the_resolution_are_repeated(tmp_path):
    rng = np.random.default_rng(1)
    fine = rng.integers(1, 9000, (2, 12, 8)).astype(np.uint16)
    coarse = rng.integers(1, 9000, (3, 6, 4)).astype(np.uint16)
    twenty = Affine(20, 0, 300_000, 0, -20, 5_800_000)
    a = write(tmp_path / "a.tif", fine, ["B02", "B03"])
    b = write(tmp_path / "b.tif", coarse, ["B05", "B8A", "B12"], twenty)
    for order in ([a, b], [b, a]):
        with Stack([Raster(p, "2023-06-15") for p in order]) as stack:
            assert "repeated" in stack.notes[0]
            names = ["B02", "B03", "B05", "B8A", "B12"]
            whole = np.concatenate([fine, coarse.repeat(2, 1).repeat(2, 2)]).transpose(1, 2, 0)
            np.testing.assert_array_equal(values(stack, bands=names)[:, :, 0], whole)
            got = stack.read(slice(3, 8), slice(1, 4))
            order = [got.bands["sentinel2_l2a"].index(n) for n in names]
            np.testing.assert_array_equal(
                got.arrays["sentinel2_l2a"][:, :, 0, order], whole[3:8, 1:4]
            )
    again = write(tmp_path / "c.tif", coarse[:1], ["B02"], twenty)
    with pytest.raises(ValueError, match=r"both hold B02, with pixels of different sizes"):
        Stack([Raster(a, "2023-06-15"), Raster(again, "2023-06-15")])
    radar = write(tmp_path / "r.tif", -coarse[:2].astype(np.float32) / 900, ["vv", "vh"], twenty)
    with pytest.raises(ValueError, match="pixels are 2 x 2 times as large"):
        Stack([Raster(a, "2023-06-15"), Raster(radar, "2023-06-15")])


def test_scenes_of_one_date_are_put_together_in_order(tmp_path):
    x = np.arange(1, 65, dtype=np.uint16).reshape(1, 8, 8)
    left, right = x.copy(), x + 100
    left[:, :, 5:], right[:, :, :2] = 0, 0
    a, b = (
        write(tmp_path / f"{n}.tif", v, ["B02"], nodata=0) for n, v in (("a", left), ("b", right))
    )

    def got(*paths):
        with Stack([Raster(p, "2023-06-15T10:30:31Z") for p in paths]) as stack:
            note = "sentinel2_l2a of 2023-06-15: 2 rasters put together, the first valid value"
            assert stack.notes[0].startswith(note)
            return values(stack, bands=["B02"])[:, :, 0, 0]

    both = x[0].astype(np.float32)
    np.testing.assert_array_equal(got(a, b), np.where(np.arange(8) < 5, both, both + 100))
    np.testing.assert_array_equal(got(b, a), np.where(np.arange(8) < 2, both, both + 100))
    east = write(tmp_path / "c.tif", right, ["B02"], grid(8, 2), nodata=0)
    with Stack([Raster(a, "2023-06-15"), Raster(east, "2023-06-15")]) as stack:
        assert stack.shape == (10, 16) and np.isnan(values(stack, bands=["B02"])).sum() > 64
    far = write(tmp_path / "d.tif", right, ["B02"], grid(900, 0))
    with pytest.raises(ValueError, match="lie far apart"):
        Stack([Raster(a, "2023-06-15"), Raster(far, "2023-06-15")])


@pytest.mark.parametrize(
    ("names", "modality", "said"),
    [
        (["B2", "B3", "B4", "B8"], "", "they fit sentinel2_l2a and landsat"),
        (["B4", "B3", "B2"], "", "give --modality"),
        (["red", "green", "blue"], "", "give --modality"),
        ([f"B{k}" for k in range(1, 12)], "", "sentinel2_l2a and landsat"),
        (["B02", "SCL"], "", "take no band SCL"),
        (["B02", "elevation"], "", "sentinel2_l2a has no 'elevation'"),
        (["B02", "blue"], "sentinel2_l2a", "more than once"),
        (["B02", "B2"], "landsat", "unknown band 'B02'"),
        (["B02", ""], "", "has 2 bands, of which 1 are named"),
        (["B04"], "sentinel2", "take no sentinel2; did you mean 'sentinel2_l2a'"),
        (["vv", "vh", "angle"], "sentinel1", "take no band angle"),
    ],
)
def test_names_that_decide_nothing(tmp_path, names, modality, said):
    path = write(tmp_path / "a.tif", np.ones((len(names), 4, 4), np.uint16), names)
    with pytest.raises(ValueError, match=said):
        Stack([Raster(path, "2023-06-15", modality)])


def test_names_that_the_modality_settles(tmp_path):
    path = write(tmp_path / "a.tif", np.ones((3, 4, 4), np.uint16), ["B4", "red-edge 1", "NIR_2"])
    with Stack([Raster(path, "2023-06-15", "sentinel2_l2a")]) as stack:
        assert stack.read(slice(0, 4), slice(0, 4)).bands == {
            "sentinel2_l2a": ["B04", "B05", "B8A"]
        }
    with pytest.raises(ValueError, match="calls its bands B4, red-edge 1, NIR_2, not B05, B04"):
        Stack([Raster(path, "2023-06-15", "sentinel2_l2a", ["B05", "B04", "B8A"])])
    paths = [write(tmp_path / f"{k}.tif", np.ones((1, 4, 4), np.uint16)) for k in "xyz"]
    rasters = [Raster(p, modality="sentinel2_l2a") for p in paths]
    spread_bands(rasters, ["B02", "B03", "B04"])
    assert [r.bands for r in rasters] == [["B02"], ["B03"], ["B04"]]
    rasters = [Raster(p) for p in paths]
    spread_bands(rasters, ["srtm"])
    assert [r.bands for r in rasters] == [["srtm"]] * 3


def test_timesteps_in_one_file(tmp_path):
    x = np.random.default_rng(3).uniform(-25, -5, (2, 3, 2, 4, 4)).astype(np.float32)
    dates = ["20230615", "2023-05-02", "2023-07"]  # day order in the file is free
    days = ["2023-05-02", "2023-06-15", "2023-07-15"]
    flat = x[0].reshape(6, 4, 4)
    a = write(tmp_path / "a.tif", flat, ["vv", "vh"] * 3)
    by_band = x[0].transpose(1, 0, 2, 3).reshape(6, 4, 4)
    b = write(tmp_path / "b.tif", by_band, ["vv"] * 3 + ["vh"] * 3)
    c = write(tmp_path / "c.tif", flat)
    right = x[0][[1, 0, 2]].transpose(2, 3, 0, 1)
    for raster in (Raster(a), Raster(b), Raster(c, bands=["vv", "vh"])):
        with Stack([raster], dates=dates) as stack:
            assert stack.dates == days
            np.testing.assert_array_equal(values(stack, "sentinel1", ["vv", "vh"]), right)
    with Stack([Raster(c, ",".join(dates), bands=["vv", "vh"])]) as stack:
        assert stack.dates == days
    for wrong in (dates[:2], ["2023-06-15"]):
        with pytest.raises(ValueError, match="3 timesteps, but"):
            Stack([Raster(a)], dates=wrong)
    with pytest.raises(ValueError, match=r"a\.tif: '15\.06\.2023' is no date"):
        Stack([Raster(a)], dates=["15.06.2023", *dates[1:]])
    with pytest.raises(ValueError, match="a date twice"):
        Stack([Raster(a)], dates=[*dates[:2], "2023-06-15"])
    # Two files of three timesteps: the same three, or six in a row.
    d = write(tmp_path / "d.tif", np.full((3, 4, 4), 500, np.uint16), ["B02"] * 3)
    with Stack([Raster(a), Raster(d)], dates=dates) as stack:
        assert stack.dates == days and stack.names == ("sentinel2_l2a", "sentinel1")
    more = ["2023-01", "2023-02", "2023-03"]
    with Stack([Raster(a), Raster(d)], dates=dates + more) as stack:
        assert len(stack.dates) == 6
    map_ = write(tmp_path / "m.tif", np.ones((2, 4, 4), np.int16))
    with pytest.raises(ValueError, match="has 2 bands, of which 1 are named"):
        Stack([Raster(map_, modality="srtm")])


def test_more_dates_than_the_models_take(tmp_path):
    x = np.arange(26, dtype=np.float32).repeat(16).reshape(26, 4, 4) - 30
    days = [f"2023-{m:02d}-{d}" for m in range(1, 13) for d in ("03", "14")][:13]
    path = write(tmp_path / "a.tif", x, ["vv", "vh"] * 13)
    with pytest.raises(ValueError, match=r"have 13 dates, but .* 12: .*--over=select .*2023-01-03"):
        Stack([Raster(path)], dates=days)
    with Stack([Raster(path)], dates=days, over="select") as stack:
        assert stack.dates == [d for d in days if d.endswith("14")] + ["2023-07-03"]
        assert stack.notes == ["7 of 13 dates kept, the nearest to mid-month each"]
        got = values(stack, "sentinel1", ["vv", "vh"])
        kept = [k for k, d in enumerate(days) if d in stack.dates]
        np.testing.assert_array_equal(got[0, 0], x[:, 0, 0].reshape(13, 2)[kept])
    other = write(tmp_path / "b.tif", np.ones((1, 4, 4), np.uint16), ["B02"])
    late = Raster(other, "2023-03-20")
    with pytest.raises(ValueError, match="no date of sentinel2_l2a is among the 7"):
        Stack([Raster(path, days), late], over="select")
    late.date = "2023-03-14"
    with Stack([Raster(path, days), late], over="select") as stack:
        assert len(stack.dates) == 7
    months = [f"{y}-{m:02d}" for y in (2022, 2023) for m in range(1, 13)][:13]
    with pytest.raises(ValueError, match="of 13 months"):
        Stack([Raster(path)], dates=months, over="select")


def test_bands_of_several_types(tmp_path):
    write(tmp_path / "a.tif", np.ones((1, 4, 4), np.uint16))
    write(tmp_path / "b.tif", np.full((1, 4, 4), 2.5, np.float32))
    bands = "".join(
        f"""<VRTRasterBand dataType="{kind}" band="{k}"><Description>B0{k + 1}</Description>
        <SimpleSource><SourceFilename relativeToVRT="1">{name}</SourceFilename>
        <SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"""
        for k, (kind, name) in enumerate((("UInt16", "a.tif"), ("Float32", "b.tif")), 1)
    )
    (tmp_path / "m.vrt").write_text(
        f"""<VRTDataset rasterXSize="4" rasterYSize="4"><SRS>EPSG:32633</SRS>
        <GeoTransform>300000,10,0,5800000,0,-10</GeoTransform>{bands}</VRTDataset>"""
    )
    with Stack([Raster(str(tmp_path / "m.vrt"), "2023-06-15")]) as stack:
        assert values(stack, bands=["B02", "B03"])[0, 0, 0].tolist() == [1, 2.5]


def test_tags_and_members_bring_values_to_the_unit_of_the_model(tmp_path):
    raw = np.array([[[1000, 3000]]], np.uint16).repeat(4, 1).repeat(2, 2)

    def got(x, name, tags=None, **member):
        modality = {"B02": "sentinel2_l2a", "vv": "sentinel1"}.get(name, "landsat")
        path = write(tmp_path / "a.tif", x, [name], tags=tags)
        with Stack([Raster(path, "2023-06-15", modality, **member)]) as stack:
            return values(stack, modality, [name])[0, ::2, 0, 0].tolist()

    assert got(raw, "B02") == [1000, 3000]
    assert got(raw, "B02", (1e-4, 0)) == [1000, 3000]
    assert got(raw, "B02", (1e-4, -0.1)) == [0, 2000]
    assert got(raw, "B02", (1, -1000)) == [0, 2000]
    assert got(raw, "B02", offset=-1000) == [0, 2000]
    assert got(raw, "B02", (1e-4, -0.1), offset=-500) == [500, 2500]  # replaces, never adds
    assert got(raw, "B02", (0.01, 0), scale=2) == [2000, 6000]
    assert got(-raw.astype(np.int16), "vv", (0.01, 1)) == [-9, -29]
    assert got(raw, "B4", (2.75e-5, -0.2), scale=1) == [1000, 3000]
    for name, tags in (
        ("B02", (0.01, 0)), ("B02", (2, 0)), ("B4", (2.75e-5, -0.2)), ("B02", (0, 0)),
        ("B02", (-1e-4, 0)), ("vv", (0, 0)), ("vv", (np.nan, 0)), ("B02", (1e-4, np.inf)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="scale and offset in a manifest"):
            got(raw, name, tags)
    path = write(tmp_path / "n.tif", raw, ["B02"], nodata=1000)
    for nodata, first in ((None, np.nan), (3000.0, 1000)):
        with Stack([Raster(path, "2023-06-15", nodata=nodata)]) as stack:
            np.testing.assert_equal(values(stack, bands=["B02"])[0, 0, 0, 0], np.float32(first))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crs": "EPSG:32634"}, "different grids.*EPSG:32634 against EPSG:32633"),
        ({"transform": grid(0.5, 0)}, "different grids.*from 300005"),
        ({"transform": grid(0, 0, 1.5, 1.5)}, "different grids.*pixels of 15 x 15"),
        ({"transform": Affine(10, 1, 300_000, 1, -10, 5_800_000)}, "is rotated"),
        ({"crs": None}, "no coordinate reference system"),
        ({"transform": Affine.identity()}, "nothing of its place"),
    ],
)
def test_other_grids_are_refused(tmp_path, change, said):
    x = np.ones((2, 6, 6), np.uint16)
    a = write(tmp_path / "a.tif", x, ["B02", "B03"])
    with pytest.warns() if change.get("transform") == Affine.identity() else _quiet():
        b = write(tmp_path / "b.tif", x, ["B04", "B08"], **change)
    with pytest.raises(ValueError, match=said):
        Stack([Raster(a, "2023-06-15"), Raster(b, "2023-06-15")])


def _quiet():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize(
    ("crs", "transform", "said"),
    [
        ("EPSG:32633", grid(0, 0, 1, 2), "have 10 m x 20 m, but"),
        ("EPSG:32633", grid(0, 0, 1, 0.5), "have 10 m x 5 m, but"),
        ("EPSG:32633", grid(0, 0, 1.06, 1.06), "have 10.6 m, but"),
        ("EPSG:32633", Affine(1e-300, 0, 3e5, 0, -1e-300, 5e6), "have 0 m on the ground, but"),
        ("EPSG:3857", Affine(10, 0, 1e6, 0, -10, 8_399_738), "have 5.01 m on the ground, but"),
        ("EPSG:4326", Affine(1e-3, 0, 9, 0, -1e-3, 50), "on the ground, but"),
        ("EPSG:32633", grid(0, 0, 1.04, 0.97), ""),
        ("EPSG:3857", Affine(10, 0, 1e6, 0, -10, 1_000_000), ""),
    ],
)
def test_pixels_of_another_size_on_the_ground(tmp_path, crs, transform, said):
    path = write(tmp_path / "a.tif", np.ones((2, 6, 6), np.uint16), ["B02", "B03"], transform, crs)
    raster = Raster(path, "2023-06-15")
    Stack([raster], any_pixel_size=True).close()
    if not said:
        return Stack([raster]).close()
    with pytest.raises(ValueError, match=said):
        Stack([raster])


def test_manifests(tmp_path):
    def read(text, name="m.csv"):
        (tmp_path / name).write_bytes(text.encode())
        return read_manifest(tmp_path / name)

    want = [Raster(str(tmp_path / "a.tif"), "2023-06-15", "", ["B2", "B3"], -1000.0)]
    assert read("path,date,bands,offset\na.tif,2023-06-15,B2 B3,-1000\n") == want
    assert read("\ufeffpath;date;bands;offset\r\na.tif;2023-06-15;B2 B3;-1000\r\n\r\n") == want
    assert read("Path,DATE,Bands,offset\na.tif,2023-06-15,B2 B3,-1000\n") == want
    row = '{"path": "a.tif", "date": "2023-06-15", "bands": ["B2", "B3"], "offset": -1000}'
    assert read(f"[{row}]", "m.json") == want
    assert read("path\n/vsicurl/x.tif\n")[0].path == "/vsicurl/x.tif"
    for text, said in (
        ("path,day\na.tif,3\n", "unknown member 'day'"),
        ("path,date\na.tif,2023-06-15\nb.t", "1 fields in line 3, but 2 columns: is it cut off"),
        ("path,scale\na.tif,much\n", "scale must be a number"),
        ("path,scale\na.tif,0\n", "leaves nothing"),
        ("path,date,path\na.tif,2023-06,b.tif\n", "two columns 'path'"),
        ("path,nodata\na.tif,none\n", "nodata must be a number"),
        ("path;scale\na.tif;0,5\n", "scale must be a number, got '0,5'"),
        ("path,resample\na.tif,nearest\n", "gdalwarp -r near"),
        ("path,resample\na.tif,cubic\n", "unknown resample"),
        ("date\n2023\n", "each with a 'path'"),
    ):
        with pytest.raises(ValueError, match=said):
            read(text)
    for text in ('"sep=;"\r\npath;bands\r\na.tif;B2,B3\r\n', 'path,bands\na.tif,"B2; B3"\n'):
        assert read(text) == [Raster(str(tmp_path / "a.tif"), bands=["B2", "B3"])]
    assert read("path,nodata\na.tif,-inf\n")[0].nodata == -np.inf
    with pytest.raises(ValueError, match="scale must be a number"):
        read('[{"path": "a.tif", "scale": 1%s}]' % ("0" * 400), "m.json")
    twice = '[{"path": "a.tif", "date": "2023-06-15", "date": "2023-07-15"}]'
    with pytest.raises(ValueError, match="'date' is given twice"):
        read(twice, "m.json")
    (tmp_path / "w.csv").write_bytes("path,date\nä.tif,2023\n".encode("latin-1"))
    with pytest.raises(ValueError, match="save it as UTF-8"):
        read_manifest(tmp_path / "w.csv")
    path = write(tmp_path / "a.tif", np.ones((1, 4, 4), np.uint16), ["B02"])
    rasters = [Raster(path, f"{y}-06-15", period=str(y)) for y in (2023, 2024)]
    with pytest.raises(ValueError, match="one map shows one period"):
        Stack(rasters)


@pytest.mark.parametrize("date", ["0023-06-15", "2223-06-15"])
def test_years_without_images_are_refused(tmp_path, date):
    path = write(tmp_path / "a.tif", np.ones((1, 4, 4), np.uint16), ["B02"])
    with pytest.raises(ValueError, match=f"no image is of {date}: years are 1970..2100"):
        Stack([Raster(path, date)])


def test_folders_with_a_name_pattern(tmp_path):
    for name in ("sentinel2_l2a_20230615_T33UUU.tif", "SENTINEL1_2023-06-15_b_c.tif", "notes.txt",
                 ".hidden", "other_20230615_x.tif"):  # fmt: skip
        (tmp_path / name).write_bytes(b"")
    found, others = read_folder(tmp_path, "{modality}_{date}_{tile}.tif")
    assert [(r.modality, r.date) for r in found] == [
        ("sentinel1", "2023-06-15"), ("sentinel2_l2a", "20230615")]  # fmt: skip
    assert others == ["notes.txt", "other_20230615_x.tif"]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "20230615_B02.tif").write_bytes(b"")
    found, _ = read_folder(tmp_path, "{tile}/{date}_{band}.tif")
    assert [(r.date, list(r.bands)) for r in found] == [("20230615", ["B02"])]
    for pattern, said in (("{a}.jp2", "none of the 4 files"), ("a.tif", "must hold fields"),
                          ("{date", "must hold fields"), ("{}_{date}", "has no name")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            read_folder(tmp_path, pattern)
    assert raster_list.name_pattern("{a}_{a}.tif").fullmatch("x_y.tif") is None


def test_some_descriptions_that_contradict_the_names_are_enough(tmp_path):
    path = write(tmp_path / "a.tif", np.ones((3, 4, 4), np.uint16), ["mine", "B04", "B03"])
    with pytest.raises(ValueError, match="calls its bands mine, B04, B03, not B02, B03, B04"):
        Stack([Raster(path, "2023-06-15", "sentinel2_l2a", ["B02", "B03", "B04"])])
    for names in (["mine", "B03", ""], ["Band 1", "Band 2", "Band 3"]):
        path = write(tmp_path / "b.tif", np.ones((3, 4, 4), np.uint16), names)
        Stack([Raster(path, "2023-06-15", "sentinel2_l2a", ["B02", "B03", "B04"])]).close()
    counted = [f"B{k}" for k in range(1, 13)]  # of a program that counts; no sensor has these
    path = write(tmp_path / "c.tif", np.ones((12, 4, 4), np.uint16), counted)
    Stack([Raster(path, "2023-06-15", "sentinel2_l2a", S2)]).close()


def test_empty_columns_at_the_end_of_a_table_do_not_count(tmp_path):
    """Spreadsheets leave them."""
    for text in ("path,date,,\na.tif,2023-06-15,,\n,,,\n", "path,date\na.tif,2023-06-15,,\n",
                 "path;date;\na.tif;2023-06-15;\n"):  # fmt: skip
        (tmp_path / "m.csv").write_text(text)
        (raster,) = read_manifest(tmp_path / "m.csv")
        assert (raster.path, raster.dates) == (str(tmp_path / "a.tif"), ["2023-06-15"])
    (tmp_path / "m.csv").write_text("path,date,\na.tif,2023-06-15,vv\n")
    with pytest.raises(ValueError, match="3 fields in line 2, but 2 columns"):
        read_manifest(tmp_path / "m.csv")
