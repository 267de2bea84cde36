"""Images of two UTM zones: one run, and a map for each grid."""

import dataclasses

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

from olmoearth_jax.maps import fine_tuning, predicting
from olmoearth_jax.maps.fine_tuning import ImageOptions
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
    for zone, transform in (("epsg_32633", world.CORNER), ("epsg_32632", WEST)):
        with rasterio.open(folder / "map" / zone / "classes.tif") as file:
            assert file.transform == transform
            assert (file.read(1) == numbers[kinds]).mean() > 0.8
    one = ImageOptions(str(folder / "imagery.csv"))
    alone = fine_tuning.run(dataclasses.replace(o, images=one, output=str(folder / "one")), quiet)
    # The other grid holds no labels: the same split of the same labels.
    assert alone["splits"]["test"]["labels"] == report["splits"]["test"]["labels"]
