"""The files of a map: Cloud Optimized GeoTIFFs of classes and values, areas, and a STAC item."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.crs import ground_pixel_size
from olmoearth_jax.files import write_atomically
from olmoearth_jax.maps import cogs
from olmoearth_jax.maps.labels import Class, nodata_of
from olmoearth_jax.maps.samples import Target

PROBABILITIES = ("uint8", "float32", "none")
STEPS = 254
"""A probability of 1 as uint8."""
_NEARLY = 0.01
"""Share by which areas on the map may miss those on the ground; in UTM it is 0.002 at most."""
_CLASSIFICATION = "https://stac-extensions.github.io/classification/v2.0.0/schema.json"


@dataclasses.dataclass(frozen=True)
class Band:
    """One file of a map.

    Attributes:
      name: of the file, without its end.
      dtype, nodata: of its values.
      bands: names.
      overviews: how GDAL thins it out.
      scale: values are numbers times this.
      unit: of values.
    """

    name: str
    dtype: str
    nodata: float
    bands: tuple[str, ...]
    overviews: str
    scale: float = 1.0
    unit: str = ""


def bands_of(target: Target, probabilities: str) -> list[Band]:
    """The files that a map of a target has."""
    if target.classes is None:
        return [Band("values", "float32", np.nan, ("value",), "average", unit=target.unit)]
    nodata = nodata_of(target.classes)
    kind = "uint8" if nodata == 255 else "uint16"
    out = [Band("classes", kind, nodata, ("class",), "mode")]
    names = tuple(c.name for c in target.classes)
    if probabilities == "uint8":
        out.append(Band("probabilities", "uint8", 255, names, "average", 1 / STEPS))
    elif probabilities == "float32":
        out.append(Band("probabilities", "float32", np.nan, names, "average"))
    return out


def layers_of(
    target: Target, bands: Sequence[Band], mean: np.ndarray, valid: np.ndarray
) -> dict[str, np.ndarray]:
    """The arrays [bands, H, W] of each file of a part of a map.

    Args:
      mean: blended probabilities or values, float32 [H, W, K].
      valid: bool [H, W].
    """
    out = {}
    for band in bands:
        if band.name == "classes":
            values = np.array([c.value for c in target.classes or ()])[mean.argmax(-1)][None]
        elif band.dtype == "uint8":
            values = np.rint(np.moveaxis(mean, -1, 0) * STEPS)
        else:
            values = np.moveaxis(mean, -1, 0)
        out[band.name] = np.where(valid, values, band.nodata).astype(band.dtype)
    return out


def writing(path: Path, form: Mapping[str, Any], band: Band, tags: Mapping[str, str],
            classes: Sequence[Class] | None = None) -> Any:  # fmt: skip
    """A writer of a file, see `cogs.writing`.

    Args:
      path: the .tif file.
      form: height, width, crs and transform as rasterio has them.
      classes: for the colour table and the names, of a file of classes.
    """
    named = classes if band.name == "classes" and classes else ()
    return cogs.writing(
        path, crs=form["crs"], transform=form["transform"], shape=(form["height"], form["width"]),
        dtype=band.dtype, names=band.bands, nodata=band.nodata, overviews=band.overviews,
        tags={**tags, **{f"CLASS_{c.value}": c.name for c in named}}, unit=band.unit,
        colors={c.value: _rgb(c.color) for c in named} or None,
        rule=(band.scale, 0.0) if band.scale != 1 else None,
    )  # fmt: skip


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def pixel_area(stack: Any, rows: slice, cols: slice) -> float:
    """Square metres of a pixel in the middle of a part of a grid.

    Those of the map, unless they lie: pixels of Web Mercator are too large, and degrees no metres.
    """
    t: Any = stack.transform
    on_map = 0.0
    if stack.crs.is_projected:
        on_map = abs(t.a * t.e) * stack.crs.linear_units_factor[1] ** 2
    place = type(t)(t.a, 0.0, t.c + t.a * cols.start, 0.0, t.e, t.f + t.e * rows.start)
    size = rows.stop - rows.start, cols.stop - cols.start
    across, down = ground_pixel_size(stack.crs, place, *size)
    on_ground = across * down
    return on_map if abs(on_map - on_ground) <= _NEARLY * on_ground else on_ground


def areas(
    path: Path, target: Target, pixels: Mapping[int, int], square_metres: Mapping[int, float]
) -> None:
    """A table of the area of each class.

    Args:
      pixels, square_metres: of each class value; others do not count.
    """
    known = target.classes or ()
    total, text = sum(square_metres.get(c.value, 0.0) for c in known), io.StringIO()
    text.write(
        "# Pixel counts are biased estimates of area: correct them with the confusion matrix of "
        "the run (confusion.csv)\n"
    )
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["value", "class", "pixels", "hectares", "share"])
    for c in known:
        area = square_metres.get(c.value, 0.0)
        rows.writerow([c.value, c.name, pixels.get(c.value, 0), f"{area / 1e4:.4f}",
                       f"{area / total:.6f}" if total else ""])  # fmt: skip
    write_atomically(path, text.getvalue())


def confusion_table(path: Path, report: Mapping[str, Any]) -> None:
    """The confusion matrix of a run as a table; rows are truth."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["truth \\ predicted", *report["classes"]])
    confusion = report["splits"][report["scored_split"]]["confusion"]
    for name, counts in zip(report["classes"], confusion, strict=True):
        rows.writerow([name, *counts])
    write_atomically(path, text.getvalue())


def item(
    path: Path, form: Mapping[str, Any], bands: Iterable[Band], target: Target,
    tags: Mapping[str, str], dates: Sequence[str], period: Mapping[str, str],
) -> None:  # fmt: skip
    """The STAC item beside the files of a map."""
    out: Any = None
    for band in bands:
        name = f"{band.name}.tif"
        made = cogs.stac_item(name, {**form, "dtype": band.dtype}, band.bands, tags, dates)
        asset = made["assets"]["embeddings"]
        asset["nodata"] = "nan" if np.isnan(band.nodata) else band.nodata
        if band.scale != 1:
            for entry in asset["bands"]:
                entry["raster:scale"] = band.scale
        if band.unit:
            for entry in asset["bands"]:
                entry["unit"] = band.unit
        if band.name == "classes":
            asset["classification:classes"] = [
                {"value": c.value, "name": re.sub(r"[^\w-]", "_", c.name, flags=re.ASCII),
                 "title": c.name, "color_hint": c.color[1:].upper()}
                for c in target.classes or ()
            ]  # fmt: skip
        out = out or {**made, "id": path.stem, "assets": {}}
        out["assets"][band.name] = asset
    out["properties"] |= period
    if "classes" in out["assets"]:
        out["stac_extensions"].append(_CLASSIFICATION)
    write_atomically(path, json.dumps(out, indent=1) + "\n")
