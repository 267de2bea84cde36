"""Areas, periods, shards and their order."""

import json
import warnings

import numpy as np
import pytest
import shapely

from olmoearth_jax.maps import area, lattice, plan
from olmoearth_jax.maps.lattice import Lattice

SQUARE = [[9.0, 47.0], [9.1, 47.0], [9.1, 47.1], [9.0, 47.1], [9.0, 47.0]]


def _file(tmp_path, *geometries, **members):
    path = tmp_path / "area.geojson"
    features = [{"type": "Feature", "properties": {}, "geometry": g} for g in geometries]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **members}))
    return path


def _polygon(ring):
    return {"type": "Polygon", "coordinates": [ring]}


@pytest.mark.parametrize("bad, said", [
    (None, "feature 2 is empty"),
    ({"type": "Polygon", "coordinates": []}, "feature 2 is empty"),
    ({"type": "Point", "coordinates": [1, 2]}, "feature 2 is a Point"),
    (_polygon([[0, 0], [1, 1], [1, 0], [0, 1], [0, 0]]), "feature 2 is no valid polygon"),
    (_polygon([[-175, 0], [175, 0], [175, 1], [-175, 1], [-175, 0]]), "feature 2 is wider"),
    (_polygon([[5e5, 5e6], [6e5, 5e6], [6e5, 6e6], [5e5, 5e6]]), "feature 2 reaches from"),
    (_polygon([[179, 0], [181, 0], [181, 1], [179, 0]]), "cut it at 180 degrees"),
    ({"type": "Polygon"}, "feature 2"),
])  # fmt: skip
def test_unusable_areas_name_the_feature(tmp_path, bad, said):
    with pytest.raises(ValueError, match=said):
        area.read_area(_file(tmp_path, _polygon(SQUARE), bad))


def test_an_area_file_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="no area file"):
        area.read_area(tmp_path / "missing.geojson")
    path = tmp_path / "text.geojson"
    path.write_text("no json")
    with pytest.raises(ValueError, match="cannot be read as GeoJSON"):
        area.read_area(path)
    with pytest.raises(ValueError, match="holds no polygons"):
        area.read_area(_file(tmp_path))


def test_a_named_crs_is_honoured(tmp_path):
    want = area.read_area(_file(tmp_path, _polygon(SQUARE)))
    moved = area.project(want, lattice.LONLAT, "EPSG:32632")
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32632"}}
    got = area.read_area(_file(tmp_path, json.loads(shapely.to_geojson(moved)), crs=crs))
    assert np.allclose(got.bounds, want.bounds, atol=1e-7)


def test_geoparquet_as_geojson(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyarrow
        import pyarrow.parquet
    shape = shapely.Polygon(SQUARE)
    geo = {"primary_column": "geometry", "columns": {"geometry": {"encoding": "WKB"}}}
    table = pyarrow.table({"geometry": [shapely.to_wkb(shape)]})
    path = tmp_path / "area.parquet"
    pyarrow.parquet.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), path)
    assert area.read_area(path).equals(shape)
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match="GeoParquet"):
        area.read_area(path)


def test_the_antimeridian():
    parts = [shapely.box(179.9, 0, 180, 0.1), shapely.box(-180, 0, -179.9, 0.1)]
    zones = area.by_zone(area.area_of(parts))
    assert sorted(zones) == [1, 60]
    assert np.isclose(zones[1].area, zones[60].area, rtol=1e-6)


def test_southern_northings_are_negative():
    zones = area.by_zone(area.area_of([shapely.box(9, -34.1, 9.1, -34)]))
    assert zones[32].bounds[3] < 0
    row, _ = Lattice(10, 256).shard_at(zones[32].bounds[0], zones[32].bounds[3])
    assert row > 0


