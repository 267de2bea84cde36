"""Reading archives: points, boxes, zones, periods, widths; what must be refused."""

import concurrent.futures
import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.transform

import olmoearth_jax
from olmoearth_jax.data.crs import transform_points
from olmoearth_jax.inference import quantize
from olmoearth_jax.maps import conventions, plan
from olmoearth_jax.maps.lattice import LONLAT
from tests.maps import stores

RULES = {
    "signed_power": quantize.rule_of("int8", "signed_power", None),
    "per_pixel_scale": quantize.rule_of("int8", "per_pixel_scale", None),
    "linear": quantize.rule_of("int8", "linear", None, 0.04),
    "float16": quantize.rule_of("float16", None, "none"),
    "float32": quantize.rule_of("float32", None, "none"),
}
TOLERANCE = {"signed_power": 0.008, "per_pixel_scale": 0.02, "linear": 0.03, "float16": 2e-3}
YEARS = plan.periods_of(["2023", "2024"])


@pytest.fixture(params=RULES)
def written(request, tmp_path):
    grids = {33: stores.grid(33, 300_000, 5_800_000)}
    held = stores.make(tmp_path / "embeddings.zarr", RULES[request.param], grids, YEARS)
    return request.param, olmoearth_jax.open_archive(tmp_path), held, grids[33]


def _centre(zone, row, col):
    a, _, c, _, e, f = zone.transform
    lon, lat = transform_points(zone.crs, LONLAT, [c + (col + 0.5) * a], [f + (row + 0.5) * e])
    return [float(lon[0]), float(lat[0])]


def test_points_boxes_and_datasets_give_what_was_written(written):
    name, archive, held, grid = written
    assert archive.zones == [33] and archive.periods == [2023, 2024]
    assert archive.dimensions == 8 and archive.widths == (8, 4)
    zone, tolerance = archive.zone(33), TOLERANCE.get(name, 0)
    dataset = archive.dataset(33)
    restored = olmoearth_jax.dequantize(dataset)
    assert restored.dtype == np.float32 and restored.dims == ("time", "band", "y", "x")
    for t, period in enumerate(YEARS):
        shard = f"utm33/{period.name}/{grid.top + 1}_{grid.left + 2}"
        want, valid = held[shard]
        rows, cols = slice(16, 32), slice(32, 48)
        got, seen = archive.window(zone, t, rows, cols)
        assert (seen == valid).all() and np.isnan(got[~valid]).all()
        clipped = np.abs(want) > 5 if name == "linear" else np.zeros(want.shape, bool)
        assert np.abs(got - want)[valid & ~clipped.any(-1)].max() <= tolerance
        lazy = np.moveaxis(restored[t].values, 0, -1)[16:32, 32:48]
        assert np.array_equal(lazy, got, equal_nan=True)
        places = [(16, 32), (31, 47), (20, 40)]
        values, ok = archive.points([_centre(zone, *p) for p in places], [period.name], width=4)
        for k, (row, col) in enumerate(places):
            assert ok[k, 0] == valid[row - 16, col - 32]
            assert np.array_equal(values[k, 0], got[row - 16, col - 32, :4], equal_nan=True)
    corners = [_centre(zone, 20, 30), _centre(zone, 10, 40)]
    (part,) = archive.read([*corners[0], *corners[1]], 2024, width=4)
    assert part.crs == "EPSG:32633" and part.values.shape[-1] == 4
    row = round((part.transform.f - zone.transform[5]) / -10)
    col = round((part.transform.c - zone.transform[2]) / 10)
    h, w = part.valid.shape
    assert (row <= 10 and row + h > 20) and (col <= 30 and col + w > 40)
    whole, _ = archive.window(zone, 1, slice(row, row + h), slice(col, col + w), 4)
    assert np.array_equal(part.values, whole, equal_nan=True)


def test_a_point_outside_is_invalid_and_never_the_nearest(written):
    _, archive, _, _ = written
    zone = archive.zone(33)
    lonlat = [_centre(zone, -1, 0), _centre(zone, 0, 48), _centre(zone, 32, 1), [100.0, 10.0]]
    values, valid, places = archive.locate(lonlat)
    assert not valid.any() and np.isnan(values).all() and (places == -1).all()
    assert archive.points(np.zeros((0, 2)))[0].shape == (0, 2, 8)
    assert archive.points(lonlat, np.int64(2024))[1].shape == (4, 1)


