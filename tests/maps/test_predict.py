"""From a run to a map."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pyarrow.parquet
import pytest
import rasterio
from absl.testing import flagsaver
from rasterio.transform import Affine

from launch import _flags, predict
from olmoearth_jax.interop import checkpoints
from olmoearth_jax.maps import fine_tuning, predicting
from olmoearth_jax.maps.fine_tuning import ImageOptions
from tests.inference.test_model import weights_of
from tests.maps import world
from tests.maps.test_finetune import options as training

# rasterio multiplies affine maps in a way that newer versions of that package discourage.
pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")


def quiet(_):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = world.build(tmp_path_factory.mktemp("world"))
    fine_tuning.run(training(out, out / "run"), quiet)
    return out


def options(folder, output, inputs="imagery.csv", **change):
    images = ImageOptions(str(folder / inputs))
    base = predicting.Options(str(folder / "run"), images, str(folder / output))
    return dataclasses.replace(base, **change)


def read(path):
    with rasterio.open(path) as file:
        return file.read()


@pytest.fixture(scope="module")
def made(folder):
    lines = []
    predicting.run(options(folder, "map"), lines.append)
    return folder / "map", lines


def test_the_map_is_what_the_report_says(folder, made):
    """At the test samples the map shows what the report scored."""
    out, lines = made
    table = pyarrow.parquet.read_table(folder / "run" / "predictions.parquet").to_pydict()
    with rasterio.open(out / "classes.tif") as file:
        xs, ys = rasterio.warp.transform("EPSG:4326", file.crs, table["lon"], table["lat"])
        found = [int(v[0]) for v in file.sample(zip(xs, ys, strict=True))]
        assert file.crs == world.CRS and file.transform == world.CORNER and file.nodata == 255
        assert file.shape == (world.SIDE, world.SIDE) and file.dtypes == ("uint8",)
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.tags()["CLASS_2"] == "forest"
        assert file.colormap(1)[1] == (0x44, 0x77, 0xAA, 255)
    numbers = {"field": 1, "forest": 2, "water": 3}
    assert found == [numbers[name] for name in table["predicted"]]
    truth = world.classes()
    kinds = np.array([numbers[n] for n in world.NAMES])
    assert (read(out / "classes.tif")[0] == kinds[truth]).mean() > 0.85
    assert "written" in lines[-1]


def test_probabilities_areas_and_item(folder, made):
    out, _ = made
    with rasterio.open(out / "probabilities.tif") as file:
        assert file.descriptions == ("field", "forest", "water") and file.nodata == 255
        assert file.scales == (1 / 254,) * 3
        probabilities = file.read()
    classes = read(out / "classes.tif")[0]
    best = probabilities.argmax(0) + 1
    tied = np.sort(probabilities, 0)[-1] == np.sort(probabilities, 0)[-2]
    assert ((best == classes) | tied).all()
    lines = (out / "areas.csv").read_text().splitlines()
    assert lines[0].startswith("# Pixel counts are biased")
    rows = list(csv.DictReader(lines[1:]))
    assert sum(int(r["pixels"]) for r in rows) == world.SIDE**2
    assert sum(float(r["hectares"]) for r in rows) == pytest.approx(world.SIDE**2 / 100)
    item = json.loads((out / "map.json").read_text())
    assert item["properties"]["proj:code"] == world.CRS and set(item["assets"]) == {
        "classes", "probabilities",
    }  # fmt: skip
    assert item["assets"]["classes"]["classification:classes"][0] == {
        "value": 1, "name": "field", "title": "field", "color_hint": "4477AA",
    }  # fmt: skip
    assert (out / "confusion.csv").is_file() and not (out / "job" / "blocks").exists()


def test_blocks_leave_no_trace(folder, made):
    predicting.run(options(folder, "small", block=64), quiet)
    for name in ("classes.tif", "probabilities.tif"):
        a, b = (read(folder / m / name).astype(int) for m in ("map", "small"))
        assert np.abs(a - b).max() <= 1
        assert (a != b).mean() < 1e-3


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_workers_that_are_killed_anywhere_make_the_same_map(folder, made, monkeypatch):
    from olmoearth_jax import files

    whole, left = files.os.replace, [0]

    def replace(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        whole(source, target)

    o = options(folder, "killed", block=128)
    monkeypatch.setattr(files.os, "replace", replace)
    for stop in range(60):
        left[0] = stop % 5
        mine = dataclasses.replace(o, index=stop % 2, count=2)
        try:
            predicting.run(mine, quiet)
            if (folder / "killed" / "job" / "done").exists() and left[0] >= 0:
                break
        except Killed:
            left[0] = 10**6
    left[0] = 10**6
    predicting.run(options(folder, "whole", block=128), quiet)
    assert (folder / "killed" / "areas.csv").read_text() == (
        folder / "whole" / "areas.csv"
    ).read_text()
    for name in ("classes.tif", "probabilities.tif"):
        np.testing.assert_array_equal(*(read(folder / m / name) for m in ("killed", "whole")))


def test_again_and_another_job(folder, made):
    lines = []
    predicting.run(options(folder, "map"), lines.append)
    assert "finished already" in lines[-1]
    with pytest.raises(ValueError, match="holds another job.*probabilities"):
        predicting.run(options(folder, "map", probabilities="none"), quiet)
    (folder / "mine").mkdir()
    (folder / "mine" / "x").write_text("x")
    with pytest.raises(ValueError, match="files of something else"):
        predicting.run(options(folder, "mine"), quiet)
    assert [p.name for p in (folder / "mine").iterdir()] == ["x"]


def test_an_area_and_missing_data(folder):
    x = world.images(world.classes(), 1)
    x[:, :40, :40] = 0
    world.write_raster(folder / "hole.tif", x)
    (folder / "hole.csv").write_text("path,date\nhole.tif,2024-05-10\nhole.tif,2024-07-10\n")
    world.write_labels(folder / "area.geojson", [world.box(0, 0, 100, 120)], ["x"])
    o = options(folder, "part", "hole.csv", area=str(folder / "area.geojson"), block=64)
    predicting.run(o, quiet)
    got = read(folder / "part" / "classes.tif")[0]
    assert (got[:40, :40] == 255).all() and (got[40:120, :100] != 255).all()
    assert (got[121:] == 255).all() and (got[:, 101:] == 255).all()
    rows = csv.DictReader((folder / "part" / "areas.csv").read_text().splitlines()[1:])
    assert sum(int(r["pixels"]) for r in rows) == (got != 255).sum()
    far = world.box(0, 0, 9, 9, Affine(10, 0, 700_000, 0, -10, 5_000_000))
    world.write_labels(folder / "far.geojson", [far], ["x"])
    with pytest.raises(ValueError, match="no raster touches the area.*17.*15"):
        predicting.run(options(folder, "far", area=str(folder / "far.geojson")), quiet)
    assert not (folder / "far").exists()


def test_images_that_do_not_fit_the_run(folder):
    (folder / "one.csv").write_text("path,date\na.tif,2023-05-10\n")
    with pytest.raises(ValueError, match="2 timesteps, but the images have 1"):
        predicting.run(options(folder, "x", "one.csv"), quiet)
    world.write_raster(folder / "few.tif", world.images(world.classes())[:3], world.S2[:3])
    (folder / "few.csv").write_text("path,date\nfew.tif,2023-05\nfew.tif,2023-07\n")
    with pytest.raises(ValueError, match="trained on the bands .* but the images have"):
        predicting.run(options(folder, "x", "few.csv"), quiet)
    radar = np.random.default_rng(0).uniform(-20, -5, (2, 64, 64)).astype(np.float32)
    world.write_raster(folder / "s1.tif", radar, ["vv", "vh"], None)
    (folder / "s1.csv").write_text("path,date\ns1.tif,2023-05\ns1.tif,2023-07\n")
    with pytest.raises(ValueError, match="trained on sentinel2_l2a, but the images show sentinel1"):
        predicting.run(options(folder, "x", "s1.csv"), quiet)
    other = weights_of()
    changed = jax.tree.map(lambda x: x * 1.5, other.params)
    checkpoints.write(dataclasses.replace(other, params=changed), folder / "other")
    with pytest.raises(ValueError, match="trained with the model of digest .* has"):
        predicting.run(options(folder, "x", model=str(folder / "other")), quiet)
    with pytest.raises(ValueError, match="overlap of 64 pixels leaves nothing of windows of 32"):
        predicting.run(options(folder, "x", overlap=64), quiet)
    with pytest.raises(ValueError, match="holds no run of launch.finetune"):
        predicting.run(dataclasses.replace(options(folder, "x"), run=str(folder)), quiet)
    assert not (folder / "x").exists()


def program(*given) -> int:
    """The exit code of launch.predict in this process."""
    saved = flagsaver.save_flag_values(predict.FLAGS)
    try:
        predict.FLAGS(["predict", *map(str, given)])
        return _flags.guarded(predict.main, ["predict"])
    finally:
        flagsaver.restore_flag_values(saved, predict.FLAGS)


def test_a_damaged_image_fails_its_blocks_alone(folder, capsys):
    rng = np.random.default_rng(0)
    kinds = world.classes()
    path = folder / "damaged.tif"
    with rasterio.open(
        path, "w", driver="GTiff", crs=world.CRS, transform=world.CORNER, nodata=0, count=12,
        height=256, width=256, dtype="uint16", compress="deflate", blockysize=16,
    ) as file:  # fmt: skip
        file.write(world.images(kinds, 1))
        file.descriptions = world.S2
    whole = path.read_bytes()
    middle = len(whole) - 30_000
    path.write_bytes(whole[:middle] + rng.bytes(2_000) + whole[middle + 2_000 :])
    (folder / "damaged.csv").write_text("path,date\ndamaged.tif,2024-05-10\nb.tif,2024-07-10\n")
    given = [f"--run={folder / 'run'}", f"--inputs={folder / 'damaged.csv'}", "--block=64",
             f"--output={folder / 'mended'}", "--nocheck_units"]  # fmt: skip
    assert program(*given, "--device=7") == 2 and "no device 7" in capsys.readouterr().err
    assert not (folder / "mended").exists()
    assert program(*given, "--attempts=1") == 1
    told = capsys.readouterr()
    assert "damaged.tif" in told.err and "--attempts=2" in told.out
    assert 0 < len(list((folder / "mended" / "job" / "failed").rglob("*.json"))) < 16
    assert not (folder / "mended" / "classes.tif").exists()
    path.write_bytes(whole)
    assert program(*given, "--attempts=2") == 0
    assert (folder / "mended" / "classes.tif").is_file()


def test_tiles_whose_files_are_named_alike_are_different_jobs(folder):
    """Products name the bands of every tile alike, and plain GeoTIFFs are of one size."""
    for name, east in (("one", 0.0), ("two", 100_000.0)):
        place = Affine(10, 0, 500_480 + east, 0, -10, 5_600_640)
        (folder / name).mkdir()
        for month, seed in (("05", 1), ("07", 2)):
            x = world.images(world.classes(), seed)
            world.write_raster(folder / name / f"{month}.tif", x, transform=place)
        (folder / name / "list.csv").write_text("path,date\n05.tif,2023-05-10\n07.tif,2023-07-10\n")
    predicting.run(options(folder, "tiles", "one/list.csv"), quiet)
    with pytest.raises(ValueError, match="holds another job.*images.grids"):
        predicting.run(options(folder, "tiles", "two/list.csv"), quiet)


def test_a_modality_that_the_run_never_saw_is_refused(folder):
    radar = np.random.default_rng(0).uniform(-20, -5, (2, 256, 256)).astype(np.float32)
    world.write_raster(folder / "radar.tif", radar, ["vv", "vh"], None)
    rows = "path,date\na.tif,2023-05-10\nb.tif,2023-07-10\nradar.tif,2023-05-10\n"
    (folder / "more.csv").write_text(rows)
    with pytest.raises(ValueError, match="sentinel2_l2a, but the images also show sentinel1"):
        predicting.run(options(folder, "x", "more.csv"), quiet)
    assert not (folder / "x").exists()


def test_areas_are_those_on_the_ground(folder, tmp_path):
    """Pixels of Web Mercator are 2.5 times as large on the map as on the ground here."""
    (x,), (y,) = rasterio.warp.transform(world.CRS, "EPSG:3857", [500_480], [5_600_640])
    side = 10 / np.cos(np.radians(50.55))
    kinds = world.classes()
    place = Affine(side, 0, x, 0, -side, y)
    for name in ("a.tif", "b.tif"):
        world.write_raster(
            tmp_path / name, world.images(kinds, 1), crs="EPSG:3857", transform=place
        )
    (tmp_path / "imagery.csv").write_text("path,date\na.tif,2023-05-10\nb.tif,2023-07-10\n")
    images = ImageOptions(str(tmp_path / "imagery.csv"))
    o = training(folder, tmp_path / "run")
    labels = dataclasses.replace(o.labels, block="1280")
    fine_tuning.run(dataclasses.replace(o, images=images, labels=labels), quiet)
    made = predicting.Options(str(tmp_path / "run"), images, str(tmp_path / "map"))
    predicting.run(made, quiet)
    rows = list(csv.DictReader((tmp_path / "map" / "areas.csv").read_text().splitlines()[1:]))
    pixels = sum(int(r["pixels"]) for r in rows)
    assert pixels > 60_000
    assert sum(float(r["hectares"]) for r in rows) == pytest.approx(pixels / 100, rel=0.01)
    assert sum(float(r["share"]) for r in rows) == pytest.approx(1, abs=1e-5)


def test_who_waits_does_not_begin_again_when_others_have_finished(folder, monkeypatch):
    from olmoearth_jax.data import work_list

    o, lines = options(folder, "waited", block=128), []
    claim = folder / "waited" / "job" / "claims" / "map" / "1_1.json"

    def hold(line):
        lines.append(line)
        if "blocks of at most" in line:
            claim.parent.mkdir(parents=True)
            claim.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "x"}))

    def others_end(_):
        claim.unlink()
        predicting.run(o, quiet)

    monkeypatch.setattr(work_list.time, "sleep", others_end)
    found = predicting.run(dataclasses.replace(o, wait=True), hold)
    assert not found.failed and not found.busy
    assert sum("pixels with data" in line for line in lines) == 3
    assert lines[-1].endswith("was finished by another worker")
    assert not (folder / "waited" / "job" / "blocks").exists()


def test_who_is_taken_over_while_putting_together_does_no_harm(folder, made, monkeypatch):
    """The other one ends first, and the blocks are gone when the first goes on."""
    from olmoearth_jax.maps import map_files

    o, whole, began, lines = options(folder, "taken", block=128), map_files.writing, [], []

    def write(*given, **more):
        if not began:
            began.append(1)
            predicting.run(o, quiet)
            assert not (folder / "taken" / "job" / "blocks").exists()
        return whole(*given, **more)

    monkeypatch.setattr(map_files, "writing", write)
    found = predicting.run(o, lines.append)
    assert began and not found.failed and not found.busy
    for path in made[0].glob("*.*"):
        if path.suffix in (".tif", ".csv"):
            with_tags = read(path) if path.suffix == ".tif" else path.read_bytes()
            ours = folder / "taken" / path.name
            there = read(ours) if path.suffix == ".tif" else ours.read_bytes()
            assert np.array_equal(with_tags, there), path.name
    names = {p.name for p in (folder / "taken").rglob("*")}
    assert not [n for n in names if n.startswith(".")] and "blocks" not in names
    assert "finished already" in run_again(o)


def test_what_killed_workers_left_beside_a_map_goes(folder, made):
    out = folder / "tidy"
    predicting.run(options(folder, "tidy", block=128), quiet)
    (out / "areas.csv").unlink()  # as if killed before
    for name in (".map-abc/raw.tif", ".areas.csv.0123abcd.tmp", ".mine", ".kept.tmp"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("x")
    predicting.run(options(folder, "tidy", block=128), quiet)
    assert {p.name for p in out.glob(".*")} == {".mine", ".kept.tmp"}
    np.testing.assert_array_equal(read(out / "classes.tif"), read(made[0] / "classes.tif"))


def run_again(o):
    lines = []
    predicting.run(o, lines.append)
    return lines[-1]
