"""tools.archive: what it says and writes of an archive."""

import json
import shutil

import numpy as np
import pytest
import rasterio
from absl.testing import flagsaver

import olmoearth_jax
from olmoearth_jax.data import work_list
from olmoearth_jax.data.crs import transform_points
from olmoearth_jax.inference import quantize
from olmoearth_jax.maps import archive, archive_zone, plan, preview
from tests.maps import stores
from tools import archive as tool

pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")
YEARS = plan.periods_of(["2023", "2024"])
RULES = {
    "signed_power": quantize.rule_of("int8", "signed_power", None),
    "per_pixel_scale": quantize.rule_of("int8", "per_pixel_scale", None),
    "linear": quantize.rule_of("int8", "linear", None, 0.05, 0.1),
    "float32": quantize.rule_of("float32", None, "none"),
}


def run(*given) -> int:
    """The exit code of the program in this process."""
    saved = flagsaver.save_flag_values(tool.FLAGS)
    try:
        return tool.main(tool.FLAGS(["archive", *map(str, given)]))
    finally:
        flagsaver.restore_flag_values(saved, tool.FLAGS)


def build(folder, rule="signed_power", left_out=0):
    """An archive of two zones beside each other, with the job folder that workers leave."""
    xs, ys = zip(*((float(x[0]), float(y[0])) for x, y in (
        transform_points("EPSG:4326", crs, [12.0], [47.0]) for crs in ("EPSG:32632", "EPSG:32633")
    )), strict=True)  # fmt: skip
    grids = {32: stores.grid(32, xs[0] - 400, ys[0]), 33: stores.grid(33, xs[1], ys[1])}
    every = [f"utm{z}/{p.name}/{g.top + r}_{g.left + c}" for z, g in grids.items() for p in YEARS
             for r in range(g.rows) for c in range(g.cols)]  # fmt: skip
    gone = tuple(every[:left_out])
    held = stores.make(folder / "embeddings.zarr", RULES[rule], grids, YEARS, left_out=gone)
    digest = work_list.open_job(folder / "job" / "job.json", {"a": 1}, ["a"])
    lines = "".join(json.dumps({"id": unit}) + "\n" for unit in every)
    (folder / "job" / "plan.jsonl").write_text(lines)
    work = work_list.WorkList(folder / "job", folder / "embeddings.zarr", digest, every)
    for unit in held:
        zone, period, place = unit.split("/")
        r, c = (int(v) for v in place.split("_"))
        g, t = grids[int(zone[3:])], [p.name for p in YEARS].index(period)
        end = f"{r - g.top}/{c - g.left}"
        work.finish(unit, {"valid": 1}, [f"{zone}/embeddings/c/{t}/0/{end}",
                                         f"{zone}/coverage/c/{t}/{end}"])  # fmt: skip
    return olmoearth_jax.open_archive(folder), held, every


def centre(zone, row, col):
    a, _, c, _, e, f = zone.transform
    lon, lat = transform_points(zone.crs, "EPSG:4326", [c + (col + 0.5) * a], [f + (row + 0.5) * e])
    return [float(lon[0]), float(lat[0])]


def test_status_and_verify(tmp_path, capsys):
    _, held, every = build(tmp_path, left_out=2)
    assert run("status", tmp_path) == 3
    told = capsys.readouterr().out
    assert f"{len(every) - 2} of {len(every)} shards done" in told and "2 planned" in told
    assert run("verify", tmp_path) == 0
    path = next((tmp_path / "embeddings.zarr").glob("utm33/embeddings/c/1/0/0/*"))
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    assert run("verify", tmp_path) == 1
    assert "is not what was written" in capsys.readouterr().out
    path.unlink()
    assert run("verify", tmp_path) == 1
    assert "is missing" in capsys.readouterr().out
    assert run("status", tmp_path) == 3


def test_a_complete_archive(tmp_path, capsys):
    build(tmp_path)
    assert run("status", tmp_path) == 0


