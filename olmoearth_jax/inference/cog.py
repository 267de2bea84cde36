"""Maps of embeddings as Cloud Optimized GeoTIFF on the token grid, with a STAC item beside them.

A map is written tile by tile as float32 into a scratch file, copied into the final form and only
then put in place under its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data import raster_file
from olmoearth_jax.inference.quantize import NO_VALUE, QUANTIZATIONS, Quantizer
from olmoearth_jax.modalities import closest

NODATA = {"int8": NO_VALUE, "float32": float("nan")}
_BLOCK_BYTES = 8 << 20


def raster_library() -> Any:
    """The rasterio package with the parts that writing needs; ValueError if it is missing."""
    found = raster_file.library()
    import rasterio.shutil  # noqa: F401

    return found


def _block(bands: int, dtype: str) -> int:
    """Side of the file's blocks: all bands of one are decoded together."""
    side = 512
    while side > 128 and side * side * bands * np.dtype(dtype).itemsize > _BLOCK_BYTES:
        side //= 2
    return side


class MapWriter:
    """A map under construction; use `open_map`."""

    def __init__(self, file: Any):
        self._file = file
        self.lo = np.full(file.count, np.inf)
        self.hi = np.full(file.count, -np.inf)

    def write(self, row: int, col: int, values: np.ndarray, valid: np.ndarray) -> None:
        """Puts embeddings float [h, w, D] at a place of the grid; `valid` bool [h, w]."""
        height, width = valid.shape
        self.lo = np.minimum(self.lo, values[valid].min(0, initial=np.inf))
        self.hi = np.maximum(self.hi, values[valid].max(0, initial=-np.inf))
        out = np.where(valid[..., None], values, np.nan).astype(np.float32)
        window = raster_library().windows.Window(col, row, width, height)
        self._file.write(np.moveaxis(out, -1, 0), window=window)


@contextlib.contextmanager
def open_map(
    path: str | Path,
    form: Mapping[str, Any],
    names: Sequence[str],
    tags: Mapping[str, str],
    dates: Sequence[str] = (),
    quantization: str = "linear",
) -> Iterator[MapWriter]:
    """Opens a map for writing; it and its STAC item appear when the block ends without error.

    Args:
      path: the .tif file; the item gets the same name with .json.
      form: height and width of the token grid, its crs and transform as rasterio has them, and
        the dtype, 'int8' or 'float32'.
      names: one per band.
      tags: written into the file and the item.
      dates: ISO dates of the images.
      quantization: rule of int8, see `Quantizer`.

    Raises:
      ValueError: rasterio is missing, or another dtype or rule.
    """
    for value, known in ((form["dtype"], NODATA), (quantization, QUANTIZATIONS)):
        if value not in known:
            raise ValueError(f"{value!r} is not known for a map; {closest(str(value), known)}")
    rasterio, path = raster_library(), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {
        **form, "driver": "GTiff", "count": len(names), "dtype": "float32", "nodata": np.nan,
        "tiled": True, "blockxsize": 128, "blockysize": 128, "interleave": "pixel",
        "bigtiff": "IF_SAFER",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=".map-", dir=path.parent) as scratch:
        raw, done, item = (Path(scratch) / n for n in ("raw.tif", "done.tif", "item.json"))
        with rasterio.open(raw, "w", **plain) as file:
            writer = MapWriter(file)
            yield writer
        rule = None
        if form["dtype"] == "int8":
            rule = Quantizer(writer.lo, writer.hi, quantization)
            tags = {**tags, "QUANTIZATION": rule.rule}
            raw = _quantized(raw, plain, rule)
        with rasterio.open(raw, "r+") as file:
            file.descriptions = tuple(names)
            file.update_tags(**tags)
        rasterio.shutil.copy(
            raw, done, driver="COG", compress="deflate", predictor="YES",
            blocksize=_block(len(names), form["dtype"]), overview_resampling="nearest",
            bigtiff="IF_SAFER",
        )  # fmt: skip
        item.write_text(json.dumps(stac_item(path.name, form, names, tags, dates, rule), indent=1))
        os.replace(done, path)
        os.replace(item, path.with_suffix(".json"))


