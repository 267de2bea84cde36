"""Images that share no grid: one run, and a map for each UTM zone on the lattice of 10 m."""

import dataclasses

import numpy as np
import pytest
import rasterio
import shapely
from rasterio.transform import Affine

from olmoearth_jax.maps import fine_tuning, labelled, predicting, split
from olmoearth_jax.maps.fine_tuning import ImageOptions
from olmoearth_jax.maps.labelled import LabelOptions
from olmoearth_jax.maps.lattice import crs_of, zone_of
from tests.maps import world
from tests.maps.test_finetune import options, quiet

pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")
WEST = Affine(10, 0, 699_520, 0, -10, 5_600_640)


def test_two_zones(tmp_path):
    folder = world.build(tmp_path)
    kinds = world.classes()
    for name, seed in (("c.tif", 3), ("d.tif", 4)):
        world.write_raster(folder / name, world.images(kinds, seed), crs="EPSG:32632",
                           transform=WEST)  # fmt: skip
    rows = [f"{n}.tif,2023-{m}" for n, m in (("a", "05"), ("c", "05"), ("b", "07"), ("d", "07"))]
    (folder / "both.csv").write_text("path,date\n" + "\n".join(rows) + "\n")
    o = options(folder, folder / "run", images=ImageOptions(str(folder / "both.csv")))
    report = fine_tuning.run(o, quiet)
    assert report["labels"]["outside"] == 0 and report["splits"]["test"]["macro_f1"] > 0.8
    made = predicting.Options(str(folder / "run"), o.images, str(folder / "map"))
    assert not predicting.run(made, quiet).failed
    numbers = np.array([{"field": 1, "forest": 2, "water": 3}[n] for n in world.NAMES])
    for zone, transform in (("utm33", world.CORNER), ("utm32", WEST)):
        with rasterio.open(folder / "map" / zone / "classes.tif") as file:
            assert file.transform == transform
            assert (file.read(1) == numbers[kinds]).mean() > 0.8
    one = ImageOptions(str(folder / "imagery.csv"))
    alone = fine_tuning.run(dataclasses.replace(o, images=one, output=str(folder / "one")), quiet)
    # The other grid holds no labels: the same split of the same labels.
    assert alone["splits"]["test"]["labels"] == report["splits"]["test"]["labels"]


def _predict(folder, rows, output, run="run"):
    manifest = folder / f"{output}.csv"
    manifest.write_text("path,date,resample\n" + "\n".join(rows) + "\n")
    images = ImageOptions(str(manifest))
    made = predicting.run(
        predicting.Options(str(folder / run), images, str(folder / output)), quiet
    )
    assert not made.failed
    with rasterio.open(folder / output / "classes.tif") as file:
        return file.read(1), file.transform, file.crs


def test_images_that_ask_to_be_resampled(tmp_path):
    """Shifted by a part of a pixel and in another CRS: the map is that of the lattice."""
    folder = world.build(tmp_path)
    kinds, t = world.classes(), world.CORNER
    numbers = np.array([{"field": 1, "forest": 2, "water": 3}[n] for n in world.NAMES])
    for name in "ab":
        with rasterio.open(folder / f"{name}.tif") as file:
            x = file.read()
        shifted = Affine(10, 0, t.c + 3, 0, -10, t.f - 4)
        world.write_raster(folder / f"{name}_shifted.tif", x, transform=shifted)
        with rasterio.vrt.WarpedVRT(
            rasterio.open(folder / f"{name}.tif"), crs="EPSG:3035", add_alpha=False
        ) as warped:
            world.write_raster(
                folder / f"{name}_laea.tif", warped.read(), crs="EPSG:3035",
                transform=warped.transform,
            )  # fmt: skip
    # Trained on images that are resampled, too.
    (folder / "laea.csv").write_text(
        "path,date,resample\na_laea.tif,2023-05,nearest\nb_laea.tif,2023-07,bilinear\n"
    )
    o = options(folder, folder / "run", images=ImageOptions(str(folder / "laea.csv")))
    report = fine_tuning.run(o, quiet)
    assert report["splits"]["test"]["macro_f1"] > 0.5 and report["labels"]["on_nodata"] >= 0
    _pixels_lie_where_they_were(o.images, kinds)
    o = options(folder, folder / "run2")
    fine_tuning.run(o, quiet)
    rows = ["a_shifted.tif,2024-05,nearest", "b_shifted.tif,2024-07,bilinear"]
    got, place, crs = _predict(folder, rows, "map", "run2")
    assert crs == "EPSG:32633" and place.a == 10 and place.c % 10 == 0 and place.f % 10 == 0
    top, left = round((place.f - t.f) / 10), round((t.c - place.c) / 10)
    inner = got[top + 8 : top + 248, left + 8 : left + 248]
    assert (inner == numbers[kinds][8:248, 8:248]).mean() > 0.7


