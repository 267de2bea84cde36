"""Archives of whole zones that grow by area."""

import json
import shutil

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

import olmoearth_jax
from olmoearth_jax.data.crs import transform_points
from olmoearth_jax.maps import embed_growth, embed_job
from tests.maps import region
from tests.maps.test_archive_tool import run as tool
from tests.maps.test_embed import objects, run

pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with rasters on both sides of 12 E in 2024, and arguments but --area, --output."""
    folder = tmp_path_factory.mktemp("growing")
    given = [a for a in region.build(folder) if not a.startswith(("--years", "--inputs"))]
    rows = []
    for name, crs, seed in (("west", "EPSG:32632", 1), ("east", "EPSG:32633", 2)):
        (x,), (y,) = transform_points("EPSG:4326", crs, [11.98], [50.03])
        corner = [round(v / 10) * 10 for v in (x, y)]
        place = Affine(10, 0, corner[0], 0, -10, corner[1])
        region.write_raster(folder / f"{name}.tif", region.image(seed, 360, 360), place, crs)
        rows.append({"path": f"{name}.tif", "date": "2024-05", "modality": "sentinel2_l2a"})
    (folder / "m.json").write_text(json.dumps(rows))
    for name, east in (("half", 11.99), ("more", 11.995), ("all", 12.02)):
        ring = [[11.982, 50.0], [east, 50.0], [east, 50.028], [11.982, 50.028], [11.982, 50.0]]
        (folder / name).with_suffix(".geojson").write_text(
            json.dumps({"type": "Polygon", "coordinates": [ring]})
        )
    return folder, [*given, "--years=2024", "--extent=zone", f"--inputs={folder / 'm.json'}"]


def made(world, out, name, *more):
    folder, given = world
    return run(*given, f"--area={folder / name}.geojson", f"--output={out}", *more)


def test_what_grew_is_what_was_made_at_once(world, tmp_path, capsys):
    out = tmp_path / "out"
    assert made(world, out, "half") == 0
    assert olmoearth_jax.open_archive(out).zones == [32]
    first = {p: p.read_bytes() for p in (out / "job" / "done").rglob("*.json")}
    assert made(world, out, "all") == 2
    assert "area: " in capsys.readouterr().err
    for name in ("more", "all"):
        assert made(world, out, name, "--extend") == 0
    assert made(world, tmp_path / "once", "all") == 0
    assert objects(out) == objects(tmp_path / "once")
    assert olmoearth_jax.open_archive(out).zones == [32, 33]
    units = embed_job.read_plan(out).units
    assert units == embed_job.read_plan(tmp_path / "once").units
    assert len(first) < len(units)
    # Again does nothing, and the grown job goes by its own flags.
    assert made(world, out, "all") == made(world, out, "all", "--extend") == 0
    assert "complete" in capsys.readouterr().out


def test_a_smaller_area_is_no_growth(world, tmp_path, capsys):
    out = tmp_path / "out"
    assert made(world, out, "more") == 0
    before = objects(out), sorted((out / "job").rglob("*.json"))
    assert made(world, out, "half", "--extend") == 2
    assert "leaves out a part" in capsys.readouterr().err
    assert before == (objects(out), sorted((out / "job").rglob("*.json")))


def test_new_rasters_renew_the_shards_that_they_touch(world, tmp_path, capsys):
    folder, _ = world
    out, flags = tmp_path / "out", (f"--inputs={tmp_path / 'm.json'}",)
    rows = json.loads((folder / "m.json").read_text())
    rows = [{**row, "path": str(folder / row["path"])} for row in rows]
    (tmp_path / "m.json").write_text(json.dumps(rows[:1]))
    assert made(world, out, "more", *flags) == 0
    zone = olmoearth_jax.open_archive(out).zone(32)
    marks = {p.name: p.read_bytes() for p in (out / "job" / "done" / "utm32").rglob("*.json")}
    assert len(marks) > 1
    row, col = (int(v) for v in min(marks).removesuffix(".json").split("_"))
    side = zone.transform[0] * zone.side
    place = Affine(10, 0, (col + 1) * side - 400, 0, -10, -row * side - 400)
    region.write_raster(tmp_path / "new.tif", region.image(5, 30, 30), place, "EPSG:32632")
    new = {**rows[0], "path": str(tmp_path / "new.tif")}
    # It lies above the others, so it counts where they meet.
    (tmp_path / "m.json").write_text(json.dumps([new, *rows]))
    assert made(world, out, "all", "--extend", *flags) == 0
    assert made(world, tmp_path / "once", "all", *flags) == 0
    assert objects(out) == objects(tmp_path / "once")
    (tmp_path / "m.json").write_text(json.dumps(rows[1:]))
    assert made(world, out, "all", "--extend", *flags) == 2
    assert "inputs" in capsys.readouterr().err


def test_a_kill_on_the_way_is_made_good(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert made(world, out, "half") == 0

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    for name in ("extend_store", "write_durably"):
        where = embed_growth.store if name == "extend_store" else embed_growth.durable
        monkeypatch.setattr(where, name, killed)
        with pytest.raises(Killed):
            made(world, out, "all", "--extend")
        monkeypatch.undo()
        assert olmoearth_jax.open_archive(out).points([[11.985, 50.01]])[1].all()
    assert made(world, out, "half") == 0  # the old job goes on
    assert made(world, out, "all", "--extend") == 0
    _, valid = olmoearth_jax.open_archive(out).points([[11.985, 50.01], [12.01, 50.01]])
    assert np.all(valid)


def test_an_area_that_is_not_known_does_not_grow(world, tmp_path, capsys):
    out = tmp_path / "out"
    assert made(world, out, "half") == 0
    (path,) = (out / "job").glob("area_*.json")
    for text in (None, "{}", '{"32": "x"}', '{"a": 5}'):
        path.unlink() if text is None else path.write_text(text)
        assert made(world, out, "more", "--extend") == 2
        assert "does not say which area" in capsys.readouterr().err


def test_maps_of_a_whole_zone_span_what_was_planned(world, tmp_path):
    """The arrays of such an archive hold a million empty shards."""
    out = tmp_path / "out"
    assert made(world, out, "half") == 0
    archive = olmoearth_jax.open_archive(out)
    zone = archive.zone(32)
    assert len(list(zone.shards())) == len(embed_job.read_plan(out).units) < 20
    rows, cols = zone.span
    place = f"--point={11.985},{50.01}"
    assert tool("search", out, place, f"--output={tmp_path / 's'}") == 0
    for verb, more in (("preview", []), ("cluster", ["--k=3", f"--output={tmp_path / 'c.tif'}"]),
                       ("export", ["--width=3", f"--output={tmp_path / 'e.tif'}"])):  # fmt: skip
        assert tool(verb, out, *more) == 0
    want, valid = archive.window(zone, 0, rows, cols, 3)
    for path in (tmp_path / "s.tif", tmp_path / "c.tif", tmp_path / "e.tif",
                 out / "preview" / "utm32_2024.tif"):  # fmt: skip
        with rasterio.open(path) as file:
            assert list(file.transform)[:6] == zone.place(rows, cols)
            assert file.shape == valid.shape
            assert ((file.dataset_mask() > 0) == valid).all()
            if path.name == "e.tif":
                np.testing.assert_array_equal(np.moveaxis(file.read(), 0, -1)[valid], want[valid])
    # Without its job folder an archive is taken as it lies.
    shutil.rmtree(out / "job")
    bare = olmoearth_jax.open_archive(out).zone(32)
    assert bare.planned is None and bare.span[0] == slice(0, zone.shape[0])
