"""STAC items as images: which rasters they make, and what they do not say."""

import datetime
import json
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import rasterio
import shapely
from rasterio.warp import transform_bounds

from olmoearth_jax.data.rasters import Stack
from olmoearth_jax.maps import imagery, stac
from tests.inference.test_model import S2
from tests.maps import world

EARTH_SEARCH = {"B02": "blue", "B03": "green", "B04": "red", "B08": "nir", "B8A": "nir08",
                "B11": "swir16"}  # fmt: skip


def _asset(href, **more):
    return {"href": href, "type": "image/tiff; application=geotiff; profile=cloud-optimized"} | more


def _item(name, assets, date: str | None = "2024-05-10T10:20:30Z", baseline="02.14", **properties):
    held = {"datetime": date, "platform": "sentinel-2b", **properties}
    if baseline:
        held["s2:processing_baseline"] = baseline
    return {"type": "Feature", "stac_version": "1.0.0", "id": name, "properties": held,
            "collection": "sentinel-2-l2a", "geometry": None, "assets": assets}  # fmt: skip


def _write(path, held):
    path.write_text(json.dumps(held))
    return str(path)


def _collection(path, *items):
    return _write(path, {"type": "FeatureCollection", "features": list(items)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two items of single-band images, as catalogues of Sentinel-2 have them."""
    out = tmp_path_factory.mktemp("stac")
    x = world.images(world.classes()[:64, :64], 1) + np.uint16(1000)
    (out / "may").mkdir()
    for k, band in enumerate(S2):
        world.write_raster(out / "may" / f"{band}.tif", x[k : k + 1], None)
    return out


def _assets(folder, at="may"):
    out = {b: _asset(f"{at}/{b}.tif", **{"eo:bands": [{"name": b}]}) for b in S2}
    more = {
        "visual": _asset("may/B02.tif", **{"eo:bands": [{"name": b} for b in ("B04", "B03")]}),
        "SCL": _asset("may/B02.tif"), "thumb": {"href": "t.jpg", "roles": ["thumbnail"]},
        "B02-jp2": {"href": "x.jp2", "type": "image/jp2"},
    }  # fmt: skip
    return out | more


def _pixels(source, **options):
    rasters, notes = imagery.list_rasters(source, items=stac.Options(**options))
    with Stack(rasters) as held:
        window = held.read(slice(0, 8), slice(0, 8))
        return window, held.dates, rasters, notes


def test_an_item_collection_is_a_raster_per_band(folder):
    path = _collection(folder / "items.json", _item("a", _assets(folder)))
    window, dates, rasters, notes = _pixels(path)
    assert dates == ["2024-05-10"] and len(rasters) == 12
    assert set(window.bands["sentinel2_l2a"]) == set(S2)
    assert notes == ["12 rasters of 1 STAC items",
                     "assets that are not used: B02-jp2 1, SCL 1, thumb 1, visual 1"]  # fmt: skip
    raw = window.arrays["sentinel2_l2a"]
    shifted, *_ = _pixels(
        _collection(folder / "new.json", _item("a", _assets(folder), baseline="05.09"))
    )
    np.testing.assert_array_equal(shifted.arrays["sentinel2_l2a"], raw - 1000)
    item = _item("a", _assets(folder), baseline="05.09")
    item["properties"]["earthsearch:boa_offset_applied"] = True
    same, *_ = _pixels(_collection(folder / "e.json", item))
    np.testing.assert_array_equal(same.arrays["sentinel2_l2a"], raw)


def test_an_unknown_baseline_is_refused_and_a_flag_settles_it(folder):
    for text in ("nan", "inf"):
        odd = _collection(folder / "odd.json", _item("a", _assets(folder), baseline=text))
        with pytest.raises(ValueError, match="does not say the processing baseline"):
            imagery.list_rasters(odd)
    path = _collection(folder / "none.json", _item("a", _assets(folder), baseline=""))
    with pytest.raises(ValueError, match=r"STAC item a .*--s2_offset=-1000 .*--s2_offset=0"):
        imagery.list_rasters(path)
    raw, shifted = (_pixels(path, s2_offset=v)[0].arrays["sentinel2_l2a"] for v in (0, -1000))
    np.testing.assert_array_equal(shifted, raw - 1000)


def test_the_flag_of_the_offset_holds_against_tags_of_files(tmp_path):
    x = world.images(world.classes()[:64, :64], 1)[:1] + np.uint16(1000)
    for name, tags in (("plain", None), ("tagged", (1e-4, -0.1))):
        world.write_raster(tmp_path / f"{name}.tif", x, None)
        if tags:
            with rasterio.open(tmp_path / f"{name}.tif", "r+") as file:
                file.scales, file.offsets = tags[:1], tags[1:]
    for name in ("plain", "tagged"):
        for baseline in ("", "02.14", "05.09"):
            item = _item("a", {"B02": _asset(f"{name}.tif")}, baseline=baseline)
            path = _collection(tmp_path / "i.json", item)
            for offset in (0, -1000):
                got, *_ = _pixels(path, s2_offset=offset)
                want = x[0, :8, :8].astype(np.float32) + offset
                np.testing.assert_array_equal(got.arrays["sentinel2_l2a"][..., 0, 0], want)
    for offset in (1000, -100, -1):
        with pytest.raises(ValueError, match=f"--s2_offset is -1000 .* or 0 .*, not {offset}"):
            stac.Options(s2_offset=offset)


def test_common_names_and_flags_name_assets(folder):
    assets = {v: _asset(f"may/{k}.tif") for k, v in EARTH_SEARCH.items()}
    assets["scene"] = _asset("may/B12.tif")
    path = _collection(folder / "e.json", _item("a", assets))
    rasters, notes = imagery.list_rasters(path)
    assert [r.bands for r in rasters] == [[b] for b in EARTH_SEARCH]
    assert "scene 1" in notes[1]
    rasters, _ = imagery.list_rasters(
        path, items=stac.Options(["scene:sentinel2_l2a/B12", "red:ignore"])
    )
    assert [r.bands[0] for r in rasters] == ["B02", "B03", "B08", "B8A", "B11", "B12"]
    for flags, said in (
        (["red"], "not of the form NAME:MODALITY/BAND"), (["red:sentinel2/B04"], "sentinel2_l2a"),
        (["red:sentinel2_l2a/B99"], "has no band 'B99'"), (["rot:ignore"], "no item .* has 'rot'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            imagery.list_rasters(path, items=stac.Options(flags))
    rows = "path,date\nmay/B02.tif,2024-05\n"
    (folder / "m.csv").write_text(rows)
    with pytest.raises(ValueError, match="--assets and --s2_offset are for STAC items"):
        imagery.list_rasters(str(folder / "m.csv"), items=stac.Options(["red:ignore"]))


def test_one_file_of_several_bands_and_other_sensors(folder):
    """STAC 1.1 has 'bands'; an asset of several is one raster."""
    assets = {"data": _asset("all.tif", bands=[{"name": b, "nodata": 0} for b in ("B02", "B8A")])}
    radar = {"vv": _asset("vv.tif"), "vh": _asset("vh.tif")}
    s1 = _item("s", radar, baseline="", platform="sentinel-1a") | {"collection": "sentinel-1-rtc"}
    rasters, _ = imagery.list_rasters(_collection(folder / "two.json", _item("a", assets), s1))
    assert [(r.modality, list(r.bands), r.nodata) for r in rasters] == [
        ("sentinel2_l2a", ["B02", "B8A"], 0.0), ("sentinel1", ["vv"], None),
        ("sentinel1", ["vh"], None),
    ]  # fmt: skip
    level1 = _item("a", assets) | {"collection": "sentinel-2-l1c"}
    with pytest.raises(ValueError, match="is Sentinel-2 L1C"):
        imagery.list_rasters(_collection(folder / "l1c.json", level1))
    unknown = _item("u", {"B02": _asset("x.tif")}, platform="mine") | {"collection": "fields"}
    assert imagery.list_rasters(_collection(folder / "u.json", unknown))[0][0].bands == ["B02"]
    unknown["assets"] = {"red": _asset("x.tif")}
    with pytest.raises(ValueError, match=r"asset 'red' of the STAC item u may be .*--assets=red:"):
        imagery.list_rasters(_collection(folder / "u.json", unknown))


def test_links_folders_and_geoparquet_lead_to_the_same_items(folder):
    """However items are handed over, relative paths start where they lie."""
    for date in ("2024-05-10", "2024-07-12"):
        (folder / "cat" / date).mkdir(parents=True, exist_ok=True)
        held = _item(date, _assets(folder, "../../may"), f"{date}T10:00:00Z")
        held["assets"].pop("visual")
        _write(folder / "cat" / date / "item.json", held)
    links = [{"rel": "self", "href": "x"}] + [
        {"rel": "item", "href": f"./{date}/item.json"} for date in ("2024-05-10", "2024-07-12")
    ]
    _write(folder / "cat" / "collection.json", {"type": "Collection", "links": links})
    child = {"rel": "child", "href": "cat/collection.json"}
    top = _write(folder / "catalog.json", {"type": "Catalog", "links": [child]})
    flat = folder / "flat"
    flat.mkdir(exist_ok=True)
    items = []
    for date in ("2024-05-10", "2024-07-12"):
        items.append(_item(date, _assets(folder, "../may"), f"{date}T10:00:00Z"))
        _write(flat / f"{date}.json", items[-1])
    table = pyarrow.Table.from_pylist([
        {"id": i["id"], "assets": i["assets"], "collection": i["collection"],
         "datetime": datetime.datetime.fromisoformat(i["properties"]["datetime"]),
         "geometry": b"", "platform": "sentinel-2a",
         "s2:processing_baseline": i["properties"]["s2:processing_baseline"]}
        for i in items
    ])  # fmt: skip
    pyarrow.parquet.write_table(table, flat / "items.parquet")
    first, *_ = _pixels(top)
    for source in (str(flat), str(flat / "items.parquet"), f"file://{top}",
                   f"file://{flat}/items.parquet"):  # fmt: skip
        window, dates, rasters, _ = _pixels(source)
        assert dates == ["2024-05-10", "2024-07-12"] and len(rasters) == 24
        # Bands come in the order of assets, which old versions of pyarrow sort.
        order = [window.bands["sentinel2_l2a"].index(b) for b in first.bands["sentinel2_l2a"]]
        found = window.arrays["sentinel2_l2a"][..., order]
        np.testing.assert_array_equal(found, first.arrays["sentinel2_l2a"])
    # A collection beside the items that it links to adds nothing.
    links = [{"rel": "item", "href": f"./{date}.json"} for date in ("2024-05-10", "2024-07-12")]
    _write(flat / "collection.json", {"type": "Collection", "links": links})
    assert len(imagery.list_rasters(str(flat))[0]) == 24
    _write(folder / "round.json", {"type": "Catalog", "links": [
        {"rel": "child", "href": "round.json"}]})  # fmt: skip
    with pytest.raises(ValueError, match="round in circles"):
        imagery.list_rasters(str(folder / "round.json"))


@pytest.fixture
def server(folder):
    """The folder on a web server of this machine; a process, since GDAL holds Python's lock."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield f"http://127.0.0.1:{line.split('port ')[1].split()[0]}"
        process.kill()


def test_rasters_of_a_web_server(folder, server):
    path = _collection(folder / "web.json", _item("a", _assets(folder, f"{server}/may")))
    window, *_ = _pixels(path)
    local, *_ = _pixels(_collection(folder / "items.json", _item("a", _assets(folder))))
    np.testing.assert_array_equal(window.arrays["sentinel2_l2a"], local.arrays["sentinel2_l2a"])


def test_what_is_no_stac(folder, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="x.json is no STAC item"):
        imagery.list_rasters(str(tmp_path))
    bare = {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": None}]}
    with pytest.raises(ValueError, match="feature 1 is no STAC item"):
        imagery.list_rasters(_write(tmp_path / "y.json", bare))
    none = _collection(tmp_path / "z.json", _item("a", {"meta": {"href": "m.xml"}}))
    with pytest.raises(ValueError, match=r"none of the assets \(meta\) of the 1 items"):
        imagery.list_rasters(none)
    late = _item("a", _assets(folder), date=None)
    with pytest.raises(ValueError, match="the STAC item a has no datetime"):
        imagery.list_rasters(_collection(tmp_path / "d.json", late))
    with pytest.raises(ValueError, match="there is no file"):
        imagery.list_rasters(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="cannot be read"):
        imagery.list_rasters(f"file://{tmp_path}/none.csv")


@pytest.mark.parametrize(
    ("collection", "properties", "said"),
    [
        ("landsat-c2-l2", {"platform": "landsat-8"}, "Landsat level 2; .* level 1"),
        ("scenes", {"platform": "landsat-9", "landsat:correction": "L2SP"}, "Landsat level 2"),
        ("scenes", {"platform": "LANDSAT_8", "processing:level": "L2"}, "Landsat level 2"),
        ("landsat-c2-l1", {"platform": "landsat-7"}, "of Landsat 7; .* Landsat 8 and 9"),
        ("landsat-c2-l1", {"platform": "landsat-5"}, "of Landsat 5"),
        ("hls2-s30", {"platform": "sentinel-2a"}, "of HLS"),
        ("HLSL30_2.0", {"platform": "landsat-8"}, "of HLS"),
        ("scenes", {"platform": "sentinel-2b", "s2:product_type": "S2MSI1C"}, "Sentinel-2 L1C"),
        ("scenes", {"platform": "sentinel-2b", "processing:level": "L1C"}, "Sentinel-2 L1C"),
    ],
)
def test_other_products_of_a_sensor_are_refused_unless_named(
    tmp_path, collection, properties, said
):
    item = _item("a", {"red": _asset("x.tif")}, **properties) | {"collection": collection}
    path = _collection(tmp_path / "i.json", item)
    with pytest.raises(ValueError, match=f"the STAC item a is {said}"):
        imagery.list_rasters(path)
    # Whoever says what an asset is, is believed.
    rasters, _ = imagery.list_rasters(path, items=stac.Options(["red:landsat/B4"]))
    assert rasters[0].modality == "landsat"


@pytest.mark.parametrize("number", [8, 9])
def test_landsat_of_level_1_is_taken(tmp_path, number):
    more = {"platform": f"landsat-{number}", "landsat:correction": "L1TP"}
    item = _item("a", {"nir08": _asset("x.tif")}, **more) | {"collection": "landsat-c2-l1"}
    (raster,), _ = imagery.list_rasters(_collection(tmp_path / "i.json", item))
    assert (raster.modality, list(raster.bands)) == ("landsat", ["B5"])


def test_what_holds_for_all_bands_may_stand_beside_them(tmp_path):
    one = _asset("x.tif", **{"eo:common_name": "red", "nodata": 0})
    two = _asset("y.tif", bands=[{"name": "B02"}, {"name": "B03", "nodata": 0}], nodata=0)
    path = _collection(tmp_path / "i.json", _item("a", {"img": one, "pair": two}))
    rasters, _ = imagery.list_rasters(path)
    assert [(list(r.bands), r.nodata) for r in rasters] == [(["B04"], 0.0), (["B02", "B03"], 0.0)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"assets": ["B02"]}, "item a is damaged: its 'assets'"),
        ({"properties": "2024"}, "item a is damaged: its 'properties'"),
        ({"assets": {"B02": "x.tif"}}, "item a is damaged: its asset 'B02'"),
        ({"assets": {"B02": _asset("x.tif", bands={"name": "B02"})}}, "'bands' of its asset 'B02'"),
        ({"assets": {"B02": _asset("x.tif", bands=["B02"])}}, "'bands' of its asset 'B02'"),
        ({"assets": {"B02": _asset("x.tif", roles=3)}}, "'roles' of its asset 'B02'"),
        (
            {"assets": {"B02": _asset("x.tif", **{"raster:bands": [{"nodata": "none"}]})}},
            "nodata of its asset 'B02' is no number",
        ),
    ],
)
def test_a_damaged_item_is_told_in_one_sentence(tmp_path, change, said):
    item = _item("a", {}) | change
    with pytest.raises(ValueError, match=said):
        imagery.list_rasters(_collection(tmp_path / "i.json", item))


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"type": "Catalog", "links": {"rel": "item"}}, "its 'links' is no list"),
        ({"type": "FeatureCollection", "features": {}, "links": 3}, "its 'links' is no list"),
        ({"type": "FeatureCollection", "features": 3}, "its 'features' is no list"),
        ({"type": "Catalog", "links": [{"rel": "item"}]}, "links has no href"),
        ({"type": "Catalog", "links": ["item.json"]}, "none of the assets of the 0 items"),
    ],
)
def test_a_damaged_collection_is_told_in_one_sentence(tmp_path, held, said):
    with pytest.raises(ValueError, match=said):
        imagery.list_rasters(_write(tmp_path / "c.json", held))