def _pixels_lie_where_they_were(images, kinds):
    """On the lattice the classes of pixels agree best with the ground where nothing is moved."""
    t = world.CORNER
    with images.open(images.rasters()[0]) as (opened, _):
        (scene,) = opened
        place = scene.stack.transform
        row, col = round((place.f - t.f) / 10), round((t.c - place.c) / 10)
        got = scene.stack.read(slice(row, row + 256), slice(col, col + 256))
    level = got.arrays["sentinel2_l2a"][:, :, 0].mean(-1)
    near = np.abs(level[..., None] - np.array(world.LEVELS)).argmin(-1)
    hits = {
        (dy, dx): (near[4:-4, 4:-4] == np.roll(kinds, (dy, dx), (0, 1))[4:-4, 4:-4]).mean()
        for dy in (-1, 0, 1) for dx in (-1, 0, 1)
    }  # fmt: skip
    assert max(hits, key=lambda k: hits[k]) == (0, 0) and hits[0, 0] > 0.9, hits


def test_northern_and_southern_names_of_one_zone_are_one_map(tmp_path):
    """Across the equator EPSG:327zz is EPSG:326zz with other northings."""
    folder = world.build(tmp_path)
    fine_tuning.run(options(folder, folder / "run"), quiet)
    kinds = world.classes()
    numbers = np.array([{"field": 1, "forest": 2, "water": 3}[n] for n in world.NAMES])
    for m, seed in (("05", 1), ("07", 2)):
        x = world.images(kinds, seed)
        world.write_raster(folder / f"n_{m}.tif", x[:, :128],
                           transform=Affine(10, 0, 500_480, 0, -10, 1_280))  # fmt: skip
        world.write_raster(folder / f"s_{m}.tif", x[:, 128:], crs="EPSG:32733",
                           transform=Affine(10, 0, 500_480, 0, -10, 10_000_000))  # fmt: skip
    rows = [f"{n}_{m}.tif,2024-{m}," for n in "ns" for m in ("05", "07")]
    got, place, crs = _predict(folder, rows, "equator")
    assert crs == "EPSG:32633" and place.f == 1_280 and got.shape == kinds.shape
    assert (got == numbers[kinds]).mean() > 0.8


def test_images_off_the_lattice_say_how_to_bring_them_to_it(tmp_path):
    folder = world.build(tmp_path)
    x = world.images(world.classes(), 3)
    world.write_raster(folder / "c.tif", x, crs="EPSG:32632",
                       transform=Affine(10, 0, 699_523, 0, -10, 5_600_640))  # fmt: skip
    (folder / "off.csv").write_text("path,date\na.tif,2023-05\nc.tif,2023-05\n")
    o = options(folder, folder / "x", images=ImageOptions(str(folder / "off.csv")))
    with pytest.raises(ValueError, match=r"c\.tif .*lattice of 10 m.*resample 'nearest'.*gdalwarp"):
        fine_tuning.run(o, quiet)
    assert not (folder / "x").exists()


def blocks_seen(scene, window, side):
    """The blocks of all pixels of a window, by their own longitudes."""
    t, crs = scene.stack.transform, scene.stack.crs
    rows, cols = np.indices(window.size).reshape(2, -1)
    xs, ys = (t.c + t.a * (window.col + cols + 0.5)), (t.f + t.e * (window.row + rows + 0.5))
    zones = zone_of(rasterio.warp.transform(crs, "EPSG:4326", xs.tolist(), ys.tolist())[0])
    out = set()
    for zone in np.unique(zones):
        mine = zones == zone
        east, north = rasterio.warp.transform(crs, crs_of(int(zone)), xs[mine], ys[mine])
        out |= set(split.blocks_of(zones[mine], east, north, side))
    return out


@pytest.mark.parametrize("points", [False, True])
def test_training_sees_no_test_block_across_a_boundary(tmp_path, points):
    """Both zones show the ground around 12 degrees east, and windows reach over it."""
    n, kinds = 320, np.random.default_rng(0).integers(0, 3, (320, 320))
    rows = ["path,date"]
    for zone in (32, 33):
        (x,), (y,) = rasterio.warp.transform("EPSG:4326", crs_of(zone), [12.0], [50.5])
        corner = Affine(10, 0, round(x / 10) * 10 - n * 5, 0, -10, round(y / 10) * 10 + n * 5)
        world.write_raster(tmp_path / f"{zone}.tif", world.images(kinds), crs=crs_of(zone),
                           transform=corner)  # fmt: skip
        rows.append(f"{zone}.tif,2023-05-10")
    (tmp_path / "i.csv").write_text("\n".join(rows) + "\n")
    draw, shapes = np.random.default_rng(1), []
    for lon, lat in draw.uniform((11.985, 50.49), (12.015, 50.51), (900, 2)):
        shapes.append(shapely.Point(lon, lat) if points else
                      shapely.box(lon, lat, lon + 8e-4, lat + 5e-4))  # fmt: skip
    names = [world.NAMES[k] for k in draw.integers(0, 3, len(shapes))]
    path = world.write_labels(tmp_path / "l.geojson", shapes, names, crs="EPSG:4326")
    images = ImageOptions(str(tmp_path / "i.csv"))
    with images.open(images.rasters()[0]) as (scenes, _):
        for seed in range(4):
            o = LabelOptions(str(path), "kind", block="640")
            got = labelled.read(o, scenes, 32, 4, 1, seed)
            apart = {b for b, name in got.split.blocks.items() if name != "train"}
            for i in got.split.rows("train"):
                w = got.windows[i]
                assert not blocks_seen(scenes[w.scene], w, got.split.side) & apart
