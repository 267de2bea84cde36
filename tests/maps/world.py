"""A small place with images, labels and a model, for tests of maps."""

import json

import numpy as np
import rasterio
import shapely
from rasterio.transform import Affine

from olmoearth_jax.interop import checkpoints
from tests.inference.test_model import S2, weights_of

CRS, SIDE, CELL = "EPSG:32633", 256, 8
CORNER = Affine(10, 0, 500_480, 0, -10, 5_600_640)
NAMES = ("water", "forest", "field")
LEVELS = (300, 1500, 3500)


def cells(seed=0):
    """Class of each cell of CELL x CELL pixels, int [32, 32]."""
    return np.random.default_rng(seed).integers(0, 3, (SIDE // CELL, SIDE // CELL))


def classes(seed=0):
    """Class of each pixel, int [SIDE, SIDE]."""
    return cells(seed).repeat(CELL, 0).repeat(CELL, 1)


def write_raster(path, x, names=S2, nodata=0, crs=CRS, transform=CORNER):
    """A GeoTIFF of x [C, H, W]."""
    form = {"count": len(x), "height": x.shape[1], "width": x.shape[2], "dtype": x.dtype}
    with rasterio.open(
        path, "w", driver="GTiff", crs=crs, transform=transform, nodata=nodata, **form
    ) as file:
        file.write(x)
        if names:
            file.descriptions = names
    return path


def images(kinds, seed=1):
    """uint16 [12, H, W] whose level is that of the class of each pixel."""
    rng = np.random.default_rng(seed)
    base = np.array(LEVELS)[kinds]
    return (base + rng.normal(0, 120, (12, *kinds.shape))).clip(50).astype(np.uint16)


def box(left, top, right, bottom, t=CORNER):
    """A polygon around pixels."""
    return shapely.box(t.c + 10 * left, t.f - 10 * bottom, t.c + 10 * right, t.f - 10 * top)


def write_labels(path, shapes, values, column="kind", crs=CRS, **more):
    """GeoJSON in a projected CRS; `more` are further columns."""
    features = [
        {"type": "Feature", "geometry": json.loads(shapely.to_geojson(s)),
         "properties": {column: v, **{k: c[i] for k, c in more.items()}}}
        for i, (s, v) in enumerate(zip(shapes, values, strict=True))
    ]  # fmt: skip
    named = {"type": "name", "properties": {"name": crs}}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, "crs": named}))
    return path


def build(folder):
    """Model, images of two months, and polygons of two thirds of the cells."""
    checkpoints.write(weights_of(), folder / "model")
    kinds = classes()
    write_raster(folder / "a.tif", images(kinds, 1))
    write_raster(folder / "b.tif", images(kinds, 2))
    (folder / "imagery.csv").write_text("path,date\na.tif,2023-05-10\nb.tif,2023-07-10\n")
    shapes, values = [], []
    rng = np.random.default_rng(5)
    for row, col in np.argwhere(rng.random((SIDE // CELL, SIDE // CELL)) < 0.6):
        shapes.append(box(col * CELL, row * CELL, (col + 1) * CELL, (row + 1) * CELL))
        values.append(NAMES[cells()[row, col]])
    write_labels(folder / "fields.geojson", shapes, values)
    points = [shapely.Point(s.centroid.x + 1, s.centroid.y - 1) for s in shapes]
    heights = [float(LEVELS[NAMES.index(v)]) / 100 for v in values]
    write_labels(folder / "plots.geojson", points, values, height=heights)
    return folder