def test_a_point_near_a_boundary_is_looked_up_in_the_neighbour(tmp_path):
    # 12.0 E is the boundary of zones 32 and 33; the archive has zone 32 only, beyond its edge.
    (x,), (y,) = transform_points(LONLAT, "EPSG:32632", [12.001], [47.0])
    grids = {32: stores.grid(32, x, y, 1, 1)}
    stores.make(tmp_path / "embeddings.zarr", RULES["float32"], grids, YEARS[:1])
    archive = olmoearth_jax.open_archive(tmp_path / "embeddings.zarr")
    _, valid, places = archive.locate([[12.001, 47.0], [11.4, 47.0], [13.0, 47.0]])
    assert places[0, 0] == 32 and (places[1:] == -1).all() and not valid[1:].any()


def test_what_is_not_processed_is_invalid_and_not_zero(tmp_path):
    grid = stores.grid(32, 500_000, -5_000)
    gone = f"utm32/2023/{grid.top}_{grid.left}"
    stores.make(tmp_path / "embeddings.zarr", RULES["signed_power"], {32: grid}, YEARS,
                left_out=(gone,))  # fmt: skip
    archive = olmoearth_jax.open_archive(tmp_path)
    zone = archive.zone(32)
    _, _, coverage = archive.stored(zone, 0, slice(0, 16), slice(0, 16))
    values, valid = archive.window(zone, 0, slice(0, 16), slice(0, 16))
    assert (coverage == 255).all() and not valid.any() and np.isnan(values).all()
    assert archive.window(zone, 1, slice(0, 16), slice(0, 16))[1].any()


@pytest.mark.parametrize("rule", ["signed_power", "per_pixel_scale", "float32"])
def test_of_what_is_empty_only_coverage_is_read(tmp_path, rule):
    """Arrays that span a zone have hundreds of thousands of empty shards."""
    grid = stores.grid(32, 500_000, -5_000)
    gone = f"utm32/2023/{grid.top}_{grid.left}"
    stores.make(tmp_path / "embeddings.zarr", RULES[rule], {32: grid}, YEARS, left_out=(gone,))
    archive = olmoearth_jax.open_archive(tmp_path)
    zone, part = archive.zone(32), slice(2, 9)
    bare = dataclasses.replace(zone, embeddings=None, scales=zone.scales and 1)
    values, valid = archive.window(bare, 0, part, part, 4)
    assert values.shape == (7, 7, 4) and np.isnan(values).all() and not valid.any()
    q, scales, _ = archive.stored(bare, 0, part, part)
    full = quantize.restore(q, archive.rule, scales)
    assert q.shape == (7, 7, 8) and str(q.dtype) == RULES[rule].dtype and np.isnan(full).all()
    (a, b), (c, d) = (_centre(zone, row, col) for row, col in ((8, 2), (2, 8)))
    (found,) = archive.read((a, b, c, d), 2023)
    found.values[:] = 0  # a caller's own


def test_periods_of_months(tmp_path):
    spans = plan.periods_of(spans=["2023-04/2024-03", "2024-04/2025-03"])
    grids = {32: stores.grid(32, 500_000, 5e6, 1, 1)}
    stores.make(tmp_path / "embeddings.zarr", RULES["float32"], grids, spans)
    archive = olmoearth_jax.open_archive(tmp_path)
    assert archive.periods == ["2023-04_2024-03", "2024-04_2025-03"]
    assert archive.step_of("2024-04/2025-03") == 1
    times = archive.dataset(32)["time"].values
    assert [str(t)[:10] for t in times] == ["2023-04-01", "2024-04-01"]


