"""Periods that differ in their timesteps and modalities, and labels in each of them."""

import json

import numpy as np
import pytest
import rasterio

from olmoearth_jax.maps import fine_tuning
from olmoearth_jax.maps.fine_tuning import ImageOptions
from olmoearth_jax.maps.token_head import HeadOptions
from tests.maps import world
from tests.maps.test_finetune import options, quiet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images of 2022 and three of 2023, which has one of Sentinel-1, too, in `both.csv`."""
    out = world.build(tmp_path_factory.mktemp("uneven"))
    kinds, rows = world.classes(), ["path,date,modality"]
    for date in ("2022-03", "2022-04", "2023-03", "2023-04", "2023-05"):
        world.write_raster(out / f"{date}.tif", world.images(kinds, len(rows)))
        rows.append(f"{date}.tif,{date}-10,sentinel2_l2a")
    (out / "uneven.csv").write_text("\n".join(rows) + "\n")
    x = np.random.default_rng(0).normal(-12, 2, (2, *kinds.shape)).astype(np.float32)
    with rasterio.open(
        out / "radar.tif", "w", driver="GTiff", count=2, dtype="float32", height=world.SIDE,
        width=world.SIDE, crs=world.CRS, transform=world.CORNER,
    ) as file:  # fmt: skip
        file.write(x)
        file.descriptions = ("vv", "vh")
    (out / "both.csv").write_text("\n".join([*rows, "radar.tif,2023-03-10,sentinel1"]) + "\n")
    held = json.loads((out / "fields.geojson").read_text())
    for i, feature in enumerate(held["features"]):
        feature["properties"]["year"] = 2022 + i % 2
    (out / "years.geojson").write_text(json.dumps(held))
    return out


@pytest.mark.parametrize(("mode", "manifest"), [("probe", "both.csv"), ("full", "uneven.csv")])
def test_periods_need_not_be_alike(folder, mode, manifest):
    images = ImageOptions(str(folder / manifest), years=["2022", "2023"])
    head = HeadOptions(epochs=30) if mode == "probe" else HeadOptions(epochs=1, lr=1e-4)
    o = options(folder, folder / mode, "years.geojson", images=images, mode=mode, head=head)
    report = fine_tuning.run(o, quiet)
    assert report["labels"]["on_nodata"] == 0
    assert set(report["splits"]) == {"train", "valid", "test"}
    assert mode == "full" or report["splits"]["test"]["macro_f1"] > 0.8
    task = json.loads((folder / mode / "task.json").read_text())
    assert list(task["modalities"]) == ["sentinel2_l2a"] and task["timesteps"] == 3