@pytest.mark.parametrize("rule", RULES)
def test_export_lies_where_the_archive_says(tmp_path, rule):
    archive, _, _ = build(tmp_path / "a", rule)
    zone = archive.zone(33)
    (west, south), (east, north) = centre(zone, 25, 12), centre(zone, 5, 40)
    out = tmp_path / "small.tif"
    assert run("export", tmp_path / "a", f"--bbox={west},{south},{east},{north}", "--year=2024",
               "--width=4", f"--output={out}") == 0  # fmt: skip
    with rasterio.open(out) as file:
        assert file.count == 4 and file.crs.to_epsg() == 32633
        q, tags, t, valid = file.read(), file.tags(), file.transform, file.dataset_mask() > 0
        scales, offsets = file.scales, file.offsets
    row, col = round((t.f - zone.transform[5]) / -10), round((t.c - zone.transform[2]) / 10)
    assert (row, col) == (5, 12) or row <= 5
    want, seen = archive.window(zone, 1, slice(row, row + q.shape[1]),
                                slice(col, col + q.shape[2]), 4)  # fmt: skip
    assert (seen == valid).all()
    x = q.astype(np.float32)
    if rule == "signed_power":
        assert tags["QUANTIZATION"].startswith("x = sign(q)")
        x = np.sign(x) * (x / np.float32(127.5)) ** 2
    x = x * np.float32(scales[0]) + np.float32(offsets[0])
    np.testing.assert_allclose(np.moveaxis(x, 0, -1)[seen], want[seen], rtol=1e-5, atol=1e-6)


def test_a_box_over_a_boundary_makes_a_file_per_zone(tmp_path, capsys):
    build(tmp_path / "a")
    out = tmp_path / "all.tif"
    box = "11.99,46.99,12.005,47.01"
    flags = ["export", tmp_path / "a", f"--bbox={box}", "--year=2023", f"--output={out}"]
    assert run(*flags, "--dtype=float32") == 0
    for zone in (32, 33):
        with rasterio.open(tmp_path / f"all_utm{zone}.tif") as file:
            assert file.crs.to_epsg() == 32600 + zone and file.dtypes[0] == "float32"
            assert np.isfinite(file.read(1)).any()


def test_sample_is_what_points_give(tmp_path):
    import pyarrow.parquet

    archive, _, _ = build(tmp_path / "a")
    zone = archive.zone(33)
    places = [centre(zone, 3, 4), centre(zone, 20, 30), [50.0, 0.0]]
    features = [{"type": "Feature", "geometry": {"type": "Point", "coordinates": p},
                 "properties": {"id": k, "kind": "x"}} for k, p in enumerate(places)]  # fmt: skip
    (tmp_path / "p.geojson").write_text(json.dumps({"features": features}))
    (tmp_path / "p.csv").write_text("id,lon,lat\n" + "".join(
        f"{k},{x},{y}\n" for k, (x, y) in enumerate(places)))  # fmt: skip
    tables = []
    for end in ("geojson", "csv"):
        out = tmp_path / f"{end}.parquet"
        assert run("sample", tmp_path / "a", f"--points={tmp_path / f'p.{end}'}",
                   f"--output={out}") == 0  # fmt: skip
        tables.append(pyarrow.parquet.read_table(out))
    values, valid, _ = archive.locate(places)
    for table in tables:
        assert table["valid"].to_pylist() == valid.reshape(-1).tolist()
        assert table["period"].to_pylist() == ["2023", "2024"] * 3
        for row, x, ok in zip(table["embedding"].to_pylist(), values.reshape(6, -1),
                              valid.reshape(-1), strict=True):  # fmt: skip
            assert (row is not None) == ok
            if ok:
                assert np.array_equal(np.float32(row), x)
    assert tables[0]["id"].to_pylist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("rule", ["signed_power", "per_pixel_scale"])