def test_an_archive_of_stac_items(folder, tmp_path):
    """Items of one tile as `launch.embed` takes them: planned like the same rasters in a list."""
    from tests.maps.test_embed import run

    given = ["--model=OlmoEarth-v1_2-Nano", "--years=2024", "--plan_only",
             f"--output={tmp_path / 'out'}"]  # fmt: skip
    path = _collection(folder / "items.json", _item("a", _assets(folder)))
    assert run(*given, f"--inputs={path}") == 0
    assert not (tmp_path / "out").exists()


def test_an_area_beside_the_rasters_is_refused(tmp_path, capsys):
    """In the same shard, too: else an archive without any value would be complete."""
    from tests.maps.test_embed import run

    x = world.images(world.classes()[:64, :64], 1)[:1]
    world.write_raster(tmp_path / "B02.tif", x, None)
    (tmp_path / "m.csv").write_text("path,date,modality,bands\nB02.tif,2024-05,sentinel2_l2a,B02\n")
    with rasterio.open(tmp_path / "B02.tif") as file:
        west, south, east, north = transform_bounds(file.crs, "EPSG:4326", *file.bounds)
    given = ["--model=OlmoEarth-v1_2-Nano", "--years=2024", "--plan_only", "--patch_size=8",
             f"--inputs={tmp_path / 'm.csv'}", f"--output={tmp_path / 'out'}"]  # fmt: skip
    high = north - south
    for below, code in ((0.5 * high, 0), (3 * high, 2)):
        box = shapely.box(west, south - below, east, north - below)
        (tmp_path / "area.geojson").write_text(shapely.to_geojson(box))
        assert run(*given, f"--area={tmp_path / 'area.geojson'}") == code
    said = capsys.readouterr().err
    assert "no raster of the period 2024 touches the area of" in said
