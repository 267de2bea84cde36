"""Archives read on other grids, and stores of others de-quantised."""

import json
import shutil

import numpy as np
import pytest
import xarray

import olmoearth_jax
from tests.maps import stores
from tests.maps.test_archive import RULES, YEARS, _centre
from tests.maps.test_archive_tool import build, run
from tests.maps.test_store_form import on_arrays, spoilt

BOX = (11.998, 46.998, 12.002, 47.0)


@pytest.fixture(scope="module")
def two_zones(tmp_path_factory):
    return build(tmp_path_factory.mktemp("two"))[0]


def test_the_own_crs_moves_nothing(tmp_path):
    grids = {33: stores.grid(33, 300_000, 5_800_000)}
    stores.make(tmp_path / "embeddings.zarr", RULES["float32"], grids, YEARS)
    archive = olmoearth_jax.open_archive(tmp_path)
    a, b = (_centre(archive.zone(33), *p) for p in ((20, 30), (10, 40)))
    (want,) = archive.read((*a, *b), 2024, 4)
    (got,) = archive.read((*a, *b), 2024, 4, crs="EPSG:32633")
    assert got.crs == want.crs and got.transform == want.transform
    np.testing.assert_array_equal(got.values, want.values)
    assert (got.valid == want.valid).all() and got.valid.any()


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3035"])
def test_another_crs_is_one_map_of_the_tokens_that_hold_the_centres(two_zones, crs):
    (got,) = two_zones.read(BOX, 2024, crs=crs)
    t, (height, width) = got.transform, got.valid.shape
    assert t.a == -t.e == (10 if crs == "EPSG:3035" else pytest.approx(10 / 111_319.49))
    rows, cols = (v.ravel() for v in np.mgrid[:height:3, :width:3])
    from olmoearth_jax.data.crs import transform_points

    lonlat = np.stack(transform_points(
        crs, "EPSG:4326", (t.c + (cols + 0.5) * t.a).tolist(), (t.f + (rows + 0.5) * t.e).tolist(),
    ), 1)  # fmt: skip
    values, valid, places = two_zones.locate(lonlat, [2024])
    assert {32, 33} <= set(places[valid[:, 0], 0])
    assert (got.valid[rows, cols] == valid[:, 0]).all()
    np.testing.assert_array_equal(got.values[rows, cols], values[:, 0])


def test_a_box_around_the_earth_is_the_whole_archive(two_zones):
    world = (-180, -90, 180, 90)
    found = two_zones.read(world, 2024)
    assert [m.valid.shape for m in found] == [two_zones.zone(z).shape for z in (32, 33)]
    (one,) = two_zones.read(world, 2024, 4, crs="EPSG:4326")
    assert one.valid.sum() > 1000 and max(one.valid.shape) < 200


def test_a_crs_that_is_none(two_zones):
    with pytest.raises(ValueError, match="unknown coordinate reference system"):
        two_zones.read(BOX, 2024, crs="EPSG:1")


def held(method, scale=None, **arrays):
    """A store of another maker: two bands of two pixels, the second one nodata."""
    q = np.array([[[3, -128]], [[-2, -128]]], np.int8)[None]
    about = {"method": method} if scale is None else {"method": method, "scale": scale}
    attrs = {"geoemb:data_type": "int8", "geoemb:quantization": about}
    named = {k: (("time", "y", "x"), np.array([[v]], np.float32)) for k, v in arrays.items()}
    return xarray.Dataset({"embeddings": (("time", "band", "y", "x"), q), **named}, attrs=attrs)


@pytest.mark.parametrize("dataset, want", [
    (held("linear", {"type": "scalar", "scale": 2, "offset": 1}), [7, -3]),
    (held("linear", {"scale": 2}), [6, -4]),
    (held("per_pixel_scale", {"type": "array", "array_name": "s"}, s=[0.5, np.inf]), [1.5, -1]),
    (held("per_pixel_scale", scales=[0.5, np.nan]), [1.5, -1]),
    (held("per_pixel_scale", scales=[np.inf, 1]), [np.nan, np.nan]),
])  # fmt: skip
def test_values_of_others_are_restored(dataset, want):
    got = olmoearth_jax.dequantize(dataset).values[0]
    np.testing.assert_array_equal(got[:, 0, 0], np.float32(want))
    assert np.isnan(got[:, 0, 1]).all()


def floats_of_bytes():
    return held("x").assign_attrs({"geoemb:data_type": "float32", "geoemb:quantization": None})


@pytest.mark.parametrize("dataset, said", [
    (held("per_pixel_scale"), "holds no 'scales'"),
    (held("signed_power").drop_vars("embeddings"), "holds no 'embeddings'"),
    (held("linear"), "no scale and offset"), (held("linear", {"scale": 0}), "no scale and offset"),
    (held("linear", {"scale": 10**400}), "no scale and offset"),
    (held(["linear"]), "unknown form"), (floats_of_bytes(), "are int8, but their attributes say"),
])  # fmt: skip
def test_attributes_that_lie_are_refused(dataset, said):
    with pytest.raises(ValueError, match=said):
        olmoearth_jax.dequantize(dataset)


def test_an_axis_of_time_without_end(two_zones, tmp_path, capsys):
    def edit(attrs, members):
        on_arrays("shape", [10**12], "time")(attrs, members)
        for zone in ("utm32", "utm33"):
            members[zone]["attributes"].pop("olmoearth:periods")

    folder = spoilt(two_zones.path.rpartition("/")[0], tmp_path, edit)
    with pytest.raises(ValueError, match="damaged: its times are"):
        olmoearth_jax.open_archive(folder)
    shutil.rmtree(folder / "job")
    assert run("export", folder, "--bbox=12,47,12.1,47.1", f"--output={folder / 'a.tif'}") == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("name, change", [
    ("job.json", {"extends": 5}), ("job.json", {"extends": [{}]}), ("marker", {"valid": [1]}),
    ("marker", {"largest": "x"}), ("marker", {"valid": float("inf")}),
    ("marker", {"objects": {"/dev/null": [0, "x"]}}),
    ("marker", {"objects": {"zarr.json": ["1", 1]}}), ("claim", {"pid": 10**30}),
    ("failed", {"attempts": "x"}), ("plan", {"id": "utm99/2023/0_0"}),
    ("plan", {"id": f"utm32/2023/{'9' * 400}_0"}),
])  # fmt: skip
def test_a_job_folder_that_lies_ends_in_a_sentence(two_zones, tmp_path, capsys, name, change):
    folder = spoilt(two_zones.path.rpartition("/")[0], tmp_path, lambda *_: None)
    job, marker = folder / "job", next((folder / "job" / "done").rglob("*.json"))
    unit = json.loads(marker.read_text())["id"]
    path = {"job.json": job / "job.json", "marker": marker, "plan": job / "plan.jsonl"}.get(name)
    if path is None:
        from olmoearth_jax.data import durable, work_list

        marker.unlink()
        path = job / {"claim": "claims"}.get(name, name) / f"{unit}.json"
        digest = json.loads((job / "job.json").read_text())["job_digest"]
        durable.write_durably(path, json.dumps({"job_digest": digest, "host": work_list._HOST}))
    before = path.read_text().splitlines()[0] if name == "plan" else path.read_text()
    path.write_text(json.dumps({**json.loads(before), **change}) + "\n")
    codes = [run(verb, folder) for verb in ("status", "verify", "index")]
    assert codes[0] in (2, 3) and codes[1] in (0, 1, 2) and codes[2] in (0, 2), codes
    assert name != "marker" or codes[:2] == [3, 1]
    assert name not in ("plan", "job.json") or codes == [2, 2, 2]
