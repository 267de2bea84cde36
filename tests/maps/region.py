"""A small region with images of two zones and years, and a model, for tests of archives."""

import json

import numpy as np
import rasterio
from rasterio.transform import Affine

from olmoearth_jax.interop import checkpoints
from tests.inference.test_model import S2, weights_of

SHARD = 64  # tokens; with patches of 4 pixels 2,560 m
ARGS = ["--patch_size=4", "--tile=48", "--overlap=16", f"--shard_side={SHARD}", "--chunk=32",
        "--batch_size=4", "--years=2023,2024"]  # fmt: skip


def write_raster(path, x, transform, crs="EPSG:32632", names=S2, nodata: float | None = 0):
    """A GeoTIFF of x [C, H, W]."""
    form = {"count": len(x), "height": x.shape[1], "width": x.shape[2], "dtype": x.dtype}
    with rasterio.open(
        path, "w", driver="GTiff", crs=crs, transform=transform, nodata=nodata, **form
    ) as file:
        file.write(x)
        file.descriptions = names
    return str(path)


def image(seed, height, width):
    """uint16 [12, height, width] with some structure."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(200, 4000, (12, height // 8 + 1, width // 8 + 1))
    x = coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]
    return (x + rng.integers(0, 150, x.shape)).astype(np.uint16)


def damage(source, path):
    """Writes a raster anew with a part that cannot be read; the bytes of it whole."""
    with rasterio.open(source) as file:
        form, x, names = {**file.profile, "compress": "deflate"}, file.read(), file.descriptions
    with rasterio.open(path, "w", **form) as file:
        file.write(x)
        file.descriptions = names
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(20_000) + whole[middle + 20_000 :])
    return whole


def build(folder):
    """Model, rasters and manifest; the arguments of `launch.embed` but --output."""
    checkpoints.write(weights_of(), folder / "model")
    corner = Affine(10, 0, 500_480, 0, -10, 5_600_640)
    rows = []
    for year in (2023, 2024):
        for month in (5, 8):
            x = image(10 * year + month, 300, 340)
            if month == 8:
                x[:, 40:90, 50:130] = 0  # clouds
            path = folder / f"a_{year}_{month}.tif"
            write_raster(path, x, corner)
            rows.append({"path": path.name, "date": f"{year}-{month:02d}-10",
                         "modality": "sentinel2_l2a"})  # fmt: skip
    path = folder / "b_2023_5.tif"
    write_raster(path, image(7, 120, 130), Affine(10, 0, 503_600, 0, -10, 5_598_000))
    rows.append({"path": path.name, "date": "2023-05-20", "modality": "sentinel2_l2a"})
    (folder / "imagery.json").write_text(json.dumps(rows))
    return [f"--model={folder / 'model'}", f"--inputs={folder / 'imagery.json'}", *ARGS]