def test_search_scores_the_query_1_and_keeps_places_apart(tmp_path, rule):
    archive, _, _ = build(tmp_path / "a", rule)
    zone = archive.zone(33)
    values, valid = archive.window(zone, 1, slice(0, 32), slice(0, 48))
    row, col = np.argwhere(valid)[100]
    lon, lat = centre(zone, row, col)
    assert run("search", tmp_path / "a", f"--point={lon},{lat}", "--year=2024", "--top=20",
               "--min_distance=50", f"--output={tmp_path / 's'}") == 0  # fmt: skip
    features = json.loads((tmp_path / "s.geojson").read_text())["features"]
    found = [f["properties"] for f in features]
    assert len(found) == 20
    assert (found[0]["zone"], found[0]["row"], found[0]["col"]) == (33, row, col)
    assert abs(found[0]["score"] - 1) < 1e-5
    assert np.allclose([found[0]["lon"], found[0]["lat"]], [lon, lat])
    scores = [p["score"] for p in found]
    assert scores == sorted(scores, reverse=True)
    for k, p in enumerate(found):
        for q in found[:k]:
            if p["zone"] == q["zone"]:
                assert np.hypot(p["row"] - q["row"], p["col"] - q["col"]) >= 5
    with rasterio.open(tmp_path / "s_utm33.tif") as file:
        x = file.read(1)
    assert np.array_equal(np.isfinite(x), valid)
    query = values[row, col] / np.linalg.norm(values[row, col])
    want = values[valid] @ query / np.linalg.norm(values[valid], axis=1)
    np.testing.assert_allclose(x[valid], want, atol=1e-5)
    assert [p["score"] for p in archive.search([lon, lat], 2024, top=5)][0] > 0.999
    with pytest.raises(ValueError, match="no embedding of 2024 at 1 2; leave them out"):
        archive.search([[lon, lat], [1, 2]], 2024)


def test_search_by_a_polygon(tmp_path):
    archive, _, _ = build(tmp_path / "a")
    zone = archive.zone(33)
    (w, n), (e, s) = centre(zone, 4, 6), centre(zone, 12, 15)
    ring = [[w, s], [e, s], [e, n], [w, n], [w, s]]
    (tmp_path / "f.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    assert run("search", tmp_path / "a", f"--area={tmp_path / 'f.geojson'}", "--year=2024",
               f"--output={tmp_path / 's'}") == 0  # fmt: skip
    best = json.loads((tmp_path / "s.geojson").read_text())["features"][0]["properties"]
    assert 0 < best["score"] < 1


@pytest.mark.parametrize("given, said", [
    (["statu", "DIR"], "status"), ([], "say what to do"), (["status"], "folder of one archive"),
    (["status", "nowhere"], "no archive that launch.embed made"),
    (["export", "nowhere", "--output=a.tif"], "is no archive"),
    (["export", "DIR"], "give --output"),
    (["export", "DIR", "--output=a.png"], "must end in .tif"),
    (["export", "DIR", "--output=a.tif"], "give --year, one of 2023, 2024"),
    (["export", "DIR", "--output=a.tif", "--year=2020"], "2023, 2024"),
    (["export", "DIR", "--output=a.tif", "--year=2023", "--bbox=1,2,3"], "4 numbers"),
    (["export", "DIR", "--output=a.tif", "--year=2023", "--bbox=1,2,3,4"], "reaches over"),
    (["export", "DIR", "--output=a.tif", "--year=2023", "--width=9"], "8 dimensions, not 9"),
    (["export", "DIR", "--output=a.tif", "--year=2023", "--complete"], "1 shards are missing"),
    (["sample", "DIR", "--output=a.parquet"], "give --points"),
    (["sample", "DIR", "--output=a.parquet", "--points=no.csv"], "no file no.csv"),
    (["change", "DIR", "--output=a.tif", "--years=2023"], "two different periods"),
    (["change", "DIR", "--output=a.tif", "--years=2023,2023"], "two different periods"),
    (["change", "DIR", "--output=a.tif", "--years=2023,2025"], "2023, 2024"),
    (["cluster", "DIR", "--output=a.tif", "--year=2023", "--k=1"], "2..255"),
    (["search", "DIR", "--output=a", "--year=2023"], "--point=LON,LAT or --area"),
    (["search", "DIR", "--output=a", "--year=2023", "--point=1"], "LON,LAT"),
    (["search", "DIR", "--output=a", "--year=2023", "--point=1,2"], "no embedding of 2023 at 1 2"),
])  # fmt: skip
def test_mistakes_are_told(tmp_path, capsys, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    build(tmp_path / "DIR", left_out=1)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert run(*given) == 2
    assert said in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_what_is_missing_is_counted(tmp_path, capsys):
    build(tmp_path / "a", left_out=3)
    assert run("export", tmp_path / "a", "--year=2023", "--width=5",
               f"--output={tmp_path / 'x.tif'}") == 0  # fmt: skip
    told = capsys.readouterr().err
    assert "3 shards are missing" in told and "widths 8, 4, not 5" in told


def test_preview_shows_the_components_where_the_embeddings_lie(tmp_path):
    import zarr

    archive, _, _ = build(tmp_path, left_out=1)
    assert run("preview", tmp_path) == 0
    held = json.loads((tmp_path / "preview.json").read_text())
    group = zarr.open_group(tmp_path / "preview.zarr", mode="r", zarr_format=3)
    attrs = dict(group["utm33"].attrs)
    assert attrs["multiscales"]["layout"][0]["spatial:transform"] == archive.zone(33).transform
    assert "spatial:transform" not in attrs and "spatial:shape" not in attrs
    for zone in map(archive.zone, archive.zones):
        rgb = group[f"utm{zone.number}/0"][1]
        x, valid = archive.window(zone, 1, slice(0, 32), slice(0, 48))
        assert ((rgb > 0).all(0) == valid).all() and ((rgb == 0).all(0) == ~valid).all()
        scores = (x[valid] - held["mean"]) @ np.array(held["components"]).T
        want = (scores - held["lo"]) / (np.array(held["hi"]) - held["lo"])
        assert np.abs(rgb[:, valid].T - 1 - 254 * want.clip(0, 1)).max() <= 0.51
        with rasterio.open(tmp_path / "preview" / f"utm{zone.number}_2024.tif") as file:
            assert np.array_equal(file.read([1, 2, 3]), rgb)
            assert np.array_equal(file.read(4) > 0, valid)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "tif" not in p.name}
    assert run("preview", tmp_path) == 0
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "tif" not in p.name}
    assert before == after