def test_the_plan_is_in_order_and_ids_round_trip():
    zones = area.by_zone(area.area_of([shapely.box(11.95, 47.3, 12.05, 47.38)]))
    shards = plan.make(zones, Lattice(10, 256), plan.periods_of(["2024", "2023"]))
    keys = [(s.zone, s.period, s.row, s.col) for s in shards]
    assert keys == sorted(keys) and {s.zone for s in shards} == {32, 33}
    assert [plan.shard_of(s.id) for s in shards] == shards
    with pytest.raises(ValueError, match="no id"):
        plan.shard_of("utm3/2024/1_1")


def test_shards_that_no_raster_touches_are_left_out():
    zones = area.by_zone(area.area_of([shapely.box(9, 47.0, 9.1, 47.1)]))
    grid, periods = Lattice(10, 256), plan.periods_of(["2024"])
    every = plan.make(zones, grid, periods)
    half = plan.make(zones, grid, periods, lambda zone, period, box: box[0] >= 500_000)
    assert 0 < len(half) < len(every)


def test_periods():
    years = plan.periods_of(["2024", "2023"])
    assert [p.name for p in years] == ["2023", "2024"] and years[0].is_year
    spans = plan.periods_of(spans=["2023-04/2024-03"])
    assert spans[0].days == ["2023-04-01", "2024-03-31"] and not spans[0].is_year
    for given, said in (
        ({}, "one of them"), ({"years": ["2023"], "spans": ["2023-01/2023-12"]}, "one of them"),
        ({"years": ["23"]}, "no year"), ({"years": ["2023", "2023"]}, "overlap"),
        ({"spans": ["2023-04"]}, "form"), ({"spans": ["2023-13/2024-01"]}, "form"),
        ({"spans": ["2024-04/2023-03"]}, "ends before"),
        ({"spans": ["2023-01/2023-06", "2023-06/2023-12"]}, "overlap"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            plan.periods_of(**given)


def test_the_whole_zone_holds_every_region():
    grid = Lattice(40, 128)
    whole = plan.grids_of([plan.Shard(32, "2024", 0, 0)], grid, "zone")[32]
    for south, north in ((83.9, 84), (-80, -79.9), (-0.1, 0.1)):
        zones = area.by_zone(area.area_of([shapely.box(6, south, 12, north)]))
        for row, col in plan.touched(zones[32], grid):
            assert whole.top <= row < whole.top + whole.rows
            assert whole.left <= col < whole.left + whole.cols


def test_sides():
    assert plan.side_of(128, 1) == 2048
    assert plan.side_of(768, 1) == 512
    assert plan.side_of(768, 4) == 256
    plan.check_sides(256, 64, 16)
    with pytest.raises(ValueError, match="--shard_side=256"):
        plan.check_sides(250, 64, 16)
    with pytest.raises(ValueError, match="core of 24"):
        plan.check_sides(256, 64, 24)


def test_a_crs_that_has_not_the_place_names_the_feature(tmp_path):
    ring = [[0, 0], [1, 0], [1, 1], [0, 0]]
    local = 'LOCAL_CS["mine",UNIT["metre",1]]'
    held = {"type": "Polygon", "coordinates": [ring],
            "crs": {"type": "name", "properties": {"name": local}}}  # fmt: skip
    (tmp_path / "a.geojson").write_text(json.dumps(held))
    with pytest.raises(ValueError, match="feature 1: the coordinate system 'mine' is a local one"):
        area.read_area(tmp_path / "a.geojson")


@pytest.mark.parametrize("record", [5, {"encoding": "WKB", "crs": {"id": 5}}])
def test_geoparquet_whose_metadata_are_none(tmp_path, record):
    import pyarrow
    import pyarrow.parquet

    about = {"primary_column": "geometry", "columns": {"geometry": record}}
    table = pyarrow.table({"geometry": [shapely.to_wkb(shapely.box(0, 0, 1, 1))]})
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"geo": json.dumps(about)}), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match="cannot be read"):
        area.read_area(tmp_path / "a.parquet")
