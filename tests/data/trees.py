"""Small GeoTIFF trees for the conversion tests."""

from __future__ import annotations

import csv
import datetime
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import rasterio
import rasterio.errors

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.convert import tree
from olmoearth_jax.data.convert.tree import Cell
from olmoearth_jax.data.draws import rng

START = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
HEADER = ("crs", "col", "row", "tile_time", "image_idx", "start_time", "end_time")


def month(number: int, shift: int = 0) -> str:
    return (START + datetime.timedelta(days=30 * number + shift)).isoformat()


def write_raster(path: Path, values: np.ndarray) -> None:
    """Writes bands [C, H, W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            count=count,
            height=height,
            width=width,
            dtype=values.dtype,
            compress="deflate",
        ) as raster:
            raster.write(values)


def add_modality(
    folder: Path,
    name: str,
    cells: Sequence[Cell],
    starts: Sequence[str],
    side: int = 64,
    seed: int = 0,
) -> dict[Cell, list[np.ndarray]]:
    """Writes rasters and CSV of a modality; the rasters per cell and band set."""
    modality = registry.get(name)
    out: dict[Cell, list[np.ndarray]] = {}
    rows = []
    for cell in cells:
        draw = rng(seed, name, cell.col, cell.row)
        rows += [
            [cell.crs, cell.col, cell.row, START.isoformat(), i, s, s] for i, s in enumerate(starts)
        ]
        out[cell] = []
        for resolution, bands in tree.files_of(modality).items():
            size = side if modality.spatial else 1
            shape = (len(starts) * len(bands), size, size)
            dtype = np.dtype(modality.source_dtype or "float32")
            values = plausible(draw.integers(1, 200, shape), name).astype(dtype)
            write_raster(tree.raster_path(folder, modality, cell, resolution), values)
            out[cell].append(values)
    write_rows(folder, name, rows)
    return out


def plausible(numbers: np.ndarray, name: str) -> np.ndarray:
    """Numbers 1..199 as values that a modality can have."""
    if name == "sentinel1":
        return numbers / 1000  # linear power
    if name == "worldcover":
        return np.array(registry.WORLDCOVER_CODES)[numbers % 11]
    if name == "worldcereal":
        return numbers % 3 * 50  # codes and averages of them
    if name in ("openstreetmap_raster", "wri_canopy_height_map"):
        return numbers % 2
    if name == "era5_10":
        per_band = np.array([280, 270, 90_000, 1, 1, 0.01])
        return numbers / 1000 + np.resize(per_band, len(numbers))[:, None, None]
    return numbers * 10 if name in ("sentinel2_l2a", "landsat") else numbers


def write_rows(folder: Path, name: str, rows: Sequence[Sequence]) -> None:
    with (folder / f"{tree.stem(registry.get(name))}.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(HEADER)
        table.writerows(rows)


def make_tree(folder: Path, tiles: int = 3, steps: int = 12) -> Mapping[str, dict]:
    """Sentinel-1 with `steps` months, land cover and elevation of neighbouring tiles."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = [Cell("EPSG:32633", 100 + i, -2000) for i in range(tiles)]
    return {
        "sentinel1": add_modality(folder, "sentinel1", cells, [month(i) for i in range(steps)]),
        "worldcover": add_modality(folder, "worldcover", cells, [month(0)]),
        "srtm": add_modality(folder, "srtm", cells[:1], [month(0)], side=32),
    }
