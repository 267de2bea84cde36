"""Maps written block by block as Cloud Optimized GeoTIFF, which appear whole or not at all.

Beside a map there may be a STAC item of the same name.
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

from olmoearth_jax.data.crs import library
from olmoearth_jax.files import write_atomically
from olmoearth_jax.inference.quantize import NO_VALUE, QUANTIZATIONS, Quantizer
from olmoearth_jax.modalities import closest

STAC_VERSION = "1.1.0"
SCRATCH = ".map-"
"""How the names of folders begin in which maps are put together."""
PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
"""The extension that all our items have."""
_BLOCK_BYTES = 8 << 20


@contextlib.contextmanager
def writing(
    path: Path,
    *,
    crs: Any,
    transform: Sequence[float],
    shape: tuple[int, int],
    dtype: str,
    names: Sequence[str],
    nodata: float | None = None,
    tags: Mapping[str, str] | None = None,
    rule: tuple[Any, Any] | None = None,
    unit: str = "",
    colors: Mapping[int, tuple[int, int, int]] | None = None,
    overviews: str = "nearest",
    alpha: bool = False,
    corner: tuple[int, int] = (0, 0),
) -> Iterator[Any]:
    """A writer with `put(row, col, x [C, h, w])`; the file appears when the block ends well.

    Args:
      path: of the file.
      crs, transform, shape: of the grid; transform is a..f.
      dtype, unit: of the values.
      names: one per band.
      nodata: where nothing is put, too.
      tags: of the file.
      rule: (scale, offset) of all bands, or of each.
      colors: colour by value, of one band of bytes.
      overviews: how they are made; 'nearest' or 'average' or 'mode'.
      alpha: the last band says what is opaque.
      corner: row and column that `put` counts the file's first pixel as.

    Raises:
      ValueError: rasterio is missing.
    """
    rasterio = library()
    from rasterio.enums import ColorInterp
    from rasterio.shutil import copy

    path.parent.mkdir(parents=True, exist_ok=True)
    side = _block_side(len(names) * np.dtype(dtype).itemsize)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=path.parent) as scratch:
        raw, done = Path(scratch) / "raw.tif", Path(scratch) / "done.tif"
        with _plain_file(raw, crs, transform, shape, len(names), dtype, nodata) as file:
            if colors is not None:
                file.write_colormap(1, {k: (*v, 255) for k, v in colors.items()})
            elif alpha:
                file.colorinterp = [ColorInterp[k] for k in ("red", "green", "blue", "alpha")]
            yield _Blocks(file, corner)
        with rasterio.open(raw, "r+") as file:
            file.descriptions = tuple(names)
            file.units = (unit,) * file.count if unit else file.units
            file.update_tags(**(tags or {}))
            if rule is not None:
                file.scales, file.offsets = (np.broadcast_to(x, file.count) for x in rule)
        copy(
            raw, done, driver="COG", compress="deflate", blocksize=side, bigtiff="IF_SAFER",
            overview_resampling=overviews, predictor="NO" if colors else "YES",
        )  # fmt: skip
        os.replace(done, path)


def _plain_file(
    path: Path, crs: Any, transform: Sequence[float], shape: Sequence[int], bands: int, dtype: str,
    nodata: float | None,
) -> Any:  # fmt: skip
    """An empty file that can be written to in any order, open."""
    rasterio = library()
    return rasterio.open(
        path, "w", driver="GTiff", crs=crs, transform=rasterio.Affine(*list(transform)[:6]),
        height=shape[0], width=shape[1], count=bands, dtype=dtype, nodata=nodata, tiled=True,
        blockxsize=128, blockysize=128, interleave="pixel", bigtiff="IF_SAFER", sparse_ok=True,
    )  # fmt: skip


def _block_side(bytes_per_pixel: int) -> int:
    side = 512
    while side > 128 and side * side * bytes_per_pixel > _BLOCK_BYTES:
        side //= 2
    return side


class _Blocks:
    def __init__(self, file: Any, corner: tuple[int, int] = (0, 0)):
        self._file, self._corner = file, corner

    def put(self, row: int, col: int, x: np.ndarray) -> None:
        """Writes values [C, h, w] at a place."""
        top, left = self._corner
        window = library().windows.Window(col - left, row - top, x.shape[2], x.shape[1])
        self._file.write(x, window=window)


def named(path: Path, zones: Sequence[int]) -> dict[int, Path]:
    """Zone -> file; its number is added where there are several."""
    if len(zones) == 1:
        return {zones[0]: path}
    return {z: path.with_name(f"{path.stem}_utm{z:02d}{path.suffix}") for z in zones}


class MapWriter:
    """A map of embeddings under construction; use `open_map`."""

    def __init__(self, blocks: Any, bands: int):
        self._blocks = blocks
        self.lo, self.hi = np.full(bands, np.inf), np.full(bands, -np.inf)

    def write(self, row: int, col: int, values: np.ndarray, valid: np.ndarray) -> None:
        """Puts embeddings float [h, w, D] at a place of the grid; `valid` bool [h, w]."""
        self.lo = np.minimum(self.lo, values[valid].min(0, initial=np.inf))
        self.hi = np.maximum(self.hi, values[valid].max(0, initial=-np.inf))
        out = np.where(valid[..., None], values, np.nan).astype(np.float32)
        self._blocks.put(row, col, np.moveaxis(out, -1, 0))


@contextlib.contextmanager
def open_map(
    path: str | Path,
    form: Mapping[str, Any],
    names: Sequence[str],
    tags: Mapping[str, str],
    dates: Sequence[str] = (),
    quantization: str = "linear",
) -> Iterator[MapWriter]:
    """Opens a map of embeddings; it and its STAC item appear when the block ends without error.

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
    for value, known in ((form["dtype"], ("int8", "float32")), (quantization, QUANTIZATIONS)):
        if value not in known:
            raise ValueError(f"{value!r} is not known for a map; {closest(str(value), known)}")
    path, rule = Path(path), None
    grid = {k: form[k] for k in ("crs", "transform")} | {"shape": (form["height"], form["width"])}
    plain: Any = {**grid, "names": names, "dtype": "float32", "nodata": np.nan, "tags": tags}
    if form["dtype"] == "float32":
        with writing(path, **plain) as blocks:
            yield MapWriter(blocks, len(names))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=path.parent) as scratch:
            raw = Path(scratch) / "float.tif"
            with _plain_file(raw, **grid, bands=len(names), dtype="float32", nodata=np.nan) as file:
                writer = MapWriter(_Blocks(file), len(names))
                yield writer
            rule = Quantizer(writer.lo, writer.hi, quantization)
            tags = {**tags, "QUANTIZATION": rule.rule}
            stored = (rule.scale, rule.offset) if rule.kind == "linear" else None
            form8 = {**plain, "dtype": "int8", "nodata": NO_VALUE, "tags": tags, "rule": stored}
            with writing(path, **form8) as blocks, library().open(raw) as source:
                for _, window in source.block_windows(1):
                    x = rule(np.moveaxis(source.read(window=window), 0, -1))
                    blocks.put(window.row_off, window.col_off, np.moveaxis(x, -1, 0))
    item = stac_item(path.name, form, names, tags, dates, rule)
    write_atomically(path.with_suffix(".json"), json.dumps(item, indent=1))


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
    rasterio = library()
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
        "nodata": "nan" if form["dtype"] == "float32" else NO_VALUE,
        "raster:spatial_resolution": abs(transform.a),
        "bands": [{"name": band} for band in names],
    }
    if rule is not None and rule.kind == "linear":
        for band, scale, offset in zip(asset["bands"], rule.scale, rule.offset, strict=True):
            band |= {"raster:scale": float(scale), "raster:offset": float(offset)}
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": [
            PROJECTION,
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