def test_overviews_are_means_of_the_valid_pixels(tmp_path, monkeypatch):
    import zarr

    from olmoearth_jax.maps import preview

    monkeypatch.setattr(preview, "SMALLEST", 4)
    build(tmp_path)
    assert run("preview", tmp_path) == 0
    group = zarr.open_group(tmp_path / "preview.zarr", mode="r", zarr_format=3)["utm32"]
    assert sorted(group.array_keys()) == ["0", "1", "2"]
    for level in (1, 2):
        above, got = (np.moveaxis(group[str(k)][0], 0, -1) for k in (level - 1, level))
        assert np.array_equal(preview.halve(above), got)


def test_a_preview_of_another_job_is_refused(tmp_path, capsys):
    build(tmp_path)
    (tmp_path / "preview.json").write_text('{"job_digest": "other"}')
    assert run("preview", tmp_path) == 2
    assert "of another job" in capsys.readouterr().err


def test_clusters_are_numbered_by_size_and_the_same_again(tmp_path):
    archive, _, _ = build(tmp_path / "a")
    maps = []
    for name in ("one.tif", "two.tif"):
        assert run("cluster", tmp_path / "a", "--year=2024", "--k=5", "--seed=3",
                   f"--output={tmp_path / name}") == 0  # fmt: skip
        found = []
        for zone in (32, 33):
            with rasterio.open(tmp_path / name.replace(".tif", f"_utm{zone}.tif")) as file:
                assert file.nodata == 255 and file.colormap(1)[0] != file.colormap(1)[1]
                found.append(file.read(1))
        maps.append(np.stack(found))
    assert np.array_equal(*maps)
    valid = np.stack([
        archive.window(archive.zone(z), 1, slice(0, 32), slice(0, 48))[1] for z in (32, 33)
    ])  # fmt: skip
    assert ((maps[0] == 255) == ~valid).all()
    sizes = np.bincount(maps[0][valid], minlength=5)
    assert len(sizes) == 5 and (np.diff(sizes) <= 0).all()