@pytest.mark.parametrize("call, said", [
    (lambda a: a.read([15, 52, 15.1, 52.1], 2025), "2023, 2024"),
    (lambda a: a.read([15, 52, 15.1, 52.1]), "name one of the periods"),
    (lambda a: a.read([-15, 52, -14, 53], 2023), "outside of the archive, which reaches over"),
    (lambda a: a.read([15, 52, 14, 53], 2023), "west, south, east, north"),
    (lambda a: a.read([15, 52, 16], 2023), "a box is west, south, east, north in degrees, not"),
    (lambda a: a.read([-200, 0, 200, 1], 2023), "a box is west, south, east, north in degrees"),
    (lambda a: a.read([12, 47, 13, float("inf")], 2023), "a box is west, south, east, north"),
    (lambda a: a.points([[15, 52]], width=9), "8 dimensions, not 9"),
    (lambda a: a.points([[15, 52]], width=0), "8 dimensions, not 0"),
    (lambda a: a.points([15, 52]), "longitude and latitude"),
    (lambda a: a.dataset(31), r"there are \[33\]"),
])  # fmt: skip
def test_what_is_not_there_is_told(tmp_path, call, said):
    grids = {33: stores.grid(33, 300_000, 5_800_000, 1, 1)}
    stores.make(tmp_path / "embeddings.zarr", RULES["float32"], grids, YEARS)
    with pytest.raises(ValueError, match=said):
        call(olmoearth_jax.open_archive(tmp_path))


def test_what_is_no_archive_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no archive"):
        olmoearth_jax.open_archive(tmp_path)
    import zarr

    zarr.open_group(tmp_path / "embeddings.zarr", mode="w", zarr_format=3)
    with pytest.raises(ValueError, match="no geoemb attributes"):
        olmoearth_jax.open_archive(tmp_path)
    (tmp_path / "embeddings.zarr" / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as an archive"):
        olmoearth_jax.open_archive(tmp_path)


def test_a_newer_store_is_refused_with_its_version(tmp_path):
    grids = {33: stores.grid(33, 300_000, 5_800_000, 1, 1)}
    stores.make(tmp_path / "embeddings.zarr", RULES["float32"], grids, YEARS[:1])
    path = tmp_path / "embeddings.zarr" / "zarr.json"
    text = json.loads(path.read_text())
    text["attributes"]["olmoearth:store_version"] = 2
    path.write_text(json.dumps(text))
    with pytest.raises(ValueError, match="store version 2"):
        olmoearth_jax.open_archive(tmp_path)


def test_a_store_is_made_once_and_whole(tmp_path):
    path = tmp_path / "embeddings.zarr"
    grids = {33: stores.grid(33, 300_000, 5_800_000, 1, 1)}
    stores.make(path, RULES["float32"], grids, YEARS[:1])
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    stores.make(path, RULES["float32"], grids, YEARS[:1])
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert [p.name for p in tmp_path.iterdir()] == ["embeddings.zarr"]


def test_importing_the_package_stays_light():
    heavy = ["ray", "zarr", "xarray", "rasterio", "matplotlib", "jax", "shapely", "pandas"]
    code = (
        "import sys, olmoearth_jax; "
        f"print([n for n in {heavy} if n in sys.modules]); "
        "assert 'open_archive' in olmoearth_jax.__all__"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).resolve().parents[2])  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_the_text_of_a_crs_does_not_depend_on_what_was_read_before(tmp_path):
    shape = types.SimpleNamespace(crs="EPSG:32633", transform=[10.0, 0.0, 3e5, 0.0, -10.0, 5.8e6])
    grid: Any = shape
    before = conventions.crs_attributes(grid)
    path, form = tmp_path / "tile.tif", {"count": 1, "height": 4, "width": 4, "dtype": "uint8"}
    place = rasterio.transform.Affine(10, 0, 3e5, 0, -10, 5.8e6)
    with rasterio.open(path, "w", "GTiff", crs="EPSG:32633", transform=place, **form):
        pass

    def after_reading() -> dict[str, str]:
        with rasterio.open(path) as file:  # GDAL keeps, per thread, the shorter text of the file
            assert file.crs.to_epsg() == 32633
        return conventions.crs_attributes(grid)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        assert thread.submit(after_reading).result() == before
    assert "ENSEMBLE" in before["crs_wkt"]
