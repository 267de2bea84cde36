"""Label files of all kinds, good and bad."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import shapely
from pyogrio import raw

from olmoearth_jax.data.crs import same_crs
from olmoearth_jax.maps import label_files
from olmoearth_jax.maps.lattice import LONLAT

SQUARE = shapely.box(13.0, 52.0, 13.01, 52.01)


def _geojson(path, rows, **more):
    features = [
        {"type": "Feature", "properties": row,
         "geometry": None if shape is None else json.loads(shapely.to_geojson(shape))}
        for shape, row in rows
    ]  # fmt: skip
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **more}))
    return path


def _crs(name):
    return {"type": "name", "properties": {"name": name}}


def test_geojson_with_what_is_no_label(tmp_path):
    line = shapely.LineString([(0, 0), (1, 1)])
    path = _geojson(tmp_path / "a.geojson", [
        (SQUARE, {"crop": "wheat", "id": "f1", "split": "train"}),
        (shapely.Point(13.2, 52.2), {"crop": " maize ", "id": "f2", "split": "test"}),
        (SQUARE, {"crop": None, "id": "f3"}),
        (line, {"crop": "wheat", "id": "f4"}),
        (None, {"crop": "wheat", "id": "f5"}),
        (shapely.Polygon(), {"crop": "wheat", "id": "f6"}),
        (shapely.GeometryCollection([line, shapely.GeometryCollection([SQUARE])]),
         {"crop": "rye", "id": "f7"}),
    ])  # fmt: skip
    got = label_files.read(path, "crop")
    assert got.values == ["wheat", "maize", "rye"] and not got.points_only
    assert got.columns == {"id": ["f1", "f2", "f7"], "split": ["train", "test", ""]}
    assert got.dropped == {"null label": 1, "line": 1, "empty geometry": 2}
    assert got.crs == LONLAT and not got.notes


def test_a_crs_of_geojson_is_honoured_and_told(tmp_path):
    rows = [(SQUARE, {"c": 1})]
    assert not label_files.read(
        _geojson(tmp_path / "a.json", rows, crs=_crs("urn:ogc:def:crs:OGC:1.3:CRS84")), "c"
    ).notes
    got = label_files.read(_geojson(tmp_path / "b.json", rows, crs=_crs("EPSG:32633")), "c")
    assert same_crs(got.crs, "EPSG:32633") and "EPSG:32633" in got.notes[0]
    got = label_files.read(_geojson(tmp_path / "b.json", rows, crs="EPSG:32633"), "c")
    assert same_crs(got.crs, "EPSG:32633") and "EPSG:32633" in got.notes[0]
    with pytest.raises(ValueError, match="unknown CRS 'EPSG:9'"):
        label_files.read(_geojson(tmp_path / "c.json", rows, crs=_crs("EPSG:9")), "c")


@pytest.mark.parametrize("name", [
    "http://127.0.0.1:9/x", "HTTPS://127.0.0.1:9/x", "/vsicurl/http://127.0.0.1:9/x", "/etc/passwd",
    "./a.prj", "DICT:a.wkt,1", "file:///etc/passwd",
])  # fmt: skip
def test_a_crs_is_not_looked_up_elsewhere(tmp_path, monkeypatch, name):
    """GDAL would ask the server, or read the file."""
    rows = [(SQUARE, {"c": 1})]
    with pytest.raises(ValueError, match="names the unknown CRS"):
        label_files.read(_geojson(tmp_path / "a.json", rows, crs=_crs(name)), "c")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EPSG:1").write_text("x")
    for text in (name, "EPSG:1"):
        with pytest.raises(ValueError, match="files and URLs are not looked up"):
            same_crs(text, LONLAT)
    authority, _, code = name.partition(":")
    column = {"encoding": "WKB", "crs": {"id": {"authority": authority, "code": code}}}
    about = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    table = pyarrow.table({"c": [1], "geometry": [shapely.to_wkb(SQUARE)]})
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(table.replace_schema_metadata({"geo": json.dumps(about)}), path)
    with pytest.raises(ValueError, match="files and URLs are not looked up"):
        label_files.read(path, "c")


@pytest.mark.parametrize("name", [
    "http://www.opengis.net/def/crs/EPSG/0/32633", "epsg:32633",
    "urn:ogc:def:crs:EPSG::32633", "+proj=utm +zone=33 +datum=WGS84",
])  # fmt: skip
def test_names_of_a_crs(name):
    assert same_crs(name, "EPSG:32633")


def test_places_that_no_number_holds_are_outside():
    from rasterio.transform import Affine

    from olmoearth_jax.maps import labels

    place = [shapely.Point(1e300, -1e300), shapely.Point(15, -15)]
    features = label_files.Features(place, "EPSG:32633", [1, 1], {"id": ["0", "1"]})
    got = labels.burn_cells(features, [1, 1], "EPSG:32633", Affine(10, 0, 0, 0, -10, 0), (4, 4))
    assert got.report["outside"] == 1 and got.cells.tolist() == [5]


def test_csv(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("lon,lat,kind,height\n13.1,52.1,1,2.5\n13.2,52.2,2,\n13.3,52.3,1,4\n")
    got = label_files.read(path, "kind")
    assert got.values == [1, 2, 1] and got.points_only and got.columns["id"] == ["0", "1", "2"]
    values = label_files.read(path, "height", numeric=True)
    assert values.values == [2.5, 4.0] and values.dropped == {"null label": 1}
    path.write_text("x,y,kind\n1,2,3\n")
    with pytest.raises(ValueError, match="columns lon and lat; it has: x, y, kind"):
        label_files.read(path, "kind")
    path.write_text("lon,lat,kind\n500000,5600000,3\n")
    with pytest.raises(ValueError, match="row 1 .*degrees: '500000'"):
        label_files.read(path, "kind")


def test_geoparquet(tmp_path):
    path = tmp_path / "p.parquet"
    table = pyarrow.table({
        "crop": ["a", "b"], "year": [2023, 2024],
        "geometry": [shapely.to_wkb(SQUARE), shapely.to_wkb(shapely.Point(13, 52))],
    })  # fmt: skip

    def write(column):
        about = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
        told = {"geo": json.dumps(about)}
        pyarrow.parquet.write_table(table.replace_schema_metadata(told), path)
        return label_files.read(path, "crop")

    got = write({"encoding": "WKB"})
    assert got.values == ["a", "b"] and got.columns["year"] == ["2023", "2024"]
    assert got.crs == LONLAT
    got = write({"encoding": "WKB", "crs": {"id": {"authority": "EPSG", "code": 32633}}})
    assert same_crs(got.crs, "EPSG:32633")
    with pytest.raises(ValueError, match="CRS is not known"):
        write({"encoding": "WKB", "crs": None})
    with pytest.raises(ValueError, match="point, not as WKB"):
        write({"encoding": "point"})
    plain = pyarrow.table({"lon": [13.0], "lat": [52.0], "v": [1.5]})
    pyarrow.parquet.write_table(plain, path)
    assert label_files.read(path, "v", numeric=True).values == [1.5]


def test_geopackage(tmp_path):
    path = tmp_path / "p.gpkg"
    raw.write(
        path, np.array([shapely.to_wkb(SQUARE)], object), [np.array(["rye"], object)], ["crop"],
        geometry_type="Polygon", crs="EPSG:4326",
    )  # fmt: skip
    got = label_files.read(path, "crop")
    assert got.values == ["rye"] and got.shapes[0].equals(SQUARE)


def test_gaps_of_a_geopackage(tmp_path):
    """Columns of dates and of numbers hold what is none in their own way."""
    path, shapes = tmp_path / "p.gpkg", np.array([shapely.to_wkb(SQUARE)] * 2, object)
    days = np.array(["2023-06-01", "NaT"], "M8[D]")
    raw.write(
        path, shapes, [days, np.array([np.nan, 2], np.float32)], ["date", "crop"],
        geometry_type="Polygon", crs="EPSG:4326",
    )  # fmt: skip
    got = label_files.read(path, "crop")
    assert got.values == [2] and got.columns["date"] == [""] and got.dropped == {"null label": 1}


@pytest.mark.parametrize(
    ("values", "numeric", "match"),
    [
        (["a", 1], False, "integer, text; classes must be"),
        ([1.5, 2.0], False, "--value_column"),
        ([True, False], False, "true or false"),
        (["a", "b"], True, "'a', no number"),
        ([1.0, -1e300], True, "-1e.300, no number"),
        ([None, None], False, "null label: 2"),
    ],
)
def test_columns_that_are_no_labels(tmp_path, values, numeric, match):
    path = _geojson(tmp_path / "a.geojson", [(SQUARE, {"c": v}) for v in values])
    with pytest.raises(ValueError, match=match):
        label_files.read(path, "c", numeric)


def test_files_that_are_no_labels(tmp_path):
    path = _geojson(tmp_path / "a.geojson", [(SQUARE, {"crop": "a", "name": "x"})])
    with pytest.raises(ValueError, match="no column 'corp'; it has: crop, name"):
        label_files.read(path, "corp")
    with pytest.raises(ValueError, match="holds no features"):
        label_files.read(_geojson(tmp_path / "b.geojson", []), "crop")
    for text in ("", "[1, 2]", '{"type": "Polygon"}', '{"type": "FeatureCollection"}'):
        (tmp_path / "c.geojson").write_text(text)
        with pytest.raises(ValueError, match="cannot be read as GeoJSON"):
            label_files.read(tmp_path / "c.geojson", "crop")
    with pytest.raises(ValueError, match="there is no label file"):
        label_files.read(tmp_path / "none.csv", "crop")
    (tmp_path / "d.shp").write_text("x")
    with pytest.raises(ValueError, match="not .shp"):
        label_files.read(tmp_path / "d.shp", "crop")
    (tmp_path / "e.parquet").write_text("x")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        label_files.read(tmp_path / "e.parquet", "crop")


def test_weights_are_numbers_from_0_on_and_1_where_nothing_is_said(tmp_path):
    rows = [(SQUARE, {"c": "a", "weight": 2}), (SQUARE, {"c": "b", "weight": "0.5"})]
    path = _geojson(tmp_path / "a.geojson", [*rows, (SQUARE, {"c": "c", "weight": None})])
    assert label_files.read(path, "c").weights == [2.0, 0.5, 1.0]
    plain = _geojson(tmp_path / "b.geojson", [(SQUARE, {"c": "a"})])
    assert label_files.read(plain, "c").weights is None
    assert label_files.read(path, "weight", numeric=True).weights is None
    for wrong in (-1, "much", True, float("inf"), 1e308):
        path = _geojson(tmp_path / "c.geojson", [*rows, (SQUARE, {"c": "a", "weight": wrong})])
        with pytest.raises(ValueError, match="weights are numbers from 0 on"):
            label_files.read(path, "c")
    path = _geojson(tmp_path / "d.geojson", [(SQUARE, {"c": "a", "weight": 0})])
    with pytest.raises(ValueError, match="all weights in .* are 0"):
        label_files.read(path, "c")


@pytest.mark.parametrize("texts, values", [
    (["1.0", "2.0", "10.0"], [1, 2, 10]), (["1", " ", "10."], [1, 10]),
    (["a", "  ", "b"], ["a", "b"]), (["+3", "4"], [3, 4]), (["--5", "4"], ["--5", "4"]),
    (["²", "1"], ["²", "1"]),
    (["1.5", "2"], ["1.5", "2"]),
])  # fmt: skip
def test_classes_of_a_table_keep_their_numbers(tmp_path, texts, values):
    """Tools write integers of a column with gaps as 1.0; a blank is no class."""
    path = tmp_path / "a.csv"
    path.write_text("lon,lat,kind\n" + "".join(f"15.0,50.5,{text}\n" for text in texts))
    got = label_files.read(path, "kind")
    assert got.values == values and sum(got.dropped.values()) == len(texts) - len(values)


def test_places_beyond_the_earth(tmp_path):
    rows = [(shapely.Point(500_000, 5_600_000), {"c": 1})]
    with pytest.raises(ValueError, match="feature 1 of .* no longitudes and latitudes: name its"):
        label_files.read(_geojson(tmp_path / "a.geojson", rows), "c")
    label_files.read(_geojson(tmp_path / "b.geojson", rows, crs=_crs("EPSG:32633")), "c")
    text = (tmp_path / "a.geojson").read_text().replace("500000.0", "NaN")
    held = json.loads(text)
    good = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]},
            "properties": {"c": 1}}  # fmt: skip
    held["features"].append(good)
    (tmp_path / "c.geojson").write_text(json.dumps(held))
    got = label_files.read(tmp_path / "c.geojson", "c")
    assert got.values == [1] and got.dropped == {"empty geometry": 1}


def test_cells_of_a_table_with_line_ends(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('lon,lat,kind\r\n1,2,"a\nb"\r\n1,2,"c\u2028d\x0b"\r\n', newline="")
    assert label_files.read(path, "kind").values == ["a\nb", "c\u2028d"]


def test_columns_of_one_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("lon,lat,kind,kind,,\n1,2,a,b,,\n")
    with pytest.raises(ValueError, match="has several columns named 'kind'"):
        label_files.read(path, "kind")
    path, texts = tmp_path / "a.parquet", pyarrow.array(["a"])
    names = ["lon", "lat", "kind", "kind"]
    ones = pyarrow.array([1.0])
    pyarrow.parquet.write_table(pyarrow.table([ones, ones, texts, texts], names), path)
    with pytest.raises(ValueError, match="has several columns named 'kind'"):
        label_files.read(path, "kind")