def test_k_means_finds_groups_and_refuses_too_few():
    from olmoearth_jax.maps import compare

    draw = np.random.default_rng(0)
    groups = np.eye(4, 8).repeat(50, 0) + draw.normal(0, 0.05, (200, 8))
    x = quantize.unit(groups.astype(np.float32))
    centres = compare.k_means(x, 4, 1)
    label = compare.nearest(x, centres).reshape(4, 50)
    assert (label == label[:, :1]).all() and len(set(label[:, 0])) == 4
    with pytest.raises(ValueError, match="smaller --k"):
        compare.k_means(np.ones((9, 8), np.float32), 2, 0)


@pytest.mark.parametrize("rule", ["signed_power", "per_pixel_scale"])
def test_change_is_one_minus_the_cosine(tmp_path, rule):
    archive, _, _ = build(tmp_path / "a", rule)
    assert run("change", tmp_path / "a", "--years=2023,2024", f"--output={tmp_path / 'c.tif'}") == 0
    every, scores = [], []
    for zone in map(archive.zone, archive.zones):
        (a, one), (b, two) = (
            archive.window(zone, t, slice(0, 32), slice(0, 48)) for t in (0, 1)
        )  # fmt: skip
        both = one & two
        a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
        with rasterio.open(tmp_path / f"c_utm{zone.number}.tif") as file:
            c, score = file.read()
        assert np.array_equal(np.isfinite(c), both) and np.array_equal(np.isfinite(score), both)
        np.testing.assert_allclose(c[both], 1 - (a * b).sum(-1)[both], atol=1e-5)
        every.append(c[both])
        scores.append(score[both])
    c, score = np.concatenate(every), np.concatenate(scores)
    median = np.median(c)
    want = (c - median) / (1.4826 * np.median(np.abs(c - median)))
    np.testing.assert_allclose(score, want, atol=1e-2)


def test_points_of_any_vector_file(tmp_path, capsys):
    """Points are read as labels and areas are: with their CRS, and told by number if they do not
    serve."""
    import shapely

    from olmoearth_jax.maps import extract, vectors

    place = shapely.Point(13.25, 52.5)
    moved = vectors.project(place, "EPSG:4326", "EPSG:32633")
    crs = {"type": "name", "properties": {"name": "EPSG:32633"}}
    feature = {"type": "Feature", "id": 7, "properties": {"kind": "x"},
               "geometry": json.loads(shapely.to_geojson(moved))}  # fmt: skip
    path = tmp_path / "p.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature], "crs": crs}))
    lonlat, columns = extract.read_points(path)
    np.testing.assert_allclose(lonlat, [[13.25, 52.5]], atol=1e-8)
    assert columns == {"kind": ["x"], "id": [7]}
    for geometry, said in (
        (None, "feature 1 is empty"), ({"type": "Point"}, "feature 1"),
        (json.loads(shapely.to_geojson(place.buffer(1))), "feature 1 is a Polygon"),
    ):  # fmt: skip
        path.write_text(json.dumps({"type": "Feature", "geometry": geometry, "properties": {}}))
        with pytest.raises(ValueError, match=said):
            extract.read_points(path)


def test_nothing_of_a_user_is_overwritten(tmp_path, capsys):
    """Nor the points that are read, nor what lies where a map of one zone goes."""
    import pyarrow
    import pyarrow.parquet

    build(tmp_path / "a")
    points = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"lon": [12.002], "lat": [46.998]}), points)
    for name in ("map_utm33.tif", "like_utm32.tif", "like.geojson", "own.parquet"):
        (tmp_path / name).write_bytes(b"mine")
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    sample = ["sample", tmp_path / "a", f"--points={points}", "--year=2023"]
    cases = [
        ([*sample, f"--output={points}"], "would replace one of the inputs"),
        ([*sample, f"--output={points}", "--overwrite"], "would replace one of the inputs"),
        ([*sample, f"--output={tmp_path / 'own.parquet'}"], "own.parquet exists"),
        (["cluster", tmp_path / "a", "--year=2023", f"--output={tmp_path / 'map.tif'}"],
         "map_utm33.tif exists"),
        (["change", tmp_path / "a", "--years=2023,2024", f"--output={tmp_path / 'map.tif'}"],
         "map_utm33.tif exists"),
        (["search", tmp_path / "a", "--year=2023", "--point=12.002,46.998",
          f"--output={tmp_path / 'like'}"], "like.geojson exists"),
    ]  # fmt: skip
    for given, said in cases:
        assert run(*given) == 2
        assert said in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    for given in ([*sample, f"--output={tmp_path / 'new.parquet'}"],
                  [*cases[-1][0][:-1], f"--output={tmp_path / 'new'}"]):  # fmt: skip
        assert run(*given) == 0 and run(*given) == 0  # our own are