def _quantized(raw: Path, plain: Mapping[str, Any], rule: Quantizer) -> Path:
    """An int8 file beside the float32 one."""
    rasterio, out = raster_library(), raw.with_name("int8.tif")
    form = {**plain, "dtype": "int8", "nodata": NODATA["int8"]}
    with rasterio.open(raw) as source, rasterio.open(out, "w", **form) as file:
        for _, window in source.block_windows(1):
            x = np.moveaxis(source.read(window=window), 0, -1)
            file.write(np.moveaxis(rule(x), -1, 0), window=window)
        if rule.kind == "linear":
            file.scales, file.offsets = tuple(rule.scale), tuple(rule.offset)
    return out


def _footprint(
    west: float, south: float, east: float, north: float
) -> tuple[list[float], dict[str, Any]]:
    """(bbox, geometry) as GeoJSON has them; across 180 degrees west > east, and two polygons."""
    if not -180 <= west <= 180:
        west = (west + 180) % 360 - 180
    if not -180 <= east <= 180:
        east = (east + 180) % 360 - 180
    parts = [(west, 180.0), (-180.0, east)] if west > east else [(west, east)]
    rings = [[[[a, south], [b, south], [b, north], [a, north], [a, south]]] for a, b in parts]
    kind, places = ("MultiPolygon", rings) if len(rings) > 1 else ("Polygon", rings[0])
    return [west, south, east, north], {"type": kind, "coordinates": places}


def _place(
    crs: Any, transform: Any, height: int, width: int
) -> tuple[list[float] | None, dict[str, Any] | None]:
    """`_footprint` of a grid; None twice where its CRS has no place on the earth."""
    rasterio = raster_library()
    corners = rasterio.transform.array_bounds(height, width, transform)
    try:
        box = rasterio.warp.transform_bounds(crs, "EPSG:4326", *corners)
    except Exception:  # GDAL's own errors have no public class
        return None, None
    return _footprint(*box) if np.isfinite(box).all() else (None, None)


def stac_item(
    name: str,
    form: Mapping[str, Any],
    names: Sequence[str],
    tags: Mapping[str, str],
    dates: Sequence[str],
    rule: Quantizer | None = None,
) -> dict[str, Any]:
    """STAC item of a map; see `open_map`."""
    height, width, transform = form["height"], form["width"], form["transform"]
    box, geometry = _place(form["crs"], transform, height, width)
    times = sorted(f"{date}T00:00:00Z" for date in dates)
    when: dict[str, Any] = {"datetime": times[0] if times else None}
    if len(times) > 1:
        when = {"datetime": None, "start_datetime": times[0], "end_datetime": times[-1]}
    epsg = form["crs"].to_epsg()
    place = {"proj:code": f"EPSG:{epsg}"} if epsg else {"proj:wkt2": form["crs"].to_wkt()}
    asset: dict[str, Any] = {
        "href": f"./{name}",
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "roles": ["data"],
        "data_type": form["dtype"],
        "nodata": "nan" if form["dtype"] == "float32" else NODATA["int8"],
        "raster:spatial_resolution": abs(transform.a),
        "bands": [{"name": band} for band in names],
    }
    if rule is not None and rule.kind == "linear":
        for band, scale, offset in zip(asset["bands"], rule.scale, rule.offset, strict=True):
            band |= {"raster:scale": float(scale), "raster:offset": float(offset)}
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": [
            "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
            "https://stac-extensions.github.io/raster/v2.0.0/schema.json",
        ],
        "id": Path(name).stem,
        "geometry": geometry,
        **({} if box is None else {"bbox": box}),
        "properties": {
            **when, **place, "proj:shape": [height, width], "proj:transform": list(transform)[:6],
            **{f"olmoearth:{key.lower()}": value for key, value in tags.items()},
        },
        "links": [],
        "assets": {"embeddings": asset},
    }  # fmt: skip