@pytest.mark.parametrize("verb, flag, said", [
    ("export", "--area=a.geojson", "--area does not go with export, which takes --year, --bbox"),
    ("cluster", "--bbox=1,2,3,4", "--bbox does not go with cluster"),
    ("change", "--year=2023", "--year does not go with change, which takes --years"),
    ("search", "--points=a.csv", "--points does not go with search"),
    ("status", "--year=2023", "--year does not go with status, which takes no flags"),
])  # fmt: skip
def test_a_flag_that_a_verb_has_no_use_for(tmp_path, capsys, verb, flag, said):
    assert run(verb, tmp_path, flag, *([] if verb == "status" else ["--output=x.tif"])) == 2
    assert said in capsys.readouterr().err


def test_points_that_are_nowhere(tmp_path, capsys):
    """Neither wrapped round the earth nor taken for the place beside them."""
    archive, _, _ = build(tmp_path / "a")
    zone = archive.zone(33)
    row, col = np.argwhere(~archive.window(zone, 0, slice(0, 32), slice(0, 48))[1])[0]
    lonlat = [centre(zone, row, col), [np.nan, 47.0], [372.002, 46.998], [12.0, np.inf]]
    _, valid, places = archive.locate(lonlat, [2023])
    assert not valid.any() and (places[1:] == -1).all()
    text = '{"type": "Point", "coordinates": [372.002, 46.998]}'
    (tmp_path / "p.geojson").write_text(text)
    assert run("sample", tmp_path / "a", f"--points={tmp_path / 'p.geojson'}", "--year=2023",
               f"--output={tmp_path / 'p.parquet'}") == 2  # fmt: skip
    assert "feature 1 lies at 372.002, 46.998" in capsys.readouterr().err


def test_shards_are_sampled_by_their_ids(tmp_path):
    """So that a sample does not depend on where the arrays of an archive begin."""
    archive, _, every = build(tmp_path)
    names = [
        preview._id(archive.zone(number), period, rows, cols)
        for number in archive.zones for period in archive.periods
        for rows, cols in archive.zone(number).shards()
    ]  # fmt: skip
    assert sorted(names) == sorted(every)


def test_memory_is_bounded_by_stripes_that_change_nothing(tmp_path, monkeypatch):
    build(tmp_path / "a")
    seen = []
    original = archive.Archive.window

    def window(self, zone, step, rows, cols, width=None):
        seen.append(rows.stop - rows.start)
        return original(self, zone, step, rows, cols, width)

    monkeypatch.setattr(archive.Archive, "window", window)
    made, tallest = [], []
    for name, size in (("whole", archive_zone._STRIPE), ("cut", 1)):
        monkeypatch.setattr(archive_zone, "_STRIPE", size)
        seen.clear()
        out = tmp_path / name
        shutil.copytree(tmp_path / "a", out / "a")
        assert run("preview", out / "a") == 0
        given = [out / "a", "--year=2023"]
        assert run("export", *given, f"--output={out}/e.tif") == 0
        assert run("cluster", *given, "--k=3", f"--output={out}/c.tif") == 0
        assert run("change", out / "a", "--years=2023,2024", f"--output={out}/d.tif") == 0
        assert run("search", *given, "--point=11.999,47.0", f"--output={out}/s") == 0
        made.append({p.relative_to(out): rasterio.open(p).read() for p in out.rglob("*.tif")})
        tallest.append(max(seen))
    assert made[0].keys() == made[1].keys() and len(made[0]) == 12
    for name, x in made[0].items():
        np.testing.assert_allclose(made[1][name], x, rtol=0, atol=1e-6, err_msg=str(name))
    assert tallest[0] > tallest[1] == 8  # a row of chunks
